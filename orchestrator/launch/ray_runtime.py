"""Ray behind the seam: workers of a TorchTrainer, and the cluster they run on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train.torch import get_device

from model.training.runtime import (
    CheckpointStore,
    Decision,
    NoSink,
    ProcessGroupRuntime,
    Sink,
    agree,
    set_threads,
)
from model.training.watchdog import Watchdog
from orchestrator.errors import ClusterError, UserError
from orchestrator.launch.mailbox import RemoteBoard, Requests, ends_the_run
from orchestrator.launch.recorder import NodeRecorder, Recorder
from orchestrator.launch.worker import Assignment, open_store, open_watchdog, train
from orchestrator.storage.background import BackgroundStore
from orchestrator.storage.filesystems import reason

EXCLUDES = [".git", ".venv", "runs", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
UNREACHED = (OSError, ValueError, RuntimeError, RayError)
LOOK_EVERY_S = 5.0
SAVE_EVERY_S_ON_NOTICE = 10.0


class RayRuntime(ProcessGroupRuntime):
    """One worker of a TorchTrainer.

    requests: what the driver asks for, on rank 0. on_notice: called on rank 0.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        store: CheckpointStore | None,
        sink: Sink,
        save_every_s: float | None = None,
        requests: Requests | None = None,
        watchdog: Watchdog | None = None,
        notices: Notices | None = None,
        on_notice: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            rank=rank, world_size=world_size, device=device,
            store=store, sink=sink, save_every_s=save_every_s, watchdog=watchdog,
        )  # fmt: skip
        self.requests = requests
        self.notices, self.on_notice = notices or Notices(), on_notice

    def decide(self) -> Decision:
        """The driver got SIGTERM: save and stop. A node is about to be taken away: save at once and
        often from now on; Ray starts the group anew when the node is gone.
        """
        if self.requests is not None:
            self.requests.look()
        look = int(self.rank == 0 and self.notices.due())
        stop, save, look = agree([self.stop_code(), self.save_due(), look], self.device)
        if look and self.notices.look():
            self.save_every_s, save = SAVE_EVERY_S_ON_NOTICE, 1
            if self.rank == 0:
                self.on_notice()
        return Decision(self.stop_reason(stop), bool(save))

    def stop_code(self) -> int:
        return int(self.requests is not None and self.requests.stop)

    def save_due(self) -> int:
        """Soon where a larger group is about to be started, which goes on from the newest checkpoint."""
        if self.requests is not None and self.requests.hurry:
            return int(self.clock() - self.saved_at >= SAVE_EVERY_S_ON_NOTICE)
        return super().save_due()

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
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if rank == 0:
        board.tell("started", context.get_world_size())
    set_threads(context.get_local_world_size(), assignment.resolved.job.launch.threads_per_worker)
    recorder = Recorder(assignment, board) if rank == 0 else None
    load = None
    if recorder is None and context.get_local_rank() == 0:
        load = NodeRecorder(assignment, board, context.get_node_rank())
    store = BackgroundStore(open_store(assignment, board.say, recorder))
    runtime = RayRuntime(
        rank=rank,
        world_size=context.get_world_size(),
        device=get_device(),
        store=store,
        sink=recorder or NoSink(),
        save_every_s=assignment.save_every_s,
        watchdog=open_watchdog(assignment, rank, context.get_world_size(), board.blame),
        requests=Requests(actor) if rank == 0 else None,
        on_notice=lambda: board.tell("noticed"),
    )
    if recorder is not None:
        recorder.begin(runtime.device, runtime.world_size)
    try:
        return train(assignment, runtime, store)
    except UserError as error:
        if ends_the_run(error):
            ray.get(actor.refuse.remote(error))
        raise
    finally:
        for records in (recorder, load):
            if records is not None:
                records.close()


@dataclass(frozen=True)
class Cluster:
    """What is there, or may come: an autoscaler starts nodes when somebody asks for them.

    embedded: started by this process and gone with it. nodes: there now.
    """

    embedded: bool
    cpus: float
    gpus: float
    nodes: int
    address: str
    grows: bool = False

    @property
    def several(self) -> bool:
        """More than one machine, now or later."""
        return self.nodes > 1 or self.grows

    def room(self, cpus_per_worker: float, gpus_per_worker: float) -> int:
        """For how many workers there is room, or may come to be, if nobody else uses it."""
        now = room_for(cpus_per_worker, gpus_per_worker)
        if not self.grows:
            return now
        return max(now, fitting(self.cpus, self.gpus, cpus_per_worker, gpus_per_worker))


def connect(root: Path, *, dashboard: bool = False) -> Cluster:
    """Join the cluster of RAY_ADDRESS (a submitted job has one), or start one on this machine.

    dashboard: of one started here; trials with workers of their own need it, or what is left of one
    that died holds its place for ever.

    Workers get the code of `root`: by path here, as an uploaded package elsewhere, unless the job
    was submitted with a working directory of its own.

    Raises:
        ClusterError: the address does not answer, or none can be started here.
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
        except UNREACHED as error:
            raise ClusterError(
                "RAY_ADDRESS", "a Ray cluster that answers", f"{address} ({reason(error)})",
                "correct it (and RAY_AUTH_TOKEN), or unset it for a local cluster",
            ) from None  # fmt: skip
    else:
        if dashboard:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        common["runtime_env"] = {"env_vars": {"PYTHONPATH": str(root)}}
        try:
            ray.init(address="local", include_dashboard=dashboard, **common)
        except UNREACHED as error:
            raise ClusterError(
                "Ray", "to start on this machine", reason(error),
                "see /tmp/ray/session_latest/logs, or name a cluster by RAY_ADDRESS",
            ) from None  # fmt: skip
        if dashboard:  # for those who ask it, when there is another Ray on this machine
            os.environ["RAY_ADDRESS"] = str(ray.get_runtime_context().gcs_address)
    there, most = ray.cluster_resources(), autoscaler_limits()
    return Cluster(
        embedded=not address,
        cpus=max(float(there.get("CPU", 0)), most.get("CPU", 0.0)),
        gpus=max(float(there.get("GPU", 0)), most.get("GPU", 0.0)),
        nodes=sum(node["Alive"] for node in ray.nodes()),
        address=str(ray.get_runtime_context().gcs_address),
        grows=any(amount > there.get(name, 0) for name, amount in most.items()),
    )


def autoscaler_limits() -> dict[str, float]:
    """What the cluster may grow to, {} where nothing scales it. Workers may well be none now."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config() or {}
    return {name: float(amount) for name, amount in most.items() if name in ("CPU", "GPU")}


def disconnect() -> None:
    ray.shutdown()


def room_for(cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many workers the nodes that are alive can hold, if nobody else uses them."""
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            there = node["Resources"]
            cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
            total += fitting(cpus, gpus, cpus_per_worker, gpus_per_worker)
    return total


def free_room(cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many workers fit beside what others use now."""
    there = ray.available_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    return fitting(cpus, gpus, cpus_per_worker, gpus_per_worker)


def fitting(cpus: float, gpus: float, cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many workers so many cores and devices hold. A part of a GPU is one of a single device."""
    fits = _parts(cpus, cpus_per_worker)
    if not gpus_per_worker:
        return fits
    if gpus_per_worker >= 1:
        return min(fits, _parts(gpus, gpus_per_worker))
    whole = math.floor(gpus)
    on_gpus = whole * _parts(1, gpus_per_worker) + _parts(gpus - whole, gpus_per_worker)
    return min(fits, on_gpus)


def _parts(there: float, each: float) -> int:
    """1 // 0.1 is 9."""
    return math.floor(there / each + 1e-9)
