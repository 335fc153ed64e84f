"""What is wrong, and what can be done about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from model.data.findings import Finding, has_errors
from orchestrator.config.cli import DoctorOptions
from orchestrator.config.doctor_cli import CheckUp, ReplayRequest, parse_doctor
from orchestrator.launch.progress import print_table

if TYPE_CHECKING:  # it brings Ray, which takes seconds
    from orchestrator.launch.cluster_doctor import ClusterRequest
    from orchestrator.records.replay import Replayed

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = "--cluster"


@dataclass(frozen=True)
class DoctorOutcome:
    """code: 0 all is well, 1 something is not."""

    code: int
    report: dict[str, Any]


def parse(
    description: str, argv: Sequence[str]
) -> tuple[ReplayRequest | CheckUp | ClusterRequest, DoctorOptions]:
    """What to look after: a run's records, data, a machine, or a cluster.

    Raises:
        ConfigError: anything that is not understood.
    """
    if any(word.partition("=")[0] == CLUSTER for word in argv):
        from orchestrator.launch.cluster_doctor import parse_cluster_doctor

        return parse_cluster_doctor(description, argv)
    return parse_doctor(description, argv)


def run_doctor_job(
    request: ReplayRequest | CheckUp | ClusterRequest,
    options: DoctorOptions,
    out: TextIO | None = None,
) -> DoctorOutcome:
    """Raises UserError: a place that cannot be read, a cluster that does not answer."""
    out = out or sys.stdout
    if isinstance(request, ReplayRequest):
        return _replay(request, out)
    if isinstance(request, CheckUp):
        return _check_up(request, out)
    from orchestrator.launch.cluster_doctor import examine

    verdict, facts = examine(request, ROOT)
    print_table("cluster", verdict.rows, out)
    well = not verdict.problems
    return DoctorOutcome(int(not well), {"status": "well" if well else "unwell"} | facts)


def _check_up(request: CheckUp, out: TextIO) -> DoctorOutcome:
    """This machine first: what is wrong with it may be why the rest is."""
    from orchestrator.launch.doctor_tables import print_data, print_findings

    findings: list[Finding] = []
    report: dict[str, Any] = {}
    if request.environment or request.storage or request.tracker:
        found, facts = _machine(request, out)
        findings += found
        report["environment"] = facts | {"findings": [one.to_json() for one in found]}
    if request.data:
        from orchestrator.launch.dataset_doctor import examine_data

        data = examine_data(request, out)
        print_data(data, out)
        findings += data.findings
        report["data"] = data.to_json()
    print_findings(findings, out)
    unwell = has_errors(findings)
    return DoctorOutcome(int(unwell), {"status": "unwell" if unwell else "well"} | report)


def _machine(request: CheckUp, out: TextIO) -> tuple[list[Finding], dict[str, Any]]:
    from orchestrator.launch.environment_doctor import Examined, examine_environment

    parts: list[Examined] = []
    if request.environment:
        parts.append(examine_environment(request.job))
    if request.storage or request.tracker:
        from orchestrator.launch import places_doctor

        if request.storage:
            parts.append(places_doctor.examine_storage(request.storage))
        if request.tracker:
            parts.append(places_doctor.examine_tracker(request.job))
    print_table("environment", [row for part in parts for row in part.rows], out)
    facts: dict[str, Any] = {}
    for part in parts:
        facts |= part.facts
    return [one for part in parts for one in part.findings], facts


def _replay(request: ReplayRequest, out: TextIO) -> DoctorOutcome:
    from orchestrator.records.replay import replay

    done = [
        sent
        for place in request.replay
        for sent in replay(place, tracking_uri=request.tracking_uri)
    ]
    rows = [(f"{sent.run.run_key} {sent.spool}", _describe(sent)) for sent in done]
    print_table("replay", rows or [("nothing", "no records were found there")], out)
    report = [
        {"run_key": sent.run.run_key, "run_id": sent.run.run_id, "spool": sent.spool,
         "records": sent.records, "left_bytes": sent.left, "lost": sent.lost}
        for sent in done
    ]  # fmt: skip
    code = int(any(sent.left or sent.lost for sent in done))
    return DoctorOutcome(
        code, {"status": "finished" if not code else "incomplete", "replayed": report}
    )


def _describe(sent: Replayed) -> str:
    where = f"run {sent.run.run_id} in {sent.run.tracking_uri}"
    if sent.left:
        return f"{sent.records} record(s) wait: {sent.run.tracking_uri} does not answer"
    if sent.lost:
        return f"{sent.lost} of {sent.records} record(s) were refused by {where}"
    return (
        f"{sent.records} record(s) sent to {where}" if sent.records else f"all was there: {where}"
    )
