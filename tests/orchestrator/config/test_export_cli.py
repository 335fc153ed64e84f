from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.export_cli import ExportOptions, ExportRequest, parse_export
from orchestrator.errors import ConfigError

INT8 = ["m.onnx", "--precision", "int8"]


def parse(*argv: str) -> tuple[ExportRequest, ExportOptions]:
    return parse_export("Export.", ["runs:/1", *argv])


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ("a.onnx", "onnx"),
        ("a.pt", "torchscript"),
        ("b/a.ts", "torchscript"),
        ("a.pt2", "pt2"),
        ("a.pth", "effdet"),
        ("a.safetensors", "effdet"),
    ],
)
def test_the_suffix_says_the_format(output: str, kind: str) -> None:
    request, options = parse(output)
    assert request == ExportRequest("runs:/1", Path(output), kind)  # type: ignore[arg-type]
    assert options == ExportOptions(json=False, benchmark=False)
    assert parse(output, "--format", kind)[0] == request


def test_the_format_names_what_the_suffix_does_not() -> None:
    assert parse("model.bin", "--format", "pt2")[0].format == "pt2"


def test_the_file_is_a_local_one() -> None:
    with pytest.raises(ConfigError, match=r"OUTPUT: expected a local file, got s3://b/m\.onnx"):
        parse("s3://b/m.onnx")


def test_everything_else() -> None:
    request, options = parse(
        *INT8, "--content", "network", "--input", "float32", "--image-size", "512x768",
        "--calibrate", "a", "--calibrate", "b/*.jpg", "--calibration-images", "7", "--data", "d",
        "--data-images", "9", "--max-ap-loss", "0.02", "--tracking-uri", "u", "--benchmark", "--json",
    )  # fmt: skip
    assert request == ExportRequest(
        "runs:/1", Path("m.onnx"), "onnx", "network", "int8", "float32", None, (512, 768),
        ("a", "b/*.jpg"), 7, "d", 9, 0.02, "u",
    )  # fmt: skip
    assert options == ExportOptions(json=True, benchmark=True)
    assert parse("m.onnx", "--image-size", "640")[0].size_hw == (640, 640)
    assert parse("m.onnx", "--nms", "hard")[0].nms == "hard"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["weights"],
            "OUTPUT: expected a suffix that says the format: .onnx (onnx), .pt .ts (torchscript)",
        ),
        (["a.onnx", "--format", "pt2"], "OUTPUT: expected a .pt2 file"),
        (["a.bin", "--format", "effdet"], "OUTPUT: expected a .pth or .safetensors file"),
        (["a.onnx", "--format", "onxx"], "invalid choice"),
        (["a.pth", "--nms", "hard"], "--nms: expected nothing beside --format effdet"),
        (["a.pth", "--content", "network"], "--content: expected nothing beside"),
        (["a.pth", "--image-size", "512"], "--image-size: expected nothing beside"),
        (["a.pth", "--benchmark"], "--benchmark: expected nothing beside"),
        (["a.onnx", "--content", "network", "--nms", "soft"], "--nms: expected nothing beside"),
        (["a.pt", "--precision", "int8"], "--precision: expected fp32 or fp16 for this format"),
        ([*INT8, "--data", "d"], "--calibrate: expected images to measure"),
        ([*INT8, "--calibrate", "i"], "--data: expected a dataset, to measure what int8 loses"),
        (["a.onnx", "--precision", "fp16"], "--data: expected a dataset"),
        (["a.onnx", "--calibrate", "i"], "--calibrate: expected nothing but"),
        (["a.onnx", "--calibration-images", "3"], "--calibrate: expected nothing but"),
        (["a.onnx", "--max-ap-loss", "0.1"], "--max-ap-loss: expected --data"),
        (["a.onnx", "--data", "d", "--max-ap-loss", "2"], "expected 0 <= X <= 1, got 2"),
        (["a.onnx", "--data-images", "3"], "--data-images: expected --data"),
        (["a.onnx", "--data", "d", "--data-images", "0"], "--data-images: expected at least 1"),
        ([*INT8, "--data", "d", "--calibrate", "i", "--calibration-images", "0"], "at least 1"),
        (["a.onnx", "--image-size", "big"], "--image-size: expected PX or HEIGHTxWIDTH, got 'big'"),
        (["a.onnx", "--opset", "9"], "expected a known flag, got --opset"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(*argv)
    assert message in str(raised.value)
