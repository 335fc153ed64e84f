"""What a sweep will be, said before it begins: its space, what is rejected, what it may cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from orchestrator.launch.progress import Row
from orchestrator.launch.resolve import Derived
from orchestrator.search.config import SweepConfig
from orchestrator.search.constraints import Sieve
from orchestrator.search.proposals import Known, Proposals
from orchestrator.search.space import Dimension, Sample
from orchestrator.search.trial import describe_sample, show_value

SHOWN_SAMPLES = 5
TRIED = 500  # samples whose costs say what the others are like
TRIED_KNOBS = 20
TRAINING_COSTS = 3  # forward passes


def outlook(
    sweep: SweepConfig, sieve: Sieve, shape: Derived, longest: float, known: Sequence[Known]
) -> list[Row]:
    """Rows of the preflight's table. longest: of a trial, in the scheduler's unit."""
    size = sweep.space.size()
    rows = [(f"space: {d.path}", _domain(d)) for d in sweep.space.dimensions]
    rows.append(("points of the space", "endless" if size is None else f"{size:,}"))
    if known:
        rows.append(("begun before", f"{len(known)} configurations, not trained again"))
    typical = [sieve.gmacs(sample) for sample in _typical(sweep)]
    feasible = [gmacs for gmacs in typical if gmacs is not None]
    rejected = 1 - len(feasible) / len(typical)
    which = "the grid" if sweep.search.algorithm == "grid" else f"{TRIED} random samples"
    said = f"parameters and MACs reject {rejected:.1%} of {which}"
    if sieve.tried:
        said += f"; {sieve.describe()}"
    rows.append(("constraints", said))
    num = len(feasible) if sweep.trials.num is None else sweep.trials.num
    left = max(0, num - len(known)) * sweep.trials.seeds
    gmacs = sum(feasible) / len(feasible) if feasible else 0.0
    rows.append(("to train", _plan(sweep, left, longest)))
    rows.append(("cost", _cost(sweep, gmacs, shape, longest, left)))
    rows += [("note", f"{path} changes nothing here") for path in idle_knobs(sweep, sieve)]
    return rows


def idle_knobs(sweep: SweepConfig, sieve: Sieve) -> list[str]:
    """Knobs of the network whose values all give the same one, as width does at phi 0."""
    samples = list(itertools.islice(_typical(sweep), TRIED_KNOBS))
    found = []
    for dimension in sweep.space.dimensions:
        path, domain = dimension.path, dimension.domain
        if not path.startswith("model.") or domain.size in (None, 1):
            continue
        having = [sample for sample in samples if path in sample]
        if having and not any(
            len({sieve.budget.network_of(sieve.base, {**sample, path: value})
                 for value in domain.values()}) > 1
            for sample in having
        ):  # fmt: skip
            found.append(path)
    return found


def first_samples(sweep: SweepConfig, source: Proposals) -> list[Row]:
    """The first that would be trained."""
    knobs = [dimension.path for dimension in sweep.space.dimensions]
    found = []
    for place in range(SHOWN_SAMPLES):
        sample = source.next()
        if sample is None:
            break
        found.append((f"sample {place + 1}", describe_sample(sample, knobs)))
    return found


def _plan(sweep: SweepConfig, trials: int, longest: float) -> str:
    scheduler, unit = sweep.scheduler, sweep.scheduler.unit
    seeds = f", {sweep.trials.seeds} seeds each" if sweep.trials.seeds > 1 else ""
    text = f"{trials} trials{seeds}, up to {longest:g} {unit}s; {sweep.search.algorithm}"
    rungs = scheduler.rungs(longest)
    if rungs:
        at = ", ".join(f"{rung:g}" for rung in rungs)
        return f"{text}, asha at {unit} {at}: the best 1 of {scheduler.reduction:g} go on"
    return f"{text}, {scheduler.kind if scheduler.kind != 'none' else 'no early stopping'}"


def _cost(sweep: SweepConfig, gmacs: float, shape: Derived, longest: float, trials: int) -> str:
    """Training is counted as three forward passes of each image."""
    epochs = longest
    if sweep.scheduler.unit == "step":
        epochs = longest / shape.schedule.steps_per_epoch
    images = trials * epochs * shape.num_train
    total = _macs(images * gmacs * TRAINING_COSTS * 1e9)
    text = f"at most {images:,.0f} images, {total} (mean network {gmacs:.3g} GMACs)"
    share = _asha_share(sweep, longest)
    return f"{text}; asha expects about {share:.0%} of it" if share < 1 else text


def _macs(number: float) -> str:
    power = min(6, int(math.log10(max(number, 1.0)) // 3))
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}MACs"


def _typical(sweep: SweepConfig) -> Iterator[Sample]:
    """What the sweep will draw from: a grid itself, else some random samples."""
    if sweep.search.algorithm == "grid":
        return sweep.space.grid()
    return (sweep.space.sample(sweep.search.seed, index) for index in range(TRIED))


def _asha_share(sweep: SweepConfig, longest: float) -> float:
    """Of all trials to their end, where one in `reduction` passes each rung."""
    share, going, before = 0.0, 1.0, 0.0
    for rung in [*sweep.scheduler.rungs(longest), longest]:
        share += going * (rung - before)
        going, before = going / sweep.scheduler.reduction, rung
    return share / longest


def _domain(dimension: Dimension) -> str:
    [(kind, values)] = list(dimension.domain.to_mapping().items())
    listed = values if isinstance(values, list) else [values]
    text = f"{kind} {', '.join(show_value(value) for value in listed)}"
    for condition in dimension.when:
        shown = " or ".join(show_value(value) for value in condition.values)
        text += f", where {condition.path} is {shown}"
    return text
