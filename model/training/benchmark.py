"""Where a training step's time goes, and how far that is from what the machine can do.

Every figure is a median of several rounds on this machine in this process.
Shape legend: B images a step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.data.dataset import Batch, DetectionDataset, collate
from model.data.loader import training_loader
from model.data.sampler import StepSampler, plan_batch
from model.detection.loss import LossConfig, detection_loss
from model.detection.matching import Targets
from model.detection.postprocess import postprocess
from model.network.detector import Detector
from model.network.footprint import network_cost
from model.network.scaling import NetworkSpec
from model.training import state
from model.training.config import Recipe
from model.training.fit import peak_memory_bytes
from model.training.step import Schedule, Trainee, use_bf16

GIGA = 1e9


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached: the largest matrix product, the largest copy (read and write)."""

    tflop_per_s: float
    gb_per_s: float


@dataclass(frozen=True)
class Report:
    """seconds: medians by part of a step, in order; step_s: of whole steps without stopwatch."""

    seconds: dict[str, float]
    step_s: float
    batch_size: int
    first_step_s: float
    ceilings: Ceilings
    tflop_per_s: float
    gb_per_s: float
    data_img_per_s: float
    data_wait_share: float
    evaluation_img_per_s: float
    postprocess_share: float
    checkpoint_s: float
    checkpoint_bytes: int
    peak_memory_bytes: int

    @property
    def img_per_s(self) -> float:
        return self.batch_size / self.step_s


@dataclass
class Stopwatch:
    """Seconds between marks, by name; waits for the device at each."""

    device: torch.device
    times: dict[str, list[float]] = field(default_factory=dict)
    _last: float = 0.0

    def start(self) -> None:
        synchronise(self.device)
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.times.setdefault(name, []).append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.times.items()}


def measure(recipe: Recipe, train: DetectionDataset, device: torch.device, rounds: int) -> Report:
    """Time every part of training `recipe` on `train` with one worker and one group a step."""
    batch_size = recipe.train.batch_size
    plan = plan_batch(batch_size, batch_size, 1)
    torch.manual_seed(recipe.train.seed)
    detector = Detector(recipe.network, recompute=recipe.checkpoint_activations)
    trainee = Trainee(detector, recipe, plan, 0, device)
    schedule = Schedule.of(recipe, len(train))
    batch = collate([train[(0, image % len(train))] for image in range(batch_size)])

    began = time.perf_counter()
    trainee.step(0, schedule, [batch.to(device)])
    synchronise(device)
    first_step_s = time.perf_counter() - began
    for number in range(1, 3):
        trainee.step(number, schedule, [batch.to(device)])

    watch = Stopwatch(device)
    for number in range(3, 3 + rounds):
        watch.start()
        on_device = batch.to(device)
        watch.mark("to device")
        trainee.step(number, schedule, [on_device], watch.mark)
    step_s = repeat(lambda: trainee.step(3, schedule, [batch.to(device)]), rounds, device)

    peak_bytes = peak_memory_bytes(device)  # before other parts take more

    evaluation_img_per_s, postprocess_share = _evaluation(trainee, recipe, train, device, rounds)
    checkpoint_s, checkpoint_bytes = _checkpoint(trainee, train, rounds)
    data_img_per_s = _decoding(train, rounds)
    wait_share = _waiting(trainee, recipe, train, schedule, device, rounds)
    half = use_bf16(recipe, device)
    flops = 3 * 2 * network_cost(recipe.network).total.macs * batch_size
    return Report(
        seconds=watch.medians(),
        step_s=step_s,
        batch_size=batch_size,
        first_step_s=first_step_s,
        ceilings=ceilings(device, torch.bfloat16 if half else torch.float32),
        tflop_per_s=flops / step_s / 1e12,
        gb_per_s=step_traffic(recipe.network, half_precision=half) * batch_size / step_s / GIGA,
        data_img_per_s=data_img_per_s,
        data_wait_share=wait_share,
        evaluation_img_per_s=evaluation_img_per_s,
        postprocess_share=postprocess_share,
        checkpoint_s=checkpoint_s,
        checkpoint_bytes=checkpoint_bytes,
        peak_memory_bytes=peak_bytes,
    )


def repeat(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """Median seconds of `work()`."""
    watch = Stopwatch(device)
    for _ in range(rounds):
        watch.start()
        work()
        watch.mark("work")
    return watch.medians()["work"]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> Ceilings:
    """Measured, not taken from a data sheet."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    product = torch.empty_like(a)
    matmul_s = repeat(lambda: torch.mm(a, a, out=product), rounds, device)
    source = torch.empty(
        2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    copy_s = repeat(lambda: target.copy_(source), rounds, device)
    return Ceilings(2 * side**3 / matmul_s / 1e12, 2 * source.numel() / copy_s / GIGA)


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each on its own: what an unfused step has to move."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(map(_size, _tensors(args))) + sum(map(_size, _tensors(out)))
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def step_traffic(spec: NetworkSpec, *, half_precision: bool) -> int:
    """Bytes moved for one image by forward, loss and backward, traced on the meta device."""
    with torch.device("meta"):
        detector = Detector(spec).train()
        images = torch.empty(2, 3, spec.image_size_px, spec.image_size_px)
        with _Traffic() as traffic:
            class_logits, box_codes = detector(images)
            labels = torch.empty(class_logits.shape[:2], dtype=torch.int64)
            targets = Targets(labels, torch.empty_like(box_codes))
            loss = detection_loss(class_logits, box_codes, targets, torch.empty(()), LossConfig())
            loss.total.backward()
    return int(traffic.bytes) // (4 if half_precision else 2)


def _evaluation(
    trainee: Trainee, recipe: Recipe, data: DetectionDataset, device: torch.device, rounds: int
) -> tuple[float, float]:
    """Images a second through the averaged network and NMS, and NMS's share of it."""
    plain = data.evaluation()
    number = min(recipe.evaluation_batch, len(data))
    batch = collate([plain[(0, image)] for image in range(number)]).to(device)
    watch = Stopwatch(device)
    with torch.no_grad():
        for _ in range(rounds):
            watch.start()
            with torch.autocast(device.type, torch.bfloat16, enabled=trainee.autocast):
                images = batch.images.contiguous(memory_format=trainee.layout)
                class_logits, box_codes = trainee.ema.module(images)
            watch.mark("network")
            postprocess(class_logits, box_codes, trainee.anchors, batch.sizes_hw, recipe.evaluation)
            watch.mark("postprocess")
    found = watch.medians()
    total = found["network"] + found["postprocess"]
    return number / total, found["postprocess"] / total


def _checkpoint(trainee: Trainee, data: DetectionDataset, rounds: int) -> tuple[float, int]:
    """Seconds to write a checkpoint to a temporary folder, and its bytes."""
    times, size = [], 0
    for _ in range(min(rounds, 3)):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            began = time.perf_counter()
            momentum = state.momentum_by_name(trainee.detector, trainee.optimizer)
            state.write_checkpoint(
                folder,
                model=trainee.detector.state_dict(),
                ema=trainee.ema.module.state_dict(),
                progress=state.Progress(0, momentum, torch.zeros(1)),
                config={},
                classes=data.index.classes,
                metrics={},
            )
            times.append(time.perf_counter() - began)
            size = sum(file.stat().st_size for file in folder.iterdir())
    return statistics.median(times), size


def _decoding(data: DetectionDataset, rounds: int) -> float:
    """Training samples a second that one core reads, decodes and augments."""
    with one_thread():
        times = []
        for image in range(max(8, rounds)):
            began = time.perf_counter()
            data[(1, image % len(data))]
            times.append(time.perf_counter() - began)
    return 1.0 / statistics.median(times)


def _waiting(
    trainee: Trainee,
    recipe: Recipe,
    data: DetectionDataset,
    schedule: Schedule,
    device: torch.device,
    rounds: int,
) -> float:
    """Share of the loop spent waiting for the loader, as `fit` would see it."""
    sampler = StepSampler(
        plan=trainee.plan, rank=0, num_images=len(data), seed=0, start=0, stop=rounds + 2
    )
    loader = training_loader(data, sampler, workers=recipe.loader_workers, device=device)
    batches = iter(cast("Iterator[Batch]", loader))
    waited = total = 0.0
    for number in range(rounds + 2):
        synchronise(device)
        began = time.perf_counter()
        batch = next(batches).to(device)
        got = time.perf_counter()
        trainee.step(number, schedule, [batch])
        synchronise(device)
        if number >= 2:  # workers have started and filled their queue
            waited += got - began
            total += time.perf_counter() - began
    return waited / total


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def num_batch_norm_exchanges(detector: Detector) -> int:
    """Rounds of statistics in a forward pass of shared batch norms: a head's levels go together."""
    layers = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in detector.modules())
    spare = sum(len(head.norms) for head in (detector.class_head, detector.box_head))
    return layers - spare * (detector.spec.num_levels - 1)
