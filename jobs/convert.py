"""Write a Pascal VOC or YOLO dataset as COCO json, for jobs/train.py --data.

python jobs/convert.py voc VOCdevkit/VOC2012 --output data/voc
python jobs/convert.py yolo my-yolo/data.yaml --output data/mine
python jobs/doctor.py --data data/mine                  then look at it

The images stay where they are: the output has a link to them, or with --copy the images. The output
may be the source's own folder; then only annotations/ is added.
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.convert_cli import parse_convert
from orchestrator.launch.convert_job import run_convert_job
from orchestrator.launch.entry import run_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_convert(description, sys.argv[1:]), run_convert_job)


if __name__ == "__main__":
    sys.exit(main())
