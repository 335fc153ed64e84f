"""What a sweep looks like: every function gives a matplotlib Figure (no pyplot, no state).

Where there is nothing to show, one that says so. Colours as in `orchestrator.records.figures`;
parallel coordinates are in `coordinates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from orchestrator.records.figures import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY
from orchestrator.search.importance import Importance
from orchestrator.search.trial import (
    Objective,
    State,
    TrialRecord,
    Unit,
    describe_sample,
    short_names,
    show_value,
    varied,
)
from orchestrator.search.verdict import leaderboard, pareto_front

NAMED_TRIALS, NAMED_LINES = 8, 34  # of a Pareto front; more are not written out
LOOK: dict[State, tuple[str, str, str]] = {  # marker, colour, what it is called
    "finished": ("o", BLUE, "ran to its end"),
    "stopped": ("v", SKY, "stopped early"),
    "interrupted": ("s", GREY, "interrupted"),
}


def blank(title: str, size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure


def nothing(figure: Figure, text: str) -> Figure:
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=13, color="#555555")
    return figure


def pareto(records: Sequence[TrialRecord], objective: Objective, cost: Objective) -> Figure:
    """Every trial by its cost (log scale) and objective; the front as steps, its trials named."""
    figure = blank(f"{objective.name} against {_axis_name(cost)}", (9.6, 5.4))
    shown = [(r, r.value(cost), r.value(objective)) for r in records]
    known = [(r, x, y) for r, x, y in shown if x is not None and y is not None and x > 0]
    if not known:
        return nothing(figure, "no trial has both values")
    axes = figure.add_subplot()
    for state, (marker, colour, label) in LOOK.items():
        chosen = [(x, y) for r, x, y in known if r.state == state]
        if chosen:
            axes.scatter(
                [x for x, _ in chosen], [y for _, y in chosen], marker=marker, s=34,
                color=colour, alpha=0.75, lw=0, label=f"{label} ({len(chosen)})", zorder=3,
            )  # fmt: skip
    front = pareto_front([r for r, _, _ in known], [cost, objective])
    steps = [(r.value(cost) or 0.0, r.value(objective) or 0.0) for r in front]
    steps = sorted(steps, reverse=cost.mode == "max")
    costs, values = [x for x, _ in steps], [y for _, y in steps]
    axes.step(costs, values, where="post", color=RED, lw=1.6, zorder=2)
    axes.scatter(
        costs, values, s=90, facecolor="none", edgecolor=RED, lw=1.6, zorder=4,
        label=f"Pareto front ({len(front)})",
    )  # fmt: skip
    axes.set_xscale("log")
    _log_ticks(axes, [x for _, x, _ in known])
    axes.set(xlabel=_axis_name(cost), ylabel=objective.metric)
    axes.grid(alpha=0.3)
    axes.margins(0.06, 0.1)
    knobs = varied(records)
    lines: list[str] = []
    ranked = sorted(front, key=lambda r: -objective.sign * (r.value(objective) or 0.0))
    for number, r in enumerate(ranked, 1):
        text = (
            f"{number}: {objective.name} {r.value(objective):.3f}, {show_value(r.value(cost))} "
            f"{_axis_name(cost).removesuffix(' of one image')}, trial {r.trial_id}\n"
            f"    {_wrapped(describe_sample(r.sample, knobs))}"
        )
        written = "\n".join([*lines, text]).count("\n")
        if number > NAMED_TRIALS or written > NAMED_LINES:
            lines.append(f"and {len(ranked) - number + 1} more")
            break
        lines.append(text)
        axes.annotate(
            str(number), (r.value(cost) or 0.0, r.value(objective) or 0.0), fontsize=9,
            xytext=(-5, 6), textcoords="offset points", ha="right", color=RED, zorder=6,
        )  # fmt: skip
    side = figure.legend(
        loc="outside right upper", frameon=False, fontsize=9, alignment="left"
    )  # fmt: skip
    side.set_title("\n".join([*lines, ""]), prop=FontProperties(size=7.5))
    return figure


def _axis_name(objective: Objective) -> str:
    units = {
        "model/gmacs": "GMACs of one image",
        "model/params_m": "million parameters",
        "model/activation_gib": "GiB of activations of one image",
        "model/latency_ms": "milliseconds of one image",
    }
    return units.get(objective.metric, objective.metric)


def _wrapped(text: str, width: int = 44) -> str:
    """Broken at commas."""
    lines = [""]
    for part in text.split(", "):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part + ", "
    return "\n    ".join(lines).removesuffix(", ")


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Round numbers, also within less than a decade."""
    wide = max(values) / min(values) > 8
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if wide else tuple(range(1, 10))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if max(values) / min(values) < 1.6:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def importance_bars(found: Sequence[Importance], objective: Objective) -> Figure:
    """Share of the ranks' variance of each knob, beside what chance reaches."""
    figure = blank(
        f"What decides {objective.name}: each knob alone", (8.2, 1.9 + 0.5 * max(len(found), 2))
    )
    if not found:
        return nothing(figure, "no knob varies")
    axes = figure.add_subplot()
    for place, one in enumerate(found):
        if one.share is None or one.chance is None:
            text = f" too few trials to say: {one.num_arms}, at least {one.needed} wanted"
            axes.text(0, place, text, va="center", fontsize=9, color="#555555")
            continue
        share = max(one.share, 0.0)
        axes.barh(place, share, color=BLUE if one.shown else GREY, height=0.62, zorder=2)
        axes.plot([one.chance] * 2, [place - 0.4, place + 0.4], color=ORANGE, lw=2.4, zorder=3)
        text = f"{share:.0%}" if one.shown else f"{share:.0%}, no more than chance"
        right = max(share, one.chance)
        axes.text(right + 0.015, place, text, va="center", fontsize=9, zorder=4)
    short = short_names([one.path for one in found])
    axes.set_yticks(range(len(found)), [short[one.path] for one in found], fontsize=10)
    axes.set(xlim=(0, 1.0), ylim=(len(found) - 0.4, -0.6))
    axes.set_xlabel("share of the ranks' variance explained, less what chance explains")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.grid(axis="x", alpha=0.3)
    handles = [Patch(color=BLUE), Patch(color=GREY)]
    (line,) = axes.plot([], [], color=ORANGE, lw=2.4)
    figure.legend(
        [*handles, line],
        ["more than chance (p < 0.05)", "no more than chance", "95 % of shuffled trials stay below"],
        loc="outside lower center", ncols=3, fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


Curve = Sequence[tuple[float, float]]


def learning_curves(
    curves: Mapping[str, Curve], records: Sequence[TrialRecord], objective: Objective, *,
    unit: Unit, rungs: Sequence[float],
) -> Figure:  # fmt: skip
    """A line a trial, ending where it was stopped; the best in front, rungs with how many went on.

    curves: of each trial id (progress in `unit`, objective at each evaluation).
    """
    figure = blank(f"{objective.name} while training", (9.2, 5.4))
    rows = leaderboard(records, objective)
    drawn = {  # nothing is learnt at 0, which a log scale has not
        row.record.trial_id: [p for p in curves.get(row.record.trial_id, ()) if p[0] > 0]
        for row in rows
    }
    if not any(drawn.values()):
        return nothing(figure, "no evaluation yet")
    axes = figure.add_subplot()
    best = rows[0].record.trial_id
    states = {row.record.trial_id: row.record.state for row in rows}
    for state, colour, label in (
        ("stopped", SKY, "stopped early"),
        ("interrupted", GREY, "interrupted"),
        ("finished", BLUE, "ran to its end"),
        ("failed", RED, "failed"),
    ):
        lines = [np.array(c) for trial, c in drawn.items() if states[trial] == state and len(c)]
        if not lines:
            continue
        axes.add_collection(
            LineCollection(lines, color=colour, lw=1.1, alpha=0.65, zorder=2),
            autolim=True,
        )  # fmt: skip
        ends = np.array([line[-1] for line in lines])
        axes.scatter(
            ends[:, 0], ends[:, 1], s=30 if state == "failed" else 16, color=colour, zorder=4,
            marker="x" if state == "failed" else "o", label=f"{label} ({len(lines)})",
        )  # fmt: skip
    if drawn[best]:
        points = np.array(drawn[best])
        text = f"best: trial {best}"
        if rows[0].value is not None:
            text += f", {objective.name} {rows[0].value:.3f}"
        axes.plot(points[:, 0], points[:, 1], color=GREEN, lw=3, zorder=5, label=text)
    axes.autoscale_view()
    axes.set(xlabel=f"{unit} (log scale)", ylabel=objective.metric)
    axes.set_xscale("log")
    last = [c[-1][0] for c in drawn.values() if c]
    _log_ticks(axes, [x for c in drawn.values() for x, _ in c])
    top = axes.get_xaxis_transform()
    for rung in rungs:
        reached, beyond = sum(x >= rung for x in last), sum(x > rung for x in last)
        axes.axvline(rung, color=BLACK, ls=":", lw=1.2, zorder=1)
        axes.text(
            rung, 1.015, f"{beyond} of {reached}\nwent on", transform=top, ha="center",
            va="bottom", fontsize=8,
        )  # fmt: skip
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure
