"""Mistakes: one clear line that says where, what was expected, what came, what to do; exit 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, command, environment, settings
from PIL import Image

from orchestrator.config.cli import parse_train, train_parser
from orchestrator.launch.entry import run_job
from orchestrator.launch.train_job import run_train_job

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good little dataset of 8 images."""
    images = tmp_path / "set" / "images"
    images.mkdir(parents=True)
    rows = []
    for number in range(8):
        Image.new("RGB", (80, 60), (number * 20, 90, 60)).save(images / f"{number}.jpg")
        rows.append({"id": number, "file_name": f"{number}.jpg", "width": 80, "height": 60})
    boxes = [
        {"id": n + 1, "image_id": n, "category_id": 5, "bbox": [30, 20, 40, 30], "area": 1200}
        for n in range(8)
    ]
    document = {"images": rows, "annotations": boxes, "categories": [{"id": 5, "name": "person"}]}
    write(tmp_path / "set", document)
    return tmp_path / "set"


def write(folder: Path, document: object) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(document))


def read(folder: Path) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = json.loads(
        (folder / "annotations" / "instances_train.json").read_text()
    )
    return found


def refuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    """The one line of a refusal."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    parser = train_parser("train.py", "")
    code = run_job(lambda: parse_train(parser, list(arguments)), run_train_job)
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def xyxy(folder: Path) -> None:
    document = read(folder)
    for box in document["annotations"]:
        box["bbox"] = [30, 20, 70, 50]
    write(folder, document)


def broken_json(folder: Path) -> None:
    path = folder / "annotations" / "instances_train.json"
    path.write_text(path.read_text()[:-20])


def missing_image(folder: Path) -> None:
    (folder / "images" / "3.jpg").unlink()


def corrupt_image(folder: Path) -> None:
    path = folder / "images" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (broken_json, "instances_train.json: expected a json file"),
        (xyxy, "[x, y, width, height], got what looks like [x1, y1, x2, y2]"),
        (missing_image, "image 3.jpg: expected a file"),
        (corrupt_image, "image 3.jpg: expected a readable image"),
    ],
)
def test_bad_data(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    expected: str,
) -> None:
    spoil(folder)
    line = refuse(
        capsys, monkeypatch, *settings(), "--data", str(folder), "--output", str(tmp_path / "out"),
        "--launcher", "local", "--pretrained", "no",
    )  # fmt: skip
    assert expected in line
    assert not list((tmp_path / "out").glob("artifacts/*"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "/nowhere/at/all"], "data.root: expected a folder, got none at /nowhere/at/all"),
        (["--phi", "9"], "model.phi: expected one of 0, 1, 2, 3, 4, 5, 6, 7, 7x, got 9"),
        (["--set", "optim.momentumm=1"], "did you mean 'momentum'?"),
        (["--set", "model.fusion=fats"], "did you mean 'fast'?"),
        (["--batchsize", "8"], "did you mean '--batch-size'?"),
        (["--batch-size", "eight"], "train.batch_size: expected a whole number, got 'eight'"),
        (["--set", "train.bn_group=3"], "train.bn_group: expected a divisor of train.batch_size 8"),
        (["--batch-size", "9", "--workers", "2", "--launcher", "ray"], "train.batch_size: expected a batch that divides"),
        (["--image-size", "100"], "the nearest that do are 64 and 128"),
        (["--output", "/proc/nowhere"], "room for the demo dataset"),
        (["--tracking-uri", "http://127.0.0.1:9"], "tracking.uri: expected an MLflow server"),
        (["--config", "jobs/configs/shape.yaml"], "--config: expected a YAML file"),
        (["--set", "data.classes=[sircle]"], "did you mean 'circle'?"),
        (["--gpus-per-worker", "1"], "launch.gpus_per_worker: expected at most 0 GPUs"),
        (["--resume"], "--resume: expected an unfinished run"),
        (["--resume", "0123"], "--resume: expected a run id of this tracker"),
    ],
)  # fmt: skip
def test_bad_request(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(ROOT)
    base = [*settings(), "--output", str(tmp_path / "out"), "--launcher", "local"]
    assert expected in refuse(capsys, monkeypatch, *base, *arguments)


def test_missing_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    line = refuse(
        capsys, monkeypatch, *settings(), "--output", str(tmp_path / "out"), "--launcher", "local",
        "--set", "checkpoint.uri=s3://nowhere/runs",
    )  # fmt: skip
    assert "checkpoint.uri: expected a place to write, got s3://nowhere/runs" in line
    assert "http://127.0.0.1:9" in line
    assert "planted-secret" not in line


def test_the_command_itself_exits_with_2_and_says_it_in_json(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--phi", "10", "--json", "--output", str(tmp_path)),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.phi: expected one of 0, 1")
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "refused"


def test_backbone_weights_that_cannot_be_fetched(tmp_path: Path) -> None:
    """Never a silent random backbone."""
    done = subprocess.run(
        command(
            *settings(), "--launcher", "local", "--pretrained", "yes", "--output", str(tmp_path),
            "--set", "model.backbone=tf_efficientnet_b0", "--set", "model.max_level=6",
        ),
        capture_output=True, text=True, env=environment(HF_HUB_OFFLINE="1"), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "model.pretrained: expected ImageNet weights of tf_efficientnet_b0.aa_in1k" in line
    assert "--pretrained no" in line


def test_dry_run_prints_a_table_and_trains_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        *settings(),
        "--output",
        str(tmp_path),
        "--launcher",
        "local",
        "--dry-run",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    parser = train_parser("train.py", "")
    assert run_job(lambda: parse_train(parser, arguments), run_train_job) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert (report["status"], report["run_id"], report["step"]) == ("dry run", None, 0)
    assert "parameters" in out
    assert "anchor recall" in out
    assert not list(tmp_path.glob("artifacts/*"))
