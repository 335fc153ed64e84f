"""Ray behind the seam: workers of a TorchTrainer, and the cluster they run on."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray decides about these when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.torch import get_device
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError as WorkerLost

from model.training.runtime import (
    CheckpointStore,
    Decision,
    ProcessGroupRuntime,
    agree,
    set_threads,
)
from model.training.watchdog import Watchdog
from orchestrator.errors import ClusterError, UserError
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.worker import Assignment, Board, Recorder, open_store, open_watchdog, train
from orchestrator.storage.background import BackgroundStore
from orchestrator.storage.filesystems import reason

EXCLUDES = [".git", ".venv", "runs", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
POLL_S = 0.25
ASK_EVERY_S = 0.5
LOOK_EVERY_S = 5.0
SAVE_EVERY_S_ON_NOTICE = 10.0


class RayRuntime(ProcessGroupRuntime):
    """One worker of a TorchTrainer.

    asked_to_stop: tells rank 0 what the driver was told. on_notice: called on rank 0.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        store: CheckpointStore | None,
        sink: Callable[[int, Mapping[str, float]], None],
        save_every_s: float | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        watchdog: Watchdog | None = None,
        notices: Notices | None = None,
        on_notice: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            rank=rank, world_size=world_size, device=device,
            store=store, sink=sink, save_every_s=save_every_s, watchdog=watchdog,
        )  # fmt: skip
        self.asked_to_stop = asked_to_stop
        self.notices, self.on_notice = notices or Notices(), on_notice

    def decide(self) -> Decision:
        """The driver got SIGTERM: save and stop. A node is about to be taken away: save at once and
        often from now on; Ray starts the group anew when the node is gone.
        """
        look = int(self.rank == 0 and self.notices.due())
        stop, save, look = agree([self.stop_code(), self.save_due(), look], self.device)
        if look and self.notices.look():
            self.save_every_s, save = SAVE_EVERY_S_ON_NOTICE, 1
            if self.rank == 0:
                self.on_notice()
        return Decision(self.stop_reason(stop), bool(save))

    def stop_code(self) -> int:
        return int(self.asked_to_stop())

    def stop_reason(self, code: int) -> str | None:
        return "stopped" if code else None


class Notices:
    """Whether a node of the group is about to be taken away.

    Ray answers this question in a barrier, so all ranks ask in the same step or none does: rank 0's
    clock says when, and `look` is called where all have agreed.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        ask: Callable[[], object | None] = ray.train.get_preemption_info,
    ) -> None:
        self.clock, self.ask = clock, ask
        self._looked_at, self._noticed = clock(), False

    def due(self) -> bool:
        return not self._noticed and self.clock() - self._looked_at >= LOOK_EVERY_S

    def look(self) -> bool:
        """True the first time there is a notice. Collective."""
        self._looked_at = self.clock()
        self._noticed = self.ask() is not None
        return self._noticed


class StopRequests:
    """Whether the mailbox was asked to stop; the question is sent ahead, so asking never blocks."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.pending, self.asked = actor, actor.stopping.remote(), False
        self._looked_at = 0.0

    def __call__(self) -> bool:
        if time.monotonic() - self._looked_at < ASK_EVERY_S:
            return self.asked
        self._looked_at = time.monotonic()
        ready, _ = ray.wait([self.pending], timeout=0)
        if ready and not self.asked:
            try:
                self.asked = bool(ray.get(self.pending))
                self.pending = self.actor.stopping.remote()
            except ray.exceptions.RayError:
                return False  # the driver is gone, and the job with it
        return self.asked


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """`train_loop_per_worker`: the same work as under any launcher.

    A user's mistake that shows only here, {"refused": the error}, ends the run: the worker that met
    it leaves it in the mailbox, and the group that Ray then starts anew finds it there.
    """
    assignment: Assignment = config["assignment"]
    actor = config["board"]
    refused: UserError | None = ray.get(actor.refusal.remote())
    if refused is not None:
        return {"refused": refused}
    board = RemoteBoard(actor)
    store = BackgroundStore(open_store(assignment, board.say))
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if rank == 0:
        board.tell("started", context.get_world_size())
    set_threads(context.get_local_world_size(), assignment.resolved.job.launch.threads_per_worker)
    recorder = Recorder(assignment, board) if rank == 0 else None
    runtime = RayRuntime(
        rank=rank,
        world_size=context.get_world_size(),
        device=get_device(),
        store=store,
        sink=recorder or (lambda step, metrics: None),
        save_every_s=assignment.save_every_s,
        watchdog=open_watchdog(assignment, rank, context.get_world_size(), board.blame),
        asked_to_stop=StopRequests(actor) if rank == 0 else lambda: False,
        on_notice=lambda: board.tell("noticed"),
    )
    try:
        return train(assignment, runtime, store)
    except UserError as error:
        ray.get(actor.refuse.remote(error))
        raise
    finally:
        if recorder is not None:
            recorder.close()


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
            preempted = any(getattr(e, "preempted", False) for e in worker_exceptions.values())
            self.board.tell("failed", describe_failures(worker_exceptions), preempted)


def describe_failures(errors: Mapping[int, BaseException]) -> str:
    """One line: the rank that broke first, as far as the errors tell it from those it dragged along."""
    died = [rank for rank, error in errors.items() if isinstance(error, RayError | WorkerLost)]
    rank = min(died or errors)
    error = root_cause(errors[rank])
    if isinstance(error, ray.exceptions.OutOfMemoryError) or "low on memory" in str(error):
        what = "killed because its node ran out of memory"
    elif isinstance(error, RayError | WorkerLost):
        what = "its process died"
    elif lost := re.search(r"\[([0-9a-f.:]+)\]:\d+: Connection \w+ by peer", str(error)):
        what = f"lost its connection to {lost.group(1)}"
    else:
        what = reason(error)[:160]
    return f"rank {rank}: {what}"


def root_cause(error: BaseException) -> BaseException:
    """The exception a user can act on, out of the layers Ray wraps around it."""
    seen: list[BaseException | None] = [error]
    while seen:
        current = seen.pop()
        if current is None:
            continue
        if isinstance(current, UserError):
            return current
        failures = getattr(current, "worker_failures", None) or {}
        seen.extend(failures.values())
        seen.append(getattr(current, "_base_exc", None))
        if isinstance(current, ray.exceptions.RayTaskError):
            seen.append(current.cause)
        seen.append(current.__cause__)
    return error


class _Mailbox:
    """Actor: keeps events until the driver takes them."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.stop = False
        self.refused: UserError | None = None

    def put(self, event: tuple[Any, ...]) -> None:
        self.events.append(event)

    def take(self) -> list[tuple[Any, ...]]:
        events, self.events = self.events, []
        return events

    def ask_to_stop(self) -> None:
        self.stop = True

    def stopping(self) -> bool:
        return self.stop

    def refuse(self, error: UserError) -> None:
        self.refused = self.refused or error

    def refusal(self) -> UserError | None:
        return self.refused


@contextmanager
def mailbox(board: Board, interruptions: Interruptions, stop: threading.Event) -> Iterator[Any]:
    """An actor handle for workers; a thread here shows and counts what arrives, passes `stop` on."""
    actor: Any = ray.remote(num_cpus=0)(_Mailbox).remote()
    done = threading.Event()

    def show() -> None:
        told = False
        while True:
            last = done.wait(POLL_S)
            try:
                if stop.is_set() and not told:
                    told = True
                    actor.ask_to_stop.remote()
                events = ray.get(actor.take.remote(), timeout=30)
            except ray.exceptions.RayError:
                return  # the cluster is going; the run's own error says why
            for kind, *content in events:
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


@dataclass(frozen=True)
class Cluster:
    """What is there. embedded: started by this process and gone with it."""

    embedded: bool
    cpus: float
    gpus: float
    nodes: int
    address: str


def connect(root: Path) -> Cluster:
    """Join the cluster of RAY_ADDRESS (a submitted job has one), or start one on this machine.

    Workers get the code of `root`: by path here, as an uploaded package elsewhere, unless the job
    was submitted with a working directory of its own.

    Raises:
        ClusterError: the address does not answer.
    """
    address = os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        environment = submitted.get("runtime_env") or {}
        if not environment.get("working_dir"):
            common["runtime_env"] = {"working_dir": str(root), "excludes": EXCLUDES}
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(
                "RAY_ADDRESS", "a Ray cluster that answers", f"{address} ({reason(error)})",
                "correct it (and RAY_AUTH_TOKEN), or unset it for a local cluster",
            ) from None  # fmt: skip
    else:
        ray.init(
            include_dashboard=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(root)}},
            **common,
        )
    resources = ray.cluster_resources()
    return Cluster(
        embedded=not address,
        cpus=float(resources.get("CPU", 0)),
        gpus=float(resources.get("GPU", 0)),
        nodes=sum(node["Alive"] for node in ray.nodes()),
        address=str(ray.get_runtime_context().gcs_address),
    )
