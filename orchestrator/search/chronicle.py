"""The sweep's own MLflow run, parent of its trials' runs. No call waits for the tracker."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.codec import flatten
from orchestrator.launch.launchers import ROOT
from orchestrator.launch.recorder import records_folder, records_place
from orchestrator.records.journal import DRIVER, Journal
from orchestrator.records.provenance import provenance
from orchestrator.records.run import FINISHED, TrackedRun, keep_card
from orchestrator.records.runs import Runs
from orchestrator.records.secrets import redact_all
from orchestrator.records.sender import Sender, open_spool
from orchestrator.search.training import SWEEP_TAG
from orchestrator.storage.filesystems import Place

CLOSE_TIMEOUT_S = 20.0
ANSWERS = "sweep"


class Chronicle:
    """Of one sweep, by one driver."""

    def __init__(
        self, runs: Runs, run: TrackedRun, output: Path, home: Place, *,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """home: of the sweep, where its card lies."""
        self.runs, self.run, self.home, self.say = runs, run, home, say
        self.folder = records_folder(output, run.run_key)
        carried = records_place(run.checkpoints_uri)
        sender = Sender(
            run, open_spool(self.folder / DRIVER, carried), creates=True, carry_to=carried,
            say=say, found=self._found,
        )  # fmt: skip
        self.journal = Journal(sender)
        self._keep_card()

    def begin(self, name: str, settings: Mapping[str, Any], note: str) -> None:
        if self.run.continued:
            self.journal.begin()
        plain: dict[str, Any] = redact_all(dict(settings))
        source = provenance(ROOT)
        shown = {key: plain[key] for key in ("objective", "trials", "search", "scheduler", "keep")}
        self.journal.params({f"sweep.{k}": v for k, v in flatten(shown).items()})
        self.journal.params({f"space.{path}": v for path, v in plain["space"].items()})
        self.journal.tags({**source.tags, SWEEP_TAG: name})
        self.journal.text("sweep.yaml", yaml.safe_dump(plain, sort_keys=False))
        self.journal.text("source/packages.txt", source.packages)
        if source.diff:
            self.journal.text("source/uncommitted.diff", source.diff)
        self.journal.describe(f"**{name}** is running. {note}")

    def progress(self, ended: int, best: float | None) -> None:
        """By the number of trials that have ended."""
        found = {"sweep/trials_ended": float(ended)}
        if best is not None:
            found["sweep/best"] = best
        self.journal.metrics(ended, found)

    def finish(
        self, status: str, outcome: str, description: str, files: Sequence[Path], *, done: bool
    ) -> None:
        """status: FINISHED, FAILED or KILLED. files: the answers, as artifacts."""
        for file in files:
            copy = self.folder / ANSWERS / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            to = f"{ANSWERS}/{file.name}"
            self.journal.sender.log({"op": "file", "file": to, "to": to, "once": True})
        self.journal.describe(description)
        self.journal.end(status, outcome)
        if not self.journal.close(CLOSE_TIMEOUT_S):
            self.say(
                "the tracker did not take all records; send them with "
                f"jobs/doctor.py --replay {self.folder}"
            )
        self.run = replace(self.run, outcome=FINISHED if done else "")
        self._keep_card()

    def _found(self, run: TrackedRun) -> None:
        self.run = replace(
            self.run, run_id=run.run_id, experiment_id=run.experiment_id,
            artifact_uri=run.artifact_uri,
        )  # fmt: skip
        self._keep_card()

    def _keep_card(self) -> None:
        self.runs.cards.keep(self.run)
        keep_card(self.home, self.run)
