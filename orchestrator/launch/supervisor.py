"""Runs a TorchTrainer to its end, across what its own retries do not cover.

`FailureConfig` restarts workers; it does not cover the controller, which dies with a storage error
or with its node. Fitting again under the same run name goes on from the newest checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.train import (
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError

from orchestrator.config.schema import LaunchConfig
from orchestrator.errors import UserError
from orchestrator.launch.ray_runtime import train_loop

BACKOFF_S = 5.0


def run_trainer(
    config: dict[str, Any],
    launch: LaunchConfig,
    *,
    gpus_per_worker: float,
    cpus_per_worker: float,
    name: str,
    storage_path: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Rank 0's result.

    Raises:
        UserError: as raised in a worker.
        TrainingFailedError: more failures than `launch.max_failures`.
    """
    # Ray reports its own life at length; the board tells what a user needs of it.
    for noisy in ("ray.train", "ray.tune", "ray.data"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    left = launch.max_failures
    while True:
        trainer = TorchTrainer(
            cast("Callable[[dict[Any, Any]], None]", train_loop),
            train_loop_config=config,
            torch_config=TorchConfig(timeout_s=launch.collective_timeout_s),
            scaling_config=ScalingConfig(
                num_workers=launch.workers,
                use_gpu=gpus_per_worker > 0,
                resources_per_worker={"CPU": cpus_per_worker}
                | ({"GPU": gpus_per_worker} if gpus_per_worker > 0 else {}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage_path,
                failure_config=FailureConfig(max_failures=left),
            ),
        )
        try:
            result: Result = trainer.fit()
        except ControllerError as error:
            if left <= 0:
                raise
            left -= 1
            say(f"the training controller failed ({error}); starting it again, {left} tries left")
            time.sleep(BACKOFF_S)
            continue
        except TrainingFailedError as error:
            raise root_cause(error) from None
        # Ray types the loop as returning nothing and then hands on what rank 0 returned.
        return cast("dict[str, Any]", cast(Any, result).return_value)


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
