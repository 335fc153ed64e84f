"""Who runs a training: Ray, or this process with those that torchrun started beside it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.config.schema import LaunchConfig, TrainJob
from orchestrator.errors import ClusterError, ConfigError
from orchestrator.launch import local, preflight
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.progress import Progress
from orchestrator.launch.worker import Assignment
from orchestrator.storage.filesystems import open_place

if TYPE_CHECKING:
    from orchestrator.launch.ray_runtime import Cluster

ROOT = Path(__file__).resolve().parents[2]


class Launcher:
    """Ray or this process. cpus, gpus, nodes: what there is to train on."""

    cpus: float
    gpus: float
    nodes: int

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def describe(self, hardware: preflight.Hardware) -> str:
        raise NotImplementedError

    def most_workers(self, hardware: preflight.Hardware) -> int:
        """As many as there is room for now."""
        by_cpus = int(self.cpus // hardware.cpus_per_worker)
        if not hardware.gpus_per_worker:
            return max(1, by_cpus)
        return max(1, min(by_cpus, int(self.gpus // hardware.gpus_per_worker)))

    def run(
        self,
        assignment: Assignment,
        hardware: preflight.Hardware,
        progress: Progress,
        interruptions: Interruptions,
    ) -> dict[str, Any]:
        raise NotImplementedError


class LocalLauncher(Launcher):
    """Plain python or torchrun: for debugging, and the reference that Ray's numbers are held to."""

    def __init__(self, leader: local.Leader) -> None:
        self.leader = leader
        self.cpus = float(len(os.sched_getaffinity(0)))
        self.gpus, self.nodes = float(torch.cuda.device_count()), 1

    def describe(self, hardware: preflight.Hardware) -> str:
        return f"this process, {hardware.device_kind}"

    def run(
        self,
        assignment: Assignment,
        hardware: preflight.Hardware,
        progress: Progress,
        interruptions: Interruptions,
    ) -> dict[str, Any]:
        use_gpu = hardware.gpus_per_worker > 0
        interruptions.at_work(assignment.resolved.job.launch.workers)
        return self.leader.lead(local.Order(assignment, use_gpu), progress)


class RayLauncher(Launcher):
    """A TorchTrainer on the cluster of RAY_ADDRESS, or on one started here."""

    def __enter__(self) -> Launcher:
        from orchestrator.launch import ray_runtime

        self.cluster = ray_runtime.connect(ROOT)
        self.cpus, self.gpus, self.nodes = (
            self.cluster.cpus,
            self.cluster.gpus,
            self.cluster.nodes,
        )
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        ray.shutdown()

    def describe(self, hardware: preflight.Hardware) -> str:
        where = "a Ray started here" if self.cluster.embedded else f"Ray at {self.cluster.address}"
        there = f"{self.nodes} node(s), {self.cpus:g} CPUs, {self.gpus:g} GPUs"
        if self.cluster.grows:
            there += " with those that can be added"
        return f"{where}: {there}; training on {hardware.device_kind}"

    def run(
        self,
        assignment: Assignment,
        hardware: preflight.Hardware,
        progress: Progress,
        interruptions: Interruptions,
    ) -> dict[str, Any]:
        from orchestrator.launch import supervisor
        from orchestrator.launch.mailbox import mailbox

        stop, launch = threading.Event(), assignment.resolved.job.launch
        room = elastic_room(launch, hardware)
        with (
            _sigterm_sets(stop, progress),
            mailbox(progress, interruptions, stop, room) as board,
        ):
            return supervisor.run_trainer(
                {"assignment": assignment, "board": board},
                launch,
                gpus_per_worker=hardware.gpus_per_worker,
                cpus_per_worker=hardware.cpus_per_worker,
                name=assignment.run.run_key,
                storage_path=_ray_storage(assignment, self.cluster),
                interruptions=interruptions,
            )


def elastic_room(launch: LaunchConfig, hardware: preflight.Hardware) -> Callable[[], int]:
    """For how many workers of an elastic group there is room; none where it is not elastic."""
    from orchestrator.launch.ray_runtime import room_for

    def room() -> int:
        if launch.max_workers is None:
            return 0
        fits = room_for(hardware.cpus_per_worker, hardware.gpus_per_worker)
        return min(fits, launch.max_workers)

    return room


@contextmanager
def _sigterm_sets(stop: threading.Event, progress: Progress) -> Iterator[None]:
    """The first SIGTERM asks the workers to save and stop; the second ends the driver at once."""

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        progress.say("asked to stop: saving a checkpoint first")

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ray_storage(assignment: Assignment, cluster: Cluster) -> str:
    """Ray Train's own notes on a run; checkpoints are not among them.

    Raises:
        ClusterError: several nodes but only a local folder.
    """
    place = open_place(assignment.checkpoints_uri, "checkpoint.uri")
    if place.local is None:
        return place.uri.rsplit("/", 1)[0] + "/ray"
    launch = assignment.resolved.job.launch
    may_span = launch.max_workers is not None and not cluster.embedded
    if may_span or (cluster.several and launch.workers > 1):
        shared = assignment.resolved.job.checkpoint.uri is not None
        if not shared:
            raise ClusterError(
                "checkpoint.uri", "a place that all nodes can reach",
                f"the local folder {place.path}",
                "give s3://… or a shared folder: --set checkpoint.uri=URI",
            )  # fmt: skip
    return str(assignment.resolved.output / "ray")


def check_launcher(job: TrainJob) -> None:
    torchrun = int(os.environ.get("WORLD_SIZE", "1"))
    if job.launch.launcher == "ray" and torchrun > 1:
        raise ConfigError("launch.launcher", "local under torchrun", "ray", "add --launcher local")
    if job.launch.launcher == "local" and job.launch.max_workers:
        raise ConfigError(
            "launch.max_workers", "a fixed number of workers without Ray",
            f"{job.launch.workers}:{job.launch.max_workers}", "leave --launcher local out",
        )  # fmt: skip
    if job.launch.launcher == "local" and job.launch.workers != torchrun:
        raise ConfigError(
            "launch.workers", f"{torchrun}, the processes there are", str(job.launch.workers),
            f"start them with torchrun --nproc-per-node {job.launch.workers}, or let Ray do it",
        )  # fmt: skip
