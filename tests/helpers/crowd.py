"""Many callers of one server at once."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Heard:
    """What one caller got. status 0: no answer, and `content` says why."""

    status: int
    content: Any
    seconds: float
    retry_after: str | None = None


def connections() -> int:
    """How many one process may open here, with some to spare for the rest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, soft - 500)


async def _one(session: aiohttp.ClientSession, url: str, body: bytes) -> Heard:
    began = time.monotonic()
    try:
        async with session.post(url, data=body, headers={"Content-Type": "image/png"}) as answer:
            content = json.loads(await answer.read())
            seconds = time.monotonic() - began
            return Heard(answer.status, content, seconds, answer.headers.get("Retry-After"))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        return Heard(0, f"{type(error).__name__}: {error}", time.monotonic() - began)


async def _all(url: str, body: bytes, number: int, timeout_s: float) -> list[Heard]:
    connector = aiohttp.TCPConnector(limit=min(number, connections()), force_close=True)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await asyncio.gather(*(_one(session, url, body) for _ in range(number)))


def crowd(url: str, body: bytes, number: int, timeout_s: float = 300) -> list[Heard]:
    """Everybody's answer to the same image, all sent at the same time."""
    return asyncio.run(_all(url, body, number, timeout_s))
