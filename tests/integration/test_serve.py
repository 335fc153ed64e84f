"""A trained checkpoint, promoted, served by MLflow and asked over HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, Done, environment, free_ports, settings, train

pytestmark = pytest.mark.integration
START_S = 240


def job(name: str, *arguments: str, **env: str) -> Done:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / name), *arguments, "--json"],
        capture_output=True, text=True, timeout=300, env=environment(**env),
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Done:
    output = tmp_path_factory.mktemp("serve") / "runs"
    output.mkdir()
    short = settings(train__duration="{steps: 10}", train__evaluate_every="{steps: 10}")
    done = train(output, *short, "--launcher", "local")
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def server(trained: Done) -> Iterator[str]:
    """Its address; the model is promoted first."""
    uri, run_id = trained.report["tracking_uri"], trained.report["run_id"]
    done = job("promote.py", run_id, "--name", "detector", "--tracking-uri", uri)
    assert (done.code, done.report.get("version")) == (0, "1"), done.err
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("mlflow")), "models", "serve",
            "-m", "models:/detector@champion", "--env-manager", "local",
            "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        ],
        env=environment(
            MLFLOW_TRACKING_URI=uri, MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
            MLFLOW_DISABLE_TELEMETRY="true",
        ),
        cwd=Path(uri.removeprefix("sqlite:///")).parent,  # not this repository's
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < end, f"no answer in {START_S} s"
            time.sleep(0.5)


def ask(url: str, images: list[bytes], **params: float) -> tuple[int, dict[str, Any]]:
    rows = [{"image": base64.b64encode(image).decode()} for image in images]
    body = json.dumps({"dataframe_records": rows, "params": params}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_served_boxes_are_those_of_the_job(server: str, trained: Done, tmp_path: Path) -> None:
    uri = trained.report["tracking_uri"]
    source = next(Path(uri.removeprefix("sqlite:///")).parent.rglob("images/val/*.jpg"))
    from PIL import Image

    image = tmp_path / "picture.png"
    Image.open(source).save(image)
    done = job(
        "predict.py", "models:/detector@champion", str(image), "--score", "0",
        "--output", str(tmp_path / "out"), "--tracking-uri", uri,
    )  # fmt: skip
    assert done.code == 0, done.err
    expected = json.loads((tmp_path / "out" / "detections.json").read_text())
    status, answer = ask(server, [image.read_bytes()], score_threshold=0.0)
    assert status == 200, answer
    found = answer["predictions"]
    assert len(found) == len(expected) > 50
    for ours, theirs in zip(found, expected, strict=True):
        box = [ours[name] for name in ("x", "y", "width", "height")]
        assert box == pytest.approx(theirs["bbox"], abs=1e-6)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
        assert ours["category_id"] == theirs["category_id"]
        assert (ours["category"], ours["image_index"]) == (theirs["category"], 0)


def test_what_is_no_image_is_a_bad_request(server: str) -> None:
    status, answer = ask(server, [b"no image"])
    assert status == 400
    assert "row 0: image: expected" in answer["message"]
