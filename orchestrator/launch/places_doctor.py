"""Whether the places that a training writes to work, and how fast they are."""

from __future__ import annotations

import io
import os
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from model.data.findings import finding
from orchestrator.config.schema import TrainJob
from orchestrator.errors import TrackingError, UserError
from orchestrator.launch.environment_doctor import Examined
from orchestrator.launch.places import open_runs
from orchestrator.launch.resolve import output_folder
from orchestrator.records.secrets import redact, without_secret
from orchestrator.storage.filesystems import Place, check_writable, open_place, reason, within

SMALL_ROUNDS, PROBE_MIB, STORE_TIMEOUT_S = 5, 32, 120.0
SLOW_LATENCY_S, SLOW_MIB_PER_S = 1.0, 5.0


def examine_storage(uri: str) -> Examined:
    """Write, list, read and delete, timed. What was written is removed.

    Raises:
        StorageError: a protocol that is not known.
    """
    found, place = Examined(), open_place(uri, "--storage")
    shown = redact(uri)
    try:
        check_writable(place, "--storage")
        times = within(STORE_TIMEOUT_S, lambda: time_storage(place))
    except UserError as error:
        found.say("storage", f"{shown}: does not work", storage=None)
        remedy = error.remedy if place.local is None else "choose a folder you may write to"
        found.findings += finding("error", "storage", "storage", f"{error.expected} wanted, got {redact(error.got)}",
                                  1, remedy)  # fmt: skip
        return found
    except Exception as error:  # each filesystem has its own exceptions
        found.say("storage", f"{shown}: does not work", storage=None)
        found.findings += finding("error", "storage", "storage", f"{shown}: {redact(reason(error))}", 1,
                                  "check the URL, AWS_ENDPOINT_URL, the credentials and what they may do")  # fmt: skip
        return found
    small, speed = times.seconds, times
    found.say(
        "storage", f"{shown}: " + ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in small.items())
        + f"; {PROBE_MIB} MiB: out {speed.write_mib_per_s:.0f} MiB/s, in {speed.read_mib_per_s:.0f} MiB/s",
        storage={"uri": shown, "seconds": small, "write_mib_per_s": speed.write_mib_per_s,
                 "read_mib_per_s": speed.read_mib_per_s},
    )  # fmt: skip
    slowest = max(small, key=lambda name: small[name])
    if small[slowest] > SLOW_LATENCY_S:
        found.findings += finding("warning", "latency", "storage", f"{slowest} takes {small[slowest]:.1f} s", 1,
                                  "is the bucket far away? use one near the machines")  # fmt: skip
    slower = min(speed.write_mib_per_s, speed.read_mib_per_s)
    if slower < SLOW_MIB_PER_S:
        found.findings += finding("warning", "throughput", "storage", f"only {slower:.1f} MiB/s", 1,
                                  "checkpoints will wait; use a place near the machines")  # fmt: skip
    return found


@dataclass(frozen=True)
class StorageTimes:
    """seconds: medians for an object of a kilobyte, by what is done with it."""

    seconds: dict[str, float]
    write_mib_per_s: float
    read_mib_per_s: float


def time_storage(place: Place) -> StorageTimes:
    """Raises OSError: what was written is not listed, is read otherwise, or stays; or any of its own."""
    folder = place.join(f".doctor-{uuid.uuid4().hex}")
    filesystem, took = place.filesystem, dict[str, list[float]]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = work()
        took.setdefault(name, []).append(time.monotonic() - began)
        return result

    try:
        if place.local is not None:
            Path(folder.path).mkdir(parents=True)
        for number in range(SMALL_ROUNDS):
            path, content = f"{folder.path}/{number}", os.urandom(1024)
            timed("write", partial(filesystem.pipe_file, path, content))
            if timed("read", partial(filesystem.cat_file, path)) != content:
                raise OSError("what is read is not what was written")
            listed = timed("list", lambda: filesystem.ls(folder.path, detail=False, refresh=True))
            if not any(str(entry).endswith(f"/{number}") for entry in listed):
                raise OSError("what was written is not listed")
            timed("delete", partial(filesystem.rm_file, path))
            if filesystem.exists(path):
                raise OSError(
                    "what was deleted is still there: no right to delete, or versions are kept"
                )
        large, content = f"{folder.path}/large", os.urandom(PROBE_MIB * 2**20)
        timed("large out", partial(filesystem.pipe_file, large, content))
        if timed("large in", partial(filesystem.cat_file, large)) != content:
            raise OSError("what is read is not what was written")
    finally:
        if filesystem.exists(folder.path):
            filesystem.rm(folder.path, recursive=True)
    (out,), (back,) = took.pop("large out"), took.pop("large in")
    medians = {name: statistics.median(values) for name, values in took.items()}
    return StorageTimes(medians, PROBE_MIB / max(out, 1e-9), PROBE_MIB / max(back, 1e-9))


def examine_tracker(job: TrainJob) -> Examined:
    """Whether it answers, and takes artifacts. The experiment is made, as a training would make it."""
    found = Examined()
    output, _ = output_folder(job)
    began = time.monotonic()
    try:
        runs = open_runs(job, output, io.StringIO())
        uri = without_secret(runs.uri)
        if runs.trouble is not None:
            raise runs.trouble
        took = time.monotonic() - began
        where = runs.artifact_location()
        runs.check_artifacts(required=True)
        if runs.trouble is not None:  # since then
            raise runs.trouble
    except TrackingError as error:
        found.say("tracker", f"does not work: {error.got}", tracker=None)
        found.findings += finding("error", "tracker", "tracker", f"{error.expected} wanted, got {error.got}", 1,
                                  error.remedy)  # fmt: skip
        return found
    found.say("tracker", f"{uri} answers ({took:.1f} s), experiment {job.tracking.experiment}, artifacts go to "
              f"{redact(where)}", tracker={"uri": uri, "seconds": took, "artifacts": redact(where)})  # fmt: skip
    return found
