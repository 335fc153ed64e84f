"""What a worker of a prediction does: a shard of images, or a video, becomes a committed part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, BinaryIO

import torch

from model.drawing import draw
from model.predictor import Prediction, Predictor, read_image
from orchestrator.errors import ConfigError, DataError
from orchestrator.launch.packed_model import PackedModel, device_held, within_memory
from orchestrator.storage.images import ImageFile, read_batches
from orchestrator.storage.predictions import (
    DRAWN,
    PARTS,
    Failure,
    Part,
    PredictionFolder,
    rows_name,
)
from orchestrator.storage.videos import Every, Frame, Video, VideoWriter

JPEG_QUALITY = 90


@dataclass(frozen=True)
class Item:
    """An image or a video. image_id: of the first frame of a video. drawn: where, None: nowhere."""

    file: ImageFile
    image_id: int
    drawn: str | None


@dataclass(frozen=True)
class Shard:
    """Images that are looked at together, or one video; in the order of the list."""

    number: int
    items: tuple[Item, ...]

    @property
    def video(self) -> Item | None:
        return self.items[0] if self.items[0].file.is_video else None

    def __str__(self) -> str:
        """For people."""
        more = f" and {len(self.items) - 1} more" if len(self.items) > 1 else ""
        return f"shard {self.number}: {one_line(valid_text(self.items[0].file.name))}{more}"


@dataclass(frozen=True)
class Looker:
    """`make` of the fleet. folders: local ones that images were listed in.

    use_gpu: None where there is one.
    """

    model: PackedModel
    output: PredictionFolder
    plan: Mapping[str, Any]
    folders: tuple[str, ...]
    score: float
    batch_size: int
    every: Every
    use_gpu: bool | None = None

    def __call__(self) -> Callable[[Shard], Part]:
        """Raises ConfigError where this node does not see what the driver sees."""
        self.output.check_reached(self.plan)
        for folder in self.folders:
            if not os.path.isdir(folder):
                raise ConfigError(
                    "IMAGES", "folders that every node reaches", f"{folder}, which one does not",
                    "give s3://… or a shared folder",
                )  # fmt: skip
        device = torch.device("cpu") if self.use_gpu is False else device_held()
        with self.model.unpacked() as checkpoint:
            predictor = Predictor.load(checkpoint, device)
        # Without the bytes, which nobody needs again.
        return _Desk(replace(self, model=PackedModel({})), predictor).look


@dataclass
class _Desk:
    order: Looker
    ask: Predictor

    def look(self, shard: Shard) -> Part:
        """Its part, committed."""
        output = self.order.output
        with (
            output.writing(f"{PARTS}/{rows_name(shard.number)}") as path,
            path.open("wb") as file,
        ):
            rows = _Rows(file)
            if shard.video is None:
                self._images(shard.items, rows)
            else:
                self._video(shard.video, rows)
        part = Part(
            shard.number, rows.images, rows.detections, rows.bytes, self.ask.device.type,
            tuple(rows.failed),
        )  # fmt: skip
        output.commit(part)
        return part

    def _images(self, items: Sequence[Item], rows: _Rows) -> None:
        waiting = iter(items)
        for batch in read_batches((item.file for item in items), self.order.batch_size):
            readable = [data for _, data in batch if isinstance(data, bytes)]
            found = iter(self._predict(readable))
            for item, (_, data) in zip(islice(waiting, len(batch)), batch, strict=True):
                rows.images += 1
                if isinstance(data, DataError):
                    rows.fail(item.file, data)
                    continue
                prediction = next(found)
                if prediction.problem is not None:
                    rows.fail(item.file, prediction.problem)
                    continue
                rows.add(item.image_id, item.file, prediction)
                if item.drawn is not None:
                    with self.order.output.writing(f"{DRAWN}/{item.drawn}") as path:
                        picture = draw(read_image(data), prediction)
                        picture.save(path, format="JPEG", quality=JPEG_QUALITY)

    def _predict(self, images: Sequence[Any]) -> list[Prediction]:
        with within_memory(self.order.batch_size):
            return self.ask.predict(
                images, score_threshold=self.order.score, batch_size=self.order.batch_size
            )

    def _video(self, item: Item, rows: _Rows) -> None:
        """A broken one is used up to the break."""
        try:
            with Video(item.file.place, self.order.every) as video:
                frames = _UntilBroken(video)
                first = list(islice(frames, 1))
                if item.drawn is None or not first:
                    self._frames(item, chain(first, frames), rows, None)
                else:
                    with (
                        self.order.output.writing(f"{DRAWN}/{item.drawn}") as path,
                        VideoWriter(path, video.fps) as drawn,
                    ):
                        self._frames(item, chain(first, frames), rows, drawn)
                if frames.error is not None:
                    raise frames.error
        except DataError as error:
            rows.fail(item.file, error)

    def _frames(
        self, item: Item, frames: Iterator[Frame], rows: _Rows, drawn: VideoWriter | None
    ) -> None:
        while batch := list(islice(frames, self.order.batch_size)):
            for frame, found in zip(batch, self._predict([f.picture for f in batch]), strict=True):
                where = {"frame": frame.index, "time_s": round(frame.time_s, 6)}
                rows.add(item.image_id + rows.images, item.file, found, where)
                rows.images += 1
                if drawn is not None:
                    drawn.add(draw(frame.picture, found))


class _UntilBroken:
    """Frames up to the first that cannot be decoded; error: why it cannot."""

    def __init__(self, video: Video) -> None:
        self.frames = iter(video)
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        try:
            return next(self.frames)
        except DataError as error:
            self.error = error
            raise StopIteration from None


@dataclass
class _Rows:
    """Rows of a part as they are found, and what could not be used."""

    file: BinaryIO
    images: int = 0
    detections: int = 0
    bytes: int = 0
    failed: list[Failure] = field(default_factory=list)

    def add(
        self,
        image_id: int,
        file: ImageFile,
        found: Prediction,
        where: Mapping[str, Any] | None = None,
    ) -> None:
        name = valid_text(file.name)
        for box, score, category_id, category in zip(
            found.boxes_xywh.tolist(), found.scores.tolist(), found.category_ids.tolist(),
            found.names, strict=True,
        ):  # fmt: skip
            row = {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": box,
                "score": score,
                "category": category,
                "file_name": name,
                **(where or {}),
            }
            self.bytes += self.file.write(json.dumps(row).encode() + b"\n")
            self.detections += 1

    def fail(self, file: ImageFile, error: DataError) -> None:
        what = "video" if file.is_video else "image"
        said = DataError(f"{what} {file.place.uri}", error.expected, error.got, error.remedy)
        self.failed.append(Failure(valid_text(file.name), one_line(str(said))))


def valid_text(name: str) -> str:
    """A file's name that is no valid text gets escapes where it is none."""
    return name.encode(errors="backslashreplace").decode()


def one_line(text: str) -> str:
    """What a name may hold to confuse a terminal, escaped."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )
