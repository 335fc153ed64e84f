"""Whole sweeps through the code that runs them, with made-up trials in place of training."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.simulation import (
    OPTIMUM_AP,
    Course,
    Simulated,
    World,
    planted,
    planted_ap,
    simulate,
    sweep_mapping,
)
from ray.tune.schedulers import MedianStoppingRule

from orchestrator.search import proposals as proposals_module
from orchestrator.search.config import SweepConfig, decode_sweep
from orchestrator.search.constraints import Budget
from orchestrator.search.sample import apply, arm_key
from orchestrator.search.schedulers import Median, Numbered, make_scheduler, recall
from orchestrator.search.verdict import leaderboard, winner

NEAR = 0.006  # AP; twice the noise between seeds
FUSIONS = ["fast", "softmax", "unbounded", "sum"]
SEEDS = 20


def sweep_of(num: int | None, **settings: Any) -> SweepConfig:
    return decode_sweep(sweep_mapping(num, **settings))


def until_near(found: Simulated) -> int:
    """Trials up to the first close to the optimum; all of them and one where none is."""
    for number, trial_id in enumerate(found.begun, 1):
        if planted_ap(found.entries[trial_id].sample) >= OPTIMUM_AP - NEAR:
            return number
    return len(found.begun) + 1


@pytest.mark.slow
def test_tpe_needs_at_most_0_6_of_the_trials_of_random_search(tmp_path: Path) -> None:
    needed: dict[str, list[int]] = {"random": [], "tpe": []}
    for seed in range(SEEDS):
        for name, num in (("random", 240), ("tpe", 144)):
            sweep = sweep_of(num, search={"algorithm": name, "seed": seed})
            folder = tmp_path / f"{name}-{seed}"
            found = simulate(sweep, planted(27), 4, folder, evaluate_every=27)
            needed[name].append(until_near(found))
    medians = {name: statistics.median(numbers) for name, numbers in needed.items()}
    print(f"trials until within {NEAR} of the optimum: {medians}, {needed}")
    assert medians["random"] < 240
    assert medians["tpe"] <= 0.6 * medians["random"]


@pytest.mark.slow
def test_asha_spends_at_most_0_4_of_the_epochs_and_keeps_the_winner(tmp_path: Path) -> None:
    shares, kept, early = [], 0, []
    for seed in range(SEEDS):
        found = {}
        for kind in ("none", "asha"):
            sweep = sweep_of(48, kind=kind, epochs=81, grace=9, search={"seed": seed})
            folder = tmp_path / f"{kind}-{seed}"
            found[kind] = simulate(sweep, planted(81), 8, folder, evaluate_every=3)
        shares.append(found["asha"].epochs / found["none"].epochs)
        best = [leaderboard(one.records, sweep.objective)[0].record for one in found.values()]
        kept += best[0].arm == best[1].arm
        early.append(rank_correlation(found["none"], at=2))
    print(f"epochs {statistics.median(shares):.3f} (most {max(shares):.3f}), winner kept {kept}, "
          f"rank correlation of grace and end {statistics.median(early):.2f}")  # fmt: skip
    assert max(shares) <= 0.4
    assert kept >= 19
    assert 0.5 < statistics.median(early) < 0.98  # the curves do cross


def rank_correlation(found: Simulated, at: int) -> float:
    curves = [entry.curve for entry in found.entries.values()]
    ranks = [np.argsort(np.argsort([curve[i][2] for curve in curves])) for i in (at, -1)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_what_breaks_a_limit_never_starts(tmp_path: Path, algorithm: str) -> None:
    sweep = sweep_of(12, algorithm=algorithm, constraints={"max_params_m": 3.85})
    found = simulate(sweep, planted(27), 4, tmp_path, evaluate_every=27)
    budget = Budget(sweep.constraints, 8)
    for entry in found.entries.values():
        assert not budget.rejections(apply(sweep.base, entry.sample))
    assert len(found.begun) == 12
    assert found.sieve.rejected["model/params_m"] > 0


def test_a_trial_that_diverges_is_failed_with_its_reason_and_never_wins(tmp_path: Path) -> None:
    def objective(sample: Mapping[str, Any], seed: int) -> Course:
        course = planted(27)(sample, seed)
        if sample["model.fusion"] == "sum":  # it led until then
            return replace(
                course, at=lambda epoch: {"val/AP": 0.9}, fails_at=5, reason="nan at 500"
            )
        if sample["model.fusion"] == "unbounded":  # before any evaluation
            return replace(course, fails_at=0.5, reason="nan at 50")
        return course

    for kind in ("none", "asha", "median"):
        sweep = sweep_of(24, kind=kind)
        found = simulate(sweep, objective, 4, tmp_path / kind)
        won = winner(found.records, sweep.objective)
        assert won is not None
        assert won.record.sample["model.fusion"] in ("fast", "softmax")
        failed = [record for record in found.records if record.state == "failed"]
        assert {record.reason for record in failed} == {"nan at 50", "nan at 500"}
        assert len(found.begun) == 24


def test_nan_at_first_hides_no_later_value(tmp_path: Path) -> None:
    def objective(sample: Mapping[str, Any], seed: int) -> Course:
        return Course(lambda epoch: {"val/AP": math.nan if epoch == 1 else 0.2})

    for kind in ("none", "asha", "median"):
        sweep = sweep_of(6, kind=kind)
        found = simulate(sweep, objective, 2, tmp_path / kind)
        assert [record.value(sweep.objective) for record in found.records] == [0.2] * 6


def test_a_process_that_dies_costs_what_follows_its_checkpoint(tmp_path: Path) -> None:
    def objective(sample: Mapping[str, Any], seed: int) -> Course:
        often = sample["model.fusion"] == "sum"
        dies_at = (3.5, 4.5, 5.5) if often else (2.5,)
        return replace(planted(9)(sample, seed), dies_at=dies_at)

    sweep = sweep_of(12, epochs=9)
    world = World()
    found = simulate(sweep, objective, 3, tmp_path, world=world)
    for trial_id, entry in found.entries.items():
        if entry.sample["model.fusion"] == "sum":
            assert (entry.state, entry.reason) == (
                "failed", "its process died more often than allowed",
            )  # fmt: skip
        else:
            assert entry.state == "finished"
            assert world.trained[trial_id] == 9.5
            assert [point[0] for point in entry.curve] == list(range(1, 10))
            assert len(entry.seconds) == 2


@pytest.mark.parametrize(
    ("algorithm", "kind"), [("random", "asha"), ("random", "median"), ("tpe", "asha"), ("grid", "none")]
)  # fmt: skip
def test_killed_anywhere_and_resumed_it_trains_each_trial_once(
    tmp_path: Path, algorithm: str, kind: str
) -> None:
    settings: dict[str, Any] = {"algorithm": algorithm, "kind": kind, "epochs": 9}
    num: int | None = 10
    if algorithm == "grid":
        num = None
        settings["space"] = {
            "model.fusion": {"choice": FUSIONS}, "model.scaling.depth": {"choice": [0, 1]},
            "model.scaling.width": {"value": 1.35}, "optim.lr_per_64": {"value": 0.09},
        }  # fmt: skip
    sweep = sweep_of(num, **settings)
    whole = simulate(sweep, planted(9), 3, tmp_path / "whole")
    lines = sum(1 for _ in (tmp_path / "whole" / "trials.jsonl").open())
    chance = random.Random(algorithm + kind)
    for attempt in range(4):
        folder, world, ended = tmp_path / str(attempt), World(), dict[str, str | None]()
        for left in sorted((chance.randrange(lines * 2 // 3) for _ in range(3)), reverse=True):
            found = simulate(sweep, planted(9), 3, folder, world=world, kill_after=left)
            assert not set(ended) & set(found.begun)
            ended = {t: e.state for t, e in found.entries.items() if e.state is not None}
        found = simulate(sweep, planted(9), 3, folder, world=world)
        assert not set(ended) & set(found.begun)
        assert len(found.entries) == len(whole.entries)
        assert len({entry.arm for entry in found.entries.values()}) == len(found.entries)
        for trial_id, entry in found.entries.items():
            assert entry.state in ("finished", "stopped")
            epochs = [point[0] for point in entry.curve]
            # Each evaluation left a checkpoint, so nothing is trained again; one whose checkpoint
            # was written and whose line was not is missed, at most one for each time it was killed.
            assert world.trained[trial_id] == (9 if entry.state == "finished" else epochs[-1])
            assert epochs == sorted(set(epochs))
            assert len(epochs) >= world.trained[trial_id] - 3
        if algorithm != "tpe":  # what is drawn does not hang on what is known
            arms = [{entry.arm for entry in one.entries.values()} for one in (whole, found)]
            assert arms[0] == arms[1]


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_extending_8_to_12_trains_4(tmp_path: Path, algorithm: str) -> None:
    world = World()
    first = simulate(sweep_of(8, algorithm=algorithm), planted(27), 2, tmp_path, world=world)
    before = dict(world.trained)
    more = simulate(sweep_of(12, algorithm=algorithm), planted(27), 2, tmp_path, world=world)
    assert (len(first.begun), len(more.begun)) == (8, 4)
    assert {trial_id: world.trained[trial_id] for trial_id in before} == before
    assert len({entry.arm for entry in more.entries.values()}) == 12


def test_seeds_belong_to_one_arm_and_more_can_be_asked_for(tmp_path: Path) -> None:
    two = sweep_of(5, trials={"num": 5, "seeds": 2})
    simulate(two, planted(27), 3, tmp_path, evaluate_every=9, kill_after=7)
    found = simulate(two, planted(27), 3, tmp_path, evaluate_every=9)
    seeds: dict[str, set[int]] = {}
    for entry in found.entries.values():
        seeds.setdefault(entry.arm, set()).add(entry.seed)
    assert len(found.entries) == 10
    assert [len(those) for those in seeds.values()] == [2] * 5
    three = sweep_of(5, trials={"num": 5, "seeds": 3})
    more = simulate(three, planted(27), 3, tmp_path, evaluate_every=9)
    assert len(more.begun) == 5
    assert len({entry.arm for entry in more.entries.values()}) == 5


def test_a_metric_that_is_never_reported_ends_the_sweep_in_one_line(tmp_path: Path) -> None:
    sweep = sweep_of(8, objective={"metric": "val/APs"})
    found = simulate(sweep, planted(27), 2, tmp_path)
    assert found.supply.error is not None
    text = str(found.supply.error)
    assert "'val/APs', which it has not" in text
    assert "val/AP" in text
    assert "\n" not in text
    assert found.epochs <= 2


def test_several_objectives_by_tpe_reach_both_ends(tmp_path: Path) -> None:
    both = [{"metric": "val/AP"}, {"metric": "model/gmacs"}]
    sweep = sweep_of(40, algorithm="tpe", objective=both)
    base, budget = sweep.base, Budget(sweep.constraints, 8)

    def objective(sample: Mapping[str, Any], seed: int) -> Course:
        course = planted(27)(sample, seed)
        gmacs = budget.closed_forms(budget.network(apply(base, sample)))[1]
        return replace(course, at=lambda epoch: {**course.at(epoch), "model/gmacs": gmacs})

    simulate(sweep, objective, 4, tmp_path, evaluate_every=27, kill_after=60)
    found = simulate(sweep, objective, 4, tmp_path, evaluate_every=27)
    assert found.states() == {"finished": 40}
    depths = [entry.sample["model.scaling.depth"] for entry in found.entries.values()]
    assert depths.count(-1) >= 8  # cheap ones are the other end of the front


def test_tpe_that_forgets_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposals_module, "HISTORY", 30)
    monkeypatch.setattr(proposals_module, "MOST_GOOD", 10)
    sweep = sweep_of(120, algorithm="tpe")
    found = simulate(sweep, planted(27), 4, tmp_path, evaluate_every=27)
    tpe = found.supply.proposals
    assert isinstance(tpe, proposals_module.Tpe)
    assert len(tpe._study.get_trials(deepcopy=False)) <= 2 * 30 + 10 + 4
    assert len({entry.arm for entry in found.entries.values()}) == 120
    late = [planted_ap(found.entries[trial_id].sample) for trial_id in found.begun[-40:]]
    early = [planted_ap(found.entries[trial_id].sample) for trial_id in found.begun[:20]]
    assert statistics.median(late) > statistics.median(early) + 0.02


def test_tpe_proposes_the_values_of_the_space(tmp_path: Path) -> None:
    """1.4000000000000001 would be another arm than 1.4, and no condition would hold."""
    space = {
        "model.scaling.width": {"quniform": [1.1, 1.6, 0.1]},
        "optim.momentum": {"uniform": [0.8, 0.95], "when": {"model.scaling.width": [1.4]}},
    }
    sweep = sweep_of(30, algorithm="tpe", space=space)

    def objective(sample: Mapping[str, Any], seed: int) -> Course:
        return Course(lambda epoch: {"val/AP": -abs(sample["model.scaling.width"] - 1.4)})

    found = simulate(sweep, objective, 1, tmp_path, evaluate_every=27)
    samples = [entry.sample for entry in found.entries.values()]
    widths = {sample["model.scaling.width"] for sample in samples}
    assert widths <= {1.1, 1.2, 1.3, 1.4, 1.5, 1.6}
    for sample in samples:
        assert ("optim.momentum" in sample) == (sample["model.scaling.width"] == 1.4)


def test_a_trial_that_pbt_changed_ends_and_is_known_by_what_it_began_as(tmp_path: Path) -> None:
    sweep = sweep_of(2)
    found = simulate(sweep, planted(27), 1, tmp_path, kill_after=3)
    supply = found.supply
    [entry] = supply.running.values()
    supply.ledger._file = supply.ledger.path.open("a")
    text = supply.ledger.path.read_text()
    supply.ledger.path.write_text(text[: text.rfind("\n") + 1])
    changed = {**entry.sample, "optim.lr_per_64": 0.123}
    result = {
        "step": 900, "epoch": 9.0, "process": "p", "seconds": 9.0, "val/AP": 0.3,
        "sample": json.dumps(changed),
    }  # fmt: skip
    [tune_id] = supply.running
    supply.on_trial_result(tune_id, result)
    began_as = entry.begun_as
    assert entry.arm == arm_key(apply(sweep.base, changed)) != began_as
    supply.on_trial_complete(tune_id, {**result, "state": "finished"})
    assert entry.state == "finished"
    supply.ledger.close()
    again = simulate(sweep, planted(27), 1, tmp_path)
    assert len(again.begun) == 1
    assert [one.begun_as for one in again.entries.values()].count(began_as) == 1


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_scheduler_that_is_reminded_decides_as_one_that_saw_it(tmp_path: Path, kind: str) -> None:
    """Also of a trial that was interrupted: it is no competitor of its own past."""
    sweep = sweep_of(20, kind=kind, epochs=9)
    killed = simulate(sweep, planted(9), 6, tmp_path, kill_after=70)
    reminded = make_scheduler(sweep)
    recall(reminded, killed.entries.values(), sweep)
    open_ids = [t for t, entry in killed.entries.items() if entry.state is None and entry.curve]
    assert open_ids
    for trial_id in open_ids:
        epoch, _, value = killed.entries[trial_id].curve[-1]
        trial: Any = Numbered(trial_id)
        reminded.on_trial_add(None, trial)
        if isinstance(reminded, Median):
            assert list(reminded._curves).count(trial_id) == 1
            continue  # it may well be stopped now: more others have come as far
        # What it was let go on from, it is let go on from again.
        assert (
            reminded.on_trial_result(None, trial, {"epoch": epoch, "val/AP": value}) == "CONTINUE"
        )
    newcomer: Any = Numbered("new")
    reminded.on_trial_add(None, newcomer)
    assert reminded.on_trial_result(None, newcomer, {"epoch": 1, "val/AP": -1.0}) == "STOP"


class RaysMedian(MedianStoppingRule):  # type: ignore[misc]
    """Without the pauses, for which it asks Tune."""

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return "CONTINUE"


def test_median_stops_as_rays_rule_does() -> None:
    told: dict[str, Any] = {"time_attr": "epoch", "metric": "val/AP", "mode": "max"}
    ours = Median(**told, grace=3)
    theirs = RaysMedian(**told, grace_period=3, min_samples_required=3)
    noise = random.Random(0)
    live: list[Any] = [Numbered(str(number)) for number in range(30)]
    for epoch in range(1, 20):
        for trial in noise.sample(live, len(live)):
            value = (int(trial.trial_id) / 30 + noise.gauss(0, 0.1)) * (1 - math.exp(-epoch / 5))
            result = {"epoch": epoch, "val/AP": value}
            decision = ours.on_trial_result(None, trial, result)
            assert decision == theirs.on_trial_result(None, trial, result)
            if decision == "STOP":
                live.remove(trial)
    assert 2 < len(live) < 25


@pytest.mark.slow
def test_2000_trials_on_200_workers_are_decided_in_milliseconds(tmp_path: Path) -> None:
    for algorithm, num in (("random", 2000), ("tpe", 600)):
        sweep = sweep_of(num, algorithm=algorithm, kind="asha")
        found = simulate(sweep, planted(27), num // 10, tmp_path / algorithm)
        assert len(found.entries) == num
        assert statistics.median(found.decision_s) < 0.010
        assert statistics.median(found.suggest_s) < 0.5
