"""The API: answers are the predictor's own, and every refusal is one json object."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.hostile import encoded, hostile, picture
from prometheus_client.parser import text_string_to_metric_families

from model.predictor import Predictor
from orchestrator.records.pyfunc_entry import ServedDetector
from orchestrator.serving.front import PAGES, WEB
from orchestrator.serving.messages import Answer, Ask, Refused, too_busy, unavailable

from .conftest import ABOUT, Reply, call, served

SENT = hostile()
STATUS = {"read": 200, "unknown": 415, "large": 413, "unusable": 422}
PNG = {"Content-Type": "image/png"}


def predict(app: Any, data: bytes, query: str = "?score=0", kind: str = "image/png") -> Reply:
    return asyncio.run(call(app, "POST", f"/predict{query}", data, {"Content-Type": kind}))


def get(app: Any, path: str) -> Reply:
    return asyncio.run(call(app, "GET", path))


def noise(width: int = 200, height: int = 90) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    from PIL import Image

    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_server_job_and_pyfunc_find_the_same(ask: Ask, predictor: Predictor) -> None:
    app, _ = served(ask)
    served_model = ServedDetector()
    served_model.predictor = predictor
    for image in (noise(), SENT["jpeg, rotated by EXIF"].data, encoded(picture("CMYK"), "JPEG")):
        (expected,) = predictor.predict([image], score_threshold=0.0)
        reply = predict(app, image)
        assert reply.status == 200
        found = reply.json["detections"]
        assert len(found) == len(expected) > 50
        boxes = np.array([one["bbox_xywh"] for one in found])
        scores = np.array([one["score"] for one in found])
        np.testing.assert_allclose(boxes, expected.boxes_xywh, atol=1e-6, rtol=0)
        np.testing.assert_allclose(scores, expected.scores, atol=1e-6, rtol=0)
        assert [one["category_id"] for one in found] == expected.category_ids.tolist()
        assert tuple(one["category"] for one in found) == expected.names
        assert reply.json["image"] == dict(zip(("width", "height"), expected.size_wh, strict=True))
        rows = served_model.predict(
            None, pd.DataFrame({"image": [image]}), {"score_threshold": 0.0}
        )
        np.testing.assert_allclose(boxes, rows[["x", "y", "width", "height"]], atol=1e-6, rtol=0)
        np.testing.assert_allclose(scores, rows["score"], atol=1e-6, rtol=0)


def test_score_of_the_request_or_of_the_server(ask: Ask) -> None:
    app, _ = served(ask, score=0.5)
    everything = predict(app, noise()).json
    by_default, asked = predict(app, noise(), "").json, predict(app, noise(), "?score=0.4").json
    assert (by_default["score_threshold"], asked["score_threshold"]) == (0.5, 0.4)
    for answer in (by_default, asked):
        kept = [one for one in everything["detections"] if one["score"] > answer["score_threshold"]]
        assert answer["detections"] == kept
    assert len(by_default["detections"]) < len(everything["detections"])


@pytest.mark.filterwarnings("ignore")  # Pillow's, on what is damaged
@pytest.mark.parametrize("name", SENT)
def test_hostile_images_get_an_answer_or_one_reason(name: str, ask: Ask) -> None:
    app, meters = served(ask)
    reply = predict(app, SENT[name].data)
    assert reply.status == STATUS[SENT[name].verdict], reply.body[:300]
    if reply.status == 200:
        size = reply.json["image"]
        assert (size["width"], size["height"]) == SENT[name].size_wh
    else:
        assert reply.error["where"] == "image"
    assert meters.inside.number == 0


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/predict", b"", PNG, 400),
        ("/predict", b"x", {"Content-Type": "text/html"}, 415),
        ("/predict?score=2", b"x", PNG, 400),
        ("/predict?score=-1", b"x", PNG, 400),
        ("/predict?score=nan", b"x", PNG, 400),
        ("/predict?score=high", b"x", PNG, 400),
        ("/predict", bytes(2_000_001), PNG, 413),
        ("/predict", bytes(2_500_000), PNG, 413),
        ("/predict/../../etc/passwd", b"x", PNG, 404),
        ("/unknown", b"x", PNG, 404),
        ("/model", b"x", PNG, 405),
    ],
)
def test_wrong_requests_are_told_what_was_expected(
    path: str, body: bytes, headers: dict[str, str], status: int, ask: Ask
) -> None:
    app, _ = served(ask)
    reply = asyncio.run(call(app, "POST", path, body, headers))
    assert reply.status == status
    assert reply.headers["content-type"] == "application/json"
    assert all(reply.error.values())


@pytest.mark.parametrize("path", ["/web/../front.py", "/web/%2e%2e/front.py", "/web/", "/docs"])
def test_nothing_else_is_served(path: str, ask: Ask) -> None:
    app, _ = served(ask)
    assert get(app, path).status == 404


def test_a_form_is_as_good_as_a_body(ask: Ask) -> None:
    app, _ = served(ask)
    head = b'--b\r\nContent-Disposition: form-data; name="f"; filename="../../x.sh"\r\n\r\n'
    form = predict(app, head + noise() + b"\r\n--b--\r\n", kind="multipart/form-data; boundary=b")
    assert form.json["detections"] == predict(app, noise()).json["detections"]


@pytest.mark.parametrize(
    ("failure", "status", "again_s"),
    [(too_busy("many"), 503, "1"), (unavailable("ActorDiedError"), 503, "10")],
)
def test_what_the_detectors_refuse_is_passed_on(
    failure: Refused, status: int, again_s: str
) -> None:
    async def refusing(data: bytes, score: float) -> Answer:
        raise failure

    app, _ = served(refusing)
    for reply in (predict(app, noise()), get(app, "/readyz")):
        assert (reply.status, reply.headers["retry-after"]) == (status, again_s)
    assert get(app, "/healthz").status == 200


def test_no_answer_in_time_is_said(ask: Ask) -> None:
    async def silent(data: bytes, score: float) -> Answer:
        await asyncio.sleep(3600)
        raise AssertionError

    app, meters = served(silent, timeout_s=0.05)
    reply = predict(app, noise())
    assert (reply.status, meters.inside.number) == (504, 0)
    assert reply.error["expected"] == "an answer within 0.05 s"
    assert get(app, "/readyz").status == 504


def test_ready_asks_the_model_but_not_again_at_once(ask: Ask) -> None:
    asked: list[float] = []

    async def counting(data: bytes, score: float) -> Answer:
        asked.append(score)
        return await ask(data, score)

    app, _ = served(counting)
    assert [get(app, "/readyz").status for _ in range(3)] == [200] * 3
    assert len(asked) == 1


def test_a_crowd_that_asks_for_ready_is_one_question(ask: Ask) -> None:
    asked: list[float] = []

    async def slow(data: bytes, score: float) -> Answer:
        asked.append(score)
        await asyncio.sleep(0.01)
        return await ask(data, score)

    async def crowd() -> list[Reply]:
        return await asyncio.gather(*(call(app, "GET", "/readyz") for _ in range(100)))

    app, _ = served(slow)
    assert {one.status for one in asyncio.run(crowd())} == {200}
    assert len(asked) == 1


def test_metrics_are_prometheus_and_bounded(ask: Ask) -> None:
    app, _ = served(ask)
    predict(app, noise())
    predict(app, b"none")
    for number in range(20):
        get(app, f"/random/{number}")
    page = get(app, "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    samples = {
        (one.name, *sorted(one.labels.items())): one.value
        for family in text_string_to_metric_families(page.body.decode())
        for one in family.samples
    }
    total = "effdet_requests_total"
    assert samples[(total, ("path", "/predict"), ("status", "200"))] == 1
    assert samples[(total, ("path", "/predict"), ("status", "415"))] == 1
    assert samples[(total, ("path", "other"), ("status", "404"))] == 20
    assert samples[("effdet_batch_images_count",)] == 1
    assert samples[("effdet_stage_seconds_count", ("stage", "detect"))] == 1
    assert samples[("effdet_requests_inside",)] == 0


def test_the_model_and_the_api_are_described(ask: Ask) -> None:
    app, _ = served(ask)
    card = get(app, "/model").json
    assert card["model"] == ABOUT.source
    assert card["classes"] == {"1": "disc", "7": "box", "9": "star"}
    api = get(app, "/openapi.json").json
    assert set(api["paths"]) == {"/predict", "/model", "/healthz", "/readyz", "/metrics"}
    described = api["paths"]["/predict"]["post"]
    assert {"200", "400", "413", "415", "422", "503", "504"} <= set(described["responses"])
    found = api["components"]["schemas"]["Found"]["properties"]
    assert set(found) == set(predict(app, noise()).json)
    assert set(api["components"]["schemas"]["ModelCard"]["properties"]) == set(card)


def links() -> Iterator[str]:
    for name, _ in PAGES.values():
        text = (WEB / name).read_text()
        yield from re.findall(r'(?:src|href)="([^"]+)"', text)


def test_the_page_needs_nothing_from_elsewhere(ask: Ask) -> None:
    app, _ = served(ask)
    for path in PAGES:
        assert get(app, path).status == 200
    found = list(links())
    assert len(found) >= 4
    assert {get(app, f"/{link}").status for link in found} == {200}
    page = (WEB / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)  # as the CSP asks
