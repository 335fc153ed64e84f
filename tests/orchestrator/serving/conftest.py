"""The server without Ray: the real door and front before a predictor in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.small_detector import CLASSES, small_detector

from model.errors import DataError
from model.predictor import Predictor
from orchestrator.serving.detector import refusal
from orchestrator.serving.door import Door
from orchestrator.serving.front import build_front
from orchestrator.serving.messages import About, Answer, Ask, Limits
from orchestrator.serving.meters import Meters

LIMITS = Limits(
    score=0.3, max_image_bytes=2_000_000, max_pixels=10_000_000, max_queued=4, timeout_s=5.0
)
ABOUT = About(
    "models:/detector@champion", "EfficientDet-D0", 128, 93_822, 3,
    dict(zip(CLASSES.category_ids, CLASSES.names, strict=True)), {"val/AP": 0.25},
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes
    pairs: list[str]
    """Names of all headers, as often as they were sent."""
    read: list[int]
    """For each chunk of the body that was read, how many messages had been sent before."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, str]:
        found = self.json["error"]
        assert list(found) == ["where", "expected", "got", "remedy"]
        return dict(found)


async def call(
    app: Any,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] = b"",
    headers: Mapping[str, str] | None = None,
    *,
    pause: Callable[[], Awaitable[None]] | None = None,
    leaves: bool = False,
) -> Reply:
    """One request, as a web server hands it over. pause: before each chunk of the body.

    leaves: the caller goes away in the middle of the body.
    """
    chunks = [body] if isinstance(body, bytes) else list(body)
    messages = [
        {"type": "http.request", "body": one, "more_body": leaves or number < len(chunks)}
        for number, one in enumerate(chunks, start=1)
    ]
    given = dict(headers or {})
    if not isinstance(body, bytes):
        given.setdefault("Transfer-Encoding", "chunked")
    elif body:
        given.setdefault("Content-Length", str(len(body)))
    path, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
        "query_string": query.encode(), "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "headers": [(key.lower().encode(), value.encode()) for key, value in given.items()],
    }  # fmt: skip
    sent: list[Any] = []
    read: list[int] = []

    async def receive() -> Any:
        if pause is not None:
            await pause()
        if messages:
            read.append(len(sent))
            return messages.pop(0)
        if not leaves:
            await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start = sent[0]
    pairs = {key.decode(): value.decode() for key, value in start["headers"]}
    names = [key.decode() for key, _ in start["headers"]]
    content = b"".join(one.get("body", b"") for one in sent[1:])
    assert not sent[-1].get("more_body", False)  # the answer has an end
    return Reply(start["status"], pairs, content, names, read)


def served(ask: Ask, token_digest: bytes | None = None, **limits: Any) -> tuple[Door, Meters]:
    meters, limited = Meters(), replace(LIMITS, **limits)
    return Door(build_front(ask, ABOUT, limited, meters), limited, meters, token_digest), meters


@pytest.fixture(scope="session")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = small_detector(tmp_path_factory.mktemp("served") / "step_00000003")
    return Predictor.load(folder, "cpu")


@pytest.fixture
def ask(predictor: Predictor) -> Ask:
    """What a detector's process answers."""

    async def asked(data: bytes, score: float) -> Answer:
        try:
            prepared = predictor.prepare(data, LIMITS.max_pixels)
        except DataError as error:
            raise refusal(error) from None
        (found,) = predictor.detect([prepared], score)
        return Answer(
            found.size_wh, found.boxes_xywh.tolist(), found.scores.tolist(),
            found.category_ids.tolist(), list(found.names), 1.0, 2.0, 3.0, 1, True,
        )  # fmt: skip

    return asked


@pytest.fixture
def folder_of_a_model(tmp_path: Path) -> Path:
    return small_detector(tmp_path / "step_00000003")
