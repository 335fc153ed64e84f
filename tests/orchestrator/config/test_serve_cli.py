from __future__ import annotations

import dataclasses

import pytest

from orchestrator.config.serve_cli import ServeOptions, ServeRequest, parse_serve
from orchestrator.errors import ConfigError


def test_defaults_are_the_requests_own() -> None:
    request, options = parse_serve("", ["models:/a@champion"])
    assert request == ServeRequest("models:/a@champion")
    assert options == ServeOptions(dry_run=False, json=False)


def test_every_field_has_a_flag() -> None:
    changed = {
        "host": "0.0.0.0", "port": 9, "replicas": 3, "cpus_per_replica": 2.0,
        "gpus_per_replica": 0.5, "max_batch": 16, "batch_wait_ms": 0.0, "score": 0.0,
        "max_image_mb": 1.5, "max_pixels": 1000, "max_queued": 7, "timeout_s": 2.5,
        "tracking_uri": "http://x",
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(ServeRequest)} - {"model"}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    request, options = parse_serve("", ["m", *argv, "--json", "--dry-run"])
    assert request == ServeRequest("m", **changed)  # type: ignore[arg-type]
    assert options == ServeOptions(dry_run=True, json=True)


@pytest.mark.parametrize(
    "flag",
    [
        "--replicas=0", "--replicas=-1", "--replicas=many", "--replicas=²", "--port=0",
        "--port=65536", "--max-batch=0", "--batch-wait-ms=-1", "--score=1", "--score=nan",
        "--max-image-mb=0", "--max-image-mb=inf", "--max-pixels=0", "--max-pixels=200000000",
        "--max-queued=0", "--timeout-s=0", "--timeout-s=nan", "--cpus-per-replica=0",
        "--gpus-per-replica=-1", "--gpus-per-replica=nan", "--host=", "--unknown",
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError):
        parse_serve("", ["m", flag])
