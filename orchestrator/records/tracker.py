"""MLflow on the driver: find or create the run, describe it, end it.

One run for a piece of work, whatever restarts it takes: a tag holds a key made of the name and the
configuration, and an unfinished run with the same key is continued.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before MLflow is imported: checkpoints and models of ours hold no pickles, and none is loaded.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")

from mlflow.entities import Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.errors import TrackingError
from orchestrator.storage.filesystems import reason

logger = logging.getLogger(__name__)

KEY, NAME, OUTCOME = "effdet.key", "effdet.name", "effdet.outcome"
CHECKPOINTS = "effdet.checkpoints"
MAX_PARAM_CHARS, MAX_PARAMS = 500, 100
CHECK_RETRIES, CHECK_TIMEOUT_S = 1, 10


@dataclass(frozen=True)
class TrackedRun:
    """A run as workers and reports need it; plain data."""

    tracking_uri: str
    experiment_id: str
    run_id: str
    artifact_uri: str
    continued: bool


class Tracker:
    """One experiment of one tracking server or database.

    Raises (constructor):
        TrackingError: it does not answer.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: Path) -> None:
        for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.store"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # The driver's calls are few; a dead server must be told within seconds, not minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(CHECK_RETRIES))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(CHECK_TIMEOUT_S))
        self.uri = uri
        try:
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                # A database has no artifact store of its own, a server has.
                location = None if uri.startswith("http") else artifact_root.as_uri()
                self.experiment_id = self.client.create_experiment(experiment, location)
            else:
                self.experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    raise TrackingError(
                        "tracking.experiment", "an active experiment", f"{experiment!r}, deleted",
                        "restore it in MLflow or choose another name (--experiment)",
                    )  # fmt: skip
        except TrackingError:
            raise
        except Exception as error:  # SQLAlchemy's, requests' and MLflow's own all mean the same
            raise TrackingError(
                "tracking.uri", "an MLflow server or database that answers",
                f"{without_secret(uri)} ({_cause(error)})",
                "start it, or correct --tracking-uri",
            ) from None  # fmt: skip

    def find_unfinished(self, key: str) -> Run | None:
        """The newest run of this key that neither finished nor diverged."""
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{KEY}` = '{key}'",
            order_by=["attributes.start_time DESC"],
            max_results=20,
        )
        for run in runs:
            if run.info.status != "FINISHED" and run.data.tags.get(OUTCOME) != "diverged":
                return run
        return None

    def get(self, run_id: str) -> Run:
        """Raises TrackingError where there is none."""
        try:
            return self.client.get_run(run_id)
        except MlflowException:
            raise TrackingError(
                "--resume", "a run id of this tracker", repr(run_id),
                f"look it up in {without_secret(self.uri)}",
            ) from None  # fmt: skip

    def open_run(self, *, name: str, key: str, resume: str) -> TrackedRun:
        """Continue or create; see `orchestrator.config.cli.Options.resume`.

        Raises:
            TrackingError: a run to be continued is not there.
        """
        run: Run | None = None
        if resume in ("auto", "must"):
            run = self.find_unfinished(key)
            if run is None and resume == "must":
                raise TrackingError(
                    "--resume", "an unfinished run of this name and configuration", "none",
                    "leave --resume out to start one, or give its run id",
                )  # fmt: skip
        elif resume != "never":
            run = self.get(resume)
            if run.info.lifecycle_stage != "active" or run.data.tags.get(KEY) != key:
                got = "a deleted one" if run.info.lifecycle_stage != "active" else "one of another"
                raise TrackingError(
                    "--resume", "an active run of this name and configuration", got,
                    "give the flags it was started with, or leave --resume out to start a new run",
                )  # fmt: skip
        continued = run is not None
        if run is None:
            run = self.client.create_run(
                self.experiment_id, run_name=name, tags={KEY: key, NAME: name}
            )
        else:
            self.client.update_run(run.info.run_id, status="RUNNING")
        return TrackedRun(
            self.uri, self.experiment_id, run.info.run_id, run.info.artifact_uri, continued
        )

    def describe(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Parameters that differ from recorded ones (a resumed run's) are left as they were."""
        known = self.client.get_run(run_id).data.params
        new = [
            Param(key, str(value)[:MAX_PARAM_CHARS])
            for key, value in params.items()
            if key not in known
        ]
        for first in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(run_id, params=new[first : first + MAX_PARAMS])
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_dict(self, run_id: str, content: Mapping[str, Any], file_name: str) -> None:
        self.client.log_dict(run_id, dict(content), file_name)

    def artifact_location(self) -> str:
        """Of the experiment's runs."""
        return str(self.client.get_experiment(self.experiment_id).artifact_location)

    def tags(self, run_id: str) -> dict[str, str]:
        """Never raises, as `tag`."""
        try:
            return dict(self.client.get_run(run_id).data.tags)
        except Exception as error:  # any trouble of any tracker
            logger.warning("tags could not be read (%s)", _cause(error))
            return {}

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Never raises: a tag is not worth a training."""
        try:
            self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        except Exception as error:  # any trouble of any tracker
            logger.warning("tags were not recorded (%s)", _cause(error))

    def end(self, run_id: str, *, status: str, outcome: str) -> str | None:
        """status: FINISHED, FAILED or KILLED; outcome: why, in a word or a line.

        Returns what went wrong, None if nothing: a finished training stays one if the tracker is down.
        """
        try:
            self.client.set_tag(run_id, OUTCOME, outcome[:MAX_PARAM_CHARS])
            self.client.set_terminated(run_id, status)
        except Exception as error:  # any trouble of any tracker
            return _cause(error)
        return None


def _cause(error: BaseException) -> str:
    """The innermost reason, without the URL and class names that libraries wrap around it."""
    while error.__cause__ is not None or error.__context__ is not None:
        inner = error.__cause__ or error.__context__
        assert inner is not None
        error = inner
    return reason(error)[:160]


def without_secret(uri: str) -> str:
    """scheme://user:password@host -> scheme://host"""
    return re.sub(r"://[^/]*@", "://", uri)
