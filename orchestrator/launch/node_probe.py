"""What a node of the cluster finds out about itself; the doctor asks every one of them."""

from __future__ import annotations

import base64
import importlib.metadata
import os
import platform
import shutil
import socket
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import ray
import torch

from orchestrator.storage.filesystems import open_place, reason, within

GIB = 2**30
PACKAGES = ("ray", "torch", "torchvision", "timm", "numpy", "mlflow", "s3fs")
PROBE_MIB = 32
TRACKER_TIMEOUT_S = 10.0
STORE_TIMEOUT_S = 120.0


@ray.remote(num_cpus=0)
def clock() -> float:
    return time.time()


@ray.remote(num_cpus=0)
def probe(store: str | None, tracking_uri: str | None) -> dict[str, Any]:
    """Runs on the node that it is about."""
    shm = shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").exists() else 0.0
    speed, store_trouble = store_speed(store)
    answer_s, tracker_trouble = ask_tracker(tracking_uri)
    cuda = torch.cuda
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "shm_gib": shm,
        "disk_free_gib": shutil.disk_usage("/tmp").free / GIB,
        "gpus": tuple(cuda.get_device_name(i) for i in range(cuda.device_count())),
        "tracker": tracker_trouble,
        "tracker_s": answer_s,
        "store": store_trouble,
        "mib_per_s": speed,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    if torch.version.cuda is not None and torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def store_speed(uri: str | None) -> tuple[tuple[float, float] | None, str | None]:
    """((write, read) in MiB/s, None), or (None, what is wrong)."""
    if uri is None:
        return None, None

    def write_and_read() -> tuple[float, float]:
        place = open_place(uri, "--cluster")
        if place.local is not None:
            place.local.mkdir(parents=True, exist_ok=True)
        path = f"{place.path}/.doctor-{uuid.uuid4().hex}"
        content = os.urandom(PROBE_MIB * 2**20)
        try:
            began = time.monotonic()
            place.filesystem.pipe_file(path, content)
            written = time.monotonic()
            same = place.filesystem.cat_file(path) == content
            read = time.monotonic()
        finally:
            if place.filesystem.exists(path):
                place.filesystem.rm_file(path)
        if not same:
            raise OSError("what was read is not what was written")
        return PROBE_MIB / (written - began), PROBE_MIB / (read - written)

    try:
        return within(STORE_TIMEOUT_S, write_and_read), None
    except Exception as error:  # each filesystem has its own exceptions
        return None, f"{uri}: {reason(error)[:200]}"


def ask_tracker(uri: str | None) -> tuple[float | None, str | None]:
    """(seconds until a server answers with this environment's password, None), or (None, what is wrong).

    (None, None): there is no server to ask.
    """
    if uri is None or not uri.startswith("http"):
        return None, None
    request = urllib.request.Request(
        f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    )
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user is not None:
        pair = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        request.add_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    elif token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=TRACKER_TIMEOUT_S):
            return time.monotonic() - began, None
    except urllib.error.HTTPError as error:
        return None, f"HTTP {error.code}"
    except OSError as error:
        return None, reason(error)[:200]
