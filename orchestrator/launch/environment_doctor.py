"""This machine: what is installed on it and what it has."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from model.data.findings import Finding, Severity, finding
from orchestrator.config.schema import TrainJob
from orchestrator.launch.preflight import choose_hardware
from orchestrator.launch.progress import Row
from orchestrator.launch.resolve import output_folder

GIB = 2**30
PINS = Path(__file__).resolve().parents[2] / "constraints.txt"
PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pillow", "pycocotools", "faster-coco-eval", "safetensors",
    "ray", "mlflow", "optuna", "fsspec", "s3fs",
)  # fmt: skip
SAME_RELEASE = ("ray", "mlflow")  # all nodes, and a run that is gone on with, need one and the same
LEAST_SHM_GIB = 1.0  # a container's default is 64 MiB
LEAST_DISK_GIB, FEW_DISK_GIB = 1.0, 10.0
LEAST_OPEN_FILES = 4096  # Ray opens thousands
LEAST_MEMORY_GIB = 4.0
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass
class Examined:
    """rows: of the table; facts: the same for a machine; findings: what is not as it should be."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def say(self, name: str, text: str, **facts: Any) -> None:
        self.rows.append((name, text))
        self.facts |= facts

    def wrong(self, severity: Severity, kind: str, what: str, remedy: str) -> None:
        self.findings += finding(severity, kind, "machine", what, 1, remedy)


def examine_environment(job: TrainJob) -> Examined:
    """What training would meet here. Nothing is written, nothing is started."""
    found = Examined()
    _software(found)
    _gpus(found)
    _machine(found)
    _disk(found, output_folder(job)[0])
    return found


def read_pins(path: Path = PINS) -> dict[str, str]:
    """Package -> version; {} where the code lies without its pins."""
    if not path.is_file():
        return {}
    lines = (
        line.partition("#")[0].strip().partition("==") for line in path.read_text().splitlines()
    )
    return {name.strip().lower(): version.strip() for name, sign, version in lines if sign}


def judge_versions(installed: dict[str, str | None], pins: dict[str, str]) -> list[Finding]:
    """Packages that are not there, or not those that the tests ran with."""
    absent = [name for name, version in installed.items() if version is None]
    other = {
        name: f"{name} {version}, pinned {pins[name]}"
        for name, version in installed.items()
        if version is not None and name in pins and version.partition("+")[0] != pins[name]
    }
    strict = [text for name, text in other.items() if name in SAME_RELEASE]
    rest = [text for name, text in other.items() if name not in SAME_RELEASE]
    remedy = "pip install -r constraints.txt"
    return [
        *finding("error", "no-package", "machine", "packages that are not installed", absent, remedy),
        *finding("warning", "other-release", "machine", "packages of another release than the pinned: "
                 "all nodes need one and the same", strict, remedy),
        *finding("note", "other-version", "machine", "packages of another version than the tests ran "
                 "with", rest, remedy),
    ]  # fmt: skip


def count_as_pinned(installed: dict[str, str | None], pins: dict[str, str]) -> int:
    """A build (+cu130) is no other version."""
    return sum(
        (installed.get(name) or "").partition("+")[0] == version for name, version in pins.items()
    )


def _software(found: Examined) -> None:
    installed: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    pins = read_pins()
    found.say(
        "python",
        f"{platform.python_version()}, {platform.platform()}",
        python=platform.python_version(),
    )
    found.say("packages", ", ".join(f"{name} {version or 'none'}" for name, version in installed.items()),
              packages=installed)  # fmt: skip
    found.findings += judge_versions(installed, pins)
    same = count_as_pinned(installed, pins)
    known = sum(name in pins for name in installed)
    found.say(
        "pins",
        f"{same} of {known} as in {PINS.name}" if pins else "no constraints.txt beside the code",
    )
    compiler = next(
        (path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None
    )
    found.say("compiler", compiler or "none: train.compile is not to be had", compiler=compiler)


def _gpus(found: Examined) -> None:
    cuda = torch.version.cuda
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    driver, seen = driver_and_gpus()
    text = f"{len(names)} x {', '.join(dict.fromkeys(names))}" if names else "none"
    if names:
        gib = torch.cuda.get_device_properties(0).total_memory / GIB
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        text += f", {gib:.0f} GiB each; CUDA {cuda}, NCCL {nccl}, driver {driver or 'unknown'}"
    else:
        text += f" that torch sees (built for {f'CUDA {cuda}' if cuda else 'the CPU'}); training takes the CPU"
    found.say("GPUs", text, gpus=names, cuda=cuda, driver=driver)
    found.findings += judge_gpus(len(names), seen, driver, cuda)


def judge_gpus(usable: int, seen: int, driver: str | None, cuda: str | None) -> list[Finding]:
    """GPUs that the driver has and torch has not. seen: by the driver."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen <= usable:
        return []
    if cuda is None:
        why, remedy = "torch is built for the CPU", "install the build of torch for CUDA"
    elif hidden is not None:
        why, remedy = f"CUDA_VISIBLE_DEVICES is {hidden!r}", "unset it, if that was not meant"
    else:
        why = f"driver {driver}, torch is built for CUDA {cuda}"
        remedy = "install a driver that knows this CUDA, or a build of torch for an older one"
    severity: Severity = "note" if hidden is not None else "error"
    return finding(severity, "gpu-unusable", "machine", f"GPUs that torch cannot use: {why}", seen - usable, remedy)  # fmt: skip


def driver_and_gpus() -> tuple[str | None, int]:
    """(version, GPUs) of NVIDIA's driver; (None, 0) without one."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, 0
    try:
        return str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return None, 0
    finally:
        pynvml.nvmlShutdown()


def _machine(found: Examined) -> None:
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    limited = (
        f", limited to {quota:g} by the container" if quota is not None and quota < cores else ""
    )
    found.say(
        "cores", f"{cores}{limited}; load {os.getloadavg()[0]:.1f}", cores=cores, cpu_quota=quota
    )
    if limited:
        found.wrong("warning", "cpu-quota", f"the container may use {quota:g} of {cores} cores",
                    "ask for whole cores, and set OMP_NUM_THREADS to them")  # fmt: skip
    total = (choose_hardware(TrainJob(), cpus=cores, gpus=0, local=True).memory_bytes or 0) / GIB
    free = psutil.virtual_memory().available / GIB
    found.say("memory", f"{total:.1f} GiB, {min(free, total):.1f} GiB free", memory_gib=total)
    if free < LEAST_MEMORY_GIB:
        found.wrong("warning", "memory", f"only {free:.1f} GiB of memory are free",
                    "end what takes it: a worker needs about 2 GiB before its first image")  # fmt: skip
    shm = Path("/dev/shm")
    room = shutil.disk_usage(shm).total / GIB if shm.exists() else 0.0
    found.say("/dev/shm", f"{room:.2f} GiB", shm_gib=room)
    if room < LEAST_SHM_GIB:
        found.wrong("warning", "shm", f"/dev/shm has {room:.2f} GiB, at least {LEAST_SHM_GIB:g} are wanted",
                    "docker: --shm-size=8g; Kubernetes: an emptyDir of medium Memory on /dev/shm")  # fmt: skip
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found.say(
        "open files",
        "unlimited" if files == resource.RLIM_INFINITY else f"{files:,}",
        open_files=files,
    )
    if files != resource.RLIM_INFINITY and files < LEAST_OPEN_FILES:
        found.wrong("warning", "open-files", f"a process may open {files} files", "ulimit -n 65536")


def cpu_quota(path: Path = CPU_QUOTA) -> float | None:
    """Cores that the container may use; None where nothing limits them."""
    try:
        given, period = path.read_text().split()[:2]
    except (OSError, ValueError):
        return None
    return None if given == "max" else int(given) / int(period)


def _disk(found: Examined, output: Path) -> None:
    there = output
    while not os.path.exists(there):  # Path's raises below a folder that may not be entered
        there = there.parent
    free = shutil.disk_usage(there).free / GIB
    found.say("disk", f"{free:.1f} GiB free for {output}", disk_free_gib=free, output=str(output))
    if not os.access(there, os.W_OK | os.X_OK):
        found.wrong("error", "output", f"{there} may not be written to", "choose another --output")
    elif free < FEW_DISK_GIB:
        severity: Severity = "error" if free < LEAST_DISK_GIB else "warning"
        found.wrong(severity, "disk", f"only {free:.1f} GiB are free for {output}",
                    "make room, or --output FOLDER on another disk; a D0 checkpoint is 45 MiB, D7's 600")  # fmt: skip
