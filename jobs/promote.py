"""Make a run's checkpoint the model that is served, if it passes every gate.

python jobs/promote.py RUN_ID --name detector --require 'val/AP>=0.3'
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.cli import parse_promote
from orchestrator.launch.entry import run_job
from orchestrator.launch.promote_job import run_promote_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_promote(description, sys.argv[1:]), run_promote_job)


if __name__ == "__main__":
    sys.exit(main())
