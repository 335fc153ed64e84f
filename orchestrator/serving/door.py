"""The door: who may come in, how many at once, and how much each may bring.

Plain ASGI around the application, so that nothing of a request is kept before it was let in, and its
body is counted while it arrives.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from orchestrator.serving.messages import Limits, Refused, too_busy
from orchestrator.serving.meters import Meters

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_TIMEOUT_S = 30.0
MOST_BYTES_INSIDE = 512 * 2**20
"""Of all bodies together; a single one that is allowed always finds room in an empty house."""
MOST_BYTES_FORGOTTEN, FORGET_S = 64 * 2**20, 5.0
FORM_BYTES = 64 * 1024
"""What a form may hold besides the image."""
GUARDED = ("/predict", "/model", "/metrics", "/openapi.json")
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
logger = logging.getLogger(__name__)


def digest(token: str) -> bytes:
    """What the cluster keeps of a token."""
    return hashlib.sha256(token.encode()).digest()


class Door:
    """token_digest: of the bearer token that GUARDED paths ask for; None: anyone may ask."""

    def __init__(
        self,
        app: App,
        limits: Limits,
        meters: Meters,
        token_digest: bytes | None = None,
        body_timeout_s: float = BODY_TIMEOUT_S,
    ) -> None:
        self.app, self.limits, self.meters, self.token_digest = app, limits, meters, token_digest
        self.body_timeout_s = body_timeout_s
        self.turned_away = 0
        self.most_bytes = max(MOST_BYTES_INSIDE, limits.max_image_bytes + FORM_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        incoming, reply, began = _Incoming(scope, receive), _Reply(send), time.monotonic()
        path = str(scope["path"])
        try:
            await self._let_in(scope, incoming, reply)
        except Refused as refused:
            self.turned_away += 1
            await reply.refuse(refused, incoming)
        except Exception:  # the one place where a request's failure must not become silence
            logger.exception("%s %s failed", scope["method"], path)
            await reply.refuse(
                Refused(500, "server", "an answer", "a failure of its own", "see the server's log"),
                incoming,
            )
        finally:
            seconds = time.monotonic() - began
            self.meters.answered(path, reply.status or 499, seconds)  # 499: the caller went away

    async def _let_in(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        headers = {key.decode("latin-1"): value for key, value in scope["headers"]}
        path = str(scope["path"])
        if self.token_digest is not None and path.startswith(GUARDED):
            _authenticate(headers.get("authorization", b""), self.token_digest)
        if scope["method"] in ("GET", "HEAD"):
            if headers.get("content-length", b"0") != b"0" or "transfer-encoding" in headers:
                raise Refused(400, "body", "none with GET", "one", "use POST /predict")
            await self.app(scope, receive, reply)
            return
        if self.meters.inside.number >= self.limits.max_queued:
            raise too_busy(f"{self.limits.max_queued} that wait already")
        with self.meters.inside.one():
            held = _Held(self.meters, self.most_bytes)
            try:
                body = await self._body(headers, receive, held)
                await self.app(scope, _replayed(body, receive), reply)
            finally:
                held.release()

    async def _body(self, headers: dict[str, bytes], receive: Receive, held: _Held) -> bytes:
        most = self.limits.max_image_bytes + FORM_BYTES
        length = headers.get("content-length", b"")
        if length.isdigit() and int(length) > most:
            raise too_large(f"{int(length):,}", self.limits)
        chunks = bytearray()
        try:
            async with asyncio.timeout(self.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "body", "a whole one", "its beginning", "send it again")
                    chunk = message.get("body", b"")
                    if len(chunks) + len(chunk) > most:
                        raise too_large("more", self.limits)
                    held.more(len(chunk))
                    chunks += chunk
                    if not message.get("more_body", False):
                        return bytes(chunks)
        except TimeoutError:
            raise Refused(
                408, "body", f"all of it within {self.body_timeout_s:g} s", f"{len(chunks):,} bytes",
                "send it faster, or a smaller image",
            ) from None  # fmt: skip


def too_large(got: str, limits: Limits) -> Refused:
    return Refused(
        413, "body", f"at most {limits.max_image_bytes:,} bytes", got, "shrink the image"
    )


def _authenticate(header: bytes, expected: bytes) -> None:
    scheme, _, given = header.partition(b" ")
    same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), expected)
    if scheme.lower() != b"bearer" or not same:
        raise Refused(
            401, "Authorization", "the server's bearer token",
            "another" if header else "none", "send Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


class _Held:
    """Bytes of one request that are in memory."""

    def __init__(self, meters: Meters, most: int) -> None:
        self.meters, self.most, self.number = meters, most, 0

    def more(self, number: int) -> None:
        if self.meters.body_bytes + number > self.most:
            raise too_busy("images in memory that fill it")
        self.meters.body_bytes += number
        self.number += number

    def release(self) -> None:
        self.meters.body_bytes -= self.number
        self.number = 0


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body at once; then what else comes, which is the caller's leaving."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


class _Incoming:
    """A request's body, and whether all of it was read."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        names = {key for key, _ in scope["headers"]}
        self.receive = receive
        # Who expects "100 Continue" sends nothing after another answer.
        self.ended = b"expect" in names or not names & {b"content-length", b"transfer-encoding"}

    async def __call__(self) -> Message:
        message = await self.receive()
        self.ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def forget(self) -> None:
        """Read on, within limits: a connection closed while data is arriving is reset, and who sends
        it would never see the answer.
        """
        left = MOST_BYTES_FORGOTTEN
        with suppress(TimeoutError):
            async with asyncio.timeout(FORGET_S):
                while not self.ended and left > 0:
                    left -= len((await self()).get("body", b""))


class _Reply:
    """Adds the headers that every answer has, and remembers the status."""

    def __init__(self, send: Send) -> None:
        self.send, self.status = send, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            headers = list(message.get("headers", []))
            there = {key for key, _ in headers}  # an inner door has added its own
            for key, value in SECURITY_HEADERS.items():
                pair = (key.lower().encode(), value.encode())
                headers += [] if pair[0] in there else [pair]
            message = {**message, "headers": headers}
        await self.send(message)

    async def refuse(self, refused: Refused, incoming: _Incoming) -> None:
        """The whole answer at once; the response ends when the body is out of the way."""
        if self.status:  # too late to say it
            return
        content = json.dumps(refused.body()).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            **refused.headers,
        }
        pairs = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        with suppress(ConnectionError):
            await self({"type": "http.response.start", "status": refused.status, "headers": pairs})
            await self({"type": "http.response.body", "body": content, "more_body": True})
            await incoming.forget()
            await self({"type": "http.response.body", "body": b""})
