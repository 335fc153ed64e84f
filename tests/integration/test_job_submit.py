"""`ray job submit -- python jobs/train.py`, literally, on a head with token authentication."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from helpers import ROOT, environment, free_ports, settings

pytestmark = pytest.mark.integration
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of one node, started in the repository; yields the environment of its users."""
    base = tmp_path_factory.mktemp("head")
    (base / "token").write_text("a-token-of-the-tests-0123456789")
    (base / "home").mkdir()
    port, dashboard, agent, metrics = free_ports(4)
    env = environment(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(base / "token"),
        HOME=str(base / "home"),
        RAY_DISABLE_IMPORT_WARNING="1",
    )
    env.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true",
            "--node-ip-address=127.0.0.1", f"--port={port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
            "--temp-dir=/tmp/ray-submit-test", "--disable-usage-stats",
        ],
        env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_up(address)
        yield env | {"RAY_API_SERVER_ADDRESS": address, "PORT": str(port)}
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_up(address: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            with closing(urllib.request.urlopen(f"{address}/api/version", timeout=5)):
                return
        except urllib.error.HTTPError:  # it answers: it wants the token
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError("the head did not come up in 120 s")


@pytest.mark.parametrize(
    "working_dir", [[], ["--working-dir", "."]], ids=["literal", "working-dir"]
)
def test_submitted_job_trains(head: dict[str, str], tmp_path: Path, working_dir: list[str]) -> None:
    arguments = [*settings(), "--phi", "0", "--steps", "4", "--json"]
    if not working_dir:
        arguments += ["--output", str(tmp_path / "out")]
    done = subprocess.run(
        [RAY, "job", "submit", *working_dir, "--", "python", "jobs/train.py", *arguments],
        env=head, cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    report = json.loads(line)
    assert (report["status"], report["step"]) == ("finished", 4)
    # What it made outlives the job, also where the code was a temporary copy.
    assert "_ray_pkg_" not in report["checkpoint"]
    assert (Path(report["checkpoint"].removeprefix("file://")) / "meta.json").is_file()


def test_without_a_token_nobody_gets_in(head: dict[str, str]) -> None:
    stranger = {k: v for k, v in head.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [RAY, "job", "submit", "--", "python", "-c", "print(1)"],
        env=stranger | {"RAY_AUTH_MODE": "disabled"}, cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "authentication" in done.stdout + done.stderr


BESIDE = """
import sys
from pathlib import Path
from ray._private import services
from orchestrator.launch.ray_runtime import connect
there = sys.argv[1]
services.find_bootstrap_address = lambda temp_dir: there  # as `ray start` leaves it in /tmp/ray
print(connect(Path.cwd()).address)
"""


def test_without_an_address_another_ray_of_the_machine_is_left_alone(head: dict[str, str]) -> None:
    there = f"127.0.0.1:{head['PORT']}"
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, there],
        env=head | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own = done.stdout.strip().rpartition(":")[2]
    assert own.isdigit(), done.stdout
    assert own != head["PORT"]
