"""Look after a run.

python jobs/doctor.py --replay                          send what waits in runs/ to MLflow
python jobs/doctor.py --replay s3://bucket/checkpoints/RUN   the same from beside its checkpoints
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.cli import parse_doctor
from orchestrator.launch.doctor_job import run_doctor_job
from orchestrator.launch.entry import run_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_doctor(description, sys.argv[1:]), run_doctor_job)


if __name__ == "__main__":
    sys.exit(main())
