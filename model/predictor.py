"""From a checkpoint to detections on any image, with evaluation's own numbers.

Images are decoded, letterboxed and postprocessed exactly as `model.training.evaluation` does it, so
what is served is what was scored. Needs nothing of the cluster.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import nn

from model.data.dataset import Sample, collate
from model.data.index import ClassMap
from model.data.transforms import apply_to_image, decode_image, letterbox_view
from model.detection.anchors import make_anchors
from model.detection.postprocess import Detections, PostprocessConfig, postprocess
from model.errors import CheckpointError, DataError
from model.network.detector import Detector
from model.network.scaling import NetworkSpec
from model.training.state import (
    CLASSES,
    CONFIG,
    EMA_WEIGHTS,
    META,
    read_classes,
    read_network,
    read_weights,
    verify_checkpoint,
)

MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
BATCH_SIZE = 8
SERVED = (EMA_WEIGHTS, CONFIG, CLASSES)
"""Files of a checkpoint that predictions need, besides its marker."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""Plain pixels only: Pillow hands others, such as EPS, to programs that run what is in them."""

JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""Those that begin a segment with a length, or end the image."""
FREE_SCANS = 16
MAX_SCANNED_PIXELS = 1_500_000_000
"""Progressive JPEGs have about ten passes."""

ImageLike = bytes | NDArray[np.uint8] | Image.Image
"""An encoded file; or RGB pixels, uint8 [H, W, 3] or a Pillow image of mode RGB."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """One image, best first. boxes_xywh float64 [N, 4] and size_wh in source pixels (as the image
    is shown, after EXIF rotation); scores float64 [N]; category_ids int64 [N]; names [N].

    problem: why there is nothing, where the image could not be used.
    """

    boxes_xywh: NDArray[np.float64]
    scores: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    names: tuple[str, ...]
    size_wh: tuple[int, int]
    problem: DataError | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image as the network takes it; size_wh as of a prediction."""

    sample: Sample
    size_wh: tuple[int, int]


class UnknownImageError(DataError):
    """Bytes that are none of FORMATS."""


class LargeImageError(DataError):
    """More pixels, or more work to decode, than is allowed."""


class Predictor:
    """A detector with all that surrounds it. `load` makes one from a checkpoint."""

    def __init__(
        self,
        detector: nn.Module,
        spec: NetworkSpec,
        classes: ClassMap,
        config: PostprocessConfig,
        *,
        device: torch.device,
        autocast: bool,
    ) -> None:
        """detector: in eval mode, on `device`. autocast: bfloat16, as training on a GPU does it."""
        self.detector, self.spec, self.classes, self.config = detector, spec, classes, config
        self.device, self.autocast = device, autocast
        self.anchors_xyxy = make_anchors(spec).to(device)
        self._category_ids = np.array(classes.category_ids, dtype=np.int64)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device | str | None = None,
        config: PostprocessConfig | None = None,
    ) -> Predictor:
        """The averaged weights of a checkpoint folder, verified first.

        device: None is a GPU where there is one. config: None is what the run evaluated with.

        Raises:
            CheckpointError: damaged, or not a detector's.
        """
        verify_checkpoint(folder)
        try:
            spec, classes = read_network(folder), read_classes(folder)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {folder.name}", f"a detector's {CONFIG} and {CLASSES}",
                f"others ({type(error).__name__}: {error})", "use a checkpoint of jobs/train.py",
            ) from None  # fmt: skip
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        job = json.loads((folder / CONFIG).read_text()).get("job", {})
        train = job.get("train", {})
        bf16 = {"auto": on.type == "cuda", "bf16": True, "fp32": False}
        detector = Detector(spec)
        read_weights(folder, detector, ema=True)
        if train.get("channels_last", True):  # evaluation's layout, which the last digits depend on
            detector = detector.to(memory_format=torch.channels_last)
        return cls(
            detector.to(on).eval().requires_grad_(False), spec, classes,
            config or _evaluated_with(job), device=on,
            autocast=bf16[train.get("precision", "auto")],
        )  # fmt: skip

    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        score_threshold: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Prediction]:
        """One for each image, in order; see `stream`."""
        return list(self.stream(images, score_threshold=score_threshold, batch_size=batch_size))

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        score_threshold: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[Prediction]:
        """Predictions as they come, never more than a batch of images at once.

        score_threshold: keep what scores above it (None: the configuration's).
        """
        waiting = iter(images)
        while batch := list(islice(waiting, batch_size)):
            yield from self._batch(batch, score_threshold)

    def prepare(self, image: ImageLike, max_pixels: int = MAX_PIXELS) -> Prepared:
        """Decode and scale: the part that needs no network, for threads of its own.

        Raises:
            DataError: as read_image.
        """
        picture = read_image(image, max_pixels)
        return Prepared(_letterboxed(picture, self.spec.image_size_px), picture.size)

    def _batch(
        self, images: Sequence[ImageLike], score_threshold: float | None
    ) -> list[Prediction]:
        ready: list[Prepared] = []
        problems: list[DataError | None] = []
        for image in images:
            try:
                ready.append(self.prepare(image))
                problems.append(None)
            except DataError as error:
                problems.append(error)
        found = iter(self.detect(ready, score_threshold) if ready else ())
        return [next(found) if problem is None else self._nothing(problem) for problem in problems]

    @torch.inference_mode()
    def detect(
        self, images: Sequence[Prepared], score_threshold: float | None = None
    ) -> list[Prediction]:
        """What is in prepared images, looked at together; score_threshold as of `stream`."""
        config = self.config
        if score_threshold is not None:
            config = replace(config, score=score_threshold)
        samples = [image.sample for image in images]
        batch = collate(samples).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            class_logits, box_codes = self.detector(batch.images)
        results = postprocess(class_logits, box_codes, self.anchors_xyxy, batch.sizes_hw, config)
        return [
            self._in_source(result, image.sample.scale, image.size_wh)
            for result, image in zip(results, images, strict=True)
        ]

    def _in_source(self, result: Detections, scale: float, size_wh: tuple[int, int]) -> Prediction:
        """Network pixels -> source pixels, labels -> categories."""
        boxes = result.boxes_xyxy.double().numpy() / scale
        boxes[:, 2:] -= boxes[:, :2]
        labels = result.labels.numpy()
        names = tuple(self.classes.names[label] for label in labels)
        scores = result.scores.double().numpy()
        return Prediction(boxes, scores, self._category_ids[labels], names, size_wh)

    def _nothing(self, problem: DataError) -> Prediction:
        none = np.empty(0)
        ids = np.empty(0, dtype=np.int64)
        return Prediction(np.empty((0, 4)), none, ids, (), (0, 0), problem)


def read_image(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB, rotated as EXIF says.

    Raises:
        DataError: undecodable, truncated, too large, or no RGB image.
    """
    if isinstance(image, bytes):
        return _decoded(image, max_pixels)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise _unusable("uint8 [H, W, 3], RGB", f"{image.dtype} {list(image.shape)}")
        return Image.fromarray(np.ascontiguousarray(image))
    if isinstance(image, Image.Image):
        if image.mode != "RGB":
            raise _unusable("mode RGB", image.mode, "convert it, or give the encoded file")
        return image
    raise _unusable("encoded bytes, an array or a Pillow image", type(image).__name__)


def _decoded(data: bytes, max_pixels: int) -> Image.Image:
    remedy = "replace it or take it out"
    at_most = f"at most {max_pixels:,} pixels"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            width, height = header.size
            passes = _scans(data) if header.format in ("JPEG", "MPO") else 1
        if width * height > max_pixels:
            raise LargeImageError("image", at_most, f"{width} x {height}", "shrink it")
        if passes > FREE_SCANS and passes * width * height > MAX_SCANNED_PIXELS:
            raise LargeImageError(
                "image", "a JPEG of a few passes", f"{passes} passes over {width} x {height}",
                "save it anew",
            )  # fmt: skip
        return decode_image(data, formats=FORMATS)
    except DataError:
        raise
    except UnidentifiedImageError:
        expected = "one of " + ", ".join(FORMATS)
        got = f"{len(data)} bytes that are none"
        raise UnknownImageError("image", expected, got, remedy) from None
    except Image.DecompressionBombError as error:
        raise LargeImageError("image", at_most, _line(error), "shrink it") from None
    except Exception as error:  # each image format has its own exceptions
        raise _unusable("a readable image", _line(error), remedy) from None


def _scans(data: bytes) -> int:
    """Passes over the pixels that a JPEG asks for. Each costs time, and some bytes ask for many."""
    place, scans = 2, 0
    while (marker := JPEG_MARKER.search(data, place)) is not None:
        kind, place = marker[0][1], marker.end()
        if kind == 0xD9:  # end of the image; what follows is nobody's
            break
        place += int.from_bytes(data[place : place + 2], "big")
        scans += kind == 0xDA
    return scans


def _letterboxed(picture: Image.Image, image_size_px: int) -> Sample:
    width, height = picture.size
    view = letterbox_view(height, width, image_size_px)
    pixels = apply_to_image(picture, view, image_size_px)
    boxes, labels = np.empty((0, 4), dtype=np.float32), np.empty(0, dtype=np.int64)
    return Sample(0, pixels, boxes, labels, view.scale, view.size_hw)


def copy_served(checkpoint: Path, target: Path) -> None:
    """The part of a verified checkpoint that predictions need, into a new folder that is one too."""
    target.mkdir(parents=True)
    meta: dict[str, Any] = json.loads((checkpoint / META).read_text())
    for name in SERVED:
        shutil.copyfile(checkpoint / name, target / name)
    meta["files"] = {name: meta["files"][name] for name in SERVED}
    (target / META).write_text(json.dumps(meta, indent=1))


def _evaluated_with(job: dict[str, Any]) -> PostprocessConfig:
    given = job.get("evaluation", {})
    known = [field.name for field in fields(PostprocessConfig)]
    return PostprocessConfig(**{name: given[name] for name in known if name in given})


def _unusable(expected: str, got: str, remedy: str = "correct it") -> DataError:
    return DataError("image", expected, got, remedy)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
