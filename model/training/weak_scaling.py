"""What N workers would reach, from what one does and what the link between them does.

A step of N workers takes the compute of one, and of its communication what the backward pass does
not hide. Gradients go in buckets while the backward pass still runs; small collectives (positives,
batch-norm statistics, running statistics) are waited for, so their latency adds up.

Shape legend: N workers, s workers that share a batch-norm group, L batch-norm layers.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from model.data.dataset import Batch
from model.data.sampler import plan_batch
from model.network.detector import Detector
from model.training.benchmark import num_batch_norm_exchanges
from model.training.config import Recipe
from model.training.step import Schedule, Trainee

BUCKET_BYTES = 25 * 2**20
SMALL, LARGE = 1024, 2**24
MAX_WORKERS_HERE = 2


@dataclass(frozen=True)
class Link:
    """All-reduce between two workers: seconds for almost nothing, bytes a second for much."""

    latency_s: float
    bytes_per_s: float

    def all_reduce_s(self, num_bytes: int, workers: int) -> float:
        """Ring: 2 (N - 1) hops of 1/N of the bytes. For 2 workers what was measured."""
        if workers == 1:
            return 0.0
        hops = 2 * (workers - 1)
        return self.latency_s * hops / 2 + num_bytes / self.bytes_per_s * hops / workers


@dataclass(frozen=True)
class Traffic:
    """What one step exchanges. small: collectives that everybody waits for, by name."""

    gradient_bytes: int
    small: dict[str, int]

    @classmethod
    def of(cls, recipe: Recipe, detector: Detector, *, team: int, num_groups: int) -> Traffic:
        small = {"positives": 1}
        if team > 1:
            small["batch norm"] = 2 * num_batch_norm_exchanges(detector)
        if num_groups > 1:
            small["running statistics"] = 1
        return cls(4 * sum(p.numel() for p in detector.parameters()), small)


@dataclass(frozen=True)
class Prediction:
    """terms: seconds that communication adds to a step, by cause."""

    workers: int
    step_s: float
    img_per_s: float
    efficiency: float
    terms: dict[str, float]

    @property
    def dominant(self) -> str:
        name = max(self.terms, key=lambda key: self.terms[key])
        return name if self.terms[name] > 0.01 * self.step_s else "compute"


def predict(
    *,
    workers: int,
    images_per_worker: int,
    compute_s: float,
    backward_s: float,
    traffic: Traffic,
    link: Link,
    team: int = 1,
) -> Prediction:
    """compute_s: step of one worker with `images_per_worker`; backward_s: the part that hides.

    The last bucket cannot hide: nothing is left to compute when it is ready.
    """
    buckets = max(1, -(-traffic.gradient_bytes // BUCKET_BYTES))
    last_bytes = min(traffic.gradient_bytes, BUCKET_BYTES)
    last = link.all_reduce_s(last_bytes, workers)
    earlier = link.all_reduce_s(traffic.gradient_bytes - last_bytes, workers) + (
        buckets - 1
    ) * link.all_reduce_s(0, workers)
    terms = {"gradients": last + max(0.0, earlier - backward_s)}
    for name, count in traffic.small.items():
        sharing = team if name == "batch norm" else workers
        terms[name] = count * link.all_reduce_s(SMALL, sharing)
    if workers == 1:
        terms = dict.fromkeys(terms, 0.0)
    step_s = compute_s + sum(terms.values())
    rate = workers * images_per_worker / step_s
    return Prediction(workers, step_s, rate, compute_s / step_s, terms)


@dataclass(frozen=True)
class Measured:
    """Two workers on this machine, side by side: without and with communication."""

    alone_s: float
    together_s: float
    link: Link


def measure_two_workers(recipe: Recipe, batch: Batch, rounds: int) -> Measured:
    """Medians of two gloo workers, each with `batch` and half of the cores.

    First each on its own but at the same time, because two processes share caches and memory
    bandwidth too; then as one group of the given recipe.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_worker, args=(recipe, batch, rounds, folder), nprocs=MAX_WORKERS_HERE)
        found = torch.load(Path(folder) / "0.pt", weights_only=True)
    return Measured(found["alone"], found["together"], Link(found["latency"], found["bandwidth"]))


def _worker(rank: int, recipe: Recipe, batch: Batch, rounds: int, folder: str) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // MAX_WORKERS_HERE))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=MAX_WORKERS_HERE
    )
    device = torch.device("cpu")
    images = len(batch)
    single = replace(recipe, train=replace(recipe.train, batch_size=images), bn_group=images)
    whole = replace(recipe, train=replace(recipe.train, batch_size=images * MAX_WORKERS_HERE))
    alone = Trainee(Detector(recipe.network), single, plan_batch(images, images, 1), 0, device)
    plan = plan_batch(whole.train.batch_size, whole.bn_group, MAX_WORKERS_HERE)
    together = Trainee(Detector(recipe.network), whole, plan, rank, device)
    shards = len(together.shards)
    parts = [batch[slice(i * images // shards, (i + 1) * images // shards)] for i in range(shards)]
    schedule = Schedule.of(recipe, 1000)
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for number in range(rounds + 2):
        for name, trainee, batches in (("alone", alone, [batch]), ("together", together, parts)):
            dist.barrier()
            began = time.perf_counter()
            trainee.step(number, schedule, batches)
            if number >= 2:
                times[name].append(time.perf_counter() - began)
    latency = _all_reduce_s(SMALL, 200)
    large = _all_reduce_s(LARGE, 10)
    if rank == 0:
        found = {name: statistics.median(values) for name, values in times.items()}
        found |= {"latency": latency, "bandwidth": LARGE / max(1e-9, large - latency)}
        torch.save(found, Path(folder) / "0.pt")
    dist.barrier()
    dist.destroy_process_group()


def _all_reduce_s(num_bytes: int, rounds: int) -> float:
    tensor = torch.zeros(num_bytes // 4)
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        dist.all_reduce(tensor)
        times.append(time.perf_counter() - began)
    return statistics.median(times)
