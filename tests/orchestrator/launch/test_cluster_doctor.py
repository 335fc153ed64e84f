"""The doctor's view of a cluster: what it calls a problem, and a real Ray that it measures."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, environment

from orchestrator.launch.cluster_doctor import (
    NodeReport,
    Reduced,
    judge,
    parse_cluster_doctor,
)
from orchestrator.launch.node_probe import ask_tracker

WELL = NodeReport(
    host="node-1", versions={"python": "3.11.7", "ray": "2.60.0"}, skew_s=0.01, shm_gib=16.0,
    disk_free_gib=200.0, gpus=("H200", "H200"), expected_gpus=2,
)  # fmt: skip
OTHERS = [replace(WELL, host=f"node-{number}") for number in (2, 3)]
FAST = Reduced(6, "nccl", 180.0)


def test_a_well_cluster_has_no_problem() -> None:
    verdict = judge([WELL, *OTHERS], FAST)
    assert verdict.problems == []
    rows = dict(verdict.rows)
    assert rows["node-1"].startswith("2 x H200; /dev/shm 16.0 GiB")
    assert rows["versions"] == "python 3.11.7, ray 2.60.0"
    assert rows["all-reduce"] == "180.00 GB/s, 6 processes over nccl"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"skew_s": -3.0}, "clock differs by -3.0 s"),
        ({"shm_gib": 0.0625}, "/dev/shm has 0.06 GiB"),
        ({"gpus": ("H200",)}, "2 GPU(s) in Ray, 1 in CUDA"),
        ({"versions": {"python": "3.11.7", "ray": "2.59.0"}}, "ray 2.59.0, others have 2.60.0"),
        ({"versions": {"python": "3.11.7"}}, "ray none, others have 2.60.0"),
        ({"tracker": "HTTP 401"}, "tracker: HTTP 401"),
        ({"store": "s3://x: AccessDenied"}, "store: s3://x: AccessDenied"),
    ],
)
def test_one_sick_node_is_named(change: dict[str, Any], said: str) -> None:
    verdict = judge([*OTHERS, replace(WELL, **change)], FAST)
    assert [problem for problem in verdict.problems if said in problem and "node-1" in problem]
    assert len(verdict.problems) == 1


def test_what_was_asked_and_is_well_has_its_cell() -> None:
    asked = replace(WELL, tracker_s=0.0124, mib_per_s=(120.4, 80.0))
    rows = dict(judge([asked, *OTHERS], FAST).rows)
    assert rows["node-1"].endswith("store 120 MiB/s out, 80 MiB/s in; tracker answers in 12 ms")
    assert "tracker" not in rows["node-2"], "nobody asked one"


def test_a_failing_all_reduce_is_a_problem_and_none_is_not() -> None:
    failed = judge([WELL], replace(FAST, error="NCCL timed out"))
    assert failed.problems == ["all-reduce of 6 over nccl failed"]
    assert judge([WELL], None).problems == []


def test_the_flag_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    request, options = parse_cluster_doctor("", ["--cluster", "s3://bucket/tmp", "--json"])
    assert request.store == "s3://bucket/tmp"
    assert request.tracking_uri == "http://mlflow:5000"
    assert options.json
    assert parse_cluster_doctor("", ["--cluster"])[0].store is None


def test_a_tracker_that_is_away_is_said(closed_port: int) -> None:
    assert ask_tracker(None) == (None, None)
    assert ask_tracker("sqlite:///m.db") == (None, None)
    answer_s, trouble = ask_tracker(f"http://127.0.0.1:{closed_port}")
    assert answer_s is None
    assert "refused" in str(trouble)


@pytest.fixture
def guarded() -> Iterator[str]:
    """A server that lets one user in, and knows no other path than the tracker's."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            return

        def do_GET(self) -> None:
            pair = base64.b64encode(b"trainer:right").decode()
            known = self.path.startswith("/api/2.0/mlflow/experiments/search")
            allowed = self.headers.get("Authorization") == f"Basic {pair}"
            self.send_response(404 if not known else 200 if allowed else 401)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("password", "trouble"), [("right", None), ("wrong", "HTTP 401")])
def test_a_tracker_is_asked_with_the_password_of_the_environment(
    guarded: str, password: str, trouble: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "trainer")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answer_s, found = ask_tracker(guarded)
    assert found == trouble
    assert (answer_s is not None) == (trouble is None)


def doctor(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "doctor.py"), *arguments, "--json"],
        env=environment(HOME=str(tmp_path), OMP_NUM_THREADS="1"), cwd=tmp_path,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_a_cluster_is_measured(tmp_path: Path, closed_port: int) -> None:
    store, uri = tmp_path / "store", f"http://127.0.0.1:{closed_port}"
    done = doctor(tmp_path, "--cluster", str(store), "--tracking-uri", uri)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PROBLEM" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    (node,) = report["nodes"]
    assert report["status"] == "unwell"
    assert [problem for problem in report["problems"] if "tracker" in problem]
    assert node["versions"]["ray"]
    assert abs(node["skew_s"]) < 2.0
    assert min(node["mib_per_s"]) > 1
    assert list(store.iterdir()) == [], "nothing is left behind"


@pytest.mark.slow
def test_processes_add_up_together(tmp_path: Path) -> None:
    code = """
import ray
from orchestrator.launch import cluster_doctor
ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
print(cluster_doctor._all_reduce([0, 0]))
"""
    env = environment(HOME=str(tmp_path), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "ranks=2, backend='gloo'" in done.stdout
    assert "error=None" in done.stdout
