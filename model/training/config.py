"""The recipe: durations, optimiser, precision, batch norm groups. Owned here, filled from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.data.transforms import AugmentConfig
from model.detection.loss import LossConfig
from model.detection.postprocess import PostprocessConfig
from model.errors import ConfigError
from model.network.scaling import NetworkSpec, Part


@dataclass(frozen=True)
class Duration:
    """Either a number of epochs (may be a fraction) or of steps; turned into steps once."""

    epochs: float | None = None
    steps: int | None = None

    def to_steps(self, steps_per_epoch: int, where: str) -> int:
        """At least 1.

        Raises:
            ConfigError: both or neither given, or not positive.
        """
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError(where, "{epochs: N} or {steps: N}", f"{self}", "give exactly one")
        number = self.steps if self.steps is not None else self.epochs
        assert number is not None
        if number <= 0:
            raise ConfigError(where, "a positive duration", str(number))
        return int(number) if self.steps is not None else max(1, round(number * steps_per_epoch))


@dataclass(frozen=True)
class OptimConfig:
    """SGD with linear warm-up and cosine decay, both in steps of the global batch.

    lr_per_64: peak learning rate for 64 images; the one used is lr_per_64 * batch_size / 64.
    warmup_from: share of the peak where warm-up starts.
    ema_decay: averaging of weights and batch-norm statistics, ramped up from the first step.
    clip_norm: bound of the global gradient norm.
    """

    lr_per_64: float = 0.08
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 4e-5
    warmup: Duration = field(default_factory=lambda: Duration(epochs=1))
    warmup_from: float = 0.1
    clip_norm: float = 10.0
    ema_decay: float = 0.9998


@dataclass(frozen=True)
class TrainConfig:
    """batch_size: images of one step over ALL workers.

    bn_group: images normalised together (None: chosen from batch and phi, never from workers).
    bn_momentum: step of the running statistics; TF's .99 is 0.01 here. Runs of a few hundred steps
    want 0.1: their weights move faster than slow statistics follow.
    max_images_at_once: the most a device holds; larger groups are shared by several workers.
    precision: "auto" is bf16 on a GPU, fp32 on a CPU.
    compile: let torch.compile fuse the network's operations; needs a C++ compiler and minutes at the
    start, and pays on long runs.
    checkpoint_activations: compute each stage's activations again in the backward pass instead of
    keeping them ("auto": where they would not fit; from phi 5 on where the memory is not known).
    """

    duration: Duration = field(default_factory=lambda: Duration(epochs=300))
    batch_size: int = 16
    bn_group: int | None = None
    max_images_at_once: int | None = None
    seed: int = 0
    bn_momentum: float = 0.01
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = True
    compile: bool = False
    checkpoint_activations: Literal["auto", "yes", "no"] = "auto"
    log_every_steps: int = 10
    evaluate_every: Duration = field(default_factory=lambda: Duration(epochs=1))
    checkpoint_every: Duration = field(default_factory=lambda: Duration(epochs=1))


@dataclass(frozen=True)
class Recipe:
    """All that `fit` needs to know, resolved: what is trained, on what schedule, how it is scored."""

    network: NetworkSpec
    pretrained: bool
    train: TrainConfig
    optim: OptimConfig
    loss: LossConfig
    augment: AugmentConfig
    evaluation: PostprocessConfig
    evaluation_batch: int
    loader_workers: int
    bn_group: int
    freeze: tuple[Part, ...] = ()
    checkpoint_activations: bool = False
