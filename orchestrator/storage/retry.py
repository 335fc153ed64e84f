"""Patience with a storage that fails for a while: growing, scattered pauses, then one line."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from orchestrator.errors import StorageError, UserError
from orchestrator.storage.filesystems import reason

RETRY_FOR_S, FIRST_PAUSE_S, LONGEST_PAUSE_S = 180.0, 0.2, 15.0

T = TypeVar("T")


def pauses(first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S) -> Iterator[float]:
    """Seconds to wait between attempts; scattered, so that many workers do not come back at once."""
    pause = first_s
    while True:
        yield pause * random.uniform(0.5, 1.5)
        pause = min(2 * pause, longest_s)


def retrying(
    work: Callable[[], T],
    what: str,
    *,
    where: str = "data",
    retry_for_s: float = RETRY_FOR_S,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """`work()`, tried again for a while.

    Raises:
        FileNotFoundError, UserError: at once, there is nothing to wait for.
        StorageError: naming the file and the cause, when the time is up or access is denied.
    """
    end = time.monotonic() + retry_for_s
    for pause in pauses():
        try:
            return work()
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each filesystem has its own exceptions
            if isinstance(error, PermissionError) or time.monotonic() + pause > end:
                raise StorageError(
                    where, f"to read {what}", reason(error),
                    "check the storage, AWS_ENDPOINT_URL and the credentials",
                ) from None  # fmt: skip
        sleep(pause)
    raise AssertionError("pauses never end")
