"""A training job small enough for tests, and ways to run it and to read what it left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "data.shapes.num_train": 24,
    "data.shapes.num_val": 6,
    "data.shapes.size_px": 64,
    "model.backbone": "test_efficientnet",
    "model.image_size_px": 64,
    "model.max_level": 6,
    "model.fpn_channels": 16,
    "model.fpn_repeats": 1,
    "model.head_layers": 1,
    "model.drop_path": 0.1,
    "train.batch_size": 8,
    "train.log_every_steps": 1,
    "train.evaluate_every": "{steps: 1000}",
    "train.checkpoint_every": "{steps: 5}",
    "optim.lr_per_64": 0.2,
    "optim.warmup": "{steps: 4}",
    "optim.ema_decay": 0.9,
    "tracking.figures": "false",
}


def settings(**changes: Any) -> list[str]:
    """--set arguments of the tiny job; `changes` by path with __ for dots."""
    merged = TINY | {key.replace("__", "."): value for key, value in changes.items()}
    return [part for key, value in merged.items() for part in ("--set", f"{key}={value}")]


@dataclass(frozen=True)
class Done:
    """A finished job. report: its --json line, {} if there is none."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        last = self.out.strip().splitlines()[-1] if self.out.strip() else ""
        return dict(json.loads(last)) if last.startswith("{") else {}

    def weights(self) -> dict[str, Tensor]:
        """Weights and, as ema.*, their average, of the final checkpoint."""
        folder = Path(self.report["checkpoint"].removeprefix("file://"))
        ema = load_file(folder / "ema.safetensors")
        return load_file(folder / "model.safetensors") | {f"ema.{k}": v for k, v in ema.items()}

    def history(self, key: str = "train/loss") -> list[tuple[int, float]]:
        """(step, value) of the run's metric, by step, as often as stored."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.report["tracking_uri"])
        found = client.get_metric_history(self.report["run_id"], key)
        return sorted((metric.step, metric.value) for metric in found)


def environment(**more: str) -> dict[str, str]:
    """For child processes: no cluster of somebody else, no torchrun of ours."""
    dropped = ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    path = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | more


def command(*arguments: str, torchrun: int = 0, job: str = "train.py") -> list[str]:
    start = [sys.executable]
    if torchrun:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    return [*start, str(ROOT / "jobs" / job), *arguments]


def train(
    output: Path, *arguments: str, torchrun: int = 0, timeout_s: float = 300, **env: str
) -> Done:
    """Run jobs/train.py to its end in a process of its own."""
    done = subprocess.run(
        command(*arguments, "--output", str(output), "--json", torchrun=torchrun),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(**env),
        cwd=output.parent,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of all processes below `pid`."""
    parents: dict[int, int] = {}
    lines: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                parent = int(stat.rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it ended meanwhile
                continue
            parents[int(entry.name)] = parent
            lines[int(entry.name)] = text
    found: list[tuple[int, str]] = []
    wave = {pid}
    while wave:
        wave = {child for child, parent in parents.items() if parent in wave}
        found += [(child, lines[child]) for child in wave]
    return found


def free_ports(number: int) -> list[int]:
    """Ports on 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports
