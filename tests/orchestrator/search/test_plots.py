"""What a sweep's figures show, with much, little and nothing."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.figure import Figure

from orchestrator.records.figures import rgb
from orchestrator.search import coordinates, plots
from orchestrator.search.coordinates import parallel_coordinates
from orchestrator.search.importance import importance
from orchestrator.search.plots import importance_bars, learning_curves, pareto
from orchestrator.search.space import Space
from orchestrator.search.trial import Objective, TrialRecord
from orchestrator.search.verdict import pareto_front

AP, GMACS = Objective("val/AP"), Objective("model/gmacs", "min")
Sweep = tuple[list[TrialRecord], dict[str, list[tuple[float, float]]]]


def words(figure: Figure) -> list[str]:
    """All text of a drawn figure."""
    rgb(figure)
    return [text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text"))]


def test_a_line_a_trial_ends_at_its_objective(sweep: Sweep, space: Space) -> None:
    records, _ = sweep
    figure = parallel_coordinates(records, space, AP)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 5]
    assert len(lines) == 48
    values = sorted(r.best["val/AP"] for r in records if r.state != "failed")
    ends = sorted(float(line.get_ydata()[-1]) for line in lines)
    expected = [(v - values[0]) / (values[-1] - values[0]) for v in values]
    assert ends[1:] == pytest.approx(expected)
    assert ends[0] < 0  # the failed one, below the axis
    assert sum(line.get_linewidth() > 3 for line in lines) == 3
    text = words(figure)
    for word in ("fusion", "width", "depth", "lr_per_64", "AP", "softmax", "1.45", "0.02", "0.1"):
        assert word in text
    assert "1 without value" in text


def test_yellow_is_the_better_end_whatever_the_mode(sweep: Sweep, space: Space) -> None:
    for objective, better in ((AP, max), (Objective("val/AP", "min"), min)):
        axes = parallel_coordinates(sweep[0], space, objective).axes[0]
        lines = [line for line in axes.lines if len(line.get_xdata()) == 5 and line.get_ydata()[-1] >= 0]  # fmt: skip
        best = better(lines, key=lambda line: line.get_ydata()[-1])
        red, green, blue, _ = best.get_color()
        assert red > 0.7
        assert green > 0.7
        assert blue < 0.3


def test_a_knob_that_is_not_used_has_its_own_place(sweep: Sweep, space: Space) -> None:
    records = [
        replace(r, sample={k: v for k, v in r.sample.items() if k != "model.scaling.depth"})
        if r.sample["model.fusion"] == "sum" else r for r in sweep[0]
    ]  # fmt: skip
    assert "not used" in words(parallel_coordinates(records, space, AP))


def test_front_goes_through_its_trials(sweep: Sweep) -> None:
    records, _ = sweep
    figure = pareto(records, AP, GMACS)
    front = pareto_front(records, [AP, GMACS])
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    points = sorted((r.gmacs, r.best["val/AP"]) for r in front)
    assert np.column_stack(axes.lines[0].get_data()).tolist() == [list(p) for p in points]
    text = "\n".join(words(figure))
    assert f"Pareto front ({len(front)})" in text
    assert "stopped early (45)" in text
    assert f"1: AP {front[0].best['val/AP']:.3f}, {front[0].gmacs:.4g} GMACs, trial 02" in text


def test_a_long_front_names_the_first_and_counts_the_rest() -> None:
    records = [
        TrialRecord(str(i), str(i), {"model.scaling.width": 1 + i / 100}, 0, "finished",
                    best={"val/AP": 0.1 + i / 100}, gmacs=1.0 + i)
        for i in range(20)
    ]  # fmt: skip
    assert "and 12 more" in "\n".join(words(pareto(records, AP, GMACS)))


def test_bars_are_the_shares_beside_chance(sweep: Sweep) -> None:
    found = importance(sweep[0], AP)
    figure = importance_bars(found, AP)
    axes = figure.axes[0]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([max(one.share or 0.0, 0.0) for one in found])
    marks = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert marks == pytest.approx([one.chance for one in found])
    assert axes.get_yticklabels()[0].get_text() == "lr_per_64"
    few = "\n".join(words(importance_bars(importance(sweep[0][:6], AP), AP)))
    assert "too few trials to say" in few


def test_curves_end_where_trials_were_stopped(sweep: Sweep) -> None:
    records, curves = sweep
    figure = learning_curves(curves, records, AP, unit="epoch", rungs=(2, 6, 18))
    text = words(figure)
    for note in ("16 of 48\nwent on", "6 of 16\nwent on", "2 of 6\nwent on", "failed (1)", "stopped early (45)"):  # fmt: skip
        assert note in text
    assert any(word.startswith("best: trial 02, AP 0.426") for word in text)
    drawn = sum(len(collection.get_segments()) for collection in figure.axes[0].collections if hasattr(collection, "get_segments"))  # fmt: skip
    assert drawn == 48


def test_curves_from_the_very_start_and_with_holes(sweep: Sweep) -> None:
    records = sweep[0][:2]
    curves = {records[0].trial_id: [(0.0, 0.0), (1.0, math.nan), (2.0, 0.3)]}
    figure = learning_curves(curves, records, AP, unit="step", rungs=())
    assert "step (log scale)" in words(figure)


def test_with_nothing_to_show_a_figure_says_so(space: Space, sweep: Sweep) -> None:
    failed = [replace(record, state="failed") for record in sweep[0]]
    for figure, text in (
        (parallel_coordinates([], space, AP), "no knob varies"),
        (parallel_coordinates(failed, space, AP), "no trial has a value"),
        (pareto(failed, AP, GMACS), "no trial has both values"),
        (importance_bars([], AP), "no knob varies"),
        (learning_curves({}, sweep[0], AP, unit="epoch", rungs=(2,)), "no evaluation yet"),
    ):
        assert text in words(figure)


@pytest.mark.parametrize("module", [plots, coordinates])
def test_no_state_of_pyplot_is_touched(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imported = {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not any("pyplot" in name for name in imported)
