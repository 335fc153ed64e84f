"""Images looked at in shares give what one evaluation of all gives."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data.dataset import DetectionDataset
from model.data.folder import FolderReader, find_split
from model.data.index import parse_coco
from model.data.shapes import ShapesConfig, ensure_shapes
from model.data.transforms import AugmentConfig
from model.detection.anchors import make_anchors
from model.detection.postprocess import PostprocessConfig
from model.detection.views import View, plan_views
from model.errors import DataError
from model.network.detector import Detector
from model.network.scaling import ModelConfig, resolve
from model.training.evaluation import detect
from model.training.examination import Examiner, in_batches, in_order

SPEC = resolve(
    ModelConfig(
        backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1,
        image_size_px=64, max_level=6,
    ), 6,
)  # fmt: skip
CONFIG = PostprocessConfig(candidates=200, detections=20)
NUM, BATCH = 7, 3


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "pictures"
    ensure_shapes(folder, ShapesConfig(num_train=2, num_val=NUM, size_px=80))
    return folder


def dataset(folder: Path, on_damage: str = "replace") -> DetectionDataset:
    split = find_split(folder, "val")
    assert split is not None
    index = parse_coco(split.annotations.read_bytes(), split.annotations.name)
    reader = FolderReader(split.images)
    return DetectionDataset(index, reader, 64, AugmentConfig(), 0, on_damage)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def detector() -> Detector:
    """Random weights with uneven statistics."""
    torch.manual_seed(2)
    made = Detector(SPEC).eval().requires_grad_(False)
    for tensor in made.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return made.to(memory_format=torch.channels_last)


def examiner(
    detector: Detector, data: DetectionDataset, views: Sequence[View], readers: int = 0
) -> Examiner:
    return Examiner(
        detector, SPEC, data, CONFIG, views, device=torch.device("cpu"), autocast=False,
        readers=readers,
    )  # fmt: skip


@pytest.mark.parametrize("readers", [0, 2])
def test_equal_to_evaluation_however_the_batches_are_shared(
    folder: Path, detector: Detector, readers: int
) -> None:
    data = dataset(folder)
    expected = detect(
        detector, data.evaluation(), make_anchors(SPEC), CONFIG, rank=0, world_size=1,
        batch_size=BATCH, workers=0, device=torch.device("cpu"), autocast=False,
    )  # fmt: skip
    assert len(expected) > NUM
    look = examiner(detector, data, plan_views(SPEC), readers)
    batches = in_batches(NUM, BATCH)
    assert batches == [(0, 1, 2), (3, 4, 5), (6,)]
    for shares in ([batches], [[one] for one in batches], [batches[1:], batches[:1]]):
        found = in_order(look(share) for share in shares)
        np.testing.assert_array_equal(found.rows, expected)
        assert found.damaged == 0


def test_one_further_view_is_that_of_its_size(folder: Path, detector: Detector) -> None:
    """Twice the size: what an evaluation at that size has, found in source pixels."""
    data = dataset(folder)
    large = DetectionDataset(data.index, data.read, 128, data.augment, 0)
    spec = resolve(
        ModelConfig(
            backbone="test_efficientnet", fpn_channels=16, fpn_repeats=1, head_layers=1,
            image_size_px=128, max_level=6,
        ), 6,
    )  # fmt: skip
    expected = detect(
        detector, large.evaluation(), make_anchors(spec), CONFIG, rank=0, world_size=1,
        batch_size=NUM, workers=0, device=torch.device("cpu"), autocast=False,
    )  # fmt: skip
    found = examiner(detector, data, plan_views(SPEC, (2,)))(in_batches(NUM, NUM)).rows
    assert len(found) == len(expected)
    np.testing.assert_allclose(found[:, 5], expected[:, 5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 1:5], expected[:, 1:5], rtol=1e-3, atol=1e-2)


def test_a_mirrored_view_of_mirrored_images_is_the_plain_one(
    folder: Path, detector: Detector, tmp_path: Path
) -> None:
    data = dataset(folder)
    for name in data.index.file_names:
        picture = Image.open(folder / "images" / "val" / str(name))
        turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        turned.save(tmp_path / f"{Path(str(name)).stem}.png")
        (tmp_path / f"{Path(str(name)).stem}.png").rename(tmp_path / str(name))
        picture.save(tmp_path / f"plain-{name}.png")

    class Plain:
        def __call__(self, name: str) -> bytes:
            return (tmp_path / f"plain-{name}.png").read_bytes()

    plain = DetectionDataset(data.index, Plain(), 64, data.augment, 0)
    mirrored = DetectionDataset(data.index, FolderReader(tmp_path), 64, data.augment, 0)
    batches = in_batches(NUM, NUM)
    expected = examiner(detector, plain, [View(64)])(batches).rows
    found = examiner(detector, mirrored, [View(64, flip=True)])(batches).rows
    scale = 64 / data.index.sizes_hw.max(axis=1)
    width = np.round(data.index.sizes_hw[:, 1] * scale) / scale
    image = found[:, 0].astype(int)
    found[:, 1] = width[image] - found[:, 1] - found[:, 3]
    assert len(found) == len(expected)
    for number in range(NUM):  # near ties may change places
        mine, other = (np.sort(rows[rows[:, 0] == number, 5]) for rows in (found, expected))
        np.testing.assert_allclose(mine, other, rtol=1e-2, atol=1e-3)
    best = [int(np.flatnonzero(expected[:, 0] == number)[0]) for number in range(NUM)]
    np.testing.assert_allclose(found[best, 1:5], expected[best, 1:5], atol=0.5)


def test_more_views_find_what_the_plain_one_finds(folder: Path, detector: Detector) -> None:
    look = examiner(detector, dataset(folder), plan_views(SPEC, (1, 2), flip=True), readers=2)
    found = look(in_batches(NUM, BATCH))
    assert set(found.rows[:, 0]) == set(range(NUM))
    counts = [int((found.rows[:, 0] == image).sum()) for image in range(NUM)]
    assert max(counts) <= CONFIG.detections
    for image in range(NUM):
        scores = found.rows[found.rows[:, 0] == image, 5]
        assert all(a >= b for a, b in itertools.pairwise(scores))


def test_damaged_images_are_counted_or_fail(
    folder: Path, detector: Detector, tmp_path: Path
) -> None:
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    name = str(dataset(copied).index.file_names[4])
    (copied / "images" / "val" / name).write_bytes(b"nothing")
    views = plan_views(SPEC, (1, 2))
    found = examiner(detector, dataset(copied), views)(in_batches(NUM, BATCH))
    assert found.damaged == 1
    with pytest.raises(DataError, match=name):
        examiner(detector, dataset(copied, "fail"), views)(in_batches(NUM, BATCH))
