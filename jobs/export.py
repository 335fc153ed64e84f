"""A model as a file that other programs run, checked against PyTorch before it is there.

python jobs/export.py runs/…/checkpoints/step_00002000 detector.onnx --benchmark
python jobs/export.py models:/detector@champion small.onnx --precision int8 --data ~/my-dataset \
    --calibrate ~/my-dataset/train2017 --max-ap-loss 0.01
python jobs/export.py runs:/RUN_ID weights.pth      # weights only, under effdet's names
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.export_cli import parse_export
from orchestrator.launch.entry import run_job
from orchestrator.launch.export_job import run_export_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_export(description, sys.argv[1:]), run_export_job)


if __name__ == "__main__":
    sys.exit(main())
