"""Several processes that each hold a model and work through tasks, each answered exactly once.

Workers are Ray's actors. They are given their tasks a few at a time, so memory does not grow with the
number of tasks; one that dies is replaced, and what it had been given is given out again.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from orchestrator.errors import ClusterError, GaveUpError, UserError
from orchestrator.launch.crew import Crew

if TYPE_CHECKING:
    from orchestrator.launch.ray_runtime import Cluster

PATIENCE_S = 30.0  # without any worker, before it is said what is waited for
NODE_LAG_S = 30.0  # a worker's death may be known before its node's, by some health checks
MOST_SIGNS = 200  # of a task's name

Task = TypeVar("Task")
Answer = TypeVar("Answer")
Make = Callable[[], Callable[[Task], Answer]]
Say = Callable[[str], None]


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def work_through(
    tasks: Iterable[Task], make: Make[Task, Answer], crew: Crew, *, say: Say = to_stderr
) -> Iterator[tuple[Task, Answer]]:
    """Each task with its answer, once each, in the order in which they are done.

    make: called once in each worker; returns what answers a task. It is sent to the workers, so it
    holds what a model is made of (see `packed_model.py`) and not a model. A worker that reserved no
    GPU may still see some: `packed_model.device_held` is the one to use. tasks: taken as they can be
    given out. say: told of lost workers.

    A task whose worker died is answered again, after all others, so what answering writes must bear
    to be written twice. Every worker is stopped at the end, at an error, and when the caller stops
    to iterate.

    Raises:
        ClusterError: more workers than the cluster has room for or could grow to; before loading.
        GaveUpError: workers died more often than `crew.max_failures`.
        Whatever `make` or an answer raises; a UserError stays one.
    """
    waiting = iter(tasks)
    first = list(islice(waiting, 1))
    if not first:
        return
    waiting = chain(first, waiting)
    if crew.workers == 0:
        yield from _alone(waiting, make, crew.threads)
        return
    with _cluster(crew) as fitted:
        fleet = _Fleet(make, fitted, say)
        try:
            yield from fleet.run(waiting)
        finally:
            fleet.stop()


def _alone(
    tasks: Iterator[Task], make: Make[Task, Answer], threads: int
) -> Iterator[tuple[Task, Answer]]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        answer = make()
        for task in tasks:
            yield task, answer(task)
    finally:
        torch.set_num_threads(before)


@contextmanager
def _cluster(crew: Crew) -> Iterator[_Fitted]:
    """Joined, or started for this, and left at the end; the crew as it fits into it.

    Raises:
        ClusterError: it cannot hold the crew.
    """
    from orchestrator.launch import ray_runtime
    from orchestrator.launch.launchers import ROOT

    with _own_sigterm():
        cluster = ray_runtime.connect(ROOT)
    try:
        yield _fit(crew, cluster)
    finally:
        ray_runtime.disconnect()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray puts a bare exit in the place of what the caller does at SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class _Fitted:
    """A crew with nothing left open."""

    crew: Crew
    workers: int
    gpus_per_worker: float


def _fit(crew: Crew, cluster: Cluster) -> _Fitted:
    from orchestrator.launch.ray_runtime import room_for

    cpus, gpus = crew.cpus_per_worker, crew.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.gpus >= 1 else 0.0
    room = cluster.room(cpus, gpus)
    # Nobody asked an autoscaler for more than one.
    workers = max(1, room_for(cpus, gpus)) if crew.workers is None else crew.workers
    if room >= workers:
        return _Fitted(crew, workers, gpus)
    each = f"{crew.cpus_per_worker:g} CPU(s)" + (f" and {gpus:g} GPU(s)" if gpus else "")
    raise ClusterError(
        "--workers",
        f"at most {room} with {each} each ({cluster.nodes} node(s), {cluster.cpus:g} CPUs, "
        f"{cluster.gpus:g} GPUs)",
        "auto" if crew.workers is None else str(crew.workers),
        "ask for fewer workers or for less each, or add nodes",
    )


@dataclass(eq=False)
class _Hand:
    """A worker. given: tasks that it has now; node: where it has loaded, None before."""

    number: int
    actor: Any
    given: int = 0
    node: str | None = None

    @property
    def ready(self) -> bool:
        return self.node is not None


@dataclass
class _Losses:
    """Workers that died. nodes: of each, None before it had loaded; taken: nodes gone with notice."""

    nodes: list[str | None] = field(default_factory=list)
    taken: set[str | None] = field(default_factory=set)

    def add(self, node: str | None, *, preempted: bool) -> None:
        if not preempted:
            self.nodes.append(node)
        elif node is not None:
            self.taken.add(node)

    def failures(self, alive: Container[str]) -> int:
        """A node that is gone counts once, however many workers it had."""
        gone = {node for node in self.nodes if node is not None and node not in alive}
        return len(gone - self.taken) + sum(node not in gone for node in self.nodes)


class _Fleet(Generic[Task, Answer]):
    """The driver's side of the workers of a cluster."""

    def __init__(self, make: Make[Task, Answer], fitted: _Fitted, say: Say) -> None:
        import ray

        self.crew, self.say = fitted.crew, say
        self.workers, self.gpus_per_worker = fitted.workers, fitted.gpus_per_worker
        self.make = ray.put(make)  # once to each node
        self.hands: list[_Hand] = []
        self.loading: dict[Any, _Hand] = {}
        self.working: dict[Any, tuple[_Hand, Task]] = {}
        self.again: deque[Task] = deque()
        self.hired = 0
        self.losses = _Losses()

    def run(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, Answer]]:
        first = list(islice(tasks, self.workers))
        for _ in first:  # no more than there is work for
            self._hire()
        tasks = chain(first, tasks)
        patient_until = time.monotonic() + PATIENCE_S
        while self._hand_out(tasks) or self.working:
            done = self._next_done()
            if done is not None:
                yield from self._take(done)
            elif not any(hand.ready for hand in self.hands) and time.monotonic() > patient_until:
                patient_until = float("inf")
                self.say(
                    f"waiting for the cluster: none of {len(self.hands)} worker(s) with "
                    f"{self.crew.cpus_per_worker:g} CPU(s) each has started"
                )

    def stop(self) -> None:
        import ray
        from ray.exceptions import RayError

        for hand in self.hands:
            with suppress(RayError):  # the cluster itself may be gone
                ray.kill(hand.actor)

    def _hire(self) -> None:
        import ray

        from orchestrator.launch.fleet_worker import FleetWorker

        made: Any = ray.remote(
            num_cpus=self.crew.cpus_per_worker,
            num_gpus=self.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(FleetWorker)
        hand = _Hand(self.hired, made.remote())
        self.hired += 1
        self.hands.append(hand)
        self.loading[hand.actor.load.remote(self.make, self.crew.threads)] = hand

    def _hand_out(self, tasks: Iterator[Task]) -> bool:
        """To those who have loaded, evenly. Whether a task is left that nobody could take."""
        for depth in range(1, self.crew.in_flight + 1):
            for hand in self.hands:
                if not hand.ready or hand.given >= depth:
                    continue
                task = list(islice(tasks, 1))
                if not task and self.again:
                    task = [self.again.popleft()]
                if not task:
                    return False
                hand.given += 1
                self.working[hand.actor.work.remote(task[0])] = (hand, task[0])
        return True

    def _next_done(self) -> Any:
        """What has come to an end, or None after a while."""
        import ray

        pending = [*self.working, *self.loading]
        ready, _ = ray.wait(pending, num_returns=1, timeout=1.0)
        return ready[0] if ready else None

    def _take(self, ref: Any) -> Iterator[tuple[Task, Answer]]:
        """The answer that has come, if it is one."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        from orchestrator.launch.mailbox import root_cause

        hand = self.loading[ref] if ref in self.loading else self.working[ref][0]
        try:
            answer: Any = ray.get(ref)
        except RayTaskError as error:
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise cause from None
            raise
        except RayError as error:
            self._lost(hand, error)
            return
        if self.loading.pop(ref, None) is not None:
            hand.node = answer
            return
        hand.given -= 1
        yield self.working.pop(ref)[1], answer

    def _lost(self, hand: _Hand, error: BaseException) -> None:
        """Another takes its place and its tasks.

        Raises:
            GaveUpError: that happened too often.
        """
        import ray
        from ray.exceptions import RayError

        from orchestrator.launch.mailbox import describe_failures

        self.hands.remove(hand)
        self.loading = {ref: other for ref, other in self.loading.items() if other is not hand}
        mine = [ref for ref, (other, _) in self.working.items() if other is hand]
        lost = [self.working.pop(ref)[1] for ref in mine]
        # The one it worked at goes last: it may be what kills the workers.
        self.again.extend([*lost[1:], *lost[:1]])
        with suppress(RayError):  # it may live behind a broken link
            ray.kill(hand.actor)
        why = f"worker {hand.number}: {describe_failures({0: error}).removeprefix('rank 0: ')}"
        self.losses.add(hand.node, preempted=getattr(error, "preempted", False))
        failures = self._failures()
        if failures > self.crew.max_failures:
            at = f", at {str(lost[0])[:MOST_SIGNS]}" if lost else ""
            raise GaveUpError(failures, RuntimeError(why + at))
        self.say(f"{why}; another takes its place and its {len(mine)} task(s)")
        self._hire()

    def _failures(self) -> int:
        """Before they are too many, the cluster gets time to notice that nodes are gone."""
        import ray

        here = ray.get_runtime_context().get_node_id()
        end = time.monotonic() + NODE_LAG_S
        while True:
            alive = {str(one["NodeID"]) for one in ray.nodes() if one["Alive"]}
            failures, least = self.losses.failures(alive), self.losses.failures({here})
            most = self.crew.max_failures
            if failures <= most or least > most or time.monotonic() > end:
                return failures
            time.sleep(NODE_LAG_S / 100)
