"""A sweep's YAML as frozen dataclasses: what is searched, by what, for what, within what limits.

The format is strict like the train config's: every mistake is one line with its dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.training.config import Duration
from model.training.evaluation import METRICS
from orchestrator.config.codec import decode, encode, read_yaml
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError, nearest
from orchestrator.search.constraints import ConstraintsConfig, check_constraints
from orchestrator.search.sample import changed, public
from orchestrator.search.space import Sample, Space, read_space
from orchestrator.search.trial import Objective, Unit

MODEL_METRICS = ("params_m", "gmacs")  # known of every trial
PER_CLASS = "val_class/"
# Weights go from one trial to another: only what leaves their shapes and the data alone may change.
PBT_MAY_CHANGE = ("optim.", "loss.", "data.augment.")
REVERSING_EPOCHS = 90  # reference facts §3: at 30 epochs small jitter leads, at 300 large
KEYS = (
    "name", "train", "objective", "trials", "search", "scheduler", "space", "constraints", "keep",
)  # fmt: skip


@dataclass(frozen=True)
class TrialsConfig:
    """num: configurations to train, each with `seeds` seeds (None: the whole grid).

    concurrent: at once ("auto" in YAML, None here: as many as the cluster has room for).
    workers_per_trial: training processes of each. max_failures: restarts of one trial.
    """

    num: int | None = None
    concurrent: int | None = None
    workers_per_trial: int = 1
    max_failures: int = 2
    seeds: int = 1


@dataclass(frozen=True)
class SearchConfig:
    """algorithm: tpe learns from finished trials; seed: of what is drawn.

    points: known points, trained before others.
    """

    algorithm: Literal["random", "grid", "tpe"] = "random"
    seed: int = 0
    points: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class SchedulerConfig:
    """Which trials are stopped early, by the first objective, counted in `unit`s of training.

    asha: at grace, grace * reduction, … only the best 1 / reduction go on. median: below the
    median of the others' means, from grace on. pbt: every grace the worst take over weights and
    settings of the best. max: a trial's end (None: its train.duration).
    """

    kind: Literal["asha", "median", "pbt", "none"] = "none"
    unit: Unit = "epoch"
    grace: float = 1.0
    max: float | None = None
    reduction: float = 3.0

    def rungs(self, longest: float) -> tuple[float, ...]:
        """Where ASHA decides, the end excluded."""
        found, at = [], self.grace
        while self.kind == "asha" and at < longest:
            found.append(at)
            at *= self.reduction
        return tuple(found)


@dataclass(frozen=True)
class KeepConfig:
    """Checkpoints that outlive the sweep: of the best trials so many each, of all others none."""

    best_of_sweep: int = 3
    best_of_trial: int = 1
    latest_of_trial: int = 1


@dataclass(frozen=True)
class SweepConfig:
    """A whole sweep. base: the training job that samples are laid on."""

    name: str
    base: TrainJob
    objectives: tuple[Objective, ...]
    trials: TrialsConfig
    search: SearchConfig
    scheduler: SchedulerConfig
    space: Space
    constraints: ConstraintsConfig
    keep: KeepConfig

    @property
    def objective(self) -> Objective:
        return self.objectives[0]

    def longest(self) -> float | None:
        """A trial's end in the scheduler's unit; None where only the data can tell."""
        return self.scheduler.max or _in_unit(self.base.train.duration, self.scheduler.unit)

    def to_mapping(self) -> dict[str, Any]:
        """As `read_sweep` would read it, nothing left to another file: what is kept with a sweep."""
        trials = encode(self.trials)
        trials["concurrent"] = self.trials.concurrent or "auto"
        search = encode(self.search) | {"points": [dict(point) for point in self.search.points]}
        return {
            "name": self.name,
            "train": changed(public(self.base)),
            "objective": [encode(objective) for objective in self.objectives],
            "trials": trials,
            "search": search,
            "scheduler": encode(self.scheduler),
            "space": self.space.to_mapping(),
            "constraints": encode(self.constraints),
            "keep": encode(self.keep),
        }

    def notes(self) -> list[str]:
        """What a reader should know before trusting the answer."""
        kind, found = self.scheduler.kind, []
        if kind in ("asha", "median") and len(self.objectives) > 1:
            found.append(
                f"{kind} stops trials by {self.objective.metric} alone: cheap networks, the other "
                "end of the Pareto front, are stopped first (scheduler.kind none keeps them)"
            )
        short = self.scheduler.unit == "epoch" and self.scheduler.grace < REVERSING_EPOCHS
        jitter = [d.path for d in self.space.dimensions if d.path.startswith("data.augment")]
        if kind in ("asha", "median") and short and jitter:
            found.append(
                f"{jitter[0]}: on COCO the best jitter at 30 epochs is not the best at 300 "
                f"(paper, figure 8); stopping at {self.scheduler.grace:g} epochs prefers the weak"
            )
        return found


def read_sweep(path: Path) -> SweepConfig:
    """A sweep from its file; a relative `train:` is looked for beside it.

    Raises:
        ConfigError: anything that is not understood or could not work.
    """
    return decode_sweep(read_yaml(path), folder=path.parent, name=path.stem)


def decode_sweep(
    given: Mapping[str, Any], *, folder: Path | None = None, name: str = "sweep"
) -> SweepConfig:
    """A sweep from a mapping. name: where it gives none.

    Raises:
        ConfigError: as for `read_sweep`.
    """
    for key in map(str, given):
        if key not in KEYS:
            raise ConfigError(key, "a known key", repr(key), nearest(key, KEYS))
    named = given.get("name", name)
    if not isinstance(named, str) or not named:
        raise ConfigError("name", "text", repr(named), "correct it")
    search = dict(_section(given, "search"))
    points = search.pop("points", None) or []
    trials = dict(_section(given, "trials"))
    if trials.get("concurrent") == "auto":
        trials["concurrent"] = None
    base = _base(given.get("train"), folder or Path())
    space = read_space(given.get("space"))
    decoded = decode(SearchConfig, search, "search")
    sweep = SweepConfig(
        name=named,
        base=base,
        objectives=_objectives(given.get("objective")),
        trials=decode(TrialsConfig, trials, "trials"),
        search=SearchConfig(decoded.algorithm, decoded.seed, _points(points, space)),
        scheduler=decode(SchedulerConfig, _section(given, "scheduler"), "scheduler"),
        space=space,
        constraints=decode(ConstraintsConfig, _section(given, "constraints"), "constraints"),
        keep=decode(KeepConfig, _section(given, "keep"), "keep"),
    )
    _check_numbers(sweep)
    check_constraints(sweep.constraints, "constraints")
    _check_search(sweep)
    _check_scheduler(sweep)
    return sweep


def known_metrics(classes: Sequence[str] = ()) -> list[str]:
    """What an objective may be; classes: names in the data, once they are known."""
    return [
        *(f"val/{name}" for name in METRICS),
        *(f"model/{name}" for name in MODEL_METRICS),
        *(f"{PER_CLASS}{name}" for name in classes),
    ]


def check_objectives(sweep: SweepConfig, classes: Sequence[str]) -> None:
    """Raises ConfigError for the AP of a class that the data has not."""
    for place, objective in enumerate(sweep.objectives):
        _check_metric(objective.metric, known_metrics(classes), f"objective[{place}].metric")


def _section(given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = given.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ConfigError(key, "a mapping", repr(section), "see jobs/sweeps/")
    return section


def _base(given: Any, folder: Path) -> TrainJob:
    if given is None:
        raise ConfigError(
            "train", "a train YAML or a mapping", "nothing", "as in train: ../configs/coco.yaml",
        )  # fmt: skip
    if isinstance(given, str):
        path = folder / Path(given).expanduser()
        if not path.is_file():
            near = [str(Path(given).parent / p.name) for p in path.parent.glob("*.yaml")]
            raise ConfigError("train", "a YAML file", f"none at {path}", nearest(given, near))
        given = read_yaml(path)
    if not isinstance(given, Mapping):
        raise ConfigError("train", "a train YAML or a mapping", repr(given), "correct it")
    # Below "train": the same key means the same place whether it is written here or in the file.
    return decode(TrainJob, given, "train")


def _objectives(given: Any) -> tuple[Objective, ...]:
    listed = given if isinstance(given, list) else [given]
    if given is None or not listed:
        raise ConfigError(
            "objective", "{metric: NAME}, or a list of them", "nothing",
            "as in {metric: val/AP, mode: max}",
        )  # fmt: skip
    found: list[Objective] = []
    for place, one in enumerate(listed):
        where = f"objective[{place}]" if isinstance(given, list) else "objective"
        if not isinstance(one, Mapping) or "metric" not in one:
            raise ConfigError(where, "{metric: NAME, mode: max}", repr(one), "name a metric")
        mode = "min" if str(one["metric"]).startswith("model/") else "max"
        objective = decode(Objective, {"mode": mode, **one}, where)
        if not objective.metric.startswith(PER_CLASS):  # those are known with the data only
            _check_metric(objective.metric, known_metrics(), f"{where}.metric")
        if objective.metric in [other.metric for other in found]:
            raise ConfigError(
                f"{where}.metric", "each metric once", repr(objective.metric), "remove one",
            )  # fmt: skip
        found.append(objective)
    if found[0].metric.startswith("model/"):
        raise ConfigError(
            "objective", "a val/… metric first", repr(found[0].metric),
            "what no training changes needs no sweep",
        )  # fmt: skip
    return tuple(found)


def _check_metric(metric: str, known: Sequence[str], where: str) -> None:
    if metric not in known:
        raise ConfigError(
            where, f"a metric that is reported ({', '.join(known)})", repr(metric),
            nearest(metric, known),
        )  # fmt: skip


def _points(given: Any, space: Space) -> tuple[Sample, ...]:
    if not isinstance(given, list) or not all(isinstance(point, Mapping) for point in given):
        raise ConfigError("search.points", "a list of {path: value}", repr(given), "correct it")
    return tuple(space.check(point, f"search.points[{i}]") for i, point in enumerate(given))


def _check_numbers(sweep: SweepConfig) -> None:
    trials, scheduler, keep = sweep.trials, sweep.scheduler, sweep.keep
    for where, value, least in (
        ("trials.num", trials.num, 1),
        ("trials.concurrent", trials.concurrent, 1),
        ("trials.workers_per_trial", trials.workers_per_trial, 1),
        ("trials.max_failures", trials.max_failures, 0),
        ("trials.seeds", trials.seeds, 1),
        ("search.seed", sweep.search.seed, 0),
        ("keep.best_of_sweep", keep.best_of_sweep, 1),
        ("keep.best_of_trial", keep.best_of_trial, 1),
        ("keep.latest_of_trial", keep.latest_of_trial, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(where, f"at least {least}", str(value), "correct it")
    for where, number, above in (
        ("scheduler.grace", scheduler.grace, 0),
        ("scheduler.max", scheduler.max, 0),
        ("scheduler.reduction", scheduler.reduction, 1),
    ):
        if number is not None and not number > above:
            raise ConfigError(where, f"more than {above}", f"{number:g}", "correct it")


def _check_search(sweep: SweepConfig) -> None:
    algorithm, num = sweep.search.algorithm, sweep.trials.num
    endless = next((d.path for d in sweep.space.dimensions if d.domain.size is None), None)
    if algorithm == "grid":
        if endless is not None:
            raise ConfigError(
                f"space.{endless}", "a choice, quniform or randint for a grid",
                "a continuous range", "search.algorithm: random or tpe",
            )  # fmt: skip
        return
    if num is None:
        raise ConfigError(
            "trials.num", f"a number of trials for {algorithm}", "nothing",
            "only a grid ends by itself",
        )  # fmt: skip
    size = sweep.space.size()
    if size is not None and num > size:
        raise ConfigError(
            "trials.num", f"at most the {size} points of the space", str(num),
            "lower it; trials.seeds repeats points",
        )  # fmt: skip


def _check_scheduler(sweep: SweepConfig) -> None:
    scheduler, duration = sweep.scheduler, sweep.base.train.duration
    total = _in_unit(duration, scheduler.unit)
    if scheduler.max is not None and total is not None and scheduler.max > total:
        raise ConfigError(
            "scheduler.max", f"at most train.duration, {total:g} {scheduler.unit}s",
            f"{scheduler.max:g}", "lower it, or train for longer",
        )  # fmt: skip
    if scheduler.kind == "none":
        return
    longest = sweep.longest()
    if longest is None:
        raise ConfigError(
            "scheduler.max", f"a number of {scheduler.unit}s", "nothing",
            f"train.duration is not in {scheduler.unit}s: give max, or another unit",
        )  # fmt: skip
    if scheduler.grace >= longest:
        raise ConfigError(
            "scheduler.grace", f"less than the {longest:g} {scheduler.unit}s of a trial",
            f"{scheduler.grace:g}", "lower it, or kind: none",
        )  # fmt: skip
    if scheduler.kind == "pbt":
        _check_pbt(sweep)


def _check_pbt(sweep: SweepConfig) -> None:
    search, trials, several = sweep.search, sweep.trials, len(sweep.objectives)
    for where, wrong, expected, got in (
        ("search.algorithm", search.algorithm != "random", "random", search.algorithm),
        ("trials.seeds", trials.seeds > 1, "1", str(trials.seeds)),
        ("objective", several > 1, "one metric", f"{several} metrics"),
    ):
        if wrong:
            remedy = "trials take over from one another as they go: correct it, or kind: asha"
            raise ConfigError(where, f"{expected} with pbt", got, remedy)
    for dimension in sweep.space.dimensions:
        path = dimension.path
        if dimension.domain.size != 1 and not path.startswith(PBT_MAY_CHANGE):
            knobs = ", ".join(f"{prefix}*" for prefix in PBT_MAY_CHANGE)
            raise ConfigError(
                f"space.{path}", f"a knob of {knobs} with pbt, which copies weights", repr(path),
                "fix it with value, or scheduler.kind: asha",
            )  # fmt: skip


def _in_unit(duration: Duration, unit: Unit) -> float | None:
    return duration.epochs if unit == "epoch" else duration.steps
