"""What workers record: rank 0 the training, and on each node one worker its load."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from model.training.evaluation import Evaluation
from model.training.fit import FUSION
from orchestrator.records.gallery import Gallery
from orchestrator.records.journal import metrics_record
from orchestrator.records.sender import Sender, open_spool
from orchestrator.records.system import SystemSampler, processor
from orchestrator.storage.filesystems import Place, open_place, reason

if TYPE_CHECKING:
    from orchestrator.launch.worker import Assignment

SCORES = "val/"


class Board(Protocol):
    """Where rank 0 shows what happens; neither call blocks or raises."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


class Recorder:
    """Rank 0's sink: the board at once, MLflow through the spool, figures in a process beside."""

    def __init__(self, assignment: Assignment, board: Board) -> None:
        self.assignment, self.board = assignment, board
        self.sender = _sender(assignment, "rank0.jsonl", board)
        self.gallery: Gallery | None = None
        self.system = _system(assignment, self.sender, node=0)
        self._scored_ms: dict[int, int] = {}
        self._fusion: dict[str, float] = {}
        self._no_gallery = False

    def begin(self, device: torch.device, world_size: int) -> None:
        """What it is trained on."""
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        tags = {"hardware": f"{world_size} x {kind}"}
        self.sender.log({"op": "tags", "tags": tags})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        record = metrics_record(step, metrics)
        self.sender.log(record)
        self.board.log(step, metrics)
        if any(key.startswith(SCORES) for key in metrics):
            self._scored_ms[step] = record["time_ms"]
            self._fusion = {
                key.removeprefix(FUSION): value
                for key, value in metrics.items()
                if key.startswith(FUSION)
            }

    def show(self, step: int, evaluation: Evaluation) -> None:
        """After `log` of the same step."""
        if not self.assignment.resolved.job.tracking.figures:
            return
        if self.gallery is None and not self._no_gallery:
            folder = self.sender.spool.path.parent
            make = partial(self.assignment.exhibition, folder)
            try:
                self.gallery = Gallery(folder, make, say=self.board.say)
            except OSError as error:  # a full disk, or no process to be had
                self._no_gallery = True
                self.board.say(f"figures are not drawn: {reason(error)}")
        if self.gallery is not None:
            self.gallery.show(step, evaluation, self._fusion)

    def carry(self) -> None:
        self.sender.carry()

    def there(self, found: Mapping[int, tuple[str, Mapping[str, float]]]) -> None:
        """A process that was killed may not have said what it committed and removed."""
        if found:
            self.sender.log({"op": "kept", "steps": sorted(found)})
        for step, (uri, metrics) in found.items():
            self.committed(step, uri, metrics)

    def committed(self, step: int, uri: str, metrics: Mapping[str, float]) -> None:
        """Only what was scored is a model to choose from."""
        scores = {key: value for key, value in metrics.items() if key.startswith(SCORES)}
        if scores:
            now_ms = self._scored_ms.get(step, int(time.time() * 1000))
            self.sender.log(
                {"op": "checkpoint", "step": step, "time_ms": now_ms, "uri": uri,
                 "metrics": scores, "dataset": dict(self.assignment.val_facts),
                 "best_by": self.assignment.resolved.job.checkpoint.metric}
            )  # fmt: skip

    def dropped(self, step: int) -> None:
        self.sender.log({"op": "dropped", "step": step})

    def close(self) -> None:
        if self.system is not None:
            self.system.close()
        if self.gallery is not None:
            self.gallery.finish()
        if not self.sender.close():
            path: Path = self.sender.spool.path
            self.board.say(f"the tracker did not take all records; the rest waits in {path}")
        if self.gallery is not None:
            self.gallery.close()


class NodeRecorder:
    """The load of a node without rank 0; used by its first worker."""

    def __init__(self, assignment: Assignment, board: Board, node: int) -> None:
        self.sender = _sender(assignment, f"{socket.gethostname()}.jsonl", board)
        self.system = _system(assignment, self.sender, node=node)

    def close(self) -> None:
        if self.system is not None:
            self.system.close()
        self.sender.close()


def records_folder(output: Path, run_key: str) -> Path:
    """Of a run on this node."""
    return output / "records" / run_key


def records_place(checkpoints_uri: str) -> Place:
    """Beside a run's checkpoints: what could not be sent from its nodes."""
    return open_place(checkpoints_uri, "checkpoint.uri").join("records")


def _sender(assignment: Assignment, name: str, board: Board) -> Sender:
    folder = records_folder(assignment.resolved.output, assignment.run.run_key)
    carried = records_place(assignment.checkpoints_uri)
    try:
        spool = open_spool(folder / name, carried)
    except OSError as error:  # recording is not worth a training
        board.say(f"records cannot be kept in {folder} ({reason(error)})")
        spool = open_spool(Path(tempfile.mkdtemp(prefix="records-")) / name, carried)
    return Sender(assignment.run, spool, carry_to=carried, say=board.say)


def _system(assignment: Assignment, sender: Sender, *, node: int) -> SystemSampler | None:
    every_s = assignment.resolved.job.tracking.system_metrics_every_s
    if every_s is None:
        return None
    return SystemSampler(sender.log, node, every_s=every_s, began_ms=assignment.run.began_ms)
