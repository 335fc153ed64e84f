"""From somebody's YOLO folder to a trained network: convert, look at it, train."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment, settings
from PIL import Image

from orchestrator.config.cli import parse_train, train_parser
from orchestrator.config.convert_cli import parse_convert
from orchestrator.config.doctor_cli import parse_doctor
from orchestrator.launch.convert_job import run_convert_job
from orchestrator.launch.doctor_job import run_doctor_job
from orchestrator.launch.train_job import run_train_job

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images with a box each, in YOLO's format."""
    for number in range(10):
        split = "train" if number < 8 else "val"
        image, label = (tmp_path / "yolo" / part / split for part in ("images", "labels"))
        image.mkdir(parents=True, exist_ok=True)
        label.mkdir(parents=True, exist_ok=True)
        picture = Image.effect_noise((80, 64), 60 + number).convert("RGB")
        picture.paste((220, 30, 30), (20, 16, 60, 48))
        picture.save(image / f"{number}.jpg")
        (label / f"{number}.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "yolo" / "data.yaml").write_text(
        "train: images/train\nval: images/val\nnames: [thing]\n"
    )
    return tmp_path / "yolo"


def test_a_converted_dataset_is_well_and_trains(folder: Path, tmp_path: Path) -> None:
    output, out = tmp_path / "coco", io.StringIO()
    request, options = parse_convert("", ["yolo", str(folder), "--output", str(output)])
    assert run_convert_job(request, options, out).code == 0
    common = [*settings(), "--data", str(output), "--output", str(tmp_path / "runs")]
    asked, doctor_options = parse_doctor("", common)
    examined = run_doctor_job(asked, doctor_options, out)
    assert examined.code == 0, out.getvalue()
    job, train_options = parse_train(
        train_parser("train.py", ""),
        [*common, "--launcher", "local", "--steps", "2", "--pretrained", "no",
         "--set", "tracking.system_metrics_every_s=null"],
    )  # fmt: skip
    trained = run_train_job(job, train_options, out)
    assert (trained.code, trained.report["step"]) == (0, 2), out.getvalue()


def test_a_malformed_label_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "labels" / "train" / "3.txt").write_text("0 0.5 0.5\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs/convert.py"), "yolo", "yolo", "--output", "coco", "--json"],
        cwd=tmp_path, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: labels/train/3.txt:1: expected class x y width height")
    assert json.loads(done.stdout)["status"] == "refused"
    assert not (tmp_path / "coco").exists()
