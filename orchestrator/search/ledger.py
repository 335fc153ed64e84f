"""What a sweep has done so far: an append-only file that every restart reads.

The driver may be killed at any moment; nothing else needs to survive it. Where checkpoints go to a
place beyond this machine, the file is copied there, so a new pod goes on from it as well.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from orchestrator.errors import StorageError
from orchestrator.records.run import CARD, read_bytes
from orchestrator.search.trial import Objective, State, TrialRecord
from orchestrator.storage.filesystems import Place, reason, within

FILE, SWEEP = "trials.jsonl", "sweep.yaml"
CARRY_EVERY_S, CARRY_TIMEOUT_S, LAST_ATTEMPTS = 5.0, 60.0, 3
KEPT_METRICS = ("val/", "model/")


@dataclass
class Entry:
    """A trial while the sweep runs. state: None while it is to be trained or is being trained.

    curve: (epoch, step, value of the first objective) of each evaluation. seconds: by process that
    trained it. ended_at: time of the day in seconds. generation: how often PBT put other weights
    under it. begun_as: its arm before, earlier_uris: its checkpoints.
    """

    trial_id: str
    arm: str
    sample: dict[str, Any]
    seed: int
    num_params: int
    gmacs: float
    workers: int
    state: State | None = None
    reason: str = ""
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    step: int = 0
    epoch: float = 0.0
    img_per_s: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    run_id: str | None = None
    run_key: str = ""
    checkpoints_uri: str = ""
    generation: int = 0
    ended_at: float = 0.0
    begun_as: str = ""
    earlier_uris: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begun_as = self.begun_as or self.arm

    def record(self) -> TrialRecord:
        """A trial that has not ended counts as interrupted where it stands."""
        seconds = sum(self.seconds.values())
        return TrialRecord(
            self.trial_id, self.arm, self.sample, self.seed, self.state or "interrupted",
            self.reason, self.best, self.last, self.step, self.epoch, self.num_params, self.gmacs,
            seconds, seconds * self.workers / 3600, self.img_per_s,
        )  # fmt: skip


class Ledger:
    """Of one sweep. carry_to: a copy for other machines.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        objective: Objective,
        *,
        workers: int,
        carry_to: Place | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.say = say
        self.folder, self.objective, self.workers = folder, objective, workers
        self.carry_to = carry_to
        self.entries: dict[str, Entry] = {}
        self.ended = 0
        self.best: float | None = None  # of trials that have ended
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._dirty, self._closing = threading.Event(), threading.Event()
        for event in self._read():
            self._apply(event)
        self._file = self.path.open("a")
        self._thread = threading.Thread(target=self._carry, name="ledger", daemon=True)
        if carry_to is not None:
            self._thread.start()

    def add(
        self, sample: Mapping[str, Any], arm: str, seed: int, num_params: int, gmacs: float
    ) -> Entry:
        """A new trial, to be trained."""
        trial_id = f"{len(self.entries):03d}"
        self._write(
            {"op": "new", "trial": trial_id, "arm": arm, "sample": dict(sample), "seed": seed,
             "num_params": num_params, "gmacs": gmacs}
        )  # fmt: skip
        return self.entries[trial_id]

    def began(self, trial_id: str) -> None:
        self._write({"op": "began", "trial": trial_id})

    def scored(self, trial_id: str, found: Mapping[str, Any]) -> None:
        """An evaluation. found: a result as `orchestrator.search.training` reports it."""
        metrics = {
            key: value for key, value in found.items()
            if key.startswith(KEPT_METRICS) or key == self.objective.metric
        }  # fmt: skip
        told = {key: found[key] for key in ("step", "epoch", "process", "seconds") if key in found}
        for key in ("img_per_s", "fit_s", "fit_began_s", "run_id", "run_key", "checkpoints_uri"):
            if found.get(key):
                told[key] = found[key]
        self._write({"op": "scored", "trial": trial_id, **told, "metrics": metrics})

    def changed(self, trial_id: str, sample: Mapping[str, Any], arm: str) -> None:
        """PBT gave a trial other settings, and the weights of a better one."""
        self._write({"op": "changed", "trial": trial_id, "sample": dict(sample), "arm": arm})

    def end(self, trial_id: str, state: State, reason: str = "") -> None:
        self._write({"op": "end", "trial": trial_id, "state": state, "reason": reason})

    def records(self) -> list[TrialRecord]:
        return [entry.record() for entry in self.entries.values()]

    def close(self) -> None:
        self._closing.set()
        self._dirty.set()
        self._file.close()
        if self.carry_to is not None:
            self._thread.join(CARRY_TIMEOUT_S)

    def _write(self, event: dict[str, Any]) -> None:
        event["at"] = round(time.time(), 3)
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        self._apply(event)
        self._dirty.set()

    def _read(self) -> Iterator[dict[str, Any]]:
        """A last line that is cut off was not written."""
        if not self.path.is_file():
            return
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            self.path.write_bytes(text[:whole])
        for line in text[:whole].splitlines():
            yield json.loads(line)

    def _apply(self, event: dict[str, Any]) -> None:
        trial_id = event["trial"]
        if event["op"] == "new":
            self.entries[trial_id] = Entry(
                trial_id, event["arm"], event["sample"], event["seed"], event["num_params"],
                event["gmacs"], self.workers,
            )  # fmt: skip
            return
        entry = self.entries[trial_id]
        if event["op"] == "scored":
            self._score(entry, event)
        elif event["op"] == "changed":
            entry.sample, entry.arm = event["sample"], event["arm"]
            entry.generation += 1
        elif event["op"] == "end":
            self.ended += entry.state is None
            entry.state, entry.reason = event["state"], event["reason"]
            entry.ended_at = event["at"]
            self._rank(entry)

    def _rank(self, entry: Entry) -> None:
        value = entry.record().value(self.objective)
        if value is not None and (
            self.best is None or self.objective.sign * (value - self.best) > 0
        ):
            self.best = value

    def _score(self, entry: Entry, event: dict[str, Any]) -> None:
        entry.step, entry.epoch = event["step"], event["epoch"]
        entry.seconds[event["process"]] = event["seconds"]
        if entry.checkpoints_uri not in ("", event.get("checkpoints_uri", entry.checkpoints_uri)):
            entry.earlier_uris.append(entry.checkpoints_uri)
        for key in ("img_per_s", "run_id", "run_key", "checkpoints_uri"):
            setattr(entry, key, event.get(key, getattr(entry, key)))
        metrics = event["metrics"]
        value = metrics.get(self.objective.metric)
        if value is None:
            return
        # Steps between the newest checkpoint and a failure are trained again.
        entry.curve = [point for point in entry.curve if point[1] < entry.step]
        entry.curve.append((entry.epoch, entry.step, value))
        entry.last = metrics
        best = entry.best.get(self.objective.metric)
        if best is None or math.isnan(best) or self.objective.sign * (value - best) > 0:
            entry.best = metrics

    def _carry(self) -> None:
        while True:
            self._dirty.wait()
            closing = self._closing.is_set()
            self._dirty.clear()
            trouble = ""
            for _ in range(LAST_ATTEMPTS if closing else 1):
                try:
                    within(CARRY_TIMEOUT_S, self._copy)
                    trouble = ""
                    break
                except Exception as error:  # each filesystem has its own; the next one carries all
                    trouble = reason(error)
                    time.sleep(CARRY_EVERY_S / LAST_ATTEMPTS)
            if closing:
                if trouble and self.carry_to is not None:
                    self.say(f"the sweep's state is not in {self.carry_to.uri}: {trouble}")
                return
            self._closing.wait(CARRY_EVERY_S)

    def _copy(self) -> None:
        assert self.carry_to is not None
        for name in (FILE, SWEEP, CARD):
            path = self.folder / name
            if path.is_file():
                self.carry_to.filesystem.pipe_file(
                    f"{self.carry_to.path}/{name}", path.read_bytes()
                )


def fetch(folder: Path, carried: Place) -> None:
    """What another machine carried, where this one has nothing of the sweep.

    Raises:
        StorageError: nobody can say whether there is anything.
    """
    if (folder / SWEEP).is_file():
        return
    for name in (FILE, CARD, SWEEP):
        try:
            content = within(CARRY_TIMEOUT_S, partial(read_bytes, carried, name))
        except FileNotFoundError:
            continue
        except Exception as error:  # each filesystem has its own exceptions
            raise StorageError(
                "checkpoint.uri", "a place that can be read", f"{carried.uri} ({reason(error)})",
                "check the URL, AWS_ENDPOINT_URL and the credentials",
            ) from None  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{name}").write_bytes(content)
        (folder / f".{name}").replace(folder / name)


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The sweep's YAML as it was begun, None if it was not."""
    path = folder / SWEEP
    return yaml.safe_load(path.read_text()) if path.is_file() else None


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{SWEEP}"
    draft.write_text(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    draft.replace(folder / SWEEP)
