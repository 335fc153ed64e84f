"""Small actors between drivers and workers. Each has a process, so nothing heavy is imported here."""

from __future__ import annotations

import asyncio
from typing import Any

from model.errors import UserError


class Mailbox:
    """Actor: keeps events until the driver takes them, and what the driver asks for."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.stop = self.hurry = False
        self.refused: UserError | None = None

    def put(self, event: tuple[Any, ...]) -> None:
        self.events.append(event)

    def take(self) -> list[tuple[Any, ...]]:
        events, self.events = self.events, []
        return events

    def ask(self, stop: bool, hurry: bool) -> None:
        self.stop, self.hurry = stop, hurry

    def requests(self) -> tuple[bool, bool]:
        return self.stop, self.hurry

    def forget(self) -> None:
        """Before another training in the same workers."""
        self.stop, self.refused = False, None

    def refuse(self, error: UserError) -> None:
        self.refused = self.refused or error

    def refusal(self) -> UserError | None:
        return self.refused


class Board:
    """Actor of a sweep, asked by trials that were told to stop."""

    def __init__(self) -> None:
        self.interrupted = False

    def interrupt(self) -> None:
        self.interrupted = True

    def is_interrupted(self) -> bool:
        return self.interrupted


class Desk:
    """Async actor: hands out trials to the ranks of a group, one after another."""

    def __init__(self) -> None:
        self.orders: list[bytes | None] = []
        self.results: dict[int, bytes | None] = {}
        self.changed = asyncio.Condition()

    async def submit(self, order: bytes | None) -> int:
        """The number of an order; None: there will be no more."""
        async with self.changed:
            self.orders.append(order)
            self.changed.notify_all()
        return len(self.orders) - 1

    async def begin(self) -> int:
        """A group starts, or starts again: the order it begins with."""
        return len(self.results)

    async def order(self, number: int) -> bytes | None:
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.orders) > number)
        return self.orders[number]

    async def done(self, number: int, result: bytes | None) -> None:
        """result: None gives the order up; the group passes it over when it starts again."""
        async with self.changed:
            self.results.setdefault(number, result)
            if number:  # a rank may still be on its way to this one
                self.orders[number - 1] = None
            self.changed.notify_all()

    async def result(self, number: int) -> bytes | None:
        """None: it was given up."""
        async with self.changed:
            await self.changed.wait_for(lambda: number in self.results)
        return self.results[number]
