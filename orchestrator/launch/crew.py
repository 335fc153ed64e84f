"""Who works through tasks: how many processes, and what each gets of the machines."""

from __future__ import annotations

import math
from dataclasses import dataclass

from orchestrator.errors import ConfigError

LEAST_SHARE = 0.0001  # that Ray counts


@dataclass(frozen=True)
class Crew:
    """Who works.

    workers: processes; 0 works in this one, without Ray; None: as many as the cluster has room for
    now. cpus_per_worker, gpus_per_worker: reserved in the cluster; None: a whole GPU each where there
    are any. threads: of torch in each. in_flight: tasks that a worker is given beforehand, so that it
    never waits. max_failures: deaths of workers that are made good; those of machines that were taken
    away do not count.
    """

    workers: int | None = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = 0.0
    threads: int = 1
    in_flight: int = 2
    max_failures: int = 3

    def __post_init__(self) -> None:
        for flag, given, least in (
            ("--workers", self.workers, 0),
            ("--gpus-per-worker", self.gpus_per_worker, 0),
            ("--threads-per-worker", self.threads, 1),
            ("--max-failures", self.max_failures, 0),
            ("in_flight", self.in_flight, 1),
        ):
            if given is not None and not given >= least:
                raise ConfigError(flag, f"at least {least}", f"{given:g}", "correct it")
        cpus, gpus = self.cpus_per_worker, self.gpus_per_worker
        if not LEAST_SHARE <= cpus < math.inf:
            expected = "more than 0" if not cpus > 0 else f"at least {LEAST_SHARE:g}, and finite"
            raise ConfigError("--cpus-per-worker", expected, f"{cpus:g}", "correct it")
        if gpus and not (LEAST_SHARE <= gpus <= 1 or float(gpus).is_integer()):
            raise ConfigError(
                "--gpus-per-worker", f"0, {LEAST_SHARE:g} to 1, or a whole number", f"{gpus:g}",
                "correct it",
            )  # fmt: skip


def threads_for(cpus: float) -> int:
    """As many as whole cores; `Crew` refuses what is no number of them."""
    return max(1, int(cpus)) if math.isfinite(cpus) else 1
