"""What a run must show before its model is promoted. Plain data in, verdict and reason out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OBJECTIVE = "val/AP"


@dataclass(frozen=True)
class Gate:
    """name: what is asked; found: what was there, in a few words."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class RunFacts:
    """What the tracker knows of a run.

    outcome: how it ended, None while it runs. validation: digests of its validation data, empty
    where none was recorded; then validation_guess, its data's root and number of validation images.
    """

    run_id: str
    outcome: str | None
    rolled_back: bool
    validation: frozenset[str]
    validation_guess: tuple[str, str] | None


@dataclass(frozen=True)
class Champion:
    """The version that is served. facts: of its run, None if the tracker no longer has it.

    same: it is the very checkpoint that is to be promoted.
    """

    version: str
    metrics: Mapping[str, float]
    facts: RunFacts | None
    same: bool = False


def finished(facts: RunFacts, *, allowed: bool) -> Gate:
    ok = facts.outcome == "finished"
    found = f"the run {facts.outcome}" if facts.outcome else "the run has not ended"
    return Gate("run finished", ok or allowed, found + _allowed(ok, allowed, "--allow-unfinished"))


def stable(facts: RunFacts, lr_factor: float) -> Gate:
    """lr_factor: the checkpoint's; below 1 after a roll back."""
    if facts.outcome == "diverged":
        return Gate("no divergence", False, "the run diverged")
    if facts.rolled_back or lr_factor < 1.0:
        return Gate("no divergence", False, "the run diverged once and was rolled back")
    return Gate("no divergence", True, "the loss stayed finite")


def required(metrics: Mapping[str, float], asked: Sequence[tuple[str, float]]) -> list[Gate]:
    """asked: (metric, least). A missing metric fails, and so does NaN."""
    gates = []
    for name, least in asked:
        value = metrics.get(name)
        found = "missing" if value is None else f"{value:.4g}"
        gates.append(Gate(f"{name} >= {least:g}", value is not None and value >= least, found))
    return gates


def not_worse(
    facts: RunFacts,
    metrics: Mapping[str, float],
    champion: Champion | None,
    objective: str,
    *,
    allowed: bool,
) -> Gate:
    """Higher is better; only numbers of the same validation data are compared."""
    name = f"{objective} not below the champion's"
    if champion is None:
        return Gate(name, True, "there is no champion yet")
    if champion.same:
        return Gate(name, True, f"it is version {champion.version}")
    ours, theirs = metrics.get(objective), champion.metrics.get(objective)
    trouble = _incomparable(facts, champion)
    if trouble is None and (ours is None or theirs is None):
        trouble = (
            f"{objective} of {'this checkpoint' if ours is None else 'the champion'} is missing"
        )
    if trouble is not None:
        found, ok = f"not comparable with version {champion.version}: {trouble}", False
    else:
        assert ours is not None
        assert theirs is not None
        found, ok = f"{ours:.4g}, version {champion.version} has {theirs:.4g}", ours >= theirs
    return Gate(name, ok or allowed, found + _allowed(ok, allowed, "--allow-worse"))


def _incomparable(facts: RunFacts, champion: Champion) -> str | None:
    """Why scores of the two runs say nothing about each other, None if they do."""
    theirs = champion.facts
    if theirs is None:
        return "its run is not in the tracker"
    if facts.run_id == theirs.run_id:
        return None
    if facts.validation and theirs.validation:
        return None if facts.validation == theirs.validation else "other validation data"
    if facts.validation_guess is None or theirs.validation_guess is None:
        return "its validation data is not known"
    if facts.validation_guess == theirs.validation_guess:
        return None
    root, number = theirs.validation_guess
    return f"it was scored on {number} images of {root}"


def _allowed(ok: bool, allowed: bool, flag: str) -> str:
    return f" ({flag})" if allowed and not ok else ""
