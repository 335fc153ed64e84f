"""Samples by image number: read, decode, view, boxes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.data.index import CocoIndex
from model.data.transforms import (
    AugmentConfig,
    View,
    apply_to_boxes,
    apply_to_image,
    decode_image,
    empty_canvas,
    letterbox_view,
    random_view,
    shrink,
)
from model.errors import DataError

logger = logging.getLogger(__name__)
MOST_REPLACEMENTS = 10  # in a row: then the storage is broken, not an image
OnDamage = Literal["replace", "blank", "fail"]
Reader = Callable[[str], bytes]
"""File name of an image, as in the annotations -> its bytes. Raises OSError.

One that has far to go may also have `ahead(names)`, which begins to fetch what will soon be read.
"""


@dataclass(frozen=True)
class Sample:
    """pixels uint8 [R, R, 3]; boxes float32 [m, 4] network pixels; labels int64 [m].

    damaged: images that could not be read and that this one stands for.
    """

    image: int
    pixels: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.float32]
    labels: NDArray[np.int64]
    scale: float
    size_hw: tuple[int, int]
    damaged: int = 0


@dataclass(frozen=True)
class Batch:
    """images uint8 [B, 3, R, R] (channels last in memory); boxes_xyxy float32 [B, M, 4];
    labels int64 [B, M], -1 for padding; sizes_hw float32 [B, 2] of the content, network pixels;
    scales float64 [B] network pixels per source pixel; indices int64 [B] into the dataset;
    damaged int64 [B]: unreadable images that each stands for.
    """

    images: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    sizes_hw: Tensor
    scales: Tensor
    indices: Tensor
    damaged: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> Batch:
        return Batch(
            *(
                getattr(self, name).to(device, non_blocking=True)
                for name in self.__dataclass_fields__
            )
        )

    def pin_memory(self) -> Batch:
        """Called by DataLoader; keeps the images' memory format."""
        return Batch(*(getattr(self, name).pin_memory() for name in self.__dataclass_fields__))


class DetectionDataset(torch.utils.data.Dataset[Sample]):
    """Maps (epoch, image number) to a sample; without augmentation the epoch does not matter.

    on_damage: what becomes of an image that cannot be read. "replace" takes another one, drawn by
    (seed, epoch, image), so that every run takes the same; "blank" is an empty picture, which scores
    as nothing found; "fail" raises. The first two are counted in the sample.
    """

    def __init__(
        self,
        index: CocoIndex,
        read: Reader,
        image_size_px: int,
        augment: AugmentConfig,
        seed: int,
        on_damage: OnDamage = "fail",
    ) -> None:
        self.index, self.read, self.image_size_px = index, read, image_size_px
        self.augment, self.seed, self.on_damage = augment, seed, on_damage

    def __len__(self) -> int:
        return len(self.index)

    def evaluation(self) -> DetectionDataset:
        """The same images, letterboxed, never augmented."""
        plain = replace(self.augment, enabled=False)
        on_damage: OnDamage = "fail" if self.on_damage == "fail" else "blank"
        return DetectionDataset(
            self.index, self.read, self.image_size_px, plain, self.seed, on_damage
        )

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Raises DataError: unreadable, and to fail or for the MOST_REPLACEMENTS-th time."""
        epoch, image = key
        others = np.random.default_rng((self.seed, epoch, image, 1))
        chosen = image
        for damaged in range(MOST_REPLACEMENTS):
            try:
                return replace(self._sample(epoch, chosen), damaged=damaged)
            except DataError as error:
                if self.on_damage == "fail" or damaged == MOST_REPLACEMENTS - 1:
                    raise
                logger.warning("%s: %s", self.on_damage, error)
            if self.on_damage == "blank":
                return self._blank(image)
            chosen = int(others.integers(len(self)))
        raise AssertionError("unreachable")

    def read_ahead(self, keys: Sequence[tuple[int, int]]) -> None:
        """Says which samples come soon."""
        ahead = getattr(self.read, "ahead", None)
        if ahead is not None:
            ahead([str(self.index.file_names[image]) for _, image in keys])

    def _blank(self, image: int) -> Sample:
        height, width = (int(side) for side in self.index.sizes_hw[image])
        view = letterbox_view(height, width, self.image_size_px)
        boxes, labels = np.empty((0, 4), dtype=np.float32), np.empty(0, dtype=np.int64)
        pixels = empty_canvas(self.image_size_px)
        return Sample(image, pixels, boxes, labels, view.scale, view.size_hw, damaged=1)

    def _sample(self, epoch: int, image: int) -> Sample:
        name = str(self.index.file_names[image])
        height, width = (int(side) for side in self.index.sizes_hw[image])
        view = self._view(epoch, image, height, width)
        # Evaluation decodes in full; training lets the JPEG decoder skip what is scaled away.
        draft = _draft(view.scale, height, width) if self.augment.enabled else None
        try:
            picture = decode_image(self.read(name), draft_size_px=draft)
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"image {name}", "a readable image", str(error), "replace it or take it out"
            ) from None
        shrunk_by = _shrunk_by(picture.size, (height, width), name, drafted=draft is not None)
        on_picture = replace(view, scale=view.scale * shrunk_by)
        pixels = apply_to_image(picture, on_picture, self.image_size_px)
        boxes, labels = self.index.training_boxes(image)
        boxes, labels = apply_to_boxes(boxes, labels, view)
        return Sample(image, pixels, boxes, labels, view.scale, view.size_hw)

    def _view(self, epoch: int, image: int, height: int, width: int) -> View:
        if not self.augment.enabled:
            return letterbox_view(height, width, self.image_size_px)
        rng = np.random.default_rng((self.seed, epoch, image))
        return random_view(height, width, self.image_size_px, self.augment, rng)


def _draft(scale: float, height: int, width: int) -> int | None:
    """Smallest side that the JPEG decoder must keep, or None if it must not shrink."""
    factor = shrink(scale)
    return None if factor == 1 else max(1, min(height, width) // factor)


def _shrunk_by(
    decoded_wh: tuple[int, int], source_hw: tuple[int, int], name: str, *, drafted: bool
) -> int:
    """How much the decoder shrank the image: 1, or 2, 4 or 8 if it was asked to.

    Raises:
        DataError: the file has another shape than its annotation says.
    """
    for factor in (1, 2, 4, 8) if drafted else (1,):
        if decoded_wh == (-(-source_hw[1] // factor), -(-source_hw[0] // factor)):
            return factor
    raise DataError(
        f"image {name}",
        f"{source_hw[1]} x {source_hw[0]} pixels as annotated",
        f"{decoded_wh[0]} x {decoded_wh[1]}",
        "annotate the image as it is shown (after EXIF rotation)",
    )


def collate(samples: list[Sample]) -> Batch:
    """Stack pixels, pad boxes with label -1 to the batch's largest number."""
    most = max(len(sample.labels) for sample in samples)
    boxes = np.zeros((len(samples), most, 4), dtype=np.float32)
    labels = np.full((len(samples), most), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        boxes[row, : len(sample.labels)] = sample.boxes_xyxy
        labels[row, : len(sample.labels)] = sample.labels
    pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        boxes_xyxy=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        sizes_hw=torch.tensor([sample.size_hw for sample in samples], dtype=torch.float32),
        scales=torch.tensor([sample.scale for sample in samples], dtype=torch.float64),
        indices=torch.tensor([sample.image for sample in samples], dtype=torch.int64),
        damaged=torch.tensor([sample.damaged for sample in samples], dtype=torch.int64),
    )
