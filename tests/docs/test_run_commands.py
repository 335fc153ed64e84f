"""The commands of README, docs and k8s/README.md, typed: on small data, with a small network.

A command is run as it is written, with more arguments after it where it would take hours otherwise; the last of two
flags wins. One that is not run has its reason here, and is parsed by test_commands.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest
from helpers import TINY, Done, free_ports

from .conftest import STEPS, World
from .documents import Command, commands

pytestmark = pytest.mark.slow
START_S = 240.0

# A few of the pictures: `shapes` itself is drawn whole, once for trainings and sweeps alike.
SMALL = [
    *(part for path, value in TINY.items() if not path.startswith("data.shapes.")
      for part in ("--set", f"{path}={value}")),
    "--set", "data.train.first=24", "--set", "data.val.first=6", "--set", f"train.duration={STEPS}",
    "--set", f"train.evaluate_every={STEPS}", "--pretrained", "no",
]  # fmt: skip
CHEAP = ["--pretrained", "no", "--launcher", "local", "--set", "model.backbone=test_efficientnet",
         "--set", "train.batch_size=4", "--set", "train.bn_group=4"]  # fmt: skip
HERE = ["--launcher", "local", "--workers", "1"]


@dataclass(frozen=True)
class Way:
    """Of running the commands that a pattern finds. codes: of exit, all of which are answers."""

    pattern: str
    added: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)
    says: str = ""


WAYS = (
    Way(r"jobs/train\.py .*--resume", (*SMALL, *HERE), (2,), "error: --resume: expected"),
    Way(r"torchrun .*jobs/train\.py", tuple(SMALL)),
    Way(r"jobs/train\.py .*--dry-run", tuple(CHEAP), says="preflight of"),
    Way(r"jobs/train\.py", (*SMALL, *HERE), says="finished"),
    Way(r"jobs/tune\.py .*(smoke\.yaml|root=shapes).*--dry-run|jobs/tune\.py .*--dry-run.*root=shapes"),
    Way(r"jobs/benchmark\.py", ("--rounds", "1", "--set", "model.backbone=test_efficientnet",
                                "--set", "model.pretrained=no", "--set", "model.image_size_px=128")),
    Way(r"jobs/doctor\.py .*--(data|cluster)", codes=(0, 1)),  # this machine may have little /dev/shm
    Way(r"jobs/doctor\.py .*--replay"),
    Way(r"jobs/convert\.py .*--output ~/my-dataset$", ("--output", "converted")),  # which is there
    Way(r"jobs/(evaluate|predict)\.py .*--workers (4|16)", ("--workers", "1")),
    Way(r"jobs/(convert|evaluate|export|predict|promote)\.py"),
)  # fmt: skip

NOT_RUN = {
    r"(--init|evaluate\.py) tf_": "published weights come over the network; "
    "tests/model/training/test_initial.py and tests/orchestrator/launch/test_evaluate_job.py load such files",
    r"jobs/train\.py --config runs/sweeps/": "a sweep writes it first; tests/integration/test_sweeps.py does both",
    r"jobs/tune\.py .*(/data/coco|--extend|smoke\.yaml$)": "whole sweeps, and going on with them: "
    "tests/integration/test_sweeps.py",
    r"^ray job submit": "test_submitted below, on a head of its own",
    r"jobs/serve\.py": "test_served below, with the question that follows it",
}


def plain() -> list[Command]:
    """What is run by itself; what several pages show is run once."""
    found: dict[str, Command] = {}
    for command in commands():
        if command.script is None or any(re.search(one, command.text) for one in NOT_RUN):
            continue
        found.setdefault(" ".join(command.words), command)
    return list(found.values())


def way_of(command: Command) -> Way | None:
    return next((way for way in WAYS if re.search(way.pattern, command.text)), None)


@pytest.mark.parametrize("command", plain(), ids=str)
def test_it_runs(command: Command, world: World, request: pytest.FixtureRequest) -> None:
    if "models:/" in command.text:
        request.getfixturevalue("detector")
    way = way_of(command)
    assert way is not None, f"{command}: add a way to run it, or why it is not run"
    done = world.run(command.text, list(way.added))
    assert done.code in way.codes, done.out + done.err
    assert "Traceback" not in done.err
    assert way.says in done.out + done.err


def test_each_reason_and_way_is_used() -> None:
    texts = [command.text for command in commands() if command.script is not None]
    for pattern in NOT_RUN:
        assert any(re.search(pattern, text) for text in texts), pattern
    for way in WAYS:
        assert way in map(way_of, plain()), way.pattern


@contextmanager
def background(world: World, text: str, url: str) -> Iterator[None]:
    """A server's command until it answers, and its end."""
    log = world.folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", f"exec env {world.here(text)}"], cwd=world.folder, env=world.env,
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(url, process, log.read_text)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: object) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            with closing(urllib.request.urlopen(url, timeout=5)):
                return
        except urllib.error.HTTPError as error:
            if error.code == 401:  # it answers: it wants the token
                return
        except OSError:
            pass
        assert process.poll() is None, log() if callable(log) else log
        assert time.monotonic() < end, f"no answer in {START_S} s"
        time.sleep(0.5)


def shown(pattern: str) -> list[Command]:
    return [command for command in commands() if re.search(pattern, command.text)]


def asks(world: World, question: Command, port: int) -> Done:
    text = re.sub(r"localhost:\d+", f"127.0.0.1:{port}", question.text)
    done = world.run(text, ["--max-time", "60"])
    assert done.code == 0, done.err
    return done


def test_served(world: World, detector: None) -> None:
    """jobs/serve.py, and the picture that the page sends to it."""
    serve, *others = shown(r"jobs/serve\.py .*--port 8000")
    assert all(other.words == serve.words for other in others)
    questions = shown(r"^curl .*localhost:8000/predict")
    (port,) = free_ports(1)
    text = serve.text.replace("8000", str(port))
    with background(world, text, f"http://127.0.0.1:{port}/readyz"):
        for question in questions:
            assert '"detections"' in asks(world, question, port).out


@pytest.mark.parametrize("serve", shown(r"mlflow models serve"), ids=str)
def test_served_by_mlflow(serve: Command, world: World, detector: None) -> None:
    (question,) = shown(r"^curl .*localhost:8080/invocations")
    (port,) = free_ports(1)
    text = serve.text.replace("--port 8080", f"--port {port} --workers 1")
    with background(world, text, f"http://127.0.0.1:{port}/health"):
        assert '"predictions"' in asks(world, question, port).out


@pytest.fixture(scope="module")
def head(world: World) -> Iterator[dict[str, str]]:
    """A cluster of one node, as `ray start --head` makes it, beside others: with ports of its own."""
    port, dashboard, agent, metrics = free_ports(4)
    start = (
        f"ray start --head --block --num-cpus=2 --include-dashboard=true --node-ip-address=127.0.0.1 "
        f"--port={port} --dashboard-host=127.0.0.1 --dashboard-port={dashboard} "
        f"--dashboard-agent-listen-port={agent} --metrics-export-port={metrics} "
        "--temp-dir=/tmp/ray-docs-test --disable-usage-stats"
    )
    address = f"http://127.0.0.1:{dashboard}"
    with background(world, start, f"{address}/api/version"):
        yield {"RAY_API_SERVER_ADDRESS": address}


@pytest.mark.parametrize("command", shown(r"^ray job submit"), ids=str)
def test_submitted(command: Command, world: World, head: dict[str, str]) -> None:
    """To the job's checks: tests/integration/test_job_submit.py goes on to the end of a training."""
    there = World(world.folder, world.env | head, world.trained)
    text = re.sub(r"--address http://localhost:8265", "", command.text)
    sweep = command.script == "tune"
    below = "train." if sweep else ""
    added = [
        "--workers", "1", "--dry-run", "--set", f"{below}model.backbone=test_efficientnet",
        "--set", f"{below}model.pretrained=no", "--set", f"{below}train.batch_size=4",
        "--set", f"{below}train.bn_group=4", "--set", f"{below}data.cache.folder={world.folder}/cache",
        "--output", str(world.folder / "submitted"),
    ]  # fmt: skip
    if "s3://effdet-" in text:
        text = text.replace("s3://effdet-datasets/", "s3://bucket/").replace(
            "s3://effdet-checkpoints/", "s3://bucket/checkpoints/"
        )
    if "--data" not in text and "data.root" not in text:
        added += ["--set", f"{below}data.root={world.env['HOME']}/my-dataset"]
    done = there.run(text, added)
    assert done.code == 0, done.out + done.err
    assert "preflight of" in done.out or sweep
