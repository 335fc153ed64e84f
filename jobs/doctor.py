"""Look at data before they cost a training, at a machine or a cluster, and after a run.

python jobs/doctor.py                                   this machine: versions, GPUs, memory, disk
python jobs/doctor.py --data FOLDER --phi 0             mistakes in a dataset, balance, anchors, memory, time
python jobs/doctor.py --storage s3://bucket/tmp --tracking-uri http://mlflow:5000   do they work, how fast
python jobs/doctor.py --replay                          send what waits in runs/ to MLflow
python jobs/doctor.py --replay s3://bucket/checkpoints/RUN   the same from beside its checkpoints
python jobs/doctor.py --cluster s3://bucket/tmp         measure the cluster: GPUs, all-reduce, S3, tracker,
                                                        versions, clocks, /dev/shm on every node

Exit code: 0 well, 1 something is wrong, 2 the question was.
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
