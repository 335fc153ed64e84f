"""What a prediction consists of: the same shards for the same list, whoever predicts them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from itertools import count
from pathlib import PurePosixPath
from typing import Any

from orchestrator.config.predict_cli import PredictRequest
from orchestrator.launch.crew import threads_for
from orchestrator.launch.packed_model import PackedModel
from orchestrator.launch.predict_worker import Item, Shard
from orchestrator.storage.images import ImageFile, ImageList, image_ids, is_video

FORMAT = 1
MOST_IMAGES, PARTS_AT_LEAST = 256, 64
MOST_DRAWN = 1000
LONGEST_NAME_BYTES = 180


class Shards:
    """Runs of images of a fixed number, and videos, each a shard of its own.

    A shard is whole batches, so what is looked at together does not depend on its size either.
    """

    def __init__(self, images: ImageList, batch_size: int, *, draw: bool) -> None:
        self.images, self.draw = images, draw
        share = min(max(len(images) // PARTS_AT_LEAST, batch_size), MOST_IMAGES)
        self.size = -(-share // batch_size) * batch_size
        self.starts = [*self._starts()]
        self.videos = sum(images[start].is_video for start in self.starts)
        self.ids, self.numbered_by = image_ids(images)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def shifted(self) -> bool:
        """How many frames a video has is known at the end: until then ids begin anew in each shard."""
        return self.videos > 0

    def files(self, number: int) -> int:
        """How many a shard has."""
        return self._stop(number) - self.starts[number]

    def without(self, done: Collection[int]) -> Iterator[Shard]:
        """Those that are not done, in order."""
        names = DrawnNames()
        for number, start in enumerate(self.starts):
            stop = self._stop(number)
            if number in done and not self.draw:
                continue
            files = self.images[start:stop]
            drawn = [
                names.of(file, start + k) if self.draw else None for k, file in enumerate(files)
            ]
            if number not in done:
                ids = range(len(files)) if self.shifted else self.ids[start:stop]
                yield Shard(number, tuple(map(Item, files, ids, drawn)))

    def _stop(self, number: int) -> int:
        return self.starts[number + 1] if number + 1 < len(self) else len(self.images)

    def _starts(self) -> Iterator[int]:
        """Positions in the list."""
        since = 0
        for position, name in enumerate(self.images.names()):
            video = is_video(name)
            if position == since or video or position - since >= self.size:
                yield position
                since = position
            if video:
                since = position + 1


class DrawnNames:
    """Where images and videos are drawn below the folder of such: never outside of it, never twice."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def of(self, file: ImageFile, position: int) -> str:
        """position: in the list, for a name that is taken. An object store's may hold anything."""
        parts = [_short(part) for part in file.name.replace("\0", "").split("/")]
        path = PurePosixPath(*(part for part in parts if part not in ("", ".", "..")))
        stem, suffix = str(path.with_suffix("")) if path.name else "image", _suffix(file)
        for attempt in count():
            candidate = (stem, f"{stem}-{position + 1}", f"image-{position + 1}")[min(attempt, 2)]
            name = f"{candidate}-{attempt}{suffix}" if attempt > 2 else candidate + suffix
            if self._take(name):
                return name
        raise AssertionError("there is always a number that is free")

    def _take(self, name: str) -> bool:
        folders = [str(folder) for folder in PurePosixPath(name).parents][:-1]
        if name in self._files or name in self._folders or not self._files.isdisjoint(folders):
            return False
        self._files.add(name)
        self._folders.update(folders)
        return True


def _suffix(file: ImageFile) -> str:
    return ".mp4" if file.is_video else ".jpg"


def _short(part: str) -> str:
    """Filesystems take 255 bytes."""
    encoded = part.encode(errors="surrogateescape")
    if len(encoded) <= LONGEST_NAME_BYTES:
        return part
    kept = encoded[:LONGEST_NAME_BYTES].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def draws(request: PredictRequest, images: ImageList) -> bool:
    """As asked; else where somebody may want to look at all of them."""
    return len(images) <= MOST_DRAWN if request.draw is None else request.draw


def threads_of(request: PredictRequest) -> int:
    """The same for every number of workers: it decides how sums are split, so the last digits."""
    given = request.threads_per_worker
    return threads_for(request.cpus_per_worker) if given is None else given


def plan_of(request: PredictRequest, shards: Shards, model: PackedModel) -> dict[str, Any]:
    """All that results depend on, for plan.json. Not how many workers there are: they do not."""
    return {
        "format": FORMAT,
        "images": len(shards.images),
        "videos": shards.videos,
        "shards": len(shards),
        "images_sha256": shards.images.sha256,
        "model_sha256": model.sha256,
        "score": request.score,
        "batch_size": request.batch_size,
        "threads": threads_of(request),
        "frames_every": request.frames_every,
        "every_s": request.every_s,
        "draw": shards.draw,
        "output_format": request.format,
    }
