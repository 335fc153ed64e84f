"""One copy of the model: decodes in threads, looks at images in batches."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve

from model.errors import DataError
from model.predictor import (
    LargeImageError,
    Prediction,
    Predictor,
    Prepared,
    UnknownImageError,
    copy_served,
)
from orchestrator.serving.messages import Answer, Refused, sample_picture

MOST_DECODERS = 4


@dataclass(frozen=True)
class Copy:
    """How a copy works. device: cpu or cuda; threads: of the network on a CPU."""

    device: str
    threads: int
    max_batch: int
    batch_wait_s: float
    max_pixels: int

    @property
    def decoders(self) -> int:
        """Images decoded at once; each may take max_pixels * 3 bytes."""
        return min(MOST_DECODERS, max(2, self.threads))


def served_files(checkpoint: Path) -> dict[str, bytes]:
    """All that predictions need of a verified checkpoint; it travels to nodes without its storage."""
    with tempfile.TemporaryDirectory(prefix="served-") as temporary:
        folder = Path(temporary) / "checkpoint"
        copy_served(checkpoint, folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(files: dict[str, bytes], device: str) -> Predictor:
    """Raises CheckpointError: damaged on its way."""
    with tempfile.TemporaryDirectory(prefix="serving-") as temporary:
        for name, content in files.items():
            (Path(temporary) / name).write_bytes(content)
        return Predictor.load(Path(temporary), device)


@dataclass(frozen=True)
class _Seen:
    found: Prediction
    began: float
    ended: float
    batch: int
    leads: bool


class Detector:
    """A Serve deployment. Ready when the network has seen an image, alone and in a full batch."""

    def __init__(self, files: ray.ObjectRef[dict[str, bytes]], copy: Copy) -> None:
        torch.set_num_threads(copy.threads)
        self.predictor, self.max_pixels = load(ray.get(files), copy.device), copy.max_pixels
        self.decoders = ThreadPoolExecutor(copy.decoders, "decode")
        self.network = ThreadPoolExecutor(1, "network")
        batched = serve.batch(max_batch_size=copy.max_batch, batch_wait_timeout_s=copy.batch_wait_s)
        self._seen: Callable[[Prepared], Coroutine[Any, Any, _Seen]] = batched(self._look)
        self.broken: str | None = None
        first = self.predictor.prepare(sample_picture())
        for number in {1, copy.max_batch}:
            self.predictor.detect([first] * number)

    async def answer(self, data: bytes, score: float) -> Answer | Refused:
        """What is in an encoded image, above a score; an image that cannot be used is no failure."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(
                self.decoders, self.predictor.prepare, data, self.max_pixels
            )
        except DataError as error:
            return refusal(error)
        decoded = time.monotonic()
        seen = await self._seen(prepared)
        found, keep = seen.found, seen.found.scores > score
        return Answer(
            size_wh=found.size_wh,
            boxes_xywh=found.boxes_xywh[keep].tolist(),
            scores=found.scores[keep].tolist(),
            category_ids=found.category_ids[keep].tolist(),
            names=[name for name, kept in zip(found.names, keep, strict=True) if kept],
            decode_ms=(decoded - began) * 1e3,
            wait_ms=(seen.began - decoded) * 1e3,
            detect_ms=(seen.ended - seen.began) * 1e3,
            batch=seen.batch,
            leads=seen.leads,
        )

    def check_health(self) -> None:
        """Serve asks now and then, and puts another copy in place of one that stays broken: after
        some errors a GPU refuses all that follows in the same process.

        Raises:
            RuntimeError: the network has failed, and has not answered since.
        """
        if self.broken is not None:
            raise RuntimeError(self.broken)

    async def _look(self, images: list[Prepared]) -> list[_Seen]:
        """The network has a thread of its own, so that the next images are decoded meanwhile."""
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        try:
            all_found = await loop.run_in_executor(self.network, self.predictor.detect, images, 0.0)
        except torch.OutOfMemoryError:  # of these images; the next ones may fit
            raise
        except RuntimeError as error:
            self.broken = str(error)
            raise
        self.broken = None
        ended = time.monotonic()
        return [
            _Seen(found, began, ended, len(images), index == 0)
            for index, found in enumerate(all_found)
        ]


def refusal(error: DataError) -> Refused:
    """413 too large, 415 no image of a known kind, 422 one that cannot be used."""
    status = 422
    if isinstance(error, LargeImageError):
        status = 413
    elif isinstance(error, UnknownImageError):
        status = 415
    return Refused(status, error.where, error.expected, error.got, error.remedy)
