"""Who may come in, and how much each may bring."""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import Any

import pytest
from helpers.hostile import encoded, picture

from orchestrator.serving import door, turnstile
from orchestrator.serving.door import Door, digest
from orchestrator.serving.messages import Ask
from orchestrator.serving.meters import TURNED_AWAY, Meters
from orchestrator.serving.turnstile import Turnstile

from .conftest import LIMITS, Reply, call, served

MOST = LIMITS.max_image_bytes + door.FORM_BYTES


class Inner:
    """An application that says how much it got; it waits while `hold` is set."""

    def __init__(self) -> None:
        self.go, self.inside, self.hold = asyncio.Event(), 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        assert not message.get("more_body", False)
        self.inside += 1
        if self.hold:
            await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % len(message["body"])})


def guarded(**options: Any) -> tuple[Door, Inner, Meters]:
    inner, meters = Inner(), Meters()
    return Door(inner, LIMITS, meters, **options), inner, meters


def post(app: Door, body: Any = b"x", **headers: str) -> Reply:
    return asyncio.run(call(app, "POST", "/predict", body, headers))


def test_the_body_arrives_whole() -> None:
    app, _, meters = guarded()
    assert post(app, [b"a" * 10, b"", b"b" * 5]).body == b"15"
    assert post(app, b"c" * MOST).body == b"%d" % MOST
    assert (meters.inside.number, meters.body_bytes) == (0, 0)


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    app, inner, _ = guarded()
    reply = post(app, [b"x"], **{"Content-Length": str(MOST + 1)})
    assert reply.status == 413
    assert reply.error["expected"] == "at most 2,000,000 bytes"
    assert inner.inside == 0


def test_a_body_that_does_not_say_is_counted_while_it_comes() -> None:
    app, inner, meters = guarded()
    reply = post(app, [bytes(100_000)] * 1000)
    assert (reply.status, inner.inside, meters.body_bytes) == (413, 0, 0)
    assert reply.error["got"] == "more"
    lying = post(app, [bytes(MOST), b"x"], **{"Content-Length": "5"})
    assert lying.status == 413


def test_a_refusal_is_sent_before_the_rest_of_the_body_is_thrown_away() -> None:
    """A connection that closes while data arrives is reset, and the answer is lost."""
    app, _, meters = guarded()
    reply = post(app, [b"x"] * 5, **{"Content-Length": "3000000"})
    assert (reply.status, reply.read) == (413, [2] * 5)
    endless = post(app, [bytes(2**20)] * 500)
    assert endless.status == 413
    assert len(endless.read) < 80
    waits = post(app, [b"x"] * 5, **{"Content-Length": "3000000", "Expect": "100-continue"})
    assert (waits.status, waits.read) == (413, [])
    assert (meters.inside.number, meters.body_bytes) == (0, 0)


def test_a_slow_body_is_given_up() -> None:
    app, _, meters = guarded(body_timeout_s=0.05)

    async def slow() -> Reply:
        return await call(app, "POST", "/predict", [b"x"] * 9, pause=lambda: asyncio.sleep(0.02))

    reply = asyncio.run(slow())
    assert (reply.status, meters.inside.number, meters.body_bytes) == (408, 0, 0)
    assert "within 0.05 s" in reply.error["expected"]


def test_a_caller_that_leaves_is_forgotten() -> None:
    app, inner, meters = guarded()
    reply = asyncio.run(call(app, "POST", "/predict", [b"half"], leaves=True))
    assert (reply.status, inner.inside) == (400, 0)
    assert (meters.inside.number, meters.body_bytes) == (0, 0)


def test_more_than_there_is_room_for_are_sent_away_at_once() -> None:
    async def crowd() -> list[Reply]:
        app, inner, _ = guarded()
        inner.hold = True
        first = [asyncio.create_task(call(app, "POST", "/predict", b"x")) for _ in range(4)]
        while inner.inside < 4:
            await asyncio.sleep(0)
        late = await asyncio.wait_for(call(app, "POST", "/predict", b"x"), 1.0)
        inner.go.set()
        early = await asyncio.gather(*first)
        again = await call(app, "POST", "/predict", b"x")
        return [late, again, *early]

    late, again, *early = asyncio.run(crowd())
    assert late.status == 503
    assert late.headers["retry-after"] == "1"
    assert late.error["got"] == "4 that wait already"
    assert [one.status for one in (again, *early)] == [200] * 5


def test_memory_for_all_bodies_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MOST_BYTES_INSIDE", 3_000_000)

    async def heavy() -> tuple[Reply, Reply]:
        app, inner, _ = guarded()
        inner.hold = True
        first = asyncio.create_task(call(app, "POST", "/predict", bytes(1_900_000)))
        while inner.inside < 1:
            await asyncio.sleep(0)
        second = await call(app, "POST", "/predict", bytes(1_900_000))
        inner.go.set()
        return second, await first

    second, first = asyncio.run(heavy())
    assert (second.status, first.status) == (503, 200)
    assert second.error["got"] == "images in memory that fill it"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Basic secret", 401),
        ("secret", 401),
        ("Bearer secret", 200),
        ("bearer  secret ", 200),
    ],
)
def test_a_token_opens_what_is_guarded(header: str | None, status: int) -> None:
    app, inner, _ = guarded(token_digest=digest("secret"))
    headers = {} if header is None else {"Authorization": header}
    for method, path in (("POST", "/predict"), ("GET", "/model"), ("GET", "/metrics")):
        body = b"x" if method == "POST" else b""
        reply = asyncio.run(call(app, method, path, body, headers))
        assert reply.status == status
        if status == 401:
            assert reply.headers["www-authenticate"] == "Bearer"
            assert reply.error["where"] == "Authorization"
    assert (inner.inside == 0) == (status == 401)
    for open_path in ("/healthz", "/readyz", "/"):
        assert asyncio.run(call(app, "GET", open_path)).status == 200


def test_every_answer_has_the_security_headers() -> None:
    app, _, _ = guarded(token_digest=digest("secret"))
    for reply in (asyncio.run(call(app, "GET", "/")), post(app)):
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert not [key for key in reply.headers if key.startswith("access-control-")]


def test_a_failure_of_its_own_is_said_and_counted() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("a secret detail")

    meters = Meters()
    reply = post(Door(broken, LIMITS, meters))
    assert reply.status == 500
    assert b"secret detail" not in reply.body
    assert b'effdet_requests_total{path="/predict",status="500"} 1.0' in meters.page()
    assert meters.inside.number == 0


def test_websockets_are_closed() -> None:
    app, inner, _ = guarded()
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert inner.inside == 0


def test_the_turnstile_is_made_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(turnstile.TOKEN_DIGEST, raising=False)
    for secret in (None, digest("secret")):
        for name, value in turnstile.environment(LIMITS, secret).items():
            monkeypatch.setenv(name, value)
        module, _, name = os.environ[turnstile.CALLBACK].rpartition(".")
        (made,) = getattr(importlib.import_module(module), name)()
        assert made.cls is Turnstile
        assert made.kwargs == {"limits": LIMITS, "token_digest": secret}


def test_the_turnstile_reads_nothing_of_who_has_no_token() -> None:
    inner = Inner()
    app = Turnstile(inner, LIMITS, digest("secret"))
    reply = post(app, [b"x"] * 5, Expect="100-continue")
    assert (reply.status, reply.read, inner.inside) == (401, [], 0)
    unasked = post(app, [b"x"] * 5)
    assert (unasked.status, unasked.read) == (401, [2] * 5), "thrown away after the answer"
    assert post(app, b"x", Authorization="Bearer secret").status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_get_brings_no_body(method: str) -> None:
    app, inner, _ = guarded()
    for headers in ({"Content-Length": "1000000000"}, {"Transfer-Encoding": "chunked"}):
        given = headers | {"Expect": "100-continue"}
        reply = asyncio.run(call(app, method, "/healthz", headers=given))
        assert (reply.status, reply.read, inner.inside) == (400, [], 0)
    empty = asyncio.run(call(app, method, "/healthz", headers={"Content-Length": "0"}))
    assert empty.status == 200


def test_a_turnstile_before_the_door_turns_away_and_tells_how_many(ask: Ask) -> None:
    front, _ = served(ask)
    app = Turnstile(front, LIMITS)
    assert post(app, bytes(MOST + 1)).status == 413
    spoofed = asyncio.run(call(app, "GET", "/metrics", headers={TURNED_AWAY: "77"}))
    assert b"effdet_turned_away 1.0" in spoofed.body
    policies = [key for key in spoofed.pairs if key == "content-security-policy"]
    assert len(policies) == 1
    image = encoded(picture(), "PNG")
    status = asyncio.run(call(app, "POST", "/predict", image, {"Content-Type": "image/png"})).status
    assert status == 200
