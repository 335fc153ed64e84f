"""What is served is what was scored."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from model.data.dataset import DetectionDataset
from model.data.folder import FolderReader, find_split
from model.data.index import ClassMap, parse_coco
from model.data.shapes import ShapesConfig, ensure_shapes
from model.data.transforms import AugmentConfig
from model.detection.anchors import make_anchors
from model.detection.postprocess import PostprocessConfig
from model.drawing import LONGEST_PX, SHORTEST_PX, draw
from model.errors import CheckpointError, DataError
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve
from model.predictor import Prediction, Predictor, copy_served, read_image
from model.training.evaluation import detect
from model.training.state import Progress, network_config, verify_checkpoint, write_checkpoint

CLASSES = ClassMap((1, 7, 9, 20, 21, 90), ("disc", "box", "star", "ring", "bar", "wedge"))
SOFT = {
    "nms": "soft",
    "iou": 0.5,
    "sigma": 0.3,
    "score": 0.001,
    "candidates": 900,
    "detections": 40,
}
HARD = SOFT | {"nms": "hard", "iou": 0.4, "batch_size": 3}


def checkpoint(folder: Path, evaluation: dict[str, Any], **train: Any) -> Detector:
    """Random weights with uneven statistics, so that nothing hides behind a zero."""
    config = ModelConfig(
        backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1,
        image_size_px=128,
    )  # fmt: skip
    torch.manual_seed(1)
    detector = Detector(resolve(config, CLASSES.num_classes))
    for tensor in detector.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))
    folder.mkdir()
    state = detector.state_dict()
    write_checkpoint(
        folder, model={key: torch.zeros_like(tensor) for key, tensor in state.items()}, ema=state,
        progress=Progress(3, {}, torch.zeros(6)),
        config={
            "network": network_config(detector.spec),
            "job": {"evaluation": evaluation, "train": {"precision": "auto"} | train},
        },
        classes=CLASSES, metrics={"val/AP": 0.25},
    )  # fmt: skip
    return detector.eval()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    folder = tmp_path_factory.mktemp("shapes") / "pictures"
    ensure_shapes(folder, ShapesConfig(num_train=2, num_val=7, size_px=96))
    split = find_split(folder, "val")
    assert split is not None
    index = parse_coco(split.annotations.read_bytes(), split.annotations.name)
    return DetectionDataset(index, FolderReader(split.images), 128, AugmentConfig(), 0)


def as_rows(found: list[Prediction]) -> NDArray[np.float64]:
    """As `detect` gives them, with category ids for labels."""
    return np.concatenate(
        [
            np.column_stack([np.full(len(one), i), one.boxes_xywh, one.scores, one.category_ids])
            for i, one in enumerate(found)
        ]
    )


@pytest.mark.parametrize("evaluation", [SOFT, HARD], ids=["soft", "hard"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equal_to_evaluation(
    shapes: DetectionDataset, tmp_path: Path, evaluation: dict[str, Any], channels_last: bool
) -> None:
    detector = checkpoint(tmp_path / "step", evaluation, channels_last=channels_last)
    if channels_last:
        detector = detector.to(memory_format=torch.channels_last)
    config = PostprocessConfig(**{k: v for k, v in evaluation.items() if k != "batch_size"})
    expected = detect(
        detector, shapes.evaluation(), make_anchors(detector.spec), config, rank=0, world_size=1,
        batch_size=3, workers=0, device=torch.device("cpu"), autocast=False,
    )  # fmt: skip
    expected[:, 6] = np.array(CLASSES.category_ids)[expected[:, 6].astype(int)]
    encoded = [shapes.read(str(name)) for name in shapes.index.file_names]
    predictor = Predictor.load(tmp_path / "step", "cpu")
    found = predictor.predict(encoded, batch_size=3)
    assert len(expected) > 100
    np.testing.assert_array_equal(as_rows(found), expected)
    pixels = [np.array(read_image(data)) for data in encoded]
    np.testing.assert_array_equal(as_rows(predictor.predict(pixels, batch_size=3)), expected)
    pictures = [Image.fromarray(one) for one in pixels]
    np.testing.assert_array_equal(as_rows(predictor.predict(pictures, batch_size=3)), expected)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("predictor") / "step_00000003"
    checkpoint(folder, SOFT)
    return Predictor.load(folder, "cpu")


def picture(width: int = 200, height: int = 90, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height)).convert("RGB")


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_boxes_are_in_source_pixels_inside_the_image(predictor: Predictor) -> None:
    small, large = picture(), picture().resize((800, 360), Image.Resampling.NEAREST)
    for image, width, height in ((small, 200, 90), (large, 800, 360)):
        (found,) = predictor.predict([image], score_threshold=0.0)
        assert found.size_wh == (width, height)
        assert len(found) == 40
        ends = found.boxes_xywh[:, :2] + found.boxes_xywh[:, 2:]
        assert (found.boxes_xywh >= 0).all()
        half_a_network_pixel = 0.5 * max(width, height) / 128  # what the content is rounded by
        assert (ends <= np.array([width, height]) + half_a_network_pixel + 1e-3).all()
        assert ends[:, 0].max() > 0.9 * width  # nothing was left in network pixels


def test_names_belong_to_category_ids(predictor: Predictor) -> None:
    (found,) = predictor.predict([picture()], score_threshold=0.0)
    by_id = dict(zip(CLASSES.category_ids, CLASSES.names, strict=True))
    assert found.names == tuple(by_id[int(one)] for one in found.category_ids)
    assert (np.diff(found.scores) <= 0).all()


def test_threshold_cuts_the_same_list(predictor: Predictor) -> None:
    (all_of_them,) = predictor.predict([picture()], score_threshold=0.0)
    middle = float(all_of_them.scores[20])
    (best,) = predictor.predict([picture()], score_threshold=middle)
    assert 0 < len(best) <= 20
    np.testing.assert_array_equal(best.boxes_xywh, all_of_them.boxes_xywh[: len(best)])


def test_exif_rotation_is_followed(predictor: Predictor) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    (rotated,) = predictor.predict([encode(picture(), exif=exif)])
    (expected,) = predictor.predict([upright])
    assert rotated.size_wh == (90, 200)
    np.testing.assert_array_equal(rotated.boxes_xywh, expected.boxes_xywh)


def header_of_a_bomb() -> bytes:
    """A PNG of a few bytes that says it is 40,000 x 40,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 100))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "0 bytes that are none"),
        (b"<html>not found</html>", "bytes that are none"),
        (encode(picture(), "JPEG")[:-400], "truncated"),
        (encode(picture())[:-4000], "a readable image"),
        (header_of_a_bomb(), "at most 89,478,485 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "bytes that are none"),
        (np.zeros((4, 4), dtype=np.uint8), "uint8 \\[H, W, 3\\]"),
        (np.zeros((4, 4, 3), dtype=np.float32), "float32"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "\\[0, 4, 3\\]"),
        (Image.new("RGBA", (4, 4)), "mode RGB, got RGBA"),
        ("photo.jpg", "got str"),
    ],
)
def test_a_bad_image_is_one_line_and_the_others_go_on(
    predictor: Predictor, bad: Any, message: str
) -> None:
    first, second, third = predictor.predict([picture(), bad, picture(seed=1)], score_threshold=0.0)
    assert isinstance(second.problem, DataError)
    assert "\n" not in str(second.problem)
    with pytest.raises(DataError, match=message):
        raise second.problem
    assert len(second) == 0
    assert (first.problem, third.problem, len(first), len(third)) == (None, None, 40, 40)
    (alone,) = predictor.predict([picture(seed=1)], score_threshold=0.0)
    np.testing.assert_allclose(third.boxes_xywh, alone.boxes_xywh, atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's
def test_damage_anywhere_never_crashes(predictor: Predictor) -> None:
    rng = np.random.default_rng(5)
    refused = 0
    for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        whole = encode(picture(40, 30), kind)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, min(len(data), 400), 4):
                data[place] = rng.integers(0, 256)
            try:
                read_image(bytes(data[: rng.integers(1, len(data) + 1)]))
            except DataError:
                refused += 1
    assert refused > 200


def test_more_pixels_than_allowed_are_not_decoded() -> None:
    data = encode(Image.new("RGB", (100, 101)))
    assert read_image(data, max_pixels=10_100).size == (100, 101)
    with pytest.raises(DataError, match="at most 10,099 pixels, got 100 x 101"):
        read_image(data, max_pixels=10_099)


def test_streams_one_batch_at_a_time(predictor: Predictor) -> None:
    taken = 0

    def images() -> Any:
        nonlocal taken
        for seed in range(7):
            taken += 1
            yield picture(seed=seed)

    stream = predictor.stream(images(), batch_size=2)
    next(stream)
    assert taken == 2
    assert len(list(stream)) == 6


def test_own_settings_win_over_the_runs(tmp_path: Path) -> None:
    checkpoint(tmp_path / "step", SOFT)
    asked = PostprocessConfig(detections=5, score=0.0)
    predictor = Predictor.load(tmp_path / "step", "cpu", asked)
    assert [len(one) for one in predictor.predict([picture()])] == [5]
    assert Predictor.load(tmp_path / "step", "cpu").config == PostprocessConfig(**SOFT)


def test_damaged_checkpoints_and_others_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "step", SOFT)
    weights = tmp_path / "step" / "ema.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError):
        Predictor.load(tmp_path / "step")
    linear = torch.nn.Linear(2, 2).state_dict()
    (tmp_path / "other").mkdir()
    write_checkpoint(
        tmp_path / "other", model=linear, ema=linear, progress=Progress(1, {}, torch.zeros(3)),
        config={}, classes=CLASSES, metrics={},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"a detector's config\.json"):
        Predictor.load(tmp_path / "other")


def test_what_is_served_is_a_checkpoint_of_its_own(tmp_path: Path, predictor: Predictor) -> None:
    checkpoint(tmp_path / "step", SOFT)
    copy_served(tmp_path / "step", tmp_path / "served")
    assert not (tmp_path / "served" / "model.safetensors").exists()
    assert verify_checkpoint(tmp_path / "served")["step"] == 3
    (found,) = Predictor.load(tmp_path / "served", "cpu").predict([picture()])
    (expected,) = predictor.predict([picture()])
    np.testing.assert_array_equal(found.boxes_xywh, expected.boxes_xywh)


@pytest.mark.parametrize("size", [(40, 30), (3000, 100)])
def test_drawings_are_large_enough_to_read_and_show_boxes(size: tuple[int, int]) -> None:
    plain = Image.new("RGB", size)
    box = np.array([[0.25 * size[0], 0.25 * size[1], 0.5 * size[0], 0.5 * size[1]]])
    one = Prediction(box, np.array([0.9]), np.array([7]), ("box",), size)
    drawn = np.array(draw(plain, one))
    assert SHORTEST_PX <= max(drawn.shape) <= LONGEST_PX
    assert drawn.any()
    height, width = drawn.shape[:2]
    assert drawn[height // 2, round(0.25 * width) : round(0.25 * width) + 3].any()
    nothing = replace(one, boxes_xywh=np.empty((0, 4)), scores=np.empty(0), names=())
    assert not np.array(draw(plain, nothing)).any()
