"""Measure where a training step's time goes on this machine, and predict more workers.

python jobs/benchmark.py --phi 0 --image-size 256 --batch-size 4
python jobs/benchmark.py --phi 4 --batch-size 16 --set train.precision=bf16 --set train.compile=true
python jobs/benchmark.py --phi 0 --batch-size 4 --model-scale 64 --link-latency-us 20 --link-gb-per-s 12
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.cli import benchmark_parser, parse_benchmark
from orchestrator.launch.benchmark_job import run_benchmark_job
from orchestrator.launch.entry import run_job


def main() -> int:
    assert __doc__ is not None
    parser = benchmark_parser("jobs/benchmark.py", __doc__)
    return run_job(lambda: parse_benchmark(parser, sys.argv[1:]), run_benchmark_job)


if __name__ == "__main__":
    sys.exit(main())
