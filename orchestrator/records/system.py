"""Load of this node, sampled into the same spool as everything else, so that no outage drops it.

Names are those that the MLflow UI shows under "System metrics"; each node has its own.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pynvml

from orchestrator.records.journal import metrics_record
from orchestrator.records.spool import Record

logger = logging.getLogger(__name__)

MIB = 2**20


class SystemSampler:
    """Calls `log` with a record every `every_s` seconds until closed.

    The step of a sample is its number since the run began, so a restart goes on counting.
    """

    def __init__(
        self, log: Callable[[Record], None], node: int, *, every_s: float, began_ms: int
    ) -> None:
        self.log, self.prefix = log, f"system/node-{node}/"
        self.every_s, self.began_ms = every_s, began_ms
        self._gpus: list[Any] = []
        self._before: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system", daemon=True)
        self._thread.start()

    def sample(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage("/")
        now = _counters()
        passed = {key: (value - self._before.get(key, value)) / MIB for key, value in now.items()}
        self._before = now
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MIB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MIB,
            **passed,
        }
        for number, gpu in enumerate(self._gpus):
            found |= {f"gpu_{number}_{key}": value for key, value in _gpu(gpu).items()}
        return {self.prefix + key: round(value, 3) for key, value in found.items()}

    def close(self) -> None:
        self._closing.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        try:
            self._gpus = _gpus()
            self._before = _counters()
            psutil.cpu_percent()  # the first call only sets the beginning
            while not self._closing.wait(self.every_s):
                step = int((time.time() * 1000 - self.began_ms) / (1000 * self.every_s))
                self.log(metrics_record(step, self.sample()))
        except (OSError, psutil.Error, RuntimeError) as error:  # a container may hide any of it
            logger.warning("the load of this node is not recorded: %s", error)


def processor() -> str:
    """Model name of this machine's CPU and its number of cores."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()} ({os.cpu_count()} cores)"


def _counters() -> dict[str, float]:
    """Bytes since the node started; 0 where it has no such device."""
    network, disk = psutil.net_io_counters(), psutil.disk_io_counters()
    found = {
        "network_receive_megabytes": network.bytes_recv if network else 0,
        "network_transmit_megabytes": network.bytes_sent if network else 0,
        "disk_read_megabytes": disk.read_bytes if disk else 0,
        "disk_write_megabytes": disk.write_bytes if disk else 0,
    }
    return {key: float(value) for key, value in found.items()}


def _gpus() -> list[Any]:
    """Handles of all GPUs; none without NVIDIA's driver."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _gpu(handle: Any) -> dict[str, float]:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        use = pynvml.nvmlDeviceGetUtilizationRates(handle)
        power = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    except pynvml.NVMLError:  # a GPU that was lost is told by the training
        return {}
    return {
        "utilization_percentage": use.gpu,
        "memory_usage_megabytes": memory.used / MIB,
        "memory_usage_percentage": 100 * memory.used / memory.total,
        "power_usage_watts": power,
    }
