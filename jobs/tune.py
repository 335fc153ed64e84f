"""Search for the best EfficientDet: which fusion, how wide, how deep, at which resolution.

python jobs/tune.py --config jobs/sweeps/smoke.yaml               minutes on this machine
python jobs/tune.py --config jobs/sweeps/smoke.yaml --dry-run     the space and what it would cost
ray job submit -- python jobs/tune.py --config SWEEP.yaml         on a cluster
python jobs/tune.py --config SWEEP.yaml                           again after an interruption: it goes on
python jobs/tune.py --config SWEEP.yaml --extend 16               16 trials more than there are
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.sweep_cli import parse_tune
from orchestrator.launch.entry import run_job
from orchestrator.search.sweep_job import run_sweep_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_tune(description, sys.argv[1:]), run_sweep_job)


if __name__ == "__main__":
    sys.exit(main())
