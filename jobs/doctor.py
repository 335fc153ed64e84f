"""Look after a run or a cluster.

python jobs/doctor.py --replay                          send what waits in runs/ to MLflow
python jobs/doctor.py --replay s3://bucket/checkpoints/RUN   the same from beside its checkpoints
python jobs/doctor.py --cluster s3://bucket/tmp         measure the cluster: GPUs, all-reduce, S3, tracker,
                                                        versions, clocks, /dev/shm on every node
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.launch.doctor_job import parse, run_doctor_job
from orchestrator.launch.entry import run_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse(description, sys.argv[1:]), run_doctor_job)


if __name__ == "__main__":
    sys.exit(main())
