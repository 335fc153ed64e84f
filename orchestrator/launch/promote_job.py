"""Promotion as a job: judge, show the gates, register."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from orchestrator.config.cli import PromoteOptions, PromoteRequest
from orchestrator.config.schema import TrainJob
from orchestrator.launch.progress import print_table
from orchestrator.launch.resolve import output_folder
from orchestrator.records.gates import Gate
from orchestrator.records.package import Ask, ask_in_new_process
from orchestrator.records.registry import Promotion, Rules, promote
from orchestrator.records.secrets import without_secret
from orchestrator.records.sources import connect
from orchestrator.records.tracker import tracking_uri


@dataclass(frozen=True)
class PromoteOutcome:
    code: int
    report: dict[str, Any]


def run_promote_job(
    request: PromoteRequest,
    options: PromoteOptions,
    out: TextIO | None = None,
    ask: Ask = ask_in_new_process,
) -> PromoteOutcome:
    """Make a run's checkpoint the served model, if it passes every gate.

    Raises:
        UserError: it does not, after the table that says where; or there is no such run.
    """
    stream = out or sys.stdout
    uri = tracking_uri(request.tracking_uri, output_folder(TrainJob())[0])
    gates: list[Gate] = []

    def show(found: Sequence[Gate]) -> None:
        gates.extend(found)
        rows = [(gate.name, f"{'pass' if gate.passed else 'FAIL'}  {gate.found}") for gate in found]
        print_table(f"gates of {request.name}", rows, stream)

    done = promote(
        connect(uri),
        request.run_id,
        request.name,
        checkpoint=request.checkpoint,
        alias=request.alias,
        rules=Rules(
            request.require, request.objective, request.allow_worse, request.allow_unfinished
        ),
        dry_run=options.dry_run,
        show=show,
        ask=ask,
    )
    print_table(request.name, _rows(done, uri), stream)
    status = "promoted" if done.created else "unchanged" if done.version else "dry run"
    report = {"status": status, "gates": [asdict(gate) for gate in gates]} | asdict(done)
    return PromoteOutcome(0, report)


def _rows(done: Promotion, uri: str) -> list[tuple[str, str]]:
    name = f"models:/{done.name}@{done.alias}"
    if done.version is None:
        return [("dry run", f"step {done.step} may become {name}; nothing was registered")]
    if not done.created:
        return [("unchanged", f"step {done.step} is {name} already, version {done.version}")]
    before = f"; before: version {done.previous}" if done.previous else ""
    shown = f"MLFLOW_TRACKING_URI={without_secret(uri)} "
    return [
        ("promoted", f"step {done.step} of run {done.run_id} as version {done.version}{before}"),
        ("look", f"jobs/predict.py {name} IMAGES --tracking-uri {without_secret(uri)}"),
        ("serve", f"{shown}mlflow models serve -m {name} --env-manager local --port 8080"),
    ]
