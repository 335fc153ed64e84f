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


def environment(limits: Limits) -> dict[str, str]:
    """Of the proxy's process."""
    return {CALLBACK: f"{__name__}.middlewares", LIMITS: json.dumps(asdict(limits))}


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(Turnstile, limits=Limits(**json.loads(os.environ[LIMITS])))]


class Turnstile:
    """The door without its token, which the front asks for."""

    def __init__(self, app: App, limits: Limits) -> None:
        self.door = Door(app, limits, Meters())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            said = (TURNED_AWAY.encode(), str(self.door.turned_away).encode())
            others = [pair for pair in scope["headers"] if pair[0] != said[0]]
            scope = {**scope, "headers": [*others, said]}
        await self.door(scope, receive, send)
