"""Serve a detector over HTTP with Ray Serve: an API, metrics and a web page to drop images on.

python jobs/serve.py models:/detector@champion --port 8000
curl -s --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/predict
"""

import sys

import bootstrap  # noqa: F401  # first: it makes the packages below importable
from orchestrator.config.serve_cli import parse_serve
from orchestrator.launch.entry import run_job
from orchestrator.serving.serve_job import run_serve_job


def main() -> int:
    assert __doc__ is not None
    description = __doc__
    return run_job(lambda: parse_serve(description, sys.argv[1:]), run_serve_job)


if __name__ == "__main__":
    sys.exit(main())
