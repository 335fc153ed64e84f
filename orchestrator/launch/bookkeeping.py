"""The driver's records of a run: what it is, what happens to it, how it ended.

Nothing here waits for the tracker; see `orchestrator.records.journal`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from model.data.index import CocoIndex
from orchestrator.launch import preflight
from orchestrator.launch.recorder import records_folder, records_place
from orchestrator.launch.resolve import Derived, ResolvedJob, Split
from orchestrator.launch.usage import Usage
from orchestrator.records.journal import DRIVER, Journal
from orchestrator.records.provenance import provenance
from orchestrator.records.run import TrackedRun
from orchestrator.records.runs import Runs
from orchestrator.records.secrets import redact_all
from orchestrator.records.sender import Sender, open_spool
from orchestrator.records.spool import Spool
from orchestrator.records.tracker import CHECKPOINTS

CLOSE_TIMEOUT_S = 4.0
EVENTS = "events.json"


class Bookkeeper:
    """Of one run, by one driver. step: of the training, asked when something happens."""

    def __init__(
        self,
        runs: Runs,
        run: TrackedRun,
        resolved: ResolvedJob,
        *,
        step: Callable[[], int],
        gpus_per_worker: float,
        say: Callable[[str], None],
    ) -> None:
        self.runs, self.run, self.resolved, self.step, self.say = runs, run, resolved, step, say
        folder = records_folder(resolved.output, run.run_key)
        carried = records_place(run.checkpoints_uri)
        spool = open_spool(folder / DRIVER, carried)
        self._earlier = _Earlier.of(spool)
        sender = Sender(
            run, spool, creates=True, carry_to=carried, say=say,
            found=self._found,
        )  # fmt: skip
        self.journal = Journal(sender)
        tracking = resolved.job.tracking
        self.usage = Usage(
            self._used, gpus_per_worker=gpus_per_worker, price=tracking.price_per_worker_hour
        )
        self.events: list[list[Any]] = []
        self._counts: dict[str, str] = {}
        runs.cards.keep(run)

    def begin(
        self, root: Path, derived: Derived, datasets: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """datasets: facts by context, see `dataset_facts`."""
        if self.run.continued:
            self.journal.begin()
            tags = self._earlier.tags(self.runs.tags(self.run))
            self.usage.recall(tags)
            self._counts = tags
            self.events = self._earlier.events(self._recorded_events())
        source = provenance(root)
        self.journal.params(preflight.as_params(self.resolved, derived))
        self.journal.tags(source.tags)
        self.journal.place(CHECKPOINTS, self.run.checkpoints_uri)
        config = redact_all(self.resolved.config())
        self.journal.text("config.yaml", yaml.safe_dump(config, sort_keys=False))
        self.journal.text("source/packages.txt", source.packages)
        if source.diff:
            self.journal.text("source/uncommitted.diff", source.diff)
        for context, facts in datasets.items():
            self.journal.dataset(facts, context)
        if not self.run.continued:
            self.journal.describe(f"**{self.resolved.name}** is running.")
        self.usage.start()

    def recalled(self) -> dict[str, str]:
        """Tags of the run as an earlier process left them."""
        return self._counts

    def happened(self, tags: Mapping[str, str]) -> None:
        """A count of interruptions changed: tags as `Interruptions` keeps them."""
        step = self.step()
        for name, value in tags.items():
            if value.isdigit() and value != self._counts.get(name, "0"):
                kind = name.rpartition(".")[2]
                why = tags.get("effdet.last_interruption", "")
                self.events.append([_now(), step, kind, why if kind != "resumptions" else ""])
                self.journal.metrics(self._age_s(), {f"events/{kind}": float(value)})
        self._counts = dict(tags)
        self.journal.tags(tags)
        self._write_events()

    def finish(
        self, status: str, outcome: str, rows: Sequence[tuple[str, str]], *, done: bool
    ) -> str | None:
        """status: FINISHED, FAILED or KILLED. rows: the summary. What went wrong, None if nothing."""
        self.journal.describe(_markdown(self.resolved, rows))
        self.events.append([_now(), self.step(), "end", outcome])
        self._write_events()
        self.journal.end(status, outcome)
        sent = self.journal.close(CLOSE_TIMEOUT_S)
        self.run = replace(self.run, outcome=outcome if done else "")
        self.runs.cards.keep(self.run)
        if sent:
            return None
        folder = records_folder(self.resolved.output, self.run.run_key)
        return (
            f"the tracker did not take all records; send them with jobs/doctor.py --replay {folder}"
        )

    def _found(self, run: TrackedRun) -> None:
        """MLflow knows the run now."""
        self.run = replace(
            self.run, run_id=run.run_id, experiment_id=run.experiment_id,
            artifact_uri=run.artifact_uri,
        )  # fmt: skip
        self.runs.cards.keep(self.run)

    def _used(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """By seconds of the run's life, as a step may take hours."""
        self.journal.metrics(self._age_s(), metrics)
        self.journal.tags(tags)

    def _age_s(self) -> int:
        return int(time.time() - self.run.began_ms / 1000)

    def _recorded_events(self) -> str | None:
        tracker, run_id = self.runs.tracker, self.run.run_id
        return tracker.read_artifact(run_id, EVENTS) if tracker and run_id else None

    def _write_events(self) -> None:
        """As a table that the MLflow UI shows as one."""
        columns = ["time", "step", "event", "why"]
        self.journal.text(EVENTS, json.dumps({"columns": columns, "data": redact_all(self.events)}))


@dataclass(frozen=True)
class _Earlier:
    """What earlier processes of the run spooled: all of it, and what is not sent yet."""

    spooled: list[dict[str, Any]]
    unsent: list[dict[str, Any]]

    @classmethod
    def of(cls, spool: Spool) -> _Earlier:
        everything, _ = spool.read(0, limit=sys.maxsize)
        unsent, _ = spool.read(spool.position(), limit=sys.maxsize)
        return cls(everything, unsent)

    def tags(self, recorded: Mapping[str, str]) -> dict[str, str]:
        """recorded: what MLflow has, {} if it cannot be asked; what it has not got yet is newer."""
        tags = dict(recorded)
        for record in self.unsent if recorded else self.spooled:
            tags |= record.get("tags", {})
        return tags

    def events(self, recorded: str | None) -> list[list[Any]]:
        """recorded: the table that MLflow has, None if there is none."""
        newest = recorded
        for record in self.spooled if recorded is None else self.unsent:
            if record["op"] == "text" and record["to"] == EVENTS:
                newest = record["text"]
        try:
            return list(json.loads(newest)["data"]) if newest else []
        except (ValueError, KeyError):
            return []


def dataset_facts(split: Split, index: CocoIndex) -> dict[str, Any]:
    """As MLflow records a dataset; the digest names its annotations."""
    profile = {
        "images": len(index),
        "boxes": len(index.labels),
        "classes": index.classes.num_classes,
    }
    name = f"{split.annotations.parent.parent.name or 'data'}/{split.annotations.stem}"
    source = str(split.annotations)
    return {"name": name, "digest": index.digest(), "source": source, "profile": profile}


def _markdown(resolved: ResolvedJob, rows: Sequence[tuple[str, str]]) -> str:
    """The summary as the description that a reviewer reads first."""
    lines = [f"**{resolved.name}**", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
