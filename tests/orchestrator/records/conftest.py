"""A run in the session's sqlite database, as senders and scribes are given it."""

from __future__ import annotations

import time

import pytest

from orchestrator.records.run import TrackedRun
from orchestrator.records.tracker import Tracker


@pytest.fixture
def tracked(tracker: Tracker, run_id: str) -> TrackedRun:
    return TrackedRun(
        tracking_uri=tracker.uri, experiment=tracker.experiment, artifact_root=None, name="a run",
        key="k", run_key=f"run-{run_id[:8]}", began_ms=int(time.time() * 1000), run_id=run_id,
    )  # fmt: skip


@pytest.fixture
def unborn(tracker: Tracker, tracked: TrackedRun) -> TrackedRun:
    """A run that MLflow does not know yet."""
    return TrackedRun(
        tracking_uri=tracker.uri, experiment=tracker.experiment, artifact_root=None, name="unborn",
        key="k", run_key=f"unborn-{tracked.run_key}", began_ms=tracked.began_ms,
    )  # fmt: skip
