from __future__ import annotations

import time

import psutil
import pytest

from orchestrator.records.spool import Record
from orchestrator.records.system import SystemSampler, processor


def test_samples_go_on_counting_after_a_restart() -> None:
    seen: list[Record] = []
    began_ms = int(time.time() * 1000) - 60_000  # a minute of the run's life has passed
    sampler = SystemSampler(seen.append, 3, every_s=0.05, began_ms=began_ms)
    end = time.monotonic() + 20
    while len(seen) < 3:
        assert time.monotonic() < end
        time.sleep(0.01)
    sampler.close()
    steps = [record["step"] for record in seen]
    assert steps[0] >= 1200
    assert steps == sorted(set(steps))
    sample = seen[0]["metrics"]
    assert all(key.startswith("system/node-3/") for key in sample)
    memory = sample["system/node-3/system_memory_usage_megabytes"]
    assert 0 < memory <= psutil.virtual_memory().total / 2**20


def test_container_that_hides_its_counters_ends_only_the_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hidden() -> None:
        raise PermissionError("/proc/diskstats")

    monkeypatch.setattr(psutil, "disk_io_counters", hidden)
    seen: list[Record] = []
    sampler = SystemSampler(seen.append, 0, every_s=0.01, began_ms=0)
    time.sleep(0.2)
    sampler.close()
    assert seen == []


def test_processor_has_a_name_and_cores() -> None:
    assert processor().endswith(" cores)")
