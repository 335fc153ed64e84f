"""Detect objects in images: a json in COCO's results format, and the images with boxes drawn.

python jobs/predict.py models:/detector@champion photos/ --output runs/predictions
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.cli import parse_predict
from orchestrator.launch.entry import run_job
from orchestrator.launch.predict_job import run_predict_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_predict(description, sys.argv[1:]), run_predict_job)


if __name__ == "__main__":
    sys.exit(main())
