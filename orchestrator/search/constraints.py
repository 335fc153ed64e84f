"""What a network may cost, decided before a trial takes anything: closed forms, then one trace.

A limit is looked at in the order cheap to dear: parameters and MACs are arithmetic (about 0.1 ms),
activations a trace on the meta device (about 0.3 s, once a network), latency runs the network.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from model.network.detector import Detector
from model.network.footprint import GIB, activations, network_cost
from model.network.scaling import NetworkSpec, resolve
from model.training.benchmark import repeat
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.search.sample import apply, arm_key
from orchestrator.search.space import Sample, Space

NO_NETWORK = "no network"
LEAST_SHARE = 0.001  # of samples that must be feasible
LEAST_FOUND = 5  # in that many expected finds, none: the share is below the least, at 99.3 %
MOST_REPEATS = 300_000  # draws in a row without a new sample: there are no more, or as good as
WARM_UP, ROUNDS = 2, 5


@dataclass(frozen=True)
class Band:
    """From min to max, or around a target by a share of it: {target: 6.1, tolerance: 0.1}."""

    min: float | None = None
    max: float | None = None
    target: float | None = None
    tolerance: float = 0.1

    def ends(self) -> tuple[float | None, float | None]:
        if self.target is None:
            return self.min, self.max
        return self.target * (1 - self.tolerance), self.target * (1 + self.tolerance)


@dataclass(frozen=True)
class ConstraintsConfig:
    """max_params_m: million parameters. gmacs: 1e9 multiply-accumulates of one image.

    max_activation_gib: kept for the backward pass of ONE training image, at the job's precision.
    max_latency_ms: median of forward passes of one image, in float32, on the device that measures.
    """

    max_params_m: float | None = None
    gmacs: Band = field(default_factory=Band)
    max_activation_gib: float | None = None
    max_latency_ms: float | None = None


def check_constraints(config: ConstraintsConfig, where: str) -> None:
    """Raises ConfigError where nothing could satisfy a limit, or it says two things."""
    for name in ("max_params_m", "max_activation_gib", "max_latency_ms"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{where}.{name}", "a positive number", f"{value:g}", "correct it")
    band, here = config.gmacs, f"{where}.gmacs"
    if band.target is not None and (band.min is not None or band.max is not None):
        raise ConfigError(here, "min and max, or target and tolerance", "both", "keep one of them")
    for name, value in (("target", band.target), ("min", band.min), ("max", band.max)):
        if value is not None and not value > 0:
            raise ConfigError(f"{here}.{name}", "a positive number", f"{value:g}", "correct it")
    if band.min is not None and band.max is not None and band.min > band.max:
        raise ConfigError(here, "min <= max", f"{band.min:g} and {band.max:g}", "exchange them")
    if not 0 <= band.tolerance < 1:
        raise ConfigError(
            f"{here}.tolerance", "a share of the target, 0 <= share < 1", f"{band.tolerance:g}",
            "0.1 is 10 %",
        )  # fmt: skip


@dataclass(frozen=True)
class Rejection:
    """Which limit (a metric's name, or NO_NETWORK), what it says and what came.

    excess: distance from the limit as a share of it; infinite where there is no network at all.
    """

    reason: str
    limit: str
    got: str
    excess: float

    def __str__(self) -> str:
        return f"{self.reason} {self.got} ({self.limit})"


class Latency:
    """Median milliseconds of one image's forward pass on a device; measured once a network."""

    def __init__(self, device: torch.device, rounds: int = ROUNDS) -> None:
        self.device, self.rounds = device, rounds
        self._known: dict[NetworkSpec, float] = {}

    def __call__(self, spec: NetworkSpec) -> float:
        if spec not in self._known:
            self._known[spec] = self._measure(spec)
        return self._known[spec]

    def _measure(self, spec: NetworkSpec) -> float:
        detector = Detector(spec).eval().to(self.device)
        shape = (1, 3, spec.image_size_px, spec.image_size_px)
        images = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        with torch.inference_mode():
            repeat(lambda: detector(images), WARM_UP, self.device)
            return 1e3 * repeat(lambda: detector(images), self.rounds, self.device)


class Budget:
    """Costs of networks and the limits on them.

    latency: milliseconds of a network, measured where it counts; needed for max_latency_ms only.
    half_precision: what precision "auto" means where the trials run (bf16 on a GPU).
    """

    def __init__(
        self,
        limits: ConstraintsConfig,
        num_classes: int,
        *,
        latency: Callable[[NetworkSpec], float] | None = None,
        half_precision: bool = False,
    ) -> None:
        if limits.max_latency_ms is not None and latency is None:
            raise ValueError("max_latency_ms needs something that measures")
        self.limits, self.num_classes, self.latency = limits, num_classes, latency
        self.half_precision = half_precision
        self._costs: dict[NetworkSpec, tuple[float, float]] = {}
        self._traces: dict[tuple[NetworkSpec, bool, bool], float] = {}

    def network(self, job: TrainJob) -> NetworkSpec:
        """Raises ConfigError: there is no such network."""
        return resolve(job.model, self.num_classes)

    def network_of(self, base: TrainJob, sample: Sample) -> NetworkSpec | None:
        """None where there is none."""
        try:
            return self.network(apply(base, sample))
        except ConfigError:
            return None

    def closed_forms(self, spec: NetworkSpec) -> tuple[float, float]:
        """Million parameters, and 1e9 multiply-accumulates of one image."""
        if spec not in self._costs:
            cost = network_cost(spec)
            self._costs[spec] = (cost.params / 1e6, cost.gmacs)
        return self._costs[spec]

    def activation_gib(self, job: TrainJob, spec: NetworkSpec) -> float:
        half = job.train.precision == "bf16" or (
            job.train.precision == "auto" and self.half_precision
        )
        recompute = job.train.checkpoint_activations == "yes"
        key = (spec, half, recompute)
        if key not in self._traces:
            traced = activations(spec, half_precision=half)
            self._traces[key] = traced.total(recompute=recompute) / GIB
        return self._traces[key]

    def breaks_closed_forms(self, job: TrainJob) -> tuple[Rejection, ...]:
        """Limits that arithmetic decides."""
        try:
            params_m, gmacs = self.closed_forms(self.network(job))
        except ConfigError as error:
            limit = f"{error.where}: {error.expected}"
            return (Rejection(NO_NETWORK, limit, error.got, float("inf")),)
        least, most = self.limits.gmacs.ends()
        return (
            *_outside("model/params_m", params_m, None, self.limits.max_params_m),
            *_outside("model/gmacs", gmacs, least, most),
        )

    def rejections(self, job: TrainJob) -> tuple[Rejection, ...]:
        """Limits that the job's network breaks; the dear ones only where the cheap ones hold."""
        found = [*self.breaks_closed_forms(job)]
        if found:
            return tuple(found)
        limits, spec = self.limits, self.network(job)
        if limits.max_activation_gib is not None:
            gib = self.activation_gib(job, spec)
            found += _outside("model/activation_gib", gib, None, limits.max_activation_gib)
        if not found and limits.max_latency_ms is not None and self.latency is not None:
            found += _outside("model/latency_ms", self.latency(spec), None, limits.max_latency_ms)
        return tuple(found)


def _outside(
    reason: str, got: float, least: float | None, most: float | None
) -> Iterable[Rejection]:
    if most is not None and got > most:
        yield Rejection(reason, f"at most {most:.4g}", f"{got:.4g}", got / most - 1)
    if least is not None and got < least:
        yield Rejection(reason, f"at least {least:.4g}", f"{got:.4g}", 1 - got / least)


class Sieve:
    """Lets feasible and new samples through; counts the others by the first limit they break.

    done: keys of arms that are trained already; they are passed over and count as nothing.
    """

    def __init__(self, base: TrainJob, budget: Budget, done: Iterable[str] = ()) -> None:
        self.base, self.budget = base, budget
        self.known = set(done)
        self.tried = self.accepted = 0
        self.rejected: Counter[str] = Counter()
        self.closest: tuple[Sample, tuple[Rejection, ...]] | None = None

    def passes(self, sample: Sample) -> bool:
        """Whether to train it. The same arm passes once."""
        job = apply(self.base, sample)
        key = arm_key(job)
        if key in self.known:
            return False
        self.known.add(key)
        return self._feasible(sample, job)

    def feasible(self, sample: Sample) -> bool:
        """The same for a sampler that may propose an arm again, as TPE does."""
        return self._feasible(sample, apply(self.base, sample))

    def _feasible(self, sample: Sample, job: TrainJob) -> bool:
        self.tried += 1
        rejections = self.budget.rejections(job)
        if not rejections:
            self.accepted += 1
            return True
        self.rejected[rejections[0].reason] += 1
        if self.closest is None or _excess(rejections) < _excess(self.closest[1]):
            self.closest = sample, rejections
        return False

    def gmacs(self, sample: Sample) -> float | None:
        """None where there is no such network, or too large or small a one."""
        job = apply(self.base, sample)
        if self.budget.breaks_closed_forms(job):
            return None
        return self.budget.closed_forms(self.budget.network(job))[1]

    def hopeless(self) -> bool:
        """Too few samples are feasible to go on drawing."""
        return self.tried * LEAST_SHARE >= LEAST_FOUND + self.accepted

    def describe(self) -> str:
        """One line of counts, for the table before a sweep and for its record."""
        if not self.rejected:
            return f"none of {self.tried} samples rejected"
        counts = ", ".join(f"{reason} {n}" for reason, n in self.rejected.most_common())
        number = sum(self.rejected.values())
        share = number / self.tried
        return f"{number} of {self.tried} samples rejected ({share:.1%}): {counts}"

    def error(self) -> ConfigError:
        """Why nothing more is drawn, with the sample that came closest."""
        near, got = "none was drawn", "no sample"
        if self.closest is not None:
            sample, rejections = self.closest
            near = f"{_show(sample)} has {' and '.join(map(str, rejections))}"
        if self.tried:
            got = f"{self.accepted} of {self.tried}"
        return ConfigError(
            "constraints", f"at least {LEAST_SHARE:.1%} of samples feasible", got,
            f"widen them or the space; closest miss: {near}",
        )  # fmt: skip


def draw(
    space: Space,
    sieve: Sieve,
    *,
    grid: bool,
    seed: int,
    num: int | None,
    points: Iterable[Sample] = (),
) -> list[Sample]:
    """Known points, then random samples or the grid; the first `num` that pass.

    num: None for the whole grid.

    Raises:
        ConfigError: a known point breaks a limit, too few samples are feasible, or the space holds
            fewer than `num`.
    """
    if num is None and not grid:
        raise ValueError("random samples have no end")
    found = [point for point in points if _asked(sieve, point)][:num]
    size = space.size()
    drawn = space.grid() if grid else (space.sample(seed, index) for index in itertools.count())
    seen: set[str] = set()
    repeats = 0
    while (num is None or len(found) < num) and len(seen) != size and repeats < MOST_REPEATS:
        sample = next(drawn, None)
        if sample is None:
            break
        text = json.dumps(sample)
        repeats = repeats + 1 if text in seen else 0
        if repeats:
            continue
        seen.add(text)
        if sieve.passes(sample):
            found.append(sample)
        if not grid and sieve.hopeless():
            raise sieve.error()
    if not found and sieve.rejected:
        raise sieve.error()
    if num is not None and len(found) < num:
        raise ConfigError(
            "trials.num", f"at most the {len(found)} points that are feasible and not yet done",
            str(num), "lower it, or widen the space",
        )  # fmt: skip
    return found


def _asked(sieve: Sieve, point: Sample) -> bool:
    """Whether a known point is new. Raises ConfigError where it breaks a limit."""
    check_point(sieve, point)
    return sieve.passes(point)


def check_point(sieve: Sieve, point: Sample) -> None:
    """Raises ConfigError where a known point breaks a limit."""
    rejections = sieve.budget.rejections(apply(sieve.base, point))
    if rejections:
        got = f"{_show(point)} with {' and '.join(map(str, rejections))}"
        raise ConfigError("search.points", "points within the constraints", got, "remove it")


def _excess(rejections: tuple[Rejection, ...]) -> float:
    return max(rejection.excess for rejection in rejections)


def _show(sample: Sample) -> str:
    def text(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{path} {text(value)}" for path, value in sample.items())
