"""What one knob may be, as data: choice, uniform, loguniform, quniform, randint.

A domain turns a number u, 0 <= u < 1, into a value: sampling is that and a source of u, so nothing
here holds state. Finite domains have a size and list their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import ConfigError, nearest

DIGITS = 6  # of a drawn number: what is written down is what was trained, and can be read
WHOLE_STEPS = 1e-6  # how far from a whole number of steps a range may end


@dataclass(frozen=True)
class Choice:
    """One of a list; of one value, where a knob is fixed."""

    choices: tuple[Any, ...]

    @property
    def size(self) -> int:
        return len(self.choices)

    def at(self, u: float) -> Any:
        return self.choices[int(u * len(self.choices))]

    def values(self) -> Sequence[Any]:
        return self.choices

    def contains(self, value: Any) -> bool:
        return value in self.choices

    def to_mapping(self) -> dict[str, Any]:
        return {"choice": list(self.choices)}


@dataclass(frozen=True)
class Uniform:
    """Any number from low to high; `log`: equally often in each decade."""

    low: float
    high: float
    log: bool = False

    @property
    def size(self) -> None:
        return None

    def at(self, u: float) -> float:
        if self.log:
            drawn = self.low * math.exp(u * math.log(self.high / self.low))
        else:
            drawn = self.low + u * (self.high - self.low)
        return min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high)

    def values(self) -> Sequence[Any]:
        raise TypeError("a range has no list of values")

    def contains(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    def to_mapping(self) -> dict[str, Any]:
        return {"loguniform" if self.log else "uniform": [self.low, self.high]}


@dataclass(frozen=True)
class Steps:
    """low, low + step, … up to high, both ends included: quniform, and randint with a step of 1.

    Whole numbers where low and step are.
    """

    low: float
    high: float
    step: float

    @property
    def size(self) -> int:
        return round((self.high - self.low) / self.step) + 1

    def at(self, u: float) -> float:
        return self._value(int(u * self.size))

    def values(self) -> Sequence[float]:
        return [self._value(i) for i in range(self.size)]

    def contains(self, value: Any) -> bool:
        if not _is_number(value):
            return False
        number = round((value - self.low) / self.step)
        return 0 <= number < self.size and math.isclose(self._value(number), value, rel_tol=1e-9)

    def to_mapping(self) -> dict[str, Any]:
        return {"quniform": [self.low, self.high, self.step]}

    def _value(self, number: int) -> float:
        value = self.low + number * self.step
        return value if isinstance(value, int) else float(f"{value:.12g}")


Domain = Choice | Uniform | Steps
KINDS = ("choice", "uniform", "loguniform", "quniform", "randint", "value")


def read_domain(given: Mapping[str, Any], where: str) -> Domain:
    """From `{kind: …}`; values are not yet checked against what they set.

    Raises:
        ConfigError: not exactly one kind, an empty choice, a range that holds nothing.
    """
    for key in map(str, given):
        if key not in KINDS:
            raise ConfigError(f"{where}.{key}", "a kind of domain", repr(key), nearest(key, KINDS))
    if len(given) != 1:
        listed = ", ".join(given) or "nothing"
        raise ConfigError(where, f"exactly one of {', '.join(KINDS)}", listed, "keep one")
    ((kind, value),) = given.items()
    where = f"{where}.{kind}"
    if kind == "value":
        return Choice((value,))
    if kind == "choice":
        if not isinstance(value, list) or not value:
            raise ConfigError(where, "a list with at least one value", repr(value), "add values")
        twice = [v for i, v in enumerate(value) if v in value[:i]]
        if twice:
            raise ConfigError(where, "each value once", f"{twice[0]!r} twice", "remove one")
        return Choice(tuple(value))
    return _range(kind, value, where)


def _range(kind: str, value: Any, where: str) -> Domain:
    form = "[low, high, step]" if kind == "quniform" else "[low, high]"
    if not isinstance(value, list) or len(value) != form.count(",") + 1:
        raise ConfigError(where, form, repr(value), f"as in {kind}: {form}")
    numbers = [_number(item, where) for item in value]
    low, high = numbers[:2]
    if not low < high:
        raise ConfigError(where, "low < high", f"{low:g} and {high:g}", "exchange or widen them")
    if kind == "randint":
        if not all(isinstance(n, int) for n in numbers):
            raise ConfigError(where, "whole numbers", repr(value), "uniform takes any number")
        return Steps(low, high, 1)
    if kind == "quniform":
        step = numbers[2]
        if step <= 0:
            raise ConfigError(where, "a positive step", f"{step:g}", "correct it")
        steps = (high - low) / step
        if abs(steps - round(steps)) > WHOLE_STEPS or round(steps) < 1:
            below = low + math.floor(steps + WHOLE_STEPS) * step
            remedy = f"end at {below:.12g} or {below + step:.12g}"
            raise ConfigError(where, f"whole steps of {step:g} from {low:g}", f"{high:g}", remedy)
        return Steps(low, high, step)
    if kind == "loguniform" and low <= 0:
        raise ConfigError(where, "positive bounds", f"{low:g}", "uniform takes any number")
    return Uniform(float(low), float(high), log=kind == "loguniform")


def _number(value: Any, where: str) -> float:
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with suppress(ValueError):
            value = float(value)
    if not _is_number(value) or not math.isfinite(value):
        raise ConfigError(where, "numbers", repr(value), "correct it")
    number: float = value
    return number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
