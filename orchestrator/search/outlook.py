"""What a sweep will be, said before it begins: its space, what is rejected, what it may cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.launch.progress import Row
from orchestrator.launch.resolve import Derived
from orchestrator.search.config import SweepConfig
from orchestrator.search.constraints import Sieve
from orchestrator.search.proposals import Known, Proposals
from orchestrator.search.space import Dimension
from orchestrator.search.trial import describe_sample, show_value

SHOWN_SAMPLES = 5
TRIED = 500  # samples whose costs say what the others are like
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
    rows += [("constraints", sieve.describe())]
    num = sweep.trials.num if sweep.trials.num is not None else size or 0
    left = max(0, num - len(known)) * sweep.trials.seeds
    rows.append(("to train", _plan(sweep, left, longest)))
    rows.append(("cost", _cost(sweep, sieve, shape, longest, left)))
    return rows


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


def _cost(sweep: SweepConfig, sieve: Sieve, shape: Derived, longest: float, trials: int) -> str:
    """Training is counted as three forward passes of each image."""
    epochs = longest
    if sweep.scheduler.unit == "step":
        epochs = longest / shape.schedule.steps_per_epoch
    gmacs = _mean_gmacs(sweep, sieve)
    images = trials * epochs * shape.num_train
    total = _macs(images * gmacs * TRAINING_COSTS * 1e9)
    text = f"at most {images:,.0f} images, {total} (mean network {gmacs:.3g} GMACs)"
    share = _asha_share(sweep, longest)
    return f"{text}; asha expects about {share:.0%} of it" if share < 1 else text


def _macs(number: float) -> str:
    power = min(6, int(math.log10(max(number, 1.0)) // 3))
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}MACs"


def _mean_gmacs(sweep: SweepConfig, sieve: Sieve) -> float:
    found = []
    for index in range(TRIED):
        gmacs = sieve.gmacs(sweep.space.sample(sweep.search.seed, index))
        if gmacs is not None:
            found.append(gmacs)
    return sum(found) / len(found) if found else 0.0


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
