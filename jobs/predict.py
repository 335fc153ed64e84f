"""Detect objects in images and videos: COCO results or a table, and pictures with boxes drawn.

python jobs/predict.py models:/detector@champion photos/ --output runs/predictions
python jobs/predict.py runs:/RUN_ID s3://bucket/photos --output s3://bucket/found --workers 16
python jobs/predict.py CHECKPOINT film.mp4 --every-s 0.5

Interrupted, the same command goes on where it was.
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.predict_cli import parse_predict
from orchestrator.launch.entry import run_job
from orchestrator.launch.predict_job import run_predict_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_predict(description, sys.argv[1:]), run_predict_job)


if __name__ == "__main__":
    sys.exit(main())
