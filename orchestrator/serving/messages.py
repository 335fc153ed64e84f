"""What the front and the detectors say to each other, and to whoever asked."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image, ImageDraw

from orchestrator.errors import UserError

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Answer:
    """One image. boxes_xywh in its pixels as it is shown; best first.

    decode_ms, wait_ms, detect_ms: where the time went. batch: images that were looked at together;
    leads: the first of them, so that a batch is counted once.
    """

    size_wh: tuple[int, int]
    boxes_xywh: list[list[float]]
    scores: list[float]
    category_ids: list[int]
    names: list[str]
    decode_ms: float
    wait_ms: float
    detect_ms: float
    batch: int
    leads: bool


class Refused(UserError):
    """Why there is no answer: a user error with HTTP's status and headers."""

    def __init__(
        self,
        status: int,
        where: str,
        expected: str,
        got: str,
        remedy: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(where, expected, got, remedy)
        self.status, self.headers = status, dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        words = (self.where, self.expected, self.got, self.remedy)
        return type(self), (self.status, *words, self.headers)

    def body(self) -> dict[str, dict[str, str]]:
        return {
            "error": {
                "where": self.where,
                "expected": self.expected,
                "got": self.got,
                "remedy": self.remedy,
            }
        }


def too_busy(got: str) -> Refused:
    return Refused(
        503, "server", "room for another request", got, f"try again in {RETRY_AFTER_S} s or later",
        {"Retry-After": str(RETRY_AFTER_S)},
    )  # fmt: skip


def unavailable(got: str) -> Refused:
    return Refused(
        503, "model", "a copy that answers", got, "try again; if it lasts, see the server's log",
        {"Retry-After": str(10 * RETRY_AFTER_S)},
    )  # fmt: skip


class Ask(Protocol):
    async def __call__(self, data: bytes, score: float) -> Answer:
        """What is in an encoded image, above a score. Raises Refused."""
        ...


@dataclass(frozen=True)
class About:
    """The model, as GET /model tells it. source: the name it was asked for by.

    step: of the checkpoint; classes: by category id.
    """

    source: str
    network: str
    image_size_px: int
    params: int
    step: int
    classes: dict[int, str]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Limits:
    """What a request may be. score: of one that names none."""

    score: float
    max_image_bytes: int
    max_pixels: int
    max_queued: int
    timeout_s: float


def sample_picture() -> bytes:
    """A small PNG with shapes, to see whether a model answers."""
    picture = Image.new("RGB", (96, 64), (90, 110, 130))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((8, 8, 48, 48), fill=(220, 60, 40))
    draw.rectangle((56, 20, 88, 56), fill=(40, 160, 220))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
