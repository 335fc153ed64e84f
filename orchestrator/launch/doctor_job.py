"""What is wrong, and what can be done about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config.cli import DoctorOptions, DoctorRequest, parse_doctor
from orchestrator.launch.progress import print_table
from orchestrator.records.replay import Replayed, replay

if TYPE_CHECKING:  # it brings Ray, which takes seconds
    from orchestrator.launch.cluster_doctor import ClusterRequest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = "--cluster"


@dataclass(frozen=True)
class DoctorOutcome:
    """code: 0 all is well, 1 something is not."""

    code: int
    report: dict[str, Any]


def parse(
    description: str, argv: Sequence[str]
) -> tuple[DoctorRequest | ClusterRequest, DoctorOptions]:
    """What to look after: a run's records, or a cluster.

    Raises:
        ConfigError: anything that is not understood.
    """
    if any(word.partition("=")[0] == CLUSTER for word in argv):
        from orchestrator.launch.cluster_doctor import parse_cluster_doctor

        return parse_cluster_doctor(description, argv)
    return parse_doctor(description, argv)


def run_doctor_job(
    request: DoctorRequest | ClusterRequest, options: DoctorOptions
) -> DoctorOutcome:
    """Raises UserError: a place that cannot be read, a cluster that does not answer."""
    if not isinstance(request, DoctorRequest):
        from orchestrator.launch.cluster_doctor import examine

        verdict, facts = examine(request, ROOT)
        print_table("cluster", verdict.rows, sys.stdout)
        well = not verdict.problems
        return DoctorOutcome(int(not well), {"status": "well" if well else "unwell"} | facts)
    done = [
        sent
        for place in request.replay
        for sent in replay(place, tracking_uri=request.tracking_uri)
    ]
    rows = [(f"{sent.run.run_key} {sent.spool}", _describe(sent)) for sent in done]
    print_table("replay", rows or [("nothing", "no records were found there")], sys.stdout)
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
