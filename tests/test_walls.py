"""The tree shows the architecture: imports that would blur it are found by reading the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path.relative_to(ROOT)
    for package in ("model", "orchestrator", "jobs")
    for path in (ROOT / package).rglob("*.py")
)
HOMES = {
    "ray": ("orchestrator/launch", "orchestrator/search", "orchestrator/serving"),
    "mlflow": ("orchestrator/records",),
    "fsspec": ("orchestrator/storage",),
    "s3fs": ("orchestrator/storage",),
    "pyarrow": ("orchestrator/storage",),
    "av": ("orchestrator/storage",),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), ("orchestrator/export",)),
    **dict.fromkeys(
        ("fastapi", "starlette", "uvicorn", "werkzeug", "prometheus_client", "pydantic"),
        ("orchestrator/serving",),
    ),
}
MODEL_MAY_USE = {
    "model", "torch", "torchvision", "timm", "numpy", "PIL", "pycocotools", "faster_coco_eval",
    "safetensors",
}  # fmt: skip
MODEL_PARTS = {
    "model/network": {"network"},
    "model/detection": {"network", "detection"},
    "model/data": {"data"},
    "model/training": {"network", "detection", "data", "training"},
}
MACHINE_PATH = re.compile(r"(?<![\w.~/$}\])])/(?:work|root|home|Users|mnt)/")


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names taken from it) of every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports absolute"
            yield str(node.module), tuple(alias.name for alias in node.names)


def violations(path: Path) -> list[str]:
    """What a file imports although a wall stands before it."""
    found = []
    place = path.as_posix()
    inside = {part: may for part, may in MODEL_PARTS.items() if place.startswith(part + "/")}
    for module, names in imports(path):
        top, _, rest = module.partition(".")
        home = HOMES.get(top)
        if home is not None and not place.startswith(tuple(folder + "/" for folder in home)):
            found.append(module)
        elif place.startswith("model/"):
            if top not in MODEL_MAY_USE and top not in sys.stdlib_module_names:
                found.append(module)
            elif top == "model":
                parts = {rest.split(".")[0]} if rest else set(names)
                for may in inside.values():
                    if parts - may - {"errors", "imagenet"} and not _constants(
                        place, module, names
                    ):
                        found.append(module)
        elif place.startswith("orchestrator/") and top in ("jobs", "bootstrap"):
            found.append(module)
    return found


def _constants(place: str, module: str, names: tuple[str, ...]) -> bool:
    """Data may know the network's constants, such as the pixel mean."""
    known = module == "model.network.detector" and place.startswith("model/data/")
    return known and bool(names) and all(name.isupper() for name in names)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_respect_the_walls(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize(
    ("place", "text", "refused"),
    [
        ("model/network/x.py", "def f():\n    import ray", True),
        ("model/network/x.py", "from orchestrator.errors import UserError", True),
        ("model/network/x.py", "import yaml", True),
        ("model/network/x.py", "from model.detection.boxes import clip", True),
        ("model/network/x.py", "from model import training", True),
        ("model/network/x.py", "import math, torch.nn, timm\nfrom model.errors import nearest", False),
        ("model/detection/x.py", "from model.network.scaling import NetworkSpec", False),
        ("model/detection/x.py", "from model.data.index import ClassMap", True),
        ("model/data/x.py", "from model.network.detector import IMAGENET_MEAN", False),
        ("model/data/x.py", "from model.network.detector import Detector", True),
        ("model/data/x.py", "from model.training.config import Recipe", True),
        ("model/training/x.py", "from model.data.index import ClassMap", False),
        ("model/errors.py", "import mlflow", True),
        ("orchestrator/launch/x.py", "import ray.train", False),
        ("orchestrator/launch/x.py", "from mlflow.entities import Run", True),
        ("orchestrator/records/x.py", "from mlflow.entities import Run", False),
        ("orchestrator/records/x.py", "import fsspec", True),
        ("orchestrator/config/x.py", "import ray", True),
        ("jobs/x.py", "import mlflow", True),
    ],
)  # fmt: skip
def test_walls_stand(
    place: str, text: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(text)
    assert bool(violations(Path(place))) == refused


@pytest.mark.integration
def test_model_loads_nothing_of_the_cluster() -> None:
    modules = [".".join(path.with_suffix("").parts) for path in SOURCES if path.parts[0] == "model"]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(*sorted(loaded & {'ray', 'mlflow', 's3fs', 'orchestrator'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_file_names_a_machines_own_folders() -> None:
    files = [
        path
        for folder in ("model", "orchestrator", "jobs", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".yml", ".json", ".toml")
    ]
    named = [str(path) for path in files if MACHINE_PATH.search(path.read_text())]
    assert len(files) > 40
    assert named == []


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parts[0] == "jobs"], ids=str)
def test_jobs_hold_no_logic(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 60
    nodes = list(ast.walk(ast.parse(text)))
    logic = (ast.For, ast.While, ast.Try, ast.With, ast.ClassDef, ast.ListComp, ast.DictComp)
    assert [type(node).__name__ for node in nodes if isinstance(node, logic)] == []
    assert sum(isinstance(node, ast.FunctionDef) for node in nodes) <= 1
    assert sum(isinstance(node, ast.If) for node in nodes) <= 1
