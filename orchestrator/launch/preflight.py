"""Everything that can be known to fail is found here, before a GPU is taken."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.data.folder import missing_images
from model.data.index import ClassMap, CocoIndex
from model.data.lint import check_images
from model.data.sampler import plan_batch
from model.detection.anchors import make_anchors
from model.network.detector import Detector
from model.network.footprint import GIB, activations
from model.network.scaling import ModelConfig, NetworkSpec, resolve
from model.training.analysis import best_anchor_iou
from model.training.initial import load_initial
from orchestrator.config.schema import CheckpointConfig, TrainJob
from orchestrator.errors import ClusterError, ConfigError, DataError, StorageError
from orchestrator.launch.resolve import Derived, ResolvedJob, Split
from orchestrator.storage.filesystems import Place
from orchestrator.storage.weights import open_initial

BASE_BYTES = 1.2 * GIB  # an idle worker: Python, torch, its libraries
COPIES_OF_WEIGHTS = 4  # weights, gradients, momentum, average
COPIES_IN_CHECKPOINT = 3  # weights, average, momentum
OOM_MARGIN = 0.9  # of the images that did not fit; the estimate was wrong, so only a guess is left


@dataclass(frozen=True)
class Hardware:
    """What training will run on. memory_bytes of one device, None where it cannot be seen."""

    gpus_per_worker: float
    cpus_per_worker: float
    device_kind: str
    memory_bytes: int | None


def describe_model(resolved: ResolvedJob, derived: Derived) -> list[tuple[str, str]]:
    """Every derived number, before step 0."""
    spec, job = resolved.recipe.network, resolved.job
    schedule, cost = derived.schedule, derived.cost
    table = ModelConfig(phi=job.model.phi, pretrained=job.model.pretrained)
    published = resolve(table, spec.num_classes) == spec
    name = f"EfficientDet-D{spec.phi}" if published else f"custom, from EfficientDet-D{spec.phi}"
    weights = "ImageNet" if resolved.recipe.pretrained else "random weights"
    if job.model.init:
        weights = "initial weights below"
    frozen = f", frozen: {', '.join(job.model.freeze)}" if job.model.freeze else ""
    most = job.launch.max_workers
    elastic = f"; the same batch on up to {most} as they come and go" if most else ""
    lr = job.optim.lr_per_64 * job.train.batch_size / 64
    return [
        ("network", f"{name}: {spec.backbone} ({weights}), {spec.image_size_px} px, "
         f"{spec.fpn_channels} channels, {spec.fpn_repeats} repeats of {spec.topology}, "
         f"{spec.head_layers} head layers, fusion {spec.fusion}, levels P{spec.min_level}-P{spec.max_level}, "
         f"anchor scale {spec.anchor_scale:g}{frozen}"),
        ("cost", f"{cost.params:,} parameters, {cost.gmacs:.3f} GMACs an image"),
        ("schedule", f"{schedule.total} steps of {job.train.batch_size} images "
         f"({schedule.total / schedule.steps_per_epoch:.1f} epochs of {schedule.steps_per_epoch} steps), "
         f"warm-up {schedule.warmup}, evaluation every {schedule.evaluate_every}"),
        ("learning rate", f"{lr:g} ({job.optim.lr_per_64:g} for 64 images), "
         f"SGD momentum {job.optim.momentum:g}, weight decay {job.optim.weight_decay:g}"),
        ("batch", derived.plan.describe() + elastic),
    ]  # fmt: skip


def describe_data(split: Split, index: CocoIndex, name: str, checked: int) -> tuple[str, str]:
    counts = ", ".join(f"{number} {kind}" for kind, number in index.counts.items() if number)
    look = f"; {checked} images decoded" if checked else ""
    where = f"{split.annotations} with images in {split.images}"
    return name, f"{counts}, {index.classes.num_classes} classes{look}; {where}"


def check_data(split: Split, index: CocoIndex, job: TrainJob) -> int:
    """Images there and readable; how many were decoded.

    Raises:
        DataError
    """
    missing = missing_images(index, split.images)
    if missing:
        raise DataError(
            f"image {missing[0]}", f"a file in {split.images}",
            f"none ({len(missing)} of {len(index)} images are missing)",
            "add the images, or take them out of the json",
        )  # fmt: skip
    if job.data.check == "none":
        return 0
    return check_images(index, split.reader(), everything=job.data.check == "all")


def check_splits(resolved: ResolvedJob, train: CocoIndex, val: CocoIndex) -> list[tuple[str, str]]:
    """Rows of the preflight's table.

    Raises:
        DataError
    """
    rows = []
    for split, index, name in (
        (resolved.train, train, "train data"),
        (resolved.val, val, "val data"),
    ):
        checked = check_data(split, index, resolved.job)
        rows.append(describe_data(split, index, name, checked))
    return rows


def choose_hardware(job: TrainJob, *, cpus: float, gpus: float, local: bool) -> Hardware:
    """Raises ClusterError where the cluster can never give what is asked for."""
    launch = job.launch
    per_worker = launch.gpus_per_worker
    if per_worker is None:
        per_worker = 1.0 if gpus >= 1 else 0.0
    if per_worker * launch.workers > gpus:
        raise ClusterError(
            "launch.gpus_per_worker", f"at most {gpus:g} GPUs for {launch.workers} worker(s)",
            f"{per_worker:g} each", "lower it (0 trains on the CPU), or add GPUs",
        )  # fmt: skip
    cores = launch.cpus_per_worker or 1.0
    if not local and cores * launch.workers > cpus:
        raise ClusterError(
            "launch.workers", f"at most {cpus:g} CPUs for all workers",
            f"{launch.workers} x {cores:g}", "ask for fewer workers, or add nodes",
        )  # fmt: skip
    kind, memory = ("GPU", None) if per_worker > 0 else ("CPU", _host_memory_bytes())
    if per_worker > 0 and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    return Hardware(per_worker, cores, kind, memory)


def check_memory(
    resolved: ResolvedJob, derived: Derived, hardware: Hardware, workers_on_node: int
) -> tuple[ResolvedJob, str]:
    """Saved activations of the images held at once, and four copies of the weights.

    Decides whether activations are kept, and says so.

    Raises:
        ConfigError: more than the device has, with the number of images that would fit.
    """
    precision = resolved.job.train.precision
    half = precision == "bf16" or (precision == "auto" and hardware.device_kind == "GPU")
    traced = activations(resolved.recipe.network, half_precision=half)
    fixed = derived.cost.params * 4 * COPIES_OF_WEIGHTS + BASE_BYTES
    images = derived.plan.images_at_once()
    sharing = workers_on_node if hardware.device_kind == "CPU" else 1
    available = None if hardware.memory_bytes is None else hardware.memory_bytes / sharing
    asked = resolved.job.train.checkpoint_activations
    recompute = asked == "yes"
    if asked == "auto":
        if available is None:
            recompute = resolved.job.model.phi >= "5"
        else:
            recompute = fixed + traced.total(recompute=False) * images > available
    per_image = traced.total(recompute=recompute)
    resolved = replace(resolved, recipe=replace(resolved.recipe, checkpoint_activations=recompute))
    needed = fixed + per_image * images
    text = f"about {needed / GIB:.1f} GiB a worker ({per_image / GIB:.2f} GiB an image, {images} at once"
    text += ", activations computed again)" if recompute else ")"
    if available is None:
        return resolved, text
    if needed > available:
        fitting = max(0, int((available - fixed) // per_image))
        remedy = (
            f"{fitting} image(s) fit: set train.bn_group {fitting} or lower, or train.batch_size"
            if fitting
            else "choose a smaller --phi or --image-size"
        )
        raise ConfigError(
            "train.bn_group", f"a worker to need at most {available / GIB:.1f} GiB", text, remedy
        )
    return resolved, f"{text}, {available / GIB:.1f} GiB there ({hardware.device_kind})"


def check_space(place: Place, params: int, config: CheckpointConfig) -> str | None:
    """What the checkpoints will take of a local disk; None elsewhere.

    Raises:
        StorageError: there is not even room for two, of which one replaces the other.
    """
    if place.local is None:
        return None
    each = params * 4 * COPIES_IN_CHECKPOINT
    most = 2 * config.keep_latest + config.keep_best + 1
    there = place.local
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{each / 2**20:.0f} MiB a checkpoint, at most {most} of them; {free / GIB:.1f} GiB free"
    if free < 2 * each:
        raise StorageError(
            "checkpoint.uri", f"room for two checkpoints of {each / 2**20:.0f} MiB",
            f"{free / 2**20:.0f} MiB in {place.local}", "make room, or --set checkpoint.uri=URI",
        )  # fmt: skip
    return text + (" (not enough for all)" if free < most * each else "")


def out_of_memory(resolved: ResolvedJob, world_size: int) -> ConfigError:
    """What to do after a worker did not have the memory that preflight, or nobody, had foreseen."""
    train, group = resolved.job.train, resolved.recipe.bn_group
    at_once = plan_batch(
        train.batch_size, group, world_size, train.max_images_at_once
    ).images_at_once()
    remedies = []
    for images in range(int(OOM_MARGIN * at_once), 0, -1):
        if train.batch_size % images:
            continue
        with suppress(ConfigError):
            plan_batch(train.batch_size, images, world_size)
            remedies.append(f"{images} image(s) should fit: set train.bn_group {images}")
            break
    if not resolved.recipe.checkpoint_activations:
        remedies.append("compute activations again (--checkpoint-activations yes)")
    remedies.append("choose a smaller --phi or --image-size")
    return ConfigError(
        "train.bn_group", "a worker to have the memory it needs",
        f"out of memory with {at_once} image(s) at once", ", or ".join(remedies),
    )  # fmt: skip


def with_loader_workers(resolved: ResolvedJob, hardware: Hardware) -> ResolvedJob:
    """Decoding processes beside a GPU; on a CPU they would only take cores from training."""
    if resolved.job.data.loader_workers is not None:
        return resolved
    cores = int(hardware.cpus_per_worker) if hardware.cpus_per_worker > 1 else 8
    workers = min(8, cores) if hardware.device_kind == "GPU" else 0
    return replace(resolved, recipe=replace(resolved.recipe, loader_workers=workers))


def anchor_ious(resolved: ResolvedJob, index: CocoIndex) -> NDArray[np.float32]:
    """Of the training boxes; see `anchor_overlaps`."""
    return anchor_overlaps(resolved.recipe.network, index)


def anchor_overlaps(spec: NetworkSpec, index: CocoIndex, limit: int = 5000) -> NDArray[np.float32]:
    """Best overlap of boxes, as the network sees them unaugmented, with any anchor."""
    real = ~index.crowd
    owner = torch.repeat_interleave(
        torch.arange(len(index)), torch.from_numpy(index.offsets).diff()
    ).numpy()[real]
    scale = spec.image_size_px / index.sizes_hw[owner].max(axis=1, keepdims=True)
    boxes = torch.from_numpy(index.boxes_xyxy[real] * scale).float()
    if len(boxes) > limit:
        boxes = boxes[torch.linspace(0, len(boxes) - 1, limit).long()]
    return best_anchor_iou(boxes, make_anchors(spec))


def describe_anchors(ious: NDArray[np.float32]) -> str:
    recall = float((ious >= 0.5).mean()) if len(ious) else 0.0
    return f"{recall:.1%} of training boxes overlap an anchor by half or more"


def check_initial(resolved: ResolvedJob, classes: ClassMap) -> str:
    """Load the weights to start from as a worker will; what was kept of them and what was not.

    Raises:
        UserError: they cannot be had, or belong to another network.
    """
    source = resolved.job.model.init
    assert source is not None
    detector = Detector(resolved.recipe.network)
    with open_initial(source) as path:
        return f"{source}: {', '.join(load_initial(detector, path, classes))}"


def fetch_backbone(resolved: ResolvedJob) -> None:
    """Bring pretrained weights into the cache once, before workers ask for them all together.

    Raises:
        ConfigError: they cannot be had.
    """
    from model.network.backbone import Backbone

    spec = resolved.recipe.network
    logging.getLogger("timm").setLevel(logging.WARNING)
    Backbone(spec.backbone, pretrained=True, drop_path=spec.drop_path)


def _host_memory_bytes() -> int:
    total: int = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # a container's limit, where there is one
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = file.read().strip()
        return total if limit == "max" else min(total, int(limit))
    except OSError:
        return total


def as_params(resolved: ResolvedJob, derived: Derived) -> dict[str, Any]:
    """Configuration and derived numbers for the tracker, flat."""
    from orchestrator.config.codec import flatten

    config = resolved.config()
    flat = flatten(config.pop("job")) | flatten({"network": config["network"]})
    return flat | {
        "derived.params": derived.cost.params,
        "derived.gmacs": round(derived.cost.gmacs, 4),
        "derived.total_steps": derived.schedule.total,
        "derived.steps_per_epoch": derived.schedule.steps_per_epoch,
        "derived.warmup_steps": derived.schedule.warmup,
        "derived.bn_group": resolved.recipe.bn_group,
        "derived.pretrained": resolved.recipe.pretrained,
        "derived.train_images": derived.num_train,
        "derived.val_images": derived.num_val,
    }
