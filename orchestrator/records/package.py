"""A detector as MLflow serves it: one folder with weights, the `model` package and the entry.

MLmodel  python_env.yaml  requirements.txt
pyfunc_entry.py            what MLflow runs
code/model/                what that imports
artifacts/checkpoint/      averaged weights, configuration, classes; itself a verified checkpoint
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import torch
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

import model
from model.predictor import Predictor, copy_served

CHECKPOINT = "artifacts/checkpoint"
CODE = Path(model.__path__[0])
ENTRY = Path(__file__).with_name("pyfunc_entry.py")
DEFAULT_SCORE = 0.05
REQUIRED = (
    "torch", "torchvision", "timm", "numpy", "pillow", "pycocotools", "faster-coco-eval",
    "safetensors", "mlflow", "pandas",
)  # fmt: skip
"""Packages that `model` and the entry import."""
LOAD_TIMEOUT_S = 600
TOLERANCE = 1e-4  # pixels; scores are compared to a thousandth of it

Row = tuple[float, float, float, float, float, int]
"""x, y, width, height, score, category id."""


def signature() -> ModelSignature:
    numbers = [ColSpec("double", name) for name in ("x", "y", "width", "height", "score")]
    return ModelSignature(
        inputs=Schema([ColSpec("binary", "image")]),
        outputs=Schema(
            [
                ColSpec("long", "image_index"),
                *numbers,
                ColSpec("long", "category_id"),
                ColSpec("string", "category"),
            ]
        ),
        params=ParamSchema([ParamSpec("score_threshold", "double", DEFAULT_SCORE)]),
    )


def requirements() -> list[str]:
    """Pinned to what is installed here. A build's own suffix (+cpu) is in no index."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIRED]


def package(checkpoint: Path, target: Path, run_id: str | None = None) -> None:
    """Write the servable folder `target` from a verified checkpoint."""
    quiet = ("mlflow.models.model", "mlflow.pyfunc", "mlflow.utils.environment")
    levels = {name: logging.getLogger(name).level for name in quiet}
    with tempfile.TemporaryDirectory(prefix="package-") as temporary, warnings.catch_warnings():
        copy_served(checkpoint, Path(temporary) / "checkpoint")
        warnings.simplefilter("ignore")  # it would like type hints instead of a signature
        for name in quiet:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            mlflow.pyfunc.save_model(
                str(target),
                python_model=str(ENTRY),
                artifacts={"checkpoint": str(Path(temporary) / "checkpoint")},
                code_paths=[str(CODE)],
                signature=signature(),
                pip_requirements=requirements(),
                mlflow_model=Model(run_id=run_id),
            )
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
    for cache in [*target.rglob("__pycache__")]:
        shutil.rmtree(cache)


def sample_image(image_size_px: int) -> bytes:
    """A PNG with some shapes, wider than high, which has to be scaled and padded."""
    width, height = image_size_px * 3 // 2, image_size_px
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 96, dtype=np.uint8)
    for _ in range(12):
        x, y = int(rng.integers(0, width * 3 // 4)), int(rng.integers(0, height * 3 // 4))
        w, h = (int(side) for side in rng.integers(image_size_px // 10, image_size_px // 3, 2))
        pixels[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# Run by `ask_in_new_process` in a folder without a package of ours: only the packaged code is there.
ASK = """
import json, sys
from pathlib import Path
import mlflow.pyfunc, pandas
image = Path(sys.argv[2]).read_bytes()
found = mlflow.pyfunc.load_model(sys.argv[1]).predict(
    pandas.DataFrame({"image": [image]}), params={"score_threshold": 0.0})
columns = ["x", "y", "width", "height", "score", "category_id"]
code = str(Path(sys.modules["model"].__path__[0]))
print(json.dumps({"rows": found[columns].values.tolist(), "code": code}))
"""


def ask_in_new_process(folder: Path, image: bytes) -> list[Row]:
    """All that the packaged model finds, in a fresh interpreter without this repository.

    Raises:
        RuntimeError: it does not load or does not answer; the last line it said.
    """
    with tempfile.TemporaryDirectory(prefix="ask-") as temporary:
        (Path(temporary) / "image.png").write_bytes(image)
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", ASK, str(folder), "image.png"],
                cwd=temporary,
                env=_environment(),
                capture_output=True,
                text=True,
                timeout=LOAD_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no answer in {LOAD_TIMEOUT_S} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeError(f"an answer that is none: {done.stdout.strip()[-200:]!r}") from None
    if not Path(answer["code"]).resolve().is_relative_to(folder.resolve()):
        raise RuntimeError(f"it ran with the code of {answer['code']}, not with its own")
    return [(*row[:5], int(row[5])) for row in answer["rows"]]


def _environment() -> dict[str, str]:
    """No pickle, no GPU (its sums differ in the last digits), as many threads as here."""
    changed = {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | changed


Ask = Callable[[Path, bytes], list[Row]]


def check_answers(folder: Path, checkpoint: Path, ask: Ask = ask_in_new_process) -> str:
    """Hold the packaged model to the checkpoint it was made from; what was compared.

    Raises:
        RuntimeError: it does not load, or finds something else.
    """
    predictor = Predictor.load(checkpoint, device="cpu")
    image = sample_image(predictor.spec.image_size_px)
    (expected,) = predictor.predict([image], score_threshold=0.0)
    rows = ask(folder, image)
    if len(rows) != len(expected):
        raise RuntimeError(f"{len(rows)} boxes on the test image, the checkpoint {len(expected)}")
    found = np.array(rows, dtype=np.float64).reshape(-1, 6)
    boxes = _largest(found[:, :4] - expected.boxes_xywh)
    scores = _largest(found[:, 4] - expected.scores)
    if (
        (found[:, 5] != expected.category_ids).any()
        or boxes > TOLERANCE
        or scores > TOLERANCE / 1e3
    ):
        raise RuntimeError(f"other boxes on the test image than the checkpoint (by {boxes:.3g} px)")
    return f"loads without pickle; {len(rows)} boxes on a test image, the checkpoint's own"


def _largest(difference: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(np.abs(difference).max()) if difference.size else 0.0
