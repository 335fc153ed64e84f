from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data.dataset import Batch, DetectionDataset, Sample, collate
from model.data.folder import FolderReader, find_split
from model.data.index import CocoIndex, parse_coco
from model.data.transforms import PAD_RGB, AugmentConfig
from model.errors import DataError

RED, BLUE = (255, 0, 0), (0, 0, 255)
SIZES = [(1003, 677), (615, 1009), (90, 120), (501, 499)]
BOXES = [(100, 80, 700, 500), (60, 300, 610, 800), (10, 20, 70, 100), (1, 2, 300, 400)]


@cache
def picture(name: str, kind: str = "JPEG") -> bytes:
    """Image `name` is a red rectangle on blue."""
    number = int(name)
    image = Image.new("RGB", SIZES[number], BLUE)
    image.paste(RED, BOXES[number])
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()


def make_index() -> CocoIndex:
    document = {
        "images": [
            {"id": i, "file_name": str(i), "width": w, "height": h}
            for i, (w, h) in enumerate(SIZES)
        ],
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 3, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for i, (x0, y0, x1, y1) in enumerate(BOXES)
        ],
    }
    return parse_coco(json.dumps(document).encode(), "boxes.json")


def make_dataset(seed: int = 0, augment: AugmentConfig | None = None) -> DetectionDataset:
    return DetectionDataset(make_index(), picture, 128, augment or AugmentConfig(), seed)


def assert_pixels_at_box(sample: Sample) -> None:
    red = (sample.pixels[..., 0].astype(int) > sample.pixels[..., 2]) & (sample.pixels[..., 1] < 60)
    ys, xs = np.nonzero(red)
    seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    np.testing.assert_allclose(seen, sample.boxes_xyxy[0], atol=1.5)


@pytest.mark.parametrize("image", range(4))
def test_boxes_lie_on_their_pixels_when_the_decoder_shrinks(image: int) -> None:
    """Odd sizes: the decoder rounds its picture up, and a flip must not move by the difference."""
    compared = 0
    for seed in range(25):
        sample = make_dataset(seed)[(0, image)]
        if len(sample.boxes_xyxy):
            assert_pixels_at_box(sample)
            compared += 1
    assert compared > 15


def test_flips_of_shrunk_images_are_not_biased() -> None:
    """The right edge of what is seen, on average to a sixth of a pixel."""
    errors = []
    for seed in range(120):
        config = AugmentConfig(flip=1.0, jitter_min=0.4, jitter_max=1.0)
        sample = make_dataset(seed, config)[(0, 0)]
        red = sample.pixels[..., 0].astype(float)[int(sample.boxes_xyxy[0, 1:4:2].mean())]
        blue = sample.pixels[..., 2].astype(float)[int(sample.boxes_xyxy[0, 1:4:2].mean())]
        share = np.clip(red / (red + blue), 0, 1)[: sample.size_hw[1]]
        left, right = sample.boxes_xyxy[0, [0, 2]]
        middle = int((left + right) / 2)
        errors.append(middle + share[middle:].sum() - right)
    assert abs(np.mean(errors)) < 0.16


@pytest.mark.parametrize("image", range(4))
def test_evaluation_sees_the_whole_image(image: int) -> None:
    dataset = make_dataset().evaluation()
    sample = dataset[(0, image)]
    width, height = SIZES[image]
    assert sample.scale == 128 / max(width, height)
    assert sample.size_hw == (round(height * sample.scale), round(width * sample.scale))
    np.testing.assert_allclose(sample.boxes_xyxy[0] / sample.scale, BOXES[image], rtol=1e-5)
    assert_pixels_at_box(sample)
    assert np.array_equal(dataset[(7, image)].pixels, sample.pixels), "whatever the epoch"


def same(a: Sample, b: Sample) -> bool:
    return np.array_equal(a.pixels, b.pixels) and np.array_equal(a.boxes_xyxy, b.boxes_xyxy)


def test_augmentation_depends_on_seed_epoch_and_image_only() -> None:
    dataset = make_dataset(seed=5)
    first = dataset[(2, 1)]
    np.random.seed(1)  # the global generators must not matter
    torch.manual_seed(1)
    dataset[(0, 0)]  # nor what was asked for before
    assert same(first, dataset[(2, 1)])
    assert same(first, make_dataset(seed=5)[(2, 1)])
    assert not same(first, make_dataset(seed=6)[(2, 1)])
    assert not same(first, dataset[(3, 1)])


def test_images_of_one_epoch_are_augmented_independently() -> None:
    dataset = make_dataset(seed=5)
    jitters = [dataset[(0, i)].scale * max(SIZES[i]) for i in range(4)]
    assert len({round(jitter, 6) for jitter in jitters}) == 4


def test_a_png_is_not_shrunk_and_agrees_with_the_jpeg() -> None:
    config = AugmentConfig(flip=1.0, jitter_min=0.9, jitter_max=0.9)
    jpeg = make_dataset(0, config)[(0, 0)]
    png = DetectionDataset(make_index(), lambda name: picture(name, "PNG"), 128, config, 0)[(0, 0)]
    difference = np.abs(jpeg.pixels.astype(int) - png.pixels)
    assert difference.mean() < 1.5
    assert np.array_equal(jpeg.boxes_xyxy, png.boxes_xyxy)


def test_an_image_of_another_shape_than_annotated_is_named() -> None:
    dataset = DetectionDataset(make_index(), lambda _: picture("2"), 128, AugmentConfig(), 0)
    with pytest.raises(DataError, match=r"image 1: expected 615 x 1009 pixels .*got 90 x 120"):
        dataset[(0, 1)]


def test_unreadable_images_are_named() -> None:
    def read(name: str) -> bytes:
        if name == "0":
            raise FileNotFoundError(name)
        return picture(name)[:600]

    dataset = DetectionDataset(make_index(), read, 128, AugmentConfig(), 0)
    for image in (0, 1):
        with pytest.raises(DataError, match=f"image {image}: expected a readable image"):
            dataset[(0, image)]


def test_collate_pads_and_keeps_memory_channels_last() -> None:
    dataset = make_dataset().evaluation()
    full, other = dataset[(0, 2)], dataset[(0, 0)]
    empty = replace(other, boxes_xyxy=other.boxes_xyxy[:0], labels=other.labels[:0])
    batch = collate([full, empty])
    assert batch.images.shape == (2, 3, 128, 128)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), full.pixels)
    assert batch.labels.tolist() == [[0], [-1]]
    assert batch.boxes_xyxy[1].tolist() == [[0, 0, 0, 0]]
    assert batch.sizes_hw.tolist() == [list(full.size_hw), list(empty.size_hw)]
    assert batch.scales.dtype == torch.float64
    assert batch.scales.tolist() == [full.scale, empty.scale]
    assert batch.indices.tolist() == [2, 0]
    assert collate([empty, empty]).boxes_xyxy.shape == (2, 0, 4)


def test_slices_of_a_batch() -> None:
    dataset = make_dataset().evaluation()
    batch = collate([dataset[(0, image)] for image in range(4)])
    part = batch[1:3]
    assert isinstance(part, Batch)
    assert len(part) == 2
    assert part.indices.tolist() == [1, 2]
    assert torch.equal(part.images, batch.images[1:3])
    assert torch.equal(part.to(torch.device("cpu")).boxes_xyxy, batch.boxes_xyxy[1:3])


def test_real_images() -> None:
    root = Path(__file__).parents[4] / "shared/data/tiny_coco"
    if not root.is_dir():
        pytest.skip("no ../shared/data/tiny_coco beside the repository")
    split = find_split(root, "train")
    assert split is not None
    index = parse_coco(split.annotations.read_bytes(), split.annotations.name)
    dataset = DetectionDataset(index, FolderReader(split.images), 128, AugmentConfig(), 0)
    for image in range(min(6, len(index))):
        for sample in (dataset[(0, image)], dataset.evaluation()[(0, image)]):
            height, width = sample.size_hw
            assert (sample.boxes_xyxy >= 0).all()
            assert (sample.boxes_xyxy <= np.array([width, height] * 2)).all()
            assert len(sample.labels) == len(sample.boxes_xyxy)
            assert sample.pixels[:height, :width].std() > 5


@pytest.mark.integration
def test_an_error_in_a_loader_process_stays_one_line(tmp_path: Path) -> None:
    """Torch hands it over as the text of a traceback."""
    dataset, _ = torn_dataset(tmp_path)
    loader = torch.utils.data.DataLoader(
        dataset, sampler=[(0, 0)], num_workers=1, multiprocessing_context="forkserver",
        collate_fn=collate,
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith("image torn.jpg: expected a readable image, got ")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy == "replace it or take it out"


def torn_dataset(folder: Path) -> tuple[DetectionDataset, CocoIndex]:
    (folder / "torn.jpg").write_bytes(b"torn")
    document = {
        "images": [{"id": 1, "file_name": "torn.jpg", "width": 64, "height": 48}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400}
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    index = parse_coco(json.dumps(document).encode(), "torn")
    return DetectionDataset(index, FolderReader(folder), 64, AugmentConfig(), 0), index


def test_a_damaged_image_scores_as_nothing_found(tmp_path: Path) -> None:
    _, index = torn_dataset(tmp_path)
    dataset = DetectionDataset(index, FolderReader(tmp_path), 64, AugmentConfig(), 0, "replace")
    sample = dataset.evaluation()[(0, 0)]
    assert sample.damaged == 1
    assert (sample.pixels == PAD_RGB).all()
    assert sample.size_hw == (48, 64)
    assert len(sample.labels) == 0
