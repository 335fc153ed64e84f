"""A sweep's space: knobs by their dotted path in the train config, some only under a condition.

Nothing here knows Ray. A sample is a plain mapping from path to value and holds the active knobs
only. Sample i of a seed is a function of both and of each knob's path alone: the same on every
machine and release, and a knob that is added leaves the draws of the others as they were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, get_type_hints

from orchestrator.config.codec import decode, encode, nest
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError, nearest
from orchestrator.search.domains import KINDS, Choice, Domain, Steps, Uniform, read_domain

Sample = dict[str, Any]

# How something runs, where it is kept, or what it is measured on: never a knob.
APART = (
    "run", "tracking", "launch", "checkpoint", "data.root", "data.shapes", "data.train",
    "data.val", "data.classes", "data.cache", "data.check", "data.loader_workers", "train.log_every_steps",
)  # fmt: skip
SEED = "train.seed"


@dataclass(frozen=True)
class Condition:
    """Holds where the knob at `path` is active and has one of `values`."""

    path: str
    values: tuple[Any, ...]

    def holds(self, sample: Sample) -> bool:
        return self.path in sample and sample[self.path] in self.values


@dataclass(frozen=True)
class Dimension:
    """One knob; it exists where all conditions hold."""

    path: str
    domain: Domain
    when: tuple[Condition, ...] = ()

    def active(self, sample: Sample) -> bool:
        return all(condition.holds(sample) for condition in self.when)


@dataclass(frozen=True)
class Space:
    """dimensions: each after those that its conditions look at."""

    dimensions: tuple[Dimension, ...]

    def size(self) -> int | None:
        """Number of different samples, None where a knob is continuous.

        Only knobs that conditions look at are enumerated; the others multiply.
        """
        if any(dimension.domain.size is None for dimension in self.dimensions):
            return None
        parents = {condition.path for d in self.dimensions for condition in d.when}

        def count(place: int, sample: Sample) -> int:
            if place == len(self.dimensions):
                return 1
            dimension = self.dimensions[place]
            if not dimension.active(sample):
                return count(place + 1, sample)
            if dimension.path not in parents:
                return (dimension.domain.size or 0) * count(place + 1, sample)
            values = dimension.domain.values()
            return sum(count(place + 1, {**sample, dimension.path: v}) for v in values)

        return count(0, {})

    def grid(self) -> Iterator[Sample]:
        """Every sample once; the first knob changes slowest. Finite spaces only."""

        def walk(place: int, sample: Sample) -> Iterator[Sample]:
            if place == len(self.dimensions):
                yield sample
                return
            dimension = self.dimensions[place]
            if not dimension.active(sample):
                yield from walk(place + 1, sample)
                return
            for value in dimension.domain.values():
                yield from walk(place + 1, {**sample, dimension.path: value})

        return walk(0, {})

    def sample(self, seed: int, index: int) -> Sample:
        """Sample number `index` of `seed`."""
        drawn: Sample = {}
        for dimension in self.dimensions:
            if dimension.active(drawn):
                drawn[dimension.path] = dimension.domain.at(_uniform(seed, index, dimension.path))
        return drawn

    def suggest(self, trial: Suggester) -> Sample:
        """A sample in Optuna's define-by-run form, which knows conditions.

        What is no plain value (a duration, a list) is suggested by its JSON text.
        """
        found: Sample = {}
        for dimension in self.dimensions:
            if dimension.active(found):
                found[dimension.path] = _suggested(dimension, trial)
        return found

    def holds(self, sample: Sample) -> bool:
        """Whether it is one of this space's samples."""
        try:
            return self.check(sample, "") == sample
        except ConfigError:
            return False

    def as_suggested(self, sample: Sample) -> dict[str, Any]:
        """Its knobs as `suggest` asks for them."""
        return {path: _plain(value) for path, value in sample.items()}

    def check(self, point: Mapping[str, Any], where: str) -> Sample:
        """A known point as a sample; knobs with a single value may be left out.

        Raises:
            ConfigError: a knob unknown, missing, inactive, or with a value outside its domain.
        """
        paths = [dimension.path for dimension in self.dimensions]
        for path in point:
            if path not in paths:
                raise ConfigError(
                    f"{where}.{path}", "a knob of the space", repr(path), nearest(path, paths),
                )  # fmt: skip
        sample: Sample = {}
        for dimension in self.dimensions:
            path, domain = dimension.path, dimension.domain
            if not dimension.active(sample):
                if path in point:
                    raise ConfigError(
                        f"{where}.{path}", "nothing, its condition does not hold",
                        repr(point[path]), "remove it",
                    )  # fmt: skip
                continue
            if path not in point and domain.size != 1:
                raise ConfigError(f"{where}.{path}", "a value for every knob", "none", "add it")
            value = typed(path, point[path], f"{where}.{path}") if path in point else domain.at(0)
            if not domain.contains(value):
                raise ConfigError(
                    f"{where}.{path}", f"a value of {domain.to_mapping()}", repr(value),
                    "widen the space or correct it",
                )  # fmt: skip
            sample[path] = value
        return sample

    def to_mapping(self) -> dict[str, Any]:
        """What `read_space` reads back equal."""
        return {
            d.path: d.domain.to_mapping()
            | ({"when": {c.path: list(c.values) for c in d.when}} if d.when else {})
            for d in self.dimensions
        }


class Suggester(Protocol):
    """What is used of an Optuna trial."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...
    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int: ...


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _suggested(dimension: Dimension, trial: Suggester) -> Any:
    path, domain = dimension.path, dimension.domain
    if isinstance(domain, Choice):
        names = [_plain(v) for v in domain.choices]
        return domain.choices[names.index(trial.suggest_categorical(path, names))]
    if isinstance(domain, Uniform):
        drawn = trial.suggest_float(path, domain.low, domain.high, log=domain.log)
    elif isinstance(domain.low, int) and isinstance(domain.step, int):
        return trial.suggest_int(path, domain.low, int(domain.high), step=domain.step)
    else:
        drawn = trial.suggest_float(path, domain.low, domain.high, step=domain.step)
        # 1.4 and not 1.4000000000000001, which would be another arm and meet no condition.
        drawn = min(domain.values(), key=lambda known: abs(known - drawn))
    return drawn


def _uniform(seed: int, index: int, path: str) -> float:
    """0 <= u < 1 in 2**-53; numpy's streams may change between releases, a hash does not."""
    digest = hashlib.blake2b(f"{seed}/{index}/{path}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def read_space(given: Any, where: str = "space") -> Space:
    """From YAML's mapping.

    Raises:
        ConfigError: empty; a path the train config has not, or that is no knob; a value that is
            not of its type; a condition on what is no finite knob, or in a circle.
    """
    if not isinstance(given, Mapping) or not given:
        got = "nothing" if not given else repr(given)
        raise ConfigError(
            where, "at least one knob", got, "as in model.fusion: {choice: [fast, sum]}",
        )  # fmt: skip
    domains: dict[str, Domain] = {}
    for path, value in given.items():
        _check_path(str(path), list(given), where)
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{where}.{path}", "a domain", repr(value),
                f"as in {{choice: […]}}; there are {', '.join(KINDS)}",
            )  # fmt: skip
        domain = read_domain({k: v for k, v in value.items() if k != "when"}, f"{where}.{path}")
        domains[path] = _typed_domain(path, domain, f"{where}.{path}")
    conditions = {
        path: _conditions(path, value.get("when"), domains, where) for path, value in given.items()
    }
    return Space(_parents_first(domains, conditions, where))


def typed(path: str, value: Any, where: str) -> Any:
    """The plain value that the train config has at `path` once `value` is decoded there.

    Raises:
        ConfigError: it is not of that type.
    """
    try:
        found: Any = decode(TrainJob, nest(path, value))
    except ConfigError as error:
        below = error.where.removeprefix(path)
        remedy = "correct it" if error.remedy == "see --help" else error.remedy
        raise ConfigError(f"{where}{below}", error.expected, error.got, remedy) from None
    if isinstance(value, Mapping):  # a section: what it leaves out stays as the base job has it
        return dict(value)
    for name in path.split("."):
        found = getattr(found, name)
    return encode(found)


def _typed_domain(path: str, domain: Domain, where: str) -> Domain:
    if isinstance(domain, Choice):
        values = tuple(typed(path, value, where) for value in domain.choices)
        twice = [v for i, v in enumerate(values) if v in values[:i]]
        if twice:
            raise ConfigError(where, "each value once", f"{twice[0]!r} twice", "remove one")
        return Choice(values)
    if isinstance(domain, Steps):
        low, _ = typed(path, domain.low, where), typed(path, domain.high, where)
        if isinstance(low, str):  # phi: a number that is a name
            return Choice(tuple(typed(path, value, where) for value in domain.values()))
        typed(path, domain.low + domain.step, where)
        return domain
    for bound in (domain.low, domain.high):
        try:
            typed(path, bound, where)
        except ConfigError as error:
            raise ConfigError(
                where, error.expected, f"a range of any numbers from {bound:g}",
                "choice, randint and quniform can hold it",
            ) from None  # fmt: skip
    return domain


def known_paths() -> list[str]:
    """Every path that may be a knob, sections included."""

    def below(cls: type[Any], path: str) -> Iterator[str]:
        for name, hint in get_type_hints(cls).items():
            here = f"{path}.{name}" if path else name
            if here in APART:
                continue
            yield here
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                yield from below(hint, here)

    return list(below(TrainJob, ""))


def _check_path(path: str, paths: list[str], where: str) -> None:
    here = f"{where}.{path}"
    if path == SEED:
        raise ConfigError(
            here, "trials.seeds: N instead", "a knob",
            "seeds are no knob: arms are compared over them",
        )  # fmt: skip
    if any(path == apart or path.startswith(apart + ".") for apart in APART):
        raise ConfigError(
            here, "a setting of how a network is trained", repr(path), "set it in the train config",
        )  # fmt: skip
    known = known_paths()
    if path not in known:
        raise ConfigError(here, "a path of the train config", repr(path), nearest(path, known))
    for other in paths:
        if other.startswith(path + "."):
            raise ConfigError(here, f"no knob around {other}", repr(path), "keep one of them")


def _conditions(
    path: str, given: Any, domains: Mapping[str, Domain], where: str
) -> tuple[Condition, ...]:
    here = f"{where}.{path}.when"
    if given is None:
        return ()
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(here, "{path of a knob: value}", repr(given), "correct it")
    found = []
    for parent, asked in given.items():
        if parent not in domains:
            raise ConfigError(
                f"{here}.{parent}", "a knob of this space", repr(parent), nearest(parent, domains),
            )  # fmt: skip
        domain = domains[parent]
        if domain.size is None:
            raise ConfigError(
                f"{here}.{parent}", "a knob with a list of values", "a range",
                "make it a choice or quniform",
            )  # fmt: skip
        several = asked if isinstance(asked, list) else [asked]
        values = tuple(typed(parent, value, f"{here}.{parent}") for value in several)
        for value in values:
            if not domain.contains(value):
                raise ConfigError(
                    f"{here}.{parent}",
                    f"one of its values ({', '.join(map(str, domain.values()))})", repr(value),
                    "correct it",
                )  # fmt: skip
        found.append(Condition(parent, values))
    return tuple(found)


def _parents_first(
    domains: Mapping[str, Domain], conditions: Mapping[str, tuple[Condition, ...]], where: str
) -> tuple[Dimension, ...]:
    """In the order given, but each after what its conditions look at."""
    ordered: dict[str, Dimension] = {}
    while len(ordered) < len(domains):
        ready = [
            path for path in domains
            if path not in ordered and all(c.path in ordered for c in conditions[path])
        ]  # fmt: skip
        if not ready:
            circle = [path for path in domains if path not in ordered]
            raise ConfigError(
                f"{where}.{circle[0]}.when", "no circle of conditions", " and ".join(circle),
                "remove one",
            )  # fmt: skip
        ordered[ready[0]] = Dimension(ready[0], domains[ready[0]], conditions[ready[0]])
    return tuple(ordered.values())
