"""The HTTP API and the web page. Knows a detector only as something to `Ask`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from orchestrator.serving.form import image_in
from orchestrator.serving.messages import (
    About,
    Answer,
    Ask,
    Limits,
    Refused,
    sample_picture,
)
from orchestrator.serving.meters import CONTENT_TYPE, TURNED_AWAY, Meters

WEB = Path(__file__).with_name("web")
PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/web/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/web/style.css": ("style.css", "text/css; charset=utf-8"),
    "/web/icon.svg": ("icon.svg", "image/svg+xml"),
}
READY_S = 5.0
"""An answer so recent shows that the model is there; under load nothing else is asked."""


class Size(BaseModel):
    """Of the image as it is shown, after EXIF rotation."""

    width: int
    height: int


class Detection(BaseModel):
    """bbox_xywh: left, top, width and height in pixels of the image as it is shown."""

    bbox_xywh: list[float]
    score: float
    category_id: int
    category: str


class Found(BaseModel):
    """Best first. ms: from the whole request to the answer."""

    image: Size
    detections: list[Detection]
    score_threshold: float
    model: str
    ms: float


class ModelCard(BaseModel):
    """step: of the checkpoint. classes: category id -> name. metrics: of its evaluation."""

    model: str
    network: str
    image_size_px: int
    parameters: int
    step: int
    classes: dict[int, str]
    metrics: dict[str, float]
    default_score: float
    max_image_bytes: int
    max_pixels: int


class Words(BaseModel):
    where: str
    expected: str
    got: str
    remedy: str


class Problem(BaseModel):
    """Every answer that is no success."""

    error: Words


BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
Score = Annotated[
    float | None, Query(ge=0, lt=1, description="Keep detections above it.", examples=[0.3])
]


def build_front(
    ask: Ask,
    about: About,
    limits: Limits,
    meters: Meters,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The application behind the door."""
    app = FastAPI(
        title="EfficientDet", version=str(about.step), docs_url=None, redoc_url=None,
        description=f"Objects in images, by {about.source}. Errors are one `Problem` each.",
    )  # fmt: skip
    front = _Front(ask, about, limits, meters, clock)
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem} for status in (400, 401, 408, 413, 415, 422, 503, 504)
    }
    app.post("/predict", response_model=Found, responses=failures, openapi_extra=BODY)(
        front.predict
    )
    app.get("/model", response_model=ModelCard, summary="The model and what may be asked of it")(
        front.model
    )
    app.get("/healthz", summary="Is the server there?")(_health)
    app.get("/readyz", summary="Does the model answer?", responses={503: {"model": Problem}})(
        front.ready
    )
    app.get("/metrics", summary="For Prometheus", response_class=Response)(front.metrics)
    for path, (name, kind) in PAGES.items():
        app.get(path, include_in_schema=False)(_page((WEB / name).read_bytes(), kind))
    _say_errors_in_one_way(app)
    return app


class _Front:
    def __init__(
        self, ask: Ask, about: About, limits: Limits, meters: Meters, clock: Callable[[], float]
    ) -> None:
        self.ask, self.about, self.limits, self.meters = ask, about, limits, meters
        self.clock, self.answered_at, self.sample = clock, -READY_S, sample_picture()
        self._probe: asyncio.Future[Answer] | None = None

    async def predict(self, request: Request, score: Score = None) -> Response:
        """Objects in one image, sent as the body or as the file of a form."""
        began = self.clock()
        body = await request.body()
        kind = request.headers.get("content-type", "application/octet-stream")
        image = await asyncio.to_thread(image_in, body, kind)
        if len(image) > self.limits.max_image_bytes:
            raise Refused(
                413, "body", f"at most {self.limits.max_image_bytes:,} bytes",
                f"{len(image):,}", "shrink the image",
            )  # fmt: skip
        threshold = self.limits.score if score is None else score
        answer = await self._answer(image, threshold)
        self.meters.looked_at(answer)
        return JSONResponse(self._found(answer, threshold, (self.clock() - began) * 1e3))

    async def model(self) -> Response:
        about, limits = self.about, self.limits
        card = ModelCard(
            model=about.source, network=about.network, image_size_px=about.image_size_px,
            parameters=about.params, step=about.step, classes=about.classes, metrics=about.metrics,
            default_score=limits.score, max_image_bytes=limits.max_image_bytes,
            max_pixels=limits.max_pixels,
        )  # fmt: skip
        return JSONResponse(card.model_dump())

    async def ready(self) -> Response:
        """One question for all who ask meanwhile: anybody may, as often as they like."""
        if self.clock() - self.answered_at >= READY_S:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.ensure_future(self._answer(self.sample, 0.0))
            await asyncio.shield(self._probe)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        turned_away = request.headers.get(TURNED_AWAY, "0")
        if turned_away.isascii() and turned_away.isdigit():
            self.meters.turned_away.set(int(turned_away))
        return Response(self.meters.page(), media_type=CONTENT_TYPE)

    async def _answer(self, image: bytes, score: float) -> Answer:
        timeout_s = self.limits.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.ask(image, score)
        except TimeoutError:
            raise Refused(
                504, "model", f"an answer within {timeout_s:g} s", "none", "try again later"
            ) from None
        self.answered_at = self.clock()
        return answer

    def _found(self, answer: Answer, threshold: float, ms: float) -> dict[str, Any]:
        columns = zip(
            answer.boxes_xywh, answer.scores, answer.category_ids, answer.names, strict=True
        )
        return {
            "image": {"width": answer.size_wh[0], "height": answer.size_wh[1]},
            "detections": [
                {"bbox_xywh": box, "score": score, "category_id": number, "category": name}
                for box, score, number, name in columns
            ],
            "score_threshold": threshold,
            "model": self.about.source,
            "ms": round(ms, 2),
        }


async def _health() -> Response:
    return JSONResponse({"status": "alive"})


def _page(content: bytes, kind: str) -> Callable[[], Any]:
    async def page() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return page


def _say_errors_in_one_way(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse(error.body(), error.status, error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = " ".join(str(part) for part in first["loc"])
        got = repr(first.get("input"))[:80]
        said = Refused(400, where, first["msg"][:1].lower() + first["msg"][1:], got, "correct it")
        return JSONResponse(said.body(), 400)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        asked = f"{request.method} {request.url.path[:200]}"
        said = Refused(
            error.status_code, "request", "POST /predict, or GET " + ", ".join(_PUBLIC), asked,
            "see /openapi.json",
        )  # fmt: skip
        return JSONResponse(said.body(), error.status_code, dict(error.headers or {}))

    app.exception_handler(Refused)(refused)
    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(HTTPException)(unknown)


_PUBLIC = ("/", "/model", "/healthz", "/readyz", "/metrics")
