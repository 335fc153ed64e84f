"""Workers of a TorchTrainer that train one trial after another.

To start the processes of a group takes longer than many a trial; so a trial that ends leaves its
group to the next one, as its own process. A group that breaks is started anew by Ray Train and goes
on with the trial it had, from that trial's newest checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray.train.collective import broadcast_from_rank_zero

from model.training.fit import forget_memory
from orchestrator.config.schema import LaunchConfig
from orchestrator.errors import GaveUpError
from orchestrator.launch import supervisor
from orchestrator.launch.actors import Desk
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.launchers import elastic_room
from orchestrator.launch.mailbox import beside, mailbox
from orchestrator.launch.preflight import Hardware
from orchestrator.launch.progress import Progress
from orchestrator.launch.ray_runtime import train_loop
from orchestrator.launch.worker import Assignment

POLL_S = 1.0
CLOSE_TIMEOUT_S = 60.0
NEWS_TIMEOUT_S = 10.0
ANY_NUMBER = 1_000_000  # of failures of a group; each trial's own are counted


def group_loop(config: dict[str, Any]) -> dict[str, Any]:
    """`train_loop_per_worker` of a group: every rank takes the same trials in the same order."""
    desk, board = config["desk"], config["board"]
    first = ray.get(desk.begin.remote()) if ray.train.get_context().get_world_rank() == 0 else None
    number: int = broadcast_from_rank_zero(first)
    while (order := ray.get(desk.order.remote(number))) is not None:
        result = train_loop({"assignment": cloudpickle.loads(order), "board": board})
        forget_memory()
        if ray.train.get_context().get_world_rank() == 0:
            # After all that this process told of it.
            ray.get(board.put.remote(("trained", number)))
            ray.get(desk.done.remote(number, cloudpickle.dumps(result)))
        number += 1
    return {}


class Group:
    """Starts with its first trial; `close` ends it."""

    def __init__(self, launch: LaunchConfig, hardware: Hardware, name: str, storage: str) -> None:
        self.launch, self.hardware, self.name, self.storage = launch, hardware, name, storage
        self.stop = threading.Event()
        self.relay = _Relay()
        self.error: BaseException | None = None
        self.board: Any = None
        self._ready = threading.Event()
        self.desk: Any = beside(Desk)
        self._thread = threading.Thread(target=self._run, name="group", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        return not self._thread.is_alive()

    def train(
        self,
        assignment: Assignment,
        progress: Progress,
        interruptions: Interruptions,
        stop: threading.Event,
    ) -> dict[str, Any]:
        """Rank 0's result, waited for. stop: asks for a checkpoint and the end.

        Raises:
            UserError: as raised in a worker.
            GaveUpError: the group broke too often.
        """
        self._ready.wait()
        self.stop.clear()
        if self.board is not None:
            ray.get(self.board.forget.remote())
        self.relay.begin(progress, interruptions)
        number = ray.get(self.desk.submit.remote(cloudpickle.dumps(assignment)))
        pending = self.desk.result.remote(number)
        while not ray.wait([pending], timeout=POLL_S if not stop.is_set() else 0.1)[0]:
            if stop.is_set():
                self.stop.set()
            if self.broken:
                raise self.error or GaveUpError(0, RuntimeError("the group of workers ended"))
            if self.relay.failures_of_trial > self.launch.max_failures:
                ray.get(self.desk.done.remote(number, None))
        result: bytes | None = ray.get(pending)
        if result is None:
            why = RuntimeError(interruptions.last or "unknown")
            raise GaveUpError(self.launch.max_failures + 1, why)
        self.relay.wait_for(number)
        found: dict[str, Any] = cloudpickle.loads(result)
        if "refused" in found:
            raise found["refused"]
        return found

    def close(self) -> None:
        if not self.broken:
            ray.get(self.desk.submit.remote(None))
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            room = elastic_room(self.launch, self.hardware)
            others = {"trained": self.relay.heard}
            with mailbox(self.relay, self.relay, self.stop, room, others) as self.board:
                self._ready.set()
                supervisor.run_trainer(
                    {"desk": self.desk, "board": self.board},
                    replace(self.launch, max_failures=ANY_NUMBER, max_preemptions=-1),
                    gpus_per_worker=self.hardware.gpus_per_worker,
                    cpus_per_worker=self.hardware.cpus_per_worker,
                    name=self.name,
                    storage_path=self.storage,
                    interruptions=self.relay,
                    loop=group_loop,
                )
        except BaseException as error:  # told by whoever waits for a result
            self.error = error
        finally:
            self._ready.set()


class _Relay(Interruptions):
    """What happens in a group, passed on to the trial it has now."""

    def __init__(self) -> None:
        super().__init__(say=self._say)
        self.progress: Progress | None = None
        self.trial: Interruptions | None = None
        self.failures_of_trial = 0
        self._heard, self._news = -1, threading.Condition()

    def begin(self, progress: Progress, trial: Interruptions) -> None:
        self.progress, self.trial, self.failures_of_trial = progress, trial, 0

    def heard(self, number: int) -> None:
        """All that was told of trial `number` has arrived."""
        with self._news:
            self._heard = number
            self._news.notify_all()

    def wait_for(self, number: int) -> None:
        with self._news:
            self._news.wait_for(lambda: self._heard >= number, timeout=NEWS_TIMEOUT_S)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.progress is not None:
            self.progress.log(step, metrics)

    def started(self, workers: int) -> None:
        self.workers = workers
        if self.trial is not None:
            self.trial.started(workers)

    def noticed(self) -> None:
        if self.trial is not None:
            self.trial.noticed()

    def blamed(self, why: str) -> None:
        if self.trial is not None:
            self.trial.blamed(why)

    def failed(self, why: str, *, preempted: bool) -> None:
        self.failures_of_trial += not preempted
        if self.trial is not None:
            self.trial.failed(why, preempted=preempted)

    def waiting(self) -> None:
        if self.trial is not None:
            self.trial.waiting()

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(text)
