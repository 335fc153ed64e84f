"""Whole exports of a nano network: the file, what it says of itself, how it is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from helpers import ROOT, environment
from helpers.peer import randomise
from PIL import Image

from model.data.index import ClassMap, parse_coco
from model.network.detector import Detector
from model.network.scaling import FusionKind, ModelConfig, TopologyKind, resolve
from model.predictor import Predictor
from model.training.state import Progress, network_config, write_checkpoint
from orchestrator.config.export_cli import ExportOptions, ExportRequest
from orchestrator.errors import UserError
from orchestrator.export.check import pictures
from orchestrator.export.onnx_file import open_onnx
from orchestrator.launch.export_job import ExportOutcome, run_export_job

NANO = ModelConfig(
    backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1, image_size_px=128
)
POSTPROCESS = {"candidates": 400, "detections": 20}
EXAMPLE = Path(__file__).parents[1] / "export" / "detect_onnx.py"


def checkpoint(
    folder: Path, classes: ClassMap, config: ModelConfig = NANO, box_bias: float = 0.0
) -> Path:
    """A network with statistics that a trained one could have; box_bias: added to its codes."""
    detector = Detector(resolve(config, classes.num_classes)).eval().requires_grad_(False)
    randomise(detector)
    assert detector.box_head.predict.pointwise.bias is not None
    detector.box_head.predict.pointwise.bias += box_bias
    folder.mkdir(parents=True)
    state = detector.state_dict()
    write_checkpoint(
        folder, model=state, ema=state, progress=Progress(7, {}, torch.zeros(6)),
        config={
            "network": network_config(detector.spec),
            "job": {"evaluation": POSTPROCESS, "data": {"classes": None}},
        },
        classes=classes, metrics={"val/AP": 0.25},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def classes(shapes: Path) -> ClassMap:
    text = (shapes / "annotations" / "instances_val.json").read_bytes()
    return parse_coco(text, "val").classes


@pytest.fixture(scope="module")
def nano(classes: ClassMap, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("nano") / "step_00000007", classes)


def export(
    source: Path, output: Path, kind: Any, *, benchmark: bool = False, **asked: Any
) -> tuple[ExportOutcome, str]:
    out = io.StringIO()
    request = ExportRequest(str(source), output, kind, **asked)
    done = run_export_job(request, ExportOptions(json=False, benchmark=benchmark), out)
    return done, out.getvalue()


@pytest.fixture(scope="module")
def onnx_file(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    path = tmp_path_factory.mktemp("onnx") / "nano.onnx"
    done, said = export(nano, path, "onnx", benchmark=True)
    assert done.code == 0, said
    return path, done.report, said


@pytest.mark.integration
def test_an_onnx_file_equals_pytorch(onnx_file: tuple[Path, Any, str]) -> None:
    path, report, said = onnx_file
    assert report["checked"]["compared"] == 7 * POSTPROCESS["detections"]
    assert report["checked"]["unexplained"] == 0
    assert 0 < report["checked"]["box_px"] < 1e-3
    assert report["checked"]["score"] < 1e-4
    assert report["latency"]["file_ms"] > 0
    assert "2 x 128 x 256 px" in said
    assert "uint8 [batch, 3, height, width], RGB, 0 to 255" in said
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no draft is left"


@pytest.mark.integration
def test_an_onnx_file_says_what_it_is(onnx_file: tuple[Path, Any, str], classes: ClassMap) -> None:
    import onnx

    model = onnx.load_model(onnx_file[0])
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert [row["name"] for row in json.loads(about["classes"])] == list(classes.names)
    assert json.loads(about["checkpoint"])["step"] == 7
    assert len(json.loads(about["checkpoint"])["sha256"]) == 64
    assert json.loads(about["network"])["backbone"] == "test_efficientnet"
    assert json.loads(about["postprocessing"])["nms"] == "soft"
    assert json.loads(about["size_hw"]) == [128, 128]
    assert json.loads(about["preprocessing"])["pad_rgb"] == [124, 116, 104]
    assert json.loads(about["versions"])["torch"] == torch.__version__.partition("+")[0]
    named = {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert named == {
        "images": ["batch", 3, "height", "width"],
        "sizes_hw": ["batch", 2],
        "boxes_xyxy": ["batch", 20, 4],
        "scores": ["batch", 20],
        "labels": ["batch", 20],
        "count": ["batch"],
    }
    assert str(ROOT).encode() not in onnx_file[0].read_bytes(), "no path of this machine"


@pytest.mark.integration
def test_the_example_finds_what_the_predictor_finds(
    onnx_file: tuple[Path, Any, str], nano: Path, tmp_path: Path
) -> None:
    """A picture that needs no scaling, so that no two resamplings are compared."""
    pixels = pictures(1, 96, 128, seed=5)[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(onnx_file[0]), str(tmp_path / "picture.png")],
        capture_output=True, text=True, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (expected,) = Predictor.load(nano, "cpu").predict([pixels])
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(expected) == POSTPROCESS["detections"]
    for line, name, score, box in zip(
        lines, expected.names, expected.scores, expected.boxes_xywh, strict=True
    ):
        assert line[0] == name
        assert float(line[1]) == pytest.approx(score, abs=1e-3)
        corners = [*box[:2], *(box[:2] + box[2:])]
        assert [float(number) for number in line[2:]] == pytest.approx(corners, abs=0.11)


@pytest.mark.integration
def test_eight_bits(onnx_file: tuple[Path, Any, str], tmp_path: Path) -> None:
    """Quantised on pictures like those asked about: most of what is found is found again."""
    import onnx

    from orchestrator.export.quantise import quantise

    sizes = np.array([[128, 128]], dtype=np.float32)
    inputs = [{"images": pictures(1, 128, 128, s).numpy(), "sizes_hw": sizes} for s in range(4)]
    path = tmp_path / "int8.onnx"
    assert quantise(onnx_file[0], path, inputs) > 40
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]
    model = onnx.load_model(path)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") > 40
    assert {entry.domain for entry in model.opset_import} == {""}
    float_convs = [
        node.input[1]
        for node in model.graph.node
        if node.op_type == "Conv" and not node.input[1].endswith("_DequantizeLinear_Output")
    ]
    assert all("predict.pointwise" in name or ".se." in name for name in float_convs)
    assert sum("predict.pointwise" in name for name in float_convs) == 10, "five levels, two heads"
    whole, small = open_onnx(onnx_file[0]), open_onnx(path)
    for shape in ((1, 128, 128), (2, 256, 128)):
        asked = pictures(*shape, seed=9).numpy(), np.tile(sizes, (shape[0], 1))
        differences = np.abs(whole(*asked)[1] - small(*asked)[1])
        assert 0 < differences.max() < 0.1


@pytest.mark.integration
def test_a_torchscript_file(nano: Path, shapes: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "nano.ts"
    done, said = export(
        nano, path, "torchscript", nms="hard", pixels="float32", data=str(shapes), max_ap_loss=0.0
    )
    assert done.code == 0, said
    assert done.report["ap"]["file"] == pytest.approx(done.report["ap"]["pytorch"], abs=1e-6)
    assert "on 4 images" in said
    extra = {"metadata.json": ""}
    loaded = torch.jit.load(str(path), _extra_files=extra)
    about = json.loads(extra["metadata.json"])
    assert json.loads(about["postprocessing"])["nms"] == "hard"
    assert json.loads(about["inputs"])["images"].startswith("float32 ")
    boxes, scores, _, count = loaded(torch.full((3, 3, 128, 256), 128.0), torch.full((3, 2), 128.0))
    assert boxes.shape == (3, 20, 4)
    assert scores.shape == (3, 20)
    assert count.shape == (3,)


@pytest.mark.integration
@pytest.mark.slow
def test_a_pt2_file(classes: ClassMap, tmp_path: Path) -> None:
    path = tmp_path / "nano.pt2"
    source = checkpoint(tmp_path / "step", classes, replace(NANO, image_size_px=256))
    done, said = export(source, path, "pt2", content="network")
    assert done.code == 0, said
    assert done.report["checked"]["raw"] < 1e-4
    assert "class_logits: float32 [batch, anchors, 6]" in said
    assert "above 128 x 128" in said
    extra = {"metadata.json": ""}
    logits, codes = torch.export.load(path, extra_files=extra).module()(
        torch.zeros(1, 3, 256, 384, dtype=torch.uint8)
    )
    assert logits.shape == (1, (32 * 48 + 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3) * 9, 6)
    assert codes.shape == (*logits.shape[:2], 4)
    assert json.loads(json.loads(extra["metadata.json"])["checkpoint"])["step"] == 7
    with zipfile.ZipFile(path) as archive:
        assert not [n for n in archive.namelist() if str(ROOT).encode() in archive.read(n)]


@pytest.mark.integration
def test_what_fails_the_check_is_not_there(classes: ClassMap, shapes: Path, tmp_path: Path) -> None:
    """Box outputs that float16 cannot hold."""
    source = checkpoint(tmp_path / "step_00000007", classes, box_bias=1e6)
    done, said = export(
        source, tmp_path / "half.ts", "torchscript", content="network", precision="fp16",
        data=str(shapes),
    )  # fmt: skip
    assert done.code == 1
    assert done.report["status"] == "failed"
    assert done.report["checked"]["unexplained"] > 0
    assert "half.ts was not written" in said
    assert [file.name for file in tmp_path.iterdir()] == ["step_00000007"]


@pytest.mark.integration
def test_what_loses_too_much_is_not_there(nano: Path, shapes: Path, tmp_path: Path) -> None:
    """More is asked than can be: as both score the same here, a gain."""
    done, said = export(
        nano, tmp_path / "half.pt", "torchscript", content="network", precision="fp16",
        data=str(shapes), data_images=2, max_ap_loss=-0.1,
    )  # fmt: skip
    assert done.code == 1
    assert "MORE than --max-ap-loss -0.1" in said
    assert list(tmp_path.iterdir()) == []


def with_other_classes(shapes: Path, folder: Path) -> Path:
    """The same data, but for a category's name."""
    path = folder / "data" / "annotations"
    path.mkdir(parents=True)
    text = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    text["categories"][0]["name"] = "something else"
    (path / "instances_val.json").write_text(json.dumps(text))
    (folder / "data" / "images").symlink_to(shapes / "images")
    return folder / "data"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size_hw": (128, 200)}, "--image-size: expected multiples of 128 .2.max_level., got 200"),
        ({"size_hw": (0, 128)}, "got 0; the next that is one is 128"),
        ({"kind": "pt2"}, "--format: expected .* got pt2 for any size; --image-size 128"),
        ({"data": "gone"}, "a folder, got none at"),
        ({"data": "other"}, "category 1: something else in the data, circle in the model"),
        ({"data": "shapes", "size_hw": (128, 256)}, "--data: expected a square --image-size"),
        ({"calibrate": ("gone",), "precision": "int8"}, "--calibrate: expected image"),
        ({"output": "closed/nano.onnx"}, "OUTPUT: expected a file that can be written"),
        ({"output": "folder"}, "OUTPUT: expected a file that can be written"),
        ({"source": "damaged"}, "checkpoint damaged: expected .* bytes of ema.safetensors"),
        ({"source": "gone"}, "MODEL: expected a checkpoint's folder or URI"),
    ],
)
def test_refusals(
    nano: Path, classes: ClassMap, shapes: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    (tmp_path / "closed").write_text("a file where a folder is needed")
    (tmp_path / "folder").mkdir()
    places = {"gone": tmp_path / "gone", "shapes": shapes, "other": tmp_path / "data"}
    if asked.get("data") == "other":
        with_other_classes(shapes, tmp_path)
    if asked.get("source") == "damaged":
        places["damaged"] = checkpoint(tmp_path / "damaged", classes)
        (tmp_path / "damaged" / "ema.safetensors").write_bytes(b"cut short")
    source = places.get(asked.get("source", ""), nano)
    output = tmp_path / asked.get("output", "nano.onnx")
    changes = {k: v for k, v in asked.items() if k not in ("source", "output", "kind")}
    if "data" in changes:
        changes["data"] = str(places[changes["data"]])
    if "calibrate" in changes:
        changes["calibrate"] = (str(tmp_path / "gone"),)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export(source, output, asked.get("kind", "onnx"), **changes)
    assert sorted(tmp_path.rglob("*")) == before


TOPOLOGIES = [(topology, "fast") for topology in get_args(TopologyKind) if topology != "bifpn"]
FUSED = [("bifpn", fusion) for fusion in get_args(FusionKind) if fusion != "fast"]


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "fusion"), [*TOPOLOGIES, *FUSED])
@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2"])
def test_every_topology_and_fusion(
    classes: ClassMap, kind: str, topology: TopologyKind, fusion: FusionKind, tmp_path: Path
) -> None:
    source = checkpoint(
        tmp_path / "step", classes,
        replace(NANO, topology=topology, fusion=fusion, image_size_px=256),
    )  # fmt: skip
    done, said = export(source, tmp_path / "file", kind)
    assert done.code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torchscript", "pt2"])
@pytest.mark.parametrize(
    "asked", [{}, {"size_hw": (256, 384)}, {"size_hw": (128, 128)}, {"nms": "hard"}], ids=str
)
def test_every_kind_of_detections(
    classes: ClassMap, kind: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    nano = checkpoint(tmp_path / "step", classes, replace(NANO, image_size_px=256))
    done, said = export(nano, tmp_path / "file", kind, **asked)
    assert done.code == 0, said
    assert done.report["checked"]["unexplained"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tf", "pytorch"])
def test_d0_at_its_own_size(classes: ClassMap, variant: Any, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "step", classes, ModelConfig(phi="0", variant=variant))
    done, said = export(source, tmp_path / "d0.onnx", "onnx")
    assert done.code == 0, said
    assert "1 x 512 x 512 px" in said


@pytest.mark.slow
def test_eight_bits_with_the_ap_they_cost(nano: Path, shapes: Path, tmp_path: Path) -> None:
    done, said = export(
        nano, tmp_path / "int8.onnx", "onnx", precision="int8", data=str(shapes),
        calibrate=(str(shapes / "images" / "train"),), calibration_images=3,
    )  # fmt: skip
    assert done.code == 0, said
    assert "int8" in said
    whole = export(nano, tmp_path / "fp32.onnx", "onnx")[0]
    assert done.report["bytes"] < 0.8 * whole.report["bytes"]


def test_a_run_with_a_high_score_is_compared_without_it(
    classes: ClassMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POSTPROCESS, "score", 0.9999)
    source = checkpoint(tmp_path / "step_00000007", classes)
    done, text = export(source, tmp_path / "m.pt", "torchscript")
    assert done.code == 0, text
    assert done.report["checked"]["compared"] > 0
    assert done.report["checked"]["silent"]
    assert "none of them is above the run's score" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "step_00000007"]
