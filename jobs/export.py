"""Write a checkpoint's weights for another program.

python jobs/export.py runs/…/checkpoints/step_00002000 weights.pth --format effdet
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.cli import parse_export
from orchestrator.launch.entry import run_job
from orchestrator.launch.export_job import run_export_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_export(description, sys.argv[1:]), run_export_job)


if __name__ == "__main__":
    sys.exit(main())
