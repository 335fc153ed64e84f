"""Train an EfficientDet.

python jobs/train.py --data FOLDER --phi 0           a COCO-format dataset, on this machine
ray job submit -- python jobs/train.py --phi 6       on a cluster
python jobs/train.py --config jobs/configs/shapes.yaml   the demo
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.cli import parse_train, train_parser
from orchestrator.launch.entry import run_job
from orchestrator.launch.train_job import run_train_job


def main() -> int:
    assert __doc__ is not None
    parser = train_parser("jobs/train.py", __doc__)
    return run_job(lambda: parse_train(parser, sys.argv[1:]), run_train_job)


if __name__ == "__main__":
    sys.exit(main())
