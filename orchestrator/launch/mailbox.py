"""Between the driver and the workers of a TorchTrainer: what happens, and what is asked for."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError as WorkerLost
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import StorageError, UserError
from orchestrator.launch.actors import Mailbox
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.recorder import Board
from orchestrator.storage.filesystems import reason

POLL_S = 0.25
ASK_EVERY_S = 0.5
LOOK_FOR_ROOM_EVERY_S = 2.0
HURRY_FOR_S = 180.0


class RemoteBoard:
    """Passes what happens to the driver; calls return at once and their failure is nobody's."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.tell("log", step, dict(metrics))

    def say(self, text: str) -> None:
        self.tell("say", text)

    def blame(self, text: str) -> None:
        """Of the watchdog."""
        self.tell("blamed", text)

    def tell(self, kind: str, *content: Any) -> None:
        self.actor.put.remote((kind, *content))


class FailureNotes(UserCallback):
    """In the controller: passes on why a group of workers broke. Must never raise."""

    def __init__(self, actor: Any) -> None:
        self.board = RemoteBoard(actor)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        with suppress(Exception):  # an exception here would end the run
            causes = [root_cause(error) for error in worker_exceptions.values()]
            if any(ends_the_run(cause) for cause in causes):
                return  # that is said at the end, with its remedy
            preempted = any(getattr(cause, "preempted", False) for cause in causes)
            self.board.tell("failed", describe_failures(worker_exceptions), preempted)


def describe_failures(errors: Mapping[int, BaseException]) -> str:
    """One line: the rank that broke first, as far as the errors tell it from those it dragged along."""
    died = [rank for rank, error in errors.items() if isinstance(error, RayError | WorkerLost)]
    rank = min(died or errors)
    error = root_cause(errors[rank])
    if isinstance(error, OutOfMemoryError) or "low on memory" in str(error):
        what = "killed because its node ran out of memory"
    elif isinstance(error, RayError | WorkerLost):
        what = "its process died"
    elif lost := re.search(r"\[([0-9a-f.:]+)\]:\d+: Connection \w+ by peer", str(error)):
        what = f"lost its connection to {lost.group(1)}"
    else:
        what = reason(error)[:160]
    return f"rank {rank}: {what}"


def ends_the_run(error: BaseException) -> bool:
    """A mistake that no restart repairs; a storage may come back."""
    return isinstance(error, UserError) and not isinstance(error, StorageError)


def root_cause(error: BaseException) -> BaseException:
    """The exception a user can act on, or that Ray knows the reason of, out of the layers around it."""
    seen: list[BaseException | None] = [error]
    while seen:
        current = seen.pop()
        if current is None:
            continue
        if isinstance(current, UserError | OutOfMemoryError) or getattr(
            current, "preempted", False
        ):
            return current
        failures = getattr(current, "worker_failures", None) or {}
        seen.extend(failures.values())
        seen.append(getattr(current, "_base_exc", None))
        seen.append(getattr(current, "health_check_failure", None))
        if isinstance(current, ray.exceptions.RayTaskError):
            seen.append(current.cause)
        seen.append(current.__cause__)
    return error


class Requests:
    """What the driver asks of rank 0; the question is sent ahead, so asking never blocks."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.pending = actor, actor.requests.remote()
        self.stop = self.hurry = False
        self._looked_at = 0.0

    def look(self) -> None:
        """Bring `stop` and `hurry` up to date."""
        if time.monotonic() - self._looked_at < ASK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        ready, _ = ray.wait([self.pending], timeout=0)
        if ready:
            with suppress(RayError):  # the driver is gone, and the job with it
                self.stop, self.hurry = ray.get(self.pending)
                self.pending = self.actor.requests.remote()


def beside(cls: type[Any], *arguments: Any) -> Any:
    """An actor on this process's node: not on one that may be lost while this process lives."""
    here = ray.get_runtime_context().get_node_id()
    return ray.remote(
        num_cpus=0,
        scheduling_strategy=cast(Any, NodeAffinitySchedulingStrategy(here, soft=False)),
    )(cls).remote(*arguments)


@contextmanager
def mailbox(
    board: Board,
    interruptions: Interruptions,
    stop: threading.Event,
    room: Callable[[], int] = lambda: 0,
    others: Mapping[str, Callable[..., None]] | None = None,
) -> Iterator[Any]:
    """An actor handle for workers; a thread here shows and counts what arrives, passes `stop` on.

    room: for how many workers there is room now. Where it is for more than there are, they are asked
    to save often: Ray will soon end them to start a larger group. others: further kinds of events.
    """
    actor = beside(Mailbox)
    done = threading.Event()

    def show() -> None:
        told, hurry, looked_at, room_since = (False, False), False, 0.0, 0.0
        while True:
            last = done.wait(POLL_S)
            try:
                now = time.monotonic()
                if now - looked_at > LOOK_FOR_ROOM_EVERY_S:
                    looked_at = now
                    interruptions.waiting()
                    more = interruptions.workers is not None and room() > interruptions.workers
                    room_since = (room_since or now) if more else 0.0
                    # Somebody else may use what is there: then the group does not grow after all.
                    hurry = more and now - room_since < HURRY_FOR_S
                if told != (stop.is_set(), hurry):
                    told = (stop.is_set(), hurry)
                    actor.ask.remote(*told)
                events = ray.get(actor.take.remote(), timeout=30)
            except GetTimeoutError:
                continue
            except RayError:
                return  # the cluster is going; the run's own error says why
            for kind, *content in events:
                if others and kind in others:
                    others[kind](*content)
                else:
                    _pass_on(kind, content, board, interruptions)
            if last and not events:
                return

    thread = threading.Thread(target=show, name="progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        done.set()
        thread.join(timeout=5)


def _pass_on(kind: str, content: list[Any], board: Board, interruptions: Interruptions) -> None:
    if kind == "log":
        board.log(*content)
    elif kind == "say":
        board.say(*content)
    elif kind == "started":
        interruptions.started(*content)
    elif kind == "noticed":
        interruptions.noticed()
    elif kind == "blamed":
        interruptions.blamed(*content)
    elif kind == "failed":
        why, preempted = content
        interruptions.failed(why, preempted=preempted)
