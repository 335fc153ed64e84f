"""Runs a TorchTrainer to its end, across what its own retries do not cover.

`FailureConfig` restarts workers; it does not cover the controller, which dies with a storage error
or with its node. Fitting again under the same run name goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any, cast

from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import Result, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError

from orchestrator.config.schema import LaunchConfig
from orchestrator.errors import GaveUpError, UserError
from orchestrator.launch.interruptions import Interruptions
from orchestrator.launch.mailbox import FailureNotes, root_cause
from orchestrator.launch.preflight import out_of_memory
from orchestrator.launch.ray_runtime import free_room, train_loop

BACKOFF_S = 5.0
# How long Ray waits for resources it believes to be there before it looks again what is: after the
# loss of a node it believes the wrong thing for a while. A fixed group has nothing to look for.
START_TIMEOUT_S = "5"
START_ATTEMPTS = 12


def run_trainer(
    config: dict[str, Any],
    launch: LaunchConfig,
    *,
    gpus_per_worker: float,
    cpus_per_worker: float,
    name: str,
    storage_path: str,
    interruptions: Interruptions,
    loop: Callable[[dict[str, Any]], dict[str, Any]] = train_loop,
) -> dict[str, Any]:
    """Rank 0's result. loop: what every worker runs, given config.

    Raises:
        UserError: as raised in a worker.
        GaveUpError: more failures than `launch.max_failures`.
    """
    # Ray reports its own life at length; the board tells what a user needs of it.
    for noisy in ("ray.train", "ray.tune", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if launch.max_workers:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_TIMEOUT_S)
    controller_failures, most = 0, launch.max_workers
    while True:
        trainer = _trainer(
            config, launch, most=most, gpus=gpus_per_worker, cpus=cpus_per_worker,
            name=name, storage_path=storage_path, failed=interruptions.here, loop=loop,
        )  # fmt: skip
        try:
            result: Result = trainer.fit()
        except (ControllerError, RayActorError) as error:
            started = getattr(error, "controller_failure", None)
            if most and isinstance(started, WorkerGroupStartupTimeoutError):
                # Ray counts all that the nodes have, others may use a part of it.
                free = free_room(cpus_per_worker, gpus_per_worker)
                most = max(launch.workers, min(launch.max_workers or 0, free))
                continue
            # The controller itself died, with its node or with a storage error.
            controller_failures += 1
            why = " ".join(str(root_cause(error)).split())[:200]
            interruptions.failed(f"the training controller: {why}", preempted=False)
            if controller_failures > launch.max_failures:
                raise GaveUpError(interruptions.here, root_cause(error)) from None
            time.sleep(BACKOFF_S)
            continue
        except TrainingFailedError as error:
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise cause from None
            if isinstance(cause, OutOfMemoryError) and "assignment" in config:
                resolved = config["assignment"].resolved
                raise out_of_memory(resolved, interruptions.workers or launch.workers) from None
            raise GaveUpError(interruptions.here + interruptions.preemptions, cause) from None
        # Ray types the loop as returning nothing and then hands on what rank 0 returned.
        returned = cast("dict[str, Any]", cast(Any, result).return_value)
        refused = returned.get("refused")
        if isinstance(refused, UserError):
            raise refused
        return returned


def _trainer(
    config: dict[str, Any],
    launch: LaunchConfig,
    *,
    most: int | None,
    gpus: float,
    cpus: float,
    name: str,
    storage_path: str,
    failed: int,
    loop: Callable[[dict[str, Any]], dict[str, Any]],
) -> TorchTrainer:
    """most: workers of an elastic group, None for a fixed one. failed: failures so far."""
    return TorchTrainer(
        cast("Callable[[dict[Any, Any]], None]", loop),
        train_loop_config=config,
        torch_config=TorchConfig(timeout_s=launch.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=(launch.workers, most) if most else launch.workers,
            elastic_resize_monitor_interval_s=launch.grow_every_s,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus > 0 else {}),
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # typed as the version before
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(
                max_failures=max(0, launch.max_failures - failed),
                max_preemption_failures=launch.max_preemptions,
                controller_failure_limit=START_ATTEMPTS if most else -1,
            ),
            callbacks=[FailureNotes(config["board"])],
        ),
    )
