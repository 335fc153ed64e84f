"""A door before the door, in the process of Serve's HTTP proxy.

The proxy takes a body in as fast as it comes, also while the front is busy, and a refusal by the
front costs a round trip between processes. So it is counted here already, and most of a crowd is
turned away here. Serve calls `middlewares`, by its name in the environment.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from starlette.middleware import Middleware

from orchestrator.serving.door import App, Door, Receive, Scope, Send
from orchestrator.serving.messages import Limits
from orchestrator.serving.meters import TURNED_AWAY, Meters

CALLBACK, LIMITS = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "EFFDET_SERVE_LIMITS"
TOKEN_DIGEST = "EFFDET_SERVE_TOKEN_DIGEST"


def environment(limits: Limits, token_digest: bytes | None) -> dict[str, str]:
    """Of the proxy's process."""
    said = {CALLBACK: f"{__name__}.middlewares", LIMITS: json.dumps(asdict(limits))}
    return said if token_digest is None else said | {TOKEN_DIGEST: token_digest.hex()}


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    limits, secret = Limits(**json.loads(os.environ[LIMITS])), os.environ.get(TOKEN_DIGEST)
    digest = bytes.fromhex(secret) if secret else None
    return [Middleware(Turnstile, limits=limits, token_digest=digest)]


class Turnstile:
    """The same door: who has no token is sent away before the body is read."""

    def __init__(self, app: App, limits: Limits, token_digest: bytes | None = None) -> None:
        self.door = Door(app, limits, Meters(), token_digest)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            said = (TURNED_AWAY.encode(), str(self.door.turned_away).encode())
            others = [pair for pair in scope["headers"] if pair[0] != said[0]]
            scope = {**scope, "headers": [*others, said]}
        await self.door(scope, receive, send)
