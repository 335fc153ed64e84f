"""The training loop: build, restore, then step, log, evaluate, save and stop, all in sight."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.data.dataset import Batch, DetectionDataset
from model.data.loader import training_loader
from model.data.sampler import StepSampler, plan_batch
from model.errors import CheckpointError, DivergedError
from model.network.detector import Detector
from model.training import state
from model.training.config import Recipe
from model.training.evaluation import Evaluation, evaluate
from model.training.runtime import Runtime
from model.training.step import Schedule, Trainee

LOG_KEYS = ("train/loss", "train/loss_classes", "train/loss_boxes", "train/positives", "train/grad_norm")  # fmt: skip

FUSION = "val_fusion/"
LR_FACTOR_AFTER_DIVERGENCE = 0.5


@dataclass(frozen=True)
class FitResult:
    """How a run ended. metrics: of the last evaluation; stopped: why it ended early, if it did.

    damaged_images: met by all workers since this process began; rolled_back: it had diverged once.
    """

    step: int
    metrics: dict[str, float]
    stopped: str | None
    img_per_s: float
    peak_memory_bytes: int
    started_at_step: int
    damaged_images: int
    rolled_back: bool


@dataclass
class LogMeter:
    """Sums of log rows on the device since the last log; one reduction and one copy an interval."""

    device: torch.device
    world_size: int
    sums: Tensor = field(init=False)
    seconds: float = 0.0
    waited: float = 0.0
    images: int = 0
    times: list[float] = field(default_factory=list)
    damaged_images: int = 0
    saving: float = 0.0

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(LOG_KEYS) + 2, device=self.device)

    def add(self, row: Tensor, *, damaged: int, seconds: float, waited: float, images: int) -> None:
        counts = torch.tensor([float(damaged), 1.0 / self.world_size])
        self.sums += torch.cat([row, counts.to(self.device, non_blocking=True)])
        self.seconds += seconds
        self.waited += waited
        self.images += images
        self.times.append(seconds)

    def reduced(self) -> Tensor:
        """Global sums and, last, the number of steps they cover. Collective."""
        total = self.sums.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def take(self) -> dict[str, float]:
        """Means of the interval; starts a new one. Collective."""
        *sums, damaged, steps = self.reduced().tolist()
        self.damaged_images += round(damaged)
        metrics = {key: value / steps for key, value in zip(LOG_KEYS, sums, strict=True)}
        if damaged:
            metrics["data/damaged_images"] = damaged
        if self.times:
            metrics["perf/img_per_s"] = self.images / self.seconds
            metrics["perf/step_s"] = self.seconds / len(self.times)
            metrics["perf/step_s_p50"] = float(np.percentile(self.times, 50))
            metrics["perf/step_s_p95"] = float(np.percentile(self.times, 95))
            metrics["perf/data_wait_share"] = self.waited / self.seconds
        if self.saving:
            metrics["perf/checkpoint_blocked_s"] = self.saving
        self.forget()
        return metrics

    def forget(self) -> None:
        self.sums.zero_()
        self.seconds, self.waited, self.images, self.times = 0.0, 0.0, 0, []
        self.saving = 0.0


def fit(
    recipe: Recipe,
    train: DetectionDataset,
    val: DetectionDataset,
    runtime: Runtime,
    config: Mapping[str, Any],
    initial: Callable[[Detector], object] | None = None,
) -> FitResult:
    """Train from the newest checkpoint, or from the start, to the end of the schedule.

    config: the resolved configuration, stored with each checkpoint.
    initial: fills the weights of a new run; every rank calls it, none that has a checkpoint.

    Where the loss stops being finite, all ranks go back to the newest checkpoint, once, and on at
    half the learning rate.

    Raises:
        DivergedError: on all ranks, before the update that would have spoilt the weights: without a
            checkpoint to go back to, or for the second time.
    """
    rank, world_size, device = runtime.rank, runtime.world_size, runtime.device
    plan = plan_batch(
        recipe.train.batch_size, recipe.bn_group, world_size, recipe.train.max_images_at_once
    )
    schedule = Schedule.of(recipe, len(train))
    torch.manual_seed(recipe.train.seed)
    with runtime.restore() as folder:
        detector = Detector(
            recipe.network,
            pretrained=recipe.pretrained and folder is None,
            bn_momentum=recipe.train.bn_momentum,
            recompute=recipe.checkpoint_activations,
        )
        if initial is not None and folder is None:
            initial(detector)
        trainee = Trainee(detector, recipe, plan, rank, device)
        meter = LogMeter(device, world_size)
        start, metrics = 0, dict[str, float]()
        if folder is not None:
            start, metrics = _load(folder, trainee, meter, train, rank)

    def loader(first: int) -> Iterator[Batch]:
        sampler = StepSampler(
            plan=plan, rank=rank, num_images=len(train), seed=recipe.train.seed,
            start=first, stop=schedule.total,
        )  # fmt: skip
        made = training_loader(train, sampler, workers=recipe.loader_workers, device=device)
        return iter(cast("Iterator[Batch]", made))

    batches = loader(start)
    stopped: str | None = None
    saved = start
    trained_s = 0.0

    def save(done: int, scored: Mapping[str, float]) -> None:
        runtime.arrive(done - 1, "save")
        began = time.perf_counter()
        log_sums = meter.reduced()
        write = None
        if rank == 0:
            write = _writer(trainee, log_sums, done, config, train, scored)
        runtime.save(done, scored, write)
        meter.saving += time.perf_counter() - began

    def score(done: int) -> dict[str, float]:
        runtime.arrive(done - 1, "evaluate")
        found = _evaluate(trainee, recipe, val, runtime)
        if rank == 0:
            weights = cast("Detector", trainee.ema.module).pyramid.fusion_weights()
            learned = {f"{FUSION}{name}": weight for name, weight in weights.items()}
            runtime.log(done, found.metrics | learned)
            runtime.show(done, found)
        save(done, found.metrics)
        return found.metrics

    step = start
    if start and start % schedule.evaluate_every == 0 and not metrics:
        metrics = score(start)  # saved in a hurry, before it could be evaluated
    while step < schedule.total and stopped is None:
        began = time.perf_counter()
        runtime.arrive(step, "data")
        shards = [next(batches) for _ in trainee.shards]
        waited = time.perf_counter() - began
        damaged = sum(int(shard.damaged.sum()) for shard in shards)
        runtime.arrive(step, "step")
        try:
            row = trainee.step(step, schedule, [shard.to(device) for shard in shards])
        except DivergedError:
            # Raised on all ranks; none has changed its weights.
            if trainee.lr_factor < 1.0:
                raise
            runtime.arrive(step, "save")
            with runtime.restore() as folder:
                if folder is None:
                    raise
                step, metrics = _load(folder, trainee, meter, train, rank)
            trainee.lr_factor *= LR_FACTOR_AFTER_DIVERGENCE
            saved, batches = step, loader(step)
            if rank == 0:
                runtime.log(step, {"train/rolled_back": 1.0})
            continue
        seconds = time.perf_counter() - began
        trained_s += seconds
        step += 1
        meter.add(row, damaged=damaged, seconds=seconds, waited=waited, images=plan.batch_size)
        last = step == schedule.total

        if step % recipe.train.log_every_steps == 0 or last:
            values = meter.take()
            values["train/lr"] = float(trainee.optimizer.param_groups[0]["lr"])
            values["train/epoch"] = step / schedule.steps_per_epoch
            values["perf/memory_gib"] = peak_memory_bytes(device) / 2**30
            if rank == 0:
                runtime.log(step, values)
        decision = runtime.decide()
        stopped = decision.stop

        if stopped is not None and not last:
            break  # saved below, at once: an evaluation may take longer than there is time
        if decision.save:
            save(step, {})
            saved = step
        if step % schedule.evaluate_every == 0 or last:
            metrics = score(step)
            saved = step
        elif step % schedule.checkpoint_every == 0 and saved < step:
            save(step, {})
            saved = step

    if saved < step:  # stopped between two checkpoints
        save(step, {})
    return FitResult(
        step=step,
        metrics=metrics,
        stopped=stopped if step < schedule.total else None,
        img_per_s=(step - start) * plan.batch_size / trained_s if trained_s else 0.0,
        peak_memory_bytes=peak_memory_bytes(device),
        started_at_step=start,
        damaged_images=meter.damaged_images,
        rolled_back=trainee.lr_factor < 1.0,
    )


def _load(
    folder: Path, trainee: Trainee, meter: LogMeter, train: DetectionDataset, rank: int
) -> tuple[int, dict[str, float]]:
    """Put a verified checkpoint into the trainee; the step to go on from and its last metrics."""
    if state.read_classes(folder) != train.index.classes:
        raise CheckpointError(
            f"checkpoint {folder.name}",
            "the classes of the training data",
            "another class list",
            "resume with the same data, or start a new run",
        )
    state.read_weights(folder, trainee.detector)
    state.read_weights(folder, trainee.ema.module, ema=True)
    progress = state.read_progress(folder)
    state.load_momentum(trainee.detector, trainee.optimizer, progress.momentum)
    trainee.lr_factor = progress.lr_factor
    meter.forget()
    if rank == 0:  # sums over all workers: one of them carries on
        meter.sums.copy_(progress.log_sums)
    return progress.step, state.read_metrics(folder)


def _writer(
    trainee: Trainee,
    log_sums: Tensor,
    step: int,
    config: Mapping[str, Any],
    train: DetectionDataset,
    metrics: Mapping[str, float],
) -> Callable[[Path], None]:
    """A snapshot on the host, taken now; the function that writes it may run later, elsewhere."""
    progress = state.Progress(
        step,
        _on_host(state.momentum_by_name(trainee.detector, trainee.optimizer)),
        log_sums.to("cpu", copy=True),
        trainee.lr_factor,
    )
    model, ema = (
        _on_host(module.state_dict()) for module in (trainee.detector, trainee.ema.module)
    )
    scored, classes = dict(metrics), train.index.classes

    def write(folder: Path) -> None:
        state.write_checkpoint(
            folder, model=model, ema=ema, progress=progress, config=config,
            classes=classes, metrics=scored,
        )  # fmt: skip

    return write


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _evaluate(
    trainee: Trainee, recipe: Recipe, val: DetectionDataset, runtime: Runtime
) -> Evaluation:
    return evaluate(
        trainee.ema.module,
        val,
        trainee.anchors,
        recipe.evaluation,
        rank=runtime.rank,
        world_size=runtime.world_size,
        batch_size=recipe.evaluation_batch,
        workers=recipe.loader_workers,
        device=runtime.device,
        autocast=trainee.autocast,
    )


def forget_memory() -> None:
    """Before another training in this process: its peak is its own, what nobody uses is given back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # resets the process's own peak, where the kernel allows it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """The device's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: its maximum survives exec, so a child begins with its parent's.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
