"""What a sweep leaves behind: the answer in words, tables and pictures, and the winner to train."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.search.config import SweepConfig
from orchestrator.search.coordinates import parallel_coordinates
from orchestrator.search.importance import importance
from orchestrator.search.plots import Curve, importance_bars, learning_curves, pareto
from orchestrator.search.trial import Objective, TrialRecord, short_names, show_value, varied
from orchestrator.search.verdict import Row, findings, leaderboard, winner, winner_yaml

WINNER = "winner.yaml"
SHOWN_ROWS = 10
COST = Objective("model/gmacs", "min")


@dataclass(frozen=True)
class Answers:
    """files: text by name. figures: by name. lines: the findings. won: trial id of the winner."""

    files: Mapping[str, str]
    figures: Mapping[str, Figure]
    lines: Sequence[str]
    table: Sequence[Sequence[str]]
    won: str | None


def answer(
    sweep: SweepConfig,
    records: Sequence[TrialRecord],
    curves: Mapping[str, Curve],
    longest: float,
    notes: Sequence[str] = (),
) -> Answers:
    """longest: what a trial that is not stopped trains, in the scheduler's unit. notes: of the run."""
    objective, unit = sweep.objective, sweep.scheduler.unit
    lines = findings(records, sweep.objectives, unit=unit, longest=longest)
    lines += [*notes, *sweep.notes()]
    rows = leaderboard(records, objective)
    knobs = varied(records)
    files = {
        "leaderboard.csv": _csv(rows, knobs, objective),
        "trials.json": json.dumps([asdict(record) for record in records], indent=1),
        "findings.md": "\n".join(f"- {line}" for line in lines) + "\n",
    }
    won = winner(records, objective)
    if won is not None:
        files[WINNER] = winner_yaml(sweep.base, won, objective, sweep.name)
    cost = next((o for o in sweep.objectives if o.metric.startswith("model/")), COST)
    figures = {
        "pareto.png": pareto(records, objective, cost),
        "coordinates.png": parallel_coordinates(records, sweep.space, objective),
        "importance.png": importance_bars(importance(records, objective), objective),
        "curves.png": learning_curves(
            curves, records, objective, unit=unit, rungs=sweep.scheduler.rungs(longest)
        ),
    }
    table = leaderboard_table(rows[:SHOWN_ROWS], knobs, objective)
    return Answers(files, figures, lines, table, won.record.trial_id if won else None)


def leaderboard_table(
    rows: Sequence[Row], knobs: Sequence[str], objective: Objective
) -> list[list[str]]:
    """First its heads."""
    names = short_names(knobs)
    found = [
        [
            "#",
            "trial",
            objective.name,
            *names.values(),
            "params",
            "GMACs",
            "img/s",
            "epoch",
            "state",
        ]
    ]
    for row in rows:
        record = row.record
        found.append(
            ["" if row.rank is None else str(row.rank), record.trial_id,
             "" if row.value is None else f"{row.value:.4f}",
             *(show_value(record.sample[k]) if k in record.sample else "" for k in knobs),
             f"{record.num_params / 1e6:.2f} M", f"{record.gmacs:.3g}",
             f"{record.img_per_s:.1f}" if record.img_per_s else "", f"{record.epoch:.4g}",
             record.state]
        )  # fmt: skip
    return found


def markdown(title: str, answers: Answers, rows: Sequence[tuple[str, str]]) -> str:
    """The description of the sweep's run: the answer first."""
    head, *body = answers.table
    lines = [f"**{title}**", "", *(f"- {_cell(line)}" for line in answers.lines), ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in body]
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows)]
    return "\n".join(lines)


def show(answers: Answers, stream: TextIO) -> None:
    """Leaderboard and findings."""
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    head, *rows = answers.table
    table = Table(pad_edge=False, title="leaderboard", title_justify="left")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for line in answers.lines:
        console.print(f"- {line}", markup=False)


def write(answers: Answers, folder: Path) -> list[Path]:
    """The files written."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in answers.files.items():
        (folder / name).write_text(text)
    for name, figure in answers.figures.items():
        figure.savefig(folder / name)
    return [folder / name for name in [*answers.files, *answers.figures]]


def _csv(rows: Sequence[Row], knobs: Sequence[str], objective: Objective) -> str:
    """Every trial, every knob by its path."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(
        ["rank", "trial", "state", "reason", objective.metric, *knobs, "seed", "step", "epoch",
         "params", "gmacs", "img_per_s", "seconds", "worker_hours", "arm"]
    )  # fmt: skip
    for row in rows:
        r = row.record
        table.writerow(
            [row.rank, r.trial_id, r.state, r.reason, row.value,
             *(json.dumps(v) if isinstance(v := r.sample.get(k), list | dict) else v for k in knobs),
             r.seed, r.step, r.epoch, r.num_params, r.gmacs, r.img_per_s, round(r.seconds, 3),
             round(r.worker_hours, 6), r.arm]
        )  # fmt: skip
    return text.getvalue()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
