"""What Ray Tune asks for its next trial, and tells what became of it.

Everything a sweep knows passes here: the ledger is written, and proposals are told, in one place,
whoever runs the trials.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from orchestrator.errors import ConfigError
from orchestrator.search.constraints import Budget
from orchestrator.search.ledger import Entry, Ledger
from orchestrator.search.proposals import Known, Proposals, Values
from orchestrator.search.sample import apply, arm_key, with_seed
from orchestrator.search.space import Sample
from orchestrator.search.trial import Objective

Tell = Callable[[str, Entry], None]


class Supply(Searcher):
    """Ray Tune's searcher of a sweep. Its own state is the ledger; Tune saves none.

    concurrent: trials at once. seeds: of each arm. tell: called with "began", "scored" or "ended"
    and the trial.
    """

    def __init__(
        self,
        proposals: Proposals,
        ledger: Ledger,
        budget: Budget,
        base: Any,
        objectives: Sequence[Objective],
        *,
        concurrent: int,
        seeds: int = 1,
        tell: Tell = lambda what, entry: None,
    ) -> None:
        super().__init__(metric=objectives[0].metric, mode=objectives[0].mode)
        self.proposals, self.ledger, self.budget, self.base = proposals, ledger, budget, base
        self.objectives, self.concurrent, self.seeds, self.tell = (
            objectives,
            concurrent,
            seeds,
            tell,
        )
        self.error: ConfigError | None = None
        self.note = ""
        self.interrupted = False
        self.running: dict[str, Entry] = {}
        self._arms: dict[str, list[Entry]] = {}
        for entry in ledger.entries.values():
            self._arms.setdefault(entry.begun_as, []).append(entry)
        self.waiting = deque(e for e in ledger.entries.values() if e.state is None)
        for arm in list(self._arms.values()):
            self._complete(arm)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """A trial's configuration; None: later."""
        if self.error is not None or self.interrupted:
            return Searcher.FINISHED
        if len(self.running) >= self.concurrent:
            return None
        if not self.waiting:
            sample = self._proposed()
            if sample is None:
                return Searcher.FINISHED
            self._begin(sample)
        entry = self.waiting.popleft()
        self.running[trial_id] = entry
        self.ledger.began(entry.trial_id)
        self.tell("began", entry)
        return {
            "trial": entry.trial_id, "sample": dict(entry.sample), "seed": entry.seed,
            "generation": entry.generation,
        }  # fmt: skip

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        entry = self.running.get(trial_id)
        if entry is not None:
            self._score(entry, result)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        entry = self.running.pop(trial_id, None)
        if entry is None:
            return
        found = result or {}
        self._score(entry, found)  # Tune hands the last one over here only
        if "state" in found:
            self.ledger.end(entry.trial_id, found["state"], found.get("reason", ""))
        elif error:
            self.ledger.end(entry.trial_id, "failed", "its process died more often than allowed")
        elif not self.interrupted:
            self.ledger.end(entry.trial_id, "stopped")
        self.tell("ended", entry)
        arm = self._arms[entry.begun_as]
        if all(one.state is not None for one in arm):
            self.proposals.tell(entry.begun_as, values_of(arm, self.objectives))

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes down what it is given, and we never restore it."""
        return {}

    def explain(self, trial: str, reason: str) -> None:
        """Why a trial was given up."""
        self.ledger.end(trial, "failed", reason)

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        return None

    def _proposed(self) -> Sample | None:
        try:
            return self.proposals.next()
        except ConfigError as error:  # too few samples are feasible
            if self.ledger.entries:  # what was trained is an answer
                self.note = f"no more than these: {error}"
            else:
                self.error = error
            return None

    def _begin(self, sample: Sample) -> None:
        job = apply(self.base, sample)
        params_m, gmacs = self.budget.closed_forms(self.budget.network(job))
        arm = arm_key(job)
        for number in range(self.seeds):
            seed = with_seed(job, number).train.seed
            entry = self.ledger.add(sample, arm, seed, round(params_m * 1e6), gmacs)
            self._arms.setdefault(arm, []).append(entry)
            self.waiting.append(entry)

    def _complete(self, begun: list[Entry]) -> None:
        """Seeds that were not begun when the sweep was interrupted, or that are asked for now."""
        first = begun[0]
        there = {entry.seed for entry in begun}
        job = apply(self.base, first.sample)
        for number in range(self.seeds):
            seed = with_seed(job, number).train.seed
            if seed not in there and first.generation == 0:
                entry = self.ledger.add(
                    first.sample, first.arm, seed, first.num_params, first.gmacs
                )
                begun.append(entry)
                self.waiting.append(entry)

    def _score(self, entry: Entry, result: Mapping[str, Any]) -> None:
        if entry.state is not None or "step" not in result:
            return
        sample = json.loads(result["sample"])
        if sample != entry.sample:
            job = apply(self.base, sample)
            self.ledger.changed(entry.trial_id, sample, arm_key(job))
        self.ledger.scored(entry.trial_id, result)
        missing = [o.metric for o in self.objectives if o.metric not in result]
        if missing and any(key.startswith("val/") for key in result):
            there = sorted(k for k in result if k.startswith(("val/", "model/")))
            self.error = self.error or ConfigError(
                "objective.metric", f"a metric that an evaluation of this data has ({', '.join(there)})",
                f"{missing[0]!r}, which it has not", "choose another",
            )  # fmt: skip
        self.tell("scored", entry)


def values_of(arm: Sequence[Entry], objectives: Sequence[Objective]) -> Values | None:
    """Means over an arm's seeds; None where one of them failed."""
    found = {}
    for objective in objectives:
        values = [entry.record().value(objective) for entry in arm]
        known = [value for value in values if value is not None]
        if len(known) < len(arm):
            return None
        found[objective.metric] = sum(known) / len(known)
    return found


def known_arms(ledger: Ledger, objectives: Sequence[Objective]) -> list[Known]:
    """What was begun, for `proposals`."""
    arms: dict[str, list[Entry]] = {}
    for entry in ledger.entries.values():
        arms.setdefault(entry.begun_as, []).append(entry)
    found = []
    for key, arm in arms.items():
        ended = all(entry.state is not None for entry in arm)
        found.append(
            Known(key, arm[0].sample, ended, values_of(arm, objectives) if ended else None)
        )
    return found
