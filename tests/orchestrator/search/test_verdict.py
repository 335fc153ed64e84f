"""Rankings against brute force, statistics against tables and scipy, answers against planted truth."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from orchestrator.config.codec import decode
from orchestrator.config.schema import TrainJob
from orchestrator.search.comparison import arms, compare, half_width, holm, welch
from orchestrator.search.importance import LEAST_ARMS, importance
from orchestrator.search.sample import apply, arm_key, changed, with_seed
from orchestrator.search.space import Space, read_space
from orchestrator.search.trial import Objective, TrialRecord, describe_sample, short_names, varied
from orchestrator.search.verdict import (
    findings,
    leaderboard,
    pareto_front,
    savings,
    train_mapping,
    winner,
    winner_yaml,
)

AP, GMACS = Objective("val/AP"), Objective("model/gmacs", "min")
Sweep = tuple[list[TrialRecord], dict[str, list[tuple[float, float]]]]


def trial(name: str, ap: float | None, **changes: Any) -> TrialRecord:
    best = {} if ap is None else {"val/AP": ap}
    return replace(TrialRecord(name, name, {}, 0, "finished", best=best, step=100), **changes)


def seeds(fusion: str, values: list[float], **changes: Any) -> list[TrialRecord]:
    """Trials of one arm, one a seed."""
    sample = {"model.fusion": fusion}
    return [
        trial(f"{fusion}-{k}", value, arm=fusion, sample=sample, seed=k, **changes)
        for k, value in enumerate(values)
    ]


def test_leaderboard_is_sorted_and_what_failed_never_wins() -> None:
    records = [
        trial("low", 0.2),
        trial("nan", math.nan),
        trial("diverged", 0.9, state="failed", reason="loss nan"),
        trial("none", None),
        trial("infinite", math.inf),
        trial("high", 0.4),
    ]
    rows = leaderboard(records, AP)
    assert [(row.rank, row.record.trial_id) for row in rows[:2]] == [(1, "high"), (2, "low")]
    assert all(row.rank is None and row.value is None for row in rows[2:])
    assert len(rows) == len(records)
    assert leaderboard(records, Objective("val/AP", "min"))[0].record.trial_id == "low"


def test_equal_trials_are_ranked_by_later_step_then_cheaper() -> None:
    records = [
        trial("early", 0.4, step=10, gmacs=1.0),
        trial("dear", 0.4, step=20, gmacs=3.0),
        trial("cheap", 0.4, step=20, gmacs=2.0),
    ]
    for order in itertools.permutations(records):
        ids = [row.record.trial_id for row in leaderboard(order, AP)]
        assert ids == ["cheap", "dear", "early"]


def test_pareto_front_is_what_nothing_dominates(sweep: Sweep) -> None:
    records, _ = sweep

    def beats(one: TrialRecord, other: TrialRecord) -> bool:
        a, b = (one.best["val/AP"], -one.gmacs), (other.best["val/AP"], -other.gmacs)
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    alive = [r for r in records if r.state != "failed"]
    expected = [r for r in alive if not any(beats(other, r) for other in alive)]
    front = pareto_front(records, [AP, GMACS])
    assert {r.trial_id for r in front} == {r.trial_id for r in expected}
    assert [r.best["val/AP"] for r in front] == sorted((r.best["val/AP"] for r in front), reverse=True)  # fmt: skip
    assert pareto_front(records, [AP])[0] == leaderboard(records, AP)[0].record


def test_equal_points_of_the_front_all_stay() -> None:
    records = [trial("a", 0.4, gmacs=2.0), trial("b", 0.4, gmacs=2.0), trial("c", 0.3, gmacs=2.0)]
    assert [r.trial_id for r in pareto_front(records, [AP, GMACS])] == ["a", "b"]
    assert pareto_front([trial("x", None)], [AP, GMACS]) == []


def test_interval_of_a_mean_is_that_of_the_tables() -> None:
    """t(0.975) is 2.776 with 4 degrees of freedom, 12.706 with 1."""
    values = [0.40, 0.41, 0.42, 0.43, 0.44]
    assert half_width(values) == pytest.approx(2.776 * math.sqrt(0.00025 / 5), rel=1e-3)
    assert half_width([0.0, 1.0]) == pytest.approx(12.706 * math.sqrt(0.5) / math.sqrt(2), rel=1e-4)
    assert half_width([0.4]) is None
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2)


def test_intervals_hold_the_truth_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    draws = random.normal(0.4, 0.01, (2000, 4))
    held = [abs(row.mean() - 0.4) <= (half_width(row.tolist()) or 0) for row in draws]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_welch_is_scipys() -> None:
    random = np.random.default_rng(1)
    for n, m in ((5, 5), (3, 8), (2, 2)):
        a, b = random.normal(0.4, 0.01, n).tolist(), random.normal(0.41, 0.03, m).tolist()
        theirs = stats.ttest_ind(a, b, equal_var=False)
        delta, half, p = welch(a, b)
        interval = theirs.confidence_interval(0.95)
        assert p == pytest.approx(theirs.pvalue)
        assert (delta - half, delta + half) == pytest.approx((interval.low, interval.high))
    assert welch([0.4, 0.4], [0.4, 0.4]) == (0.0, 0.0, 1.0)
    assert welch([0.5, 0.5], [0.4, 0.4])[1:] == (0.0, 0.0)


def test_holms_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_a_family_of_equal_arms_is_seldom_told_apart() -> None:
    """In 95 of 100 families of 6 comparisons; without the correction in about 80."""
    random = np.random.default_rng(2)
    wrong = plain = 0
    for _ in range(300):
        values = random.normal(0.4, 0.01, (4, 5)).tolist()
        records = [r for name, row in zip("abcd", values, strict=True) for r in seeds(name, row)]
        found = compare(arms(records, AP), AP)
        assert len(found) == 6
        wrong += any(one.differ for one in found)
        plain += any(one.p < 0.05 for one in found)
    assert wrong <= 300 * 0.08
    assert plain > 300 * 0.1


def test_verdict_in_plain_words() -> None:
    same = seeds("fast", [0.40, 0.41, 0.39, 0.405, 0.398])
    same += seeds("softmax", [0.41, 0.392, 0.40, 0.389, 0.397])
    (one,) = compare(arms(same, AP), AP)
    assert one.describe(AP) == (
        "fast and softmax do not differ at 95 % (ΔAP 0.003 ± 0.011, n = 5 and 5)"
    )
    apart = seeds("fast", [0.40, 0.41, 0.405]) + seeds("sum", [0.30, 0.31, 0.305])
    (one,) = compare(arms(apart, AP), AP)
    assert one.describe(AP).startswith("fast is better than sum at 95 % (ΔAP 0.100 ± 0.01")
    lower = Objective("val/AP", "min")
    (one,) = compare(arms(apart, lower), lower)
    assert one.describe(lower).startswith("sum is better than fast")
    (pair, *_) = compare(arms([*same, *seeds("sum", [0.30, 0.31, 0.305])], AP), AP)
    assert "corrected for 3 comparisons" in pair.describe(AP)


def test_of_many_arms_the_best_is_compared_with_the_others() -> None:
    records = [r for k in range(9) for r in seeds(f"arm{k}", [0.1 * k, 0.1 * k + 0.01])]
    found = compare(arms(records, AP), AP)
    assert len(found) == 8
    assert {one.first.key for one in found} == {"arm8"}


def test_an_arm_counts_what_did_not_come_to_its_end() -> None:
    group = seeds("fast", [0.4, 0.5, math.nan, 0.9, 0.8])
    group[3] = replace(group[3], state="failed")
    group[4] = replace(group[4], state="stopped")
    (arm,) = arms([*group], AP)
    assert (arm.values, arm.failed, arm.unfinished) == ((0.4, 0.5), 2, 1)
    assert arm.mean == pytest.approx(0.45)
    assert arm.describe(AP).endswith("(n = 2, 2 failed, 1 ended early)")


def test_winner_of_arms_with_seeds_is_the_best_mean_not_the_luckiest_seed() -> None:
    records = seeds("fast", [0.40, 0.41, 0.42]) + seeds("sum", [0.30, 0.35, 0.50])
    won = winner(records, AP)
    assert won is not None
    assert won.record.trial_id == "fast-2"
    unstable = seeds("unbounded", [0.60, 0.61, math.nan])
    won = winner([*records, *unstable], AP)
    assert won is not None
    assert won.record.arm == "fast"
    assert "unbounded" in won.notes[0]
    assert "not every seed survived" in won.notes[0]
    won = winner(unstable, AP)
    assert won is not None
    assert won.record.trial_id == "unbounded-1"


def test_nothing_wins_without_a_value() -> None:
    assert winner([], AP) is None
    assert winner([trial("a", math.nan), trial("b", 0.5, state="failed")], AP) is None
    early = seeds("fast", [0.4, 0.5], state="stopped")
    won = winner(early, AP)
    assert won is not None
    assert won.notes == ("no trial ran to its end: the best so far",)


def test_winner_yaml_trains_the_trials_job(sweep: Sweep, base: TrainJob) -> None:
    base = apply(base, {"train.duration": {"steps": 90}, "run.name": "it"})
    base = with_seed(base, 3)
    for record in sweep[0][:10]:
        seeded = replace(record, seed=5)
        written = yaml.safe_load(yaml.safe_dump(train_mapping(base, seeded)))
        trained = with_seed(apply(base, record.sample), 2)  # the third seed of an arm
        assert decode(TrainJob, written) == trained
        assert arm_key(trained) == arm_key(decode(TrainJob, written))
    won = winner(sweep[0], AP)
    assert won is not None
    text = winner_yaml(base, won, AP, "fusion")
    named = replace(base, run=replace(base.run, name="fusion-winner"))
    assert decode(TrainJob, yaml.safe_load(text)) == decode(TrainJob, train_mapping(named, won.record))  # fmt: skip
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[0] == f"# The winner of the sweep fusion: trial {won.record.trial_id}, seed 0, with"
    assert head[1] == f"# val/AP {won.value:.4f} at step 5400 (epoch 54)."
    assert not set(yaml.safe_load(text)["train"]) - {"duration", "seed"}
    assert changed(TrainJob()) == {}


def test_yaml_of_a_stopped_winner_says_so(base: TrainJob) -> None:
    won = winner([trial("a", 0.4, state="stopped", reason="x\ny")], AP)
    assert won is not None
    assert "where it was stopped: longer training may rank it otherwise" in winner_yaml(base, won, AP, "s")  # fmt: skip


def test_savings_are_counted_against_running_each_to_its_end() -> None:
    records = [
        trial("end", 0.4, epoch=60, worker_hours=10.0),
        trial("half", 0.3, state="stopped", epoch=30, worker_hours=4.0),
        trial("tenth", 0.2, state="stopped", epoch=6, worker_hours=1.0, step=600),
        trial("unborn", None, state="stopped", epoch=0, step=0),
        trial("dead", None, state="failed", epoch=1, worker_hours=0.5),
    ]
    found = savings(records, "epoch", 60)
    assert (found.spent, found.saved) == pytest.approx((15.5, 4.0 + 9.0))
    assert (found.stopped, found.unknown) == (2, 1)
    assert "saved 13.00 (46% of what all to the end would take)" in found.describe()
    assert savings(records[2:3], "step", 1200).saved == pytest.approx(1.0)
    assert "no trial was stopped early" in savings(records[:1], "epoch", 60).describe()


def planted(space: Space, num: int, value: Any, seed: int = 0) -> list[TrialRecord]:
    random = np.random.default_rng(seed)
    samples = [space.sample(seed, i) for i in range(num)]
    return [
        trial(str(i), value(s) + random.normal(0, 0.01), sample=s, arm=str(i))
        for i, s in enumerate(samples)
    ]


def test_importance_finds_what_decides_and_nothing_else(space: Space) -> None:
    """Learning rate by a hill in its middle, fusion by a step, the others not at all."""

    def value(sample: dict[str, Any]) -> float:
        hill = -abs(math.log(sample["optim.lr_per_64"] / 0.063))
        return 0.1 * hill + (0.05 if sample["model.fusion"] == "sum" else 0.0)

    found = {one.path: one for one in importance(planted(space, 96, value), AP)}
    assert next(iter(found)) == "optim.lr_per_64"
    assert (found["optim.lr_per_64"].share or 0) > 0.5 > (found["model.fusion"].share or 0) > 0.1
    assert found["model.fusion"].shown
    for path in ("model.scaling.depth", "model.scaling.width"):
        assert not found[path].shown
        assert abs(found[path].share or 1) < 0.1
        assert "no more than chance" in found[path].describe()


def test_importance_of_noise_is_0_on_average_and_seldom_shown(space: Space) -> None:
    runs = [importance(planted(space, 24, lambda _: 0.0, seed), AP) for seed in range(40)]
    found = [one for run in runs for one in run]
    assert np.mean([one.share or 0.0 for one in found]) == pytest.approx(0.0, abs=0.02)
    assert np.mean([one.shown for one in found]) < 0.1


def test_importance_is_kruskal_and_wallis() -> None:
    """H = (n - 1) eta squared; Kelley's epsilon squared is (H - k + 1) / (n - k)."""
    groups = {"fast": [1, 4, 6, 9.5, 3], "sum": [2, 5, 7, 8, 11], "softmax": [10, 12, 13, 14, 15]}
    records = [
        trial(f"{name}{value}", value, sample={"model.fusion": name}, arm=f"{name}{value}")
        for name, values in groups.items() for value in values
    ]  # fmt: skip
    (found,) = importance(records, AP)
    theirs = stats.kruskal(*groups.values())
    assert found.share == pytest.approx((theirs.statistic - 2) / (15 - 3))
    assert found.p == pytest.approx(theirs.pvalue, abs=0.01)


def test_importance_with_too_few_trials_says_so(space: Space) -> None:
    found = importance(planted(space, LEAST_ARMS - 1, lambda s: s["model.scaling.depth"]), AP)
    assert all(one.share is None for one in found)
    assert "too few trials to say (11, at least" in found[0].describe()


def test_importance_takes_an_arm_once_however_many_seeds() -> None:
    space = read_space({"optim.lr_per_64": {"uniform": [0.1, 0.2]}})
    records = planted(space, 15, lambda s: s["optim.lr_per_64"])
    again = [replace(r, trial_id=r.trial_id + "b", seed=1) for r in records]
    assert importance([*records, *again], AP) == importance(records, AP)


def test_importance_of_a_conditional_knob_is_over_trials_that_have_it() -> None:
    space = read_space(
        {
            "model.fusion": {"choice": ["fast", "sum"]},
            "model.scaling.depth": {"choice": [0, 1], "when": {"model.fusion": "sum"}},
        }
    )
    records = planted(space, 60, lambda s: 1.0 if s["model.fusion"] == "sum" else 0.0)
    found = {one.path: one for one in importance(records, AP)}
    assert found["model.scaling.depth"].num_arms == sum("model.scaling.depth" in r.sample for r in records)  # fmt: skip
    assert not found["model.scaling.depth"].shown
    assert found["model.fusion"].shown


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["model.scaling.width", "optim.warmup.epochs", "train.duration.epochs"]) == {
        "model.scaling.width": "width",
        "optim.warmup.epochs": "warmup.epochs",
        "train.duration.epochs": "duration.epochs",
    }
    sample = {"model.fusion": "fast", "optim.lr_per_64": 0.0731234, "train.duration": {"steps": 5}}
    assert describe_sample(sample, list(sample)) == (
        "fusion fast, lr_per_64 0.07312, duration 5 steps"
    )
    assert describe_sample(sample, ["model.fusion"]) == "fast"
    records = [trial("a", 1.0, sample={"x": 1, "y": 2}), trial("b", 1.0, sample={"x": 1})]
    assert varied(records) == ["y"]


def test_findings_answer_in_sentences(sweep: Sweep) -> None:
    lines = findings(sweep[0], [AP, GMACS], unit="epoch", longest=54)
    assert lines[0].startswith("best: fusion fast, width 1.4")
    assert any(line.startswith("Pareto front: ") for line in lines)
    assert any(line.startswith("optim.lr_per_64: 70% of the ranks' variance") for line in lines)
    assert "trial 07 failed: loss nan at step 212" in lines
    assert "stopping 45 trials early saved" in lines[-1]
    few = seeds("fast", [0.40, 0.41]) + seeds("sum", [0.30, 0.31])
    lines = findings(few, [AP], unit="epoch", longest=54)
    assert "fast: AP 0.4050 ± 0.0635 (n = 2)" in lines
    assert any(line.startswith("fast is better than sum at 95 %") for line in lines)
    assert findings([], [AP], unit="epoch", longest=1)[0] == "no trial has a value: nothing won"
