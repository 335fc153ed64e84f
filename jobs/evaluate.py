"""Score a model as training does: COCO AP by class and size, detections, figures. Or compare two.

python jobs/evaluate.py runs:/RUN_ID --data ~/my-dataset --workers 4
python jobs/evaluate.py models:/detector@champion --against models:/detector@previous
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.evaluate_cli import parse_evaluate
from orchestrator.launch.entry import run_job
from orchestrator.launch.evaluate_job import run_evaluate_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_evaluate(description, sys.argv[1:]), run_evaluate_job)


if __name__ == "__main__":
    sys.exit(main())
