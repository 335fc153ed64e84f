"""MLflow as a driver meets it at its start: the experiment, its unfinished runs, its artifacts."""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from orchestrator.errors import TrackingError
from orchestrator.records.run import DIVERGED, TrackedRun
from orchestrator.records.secrets import redact, without_secret
from orchestrator.storage.filesystems import reason, within

logger = logging.getLogger(__name__)

KEY, NAME, RUN_KEY, OUTCOME = "effdet.key", "effdet.name", "effdet.run_key", "effdet.outcome"
CHECKPOINTS = "effdet.checkpoints"
DOWN = "tracking.uri"
CHECK_RETRIES, CHECK_TIMEOUT_S = 1, 10
PROBE_TIMEOUT_S = 30.0


def tracking_uri(given: str | None, output: Path) -> str:
    """As given, as the environment says, or the database that training keeps in `output`."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output / 'mlflow.db'}"


class Tracker:
    """One experiment of one tracking server or database.

    Raises (constructor):
        TrackingError: it does not answer.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: str | None) -> None:
        for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.store"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # The driver's calls are few; a dead server must be told within seconds, not minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(CHECK_RETRIES))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(CHECK_TIMEOUT_S))
        self.uri, self.experiment = uri, experiment
        try:
            self.client = MlflowClient(uri)
            self.experiment_id = open_experiment(self.client, experiment, artifact_root)
        except TrackingError:
            raise
        except Exception as error:  # SQLAlchemy's, requests' and MLflow's own all mean the same
            raise TrackingError(
                DOWN, "an MLflow server or database that answers",
                f"{without_secret(uri)} ({cause(error)})",
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
            if run.info.status != "FINISHED" and run.data.tags.get(OUTCOME) != DIVERGED:
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

    def tracked(self, run: Run, artifact_root: str | None) -> TrackedRun:
        """A run found here, to be gone on with."""
        tags = run.data.tags
        return TrackedRun(
            tracking_uri=self.uri,
            experiment=self.experiment,
            artifact_root=artifact_root,
            name=tags.get(NAME, run.info.run_name),
            key=tags.get(KEY, ""),
            run_key=tags.get(RUN_KEY, run.info.run_id),
            began_ms=run.info.start_time,
            run_id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            artifact_uri=run.info.artifact_uri,
            checkpoints_uri=tags.get(CHECKPOINTS, ""),
            outcome=tags.get(OUTCOME, ""),
            continued=True,
        )

    def tags(self, run_id: str) -> dict[str, str]:
        """{} where it does not answer."""
        try:
            return dict(self.client.get_run(run_id).data.tags)
        except Exception as error:  # any trouble of any tracker
            logger.warning("tags could not be read (%s)", cause(error))
            return {}

    def artifact_location(self) -> str:
        """Of the experiment's runs."""
        return str(self.client.get_experiment(self.experiment_id).artifact_location)

    def check_artifacts(self) -> None:
        """Write and remove a small artifact, as figures and models will be.

        Raises:
            TrackingError: with the place and the cause.
        """
        location, name = "artifacts", f"probe-{uuid.uuid4().hex}.txt"

        def write() -> None:
            nonlocal location
            location = self.artifact_location()
            store = get_artifact_repository(location, tracking_uri=self.uri)
            with tempfile.TemporaryDirectory() as folder:
                probe = Path(folder) / name
                probe.write_text("probe")
                store.log_artifact(str(probe))
            with suppress(Exception):  # whoever may not delete may still record
                store.delete_artifacts(name)

        try:
            within(PROBE_TIMEOUT_S, write)
        except Exception as error:  # each artifact store has its own exceptions
            raise TrackingError(
                "tracking.experiment", "a place that takes artifacts",
                f"{redact(location)} ({cause(error)})",
                "check that its bucket exists and may be written to, here or by the server, "
                "or choose another --experiment",
            ) from None  # fmt: skip

    def read_artifact(self, run_id: str, name: str) -> str | None:
        """None where there is none, or no answer."""

        def read() -> str:
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(run_id, name, folder)).read_text()

        try:
            return within(PROBE_TIMEOUT_S, read)
        except Exception:  # nothing that a training should wait for
            return None


def create_run(client: MlflowClient, experiment_id: str, run: TrackedRun) -> TrackedRun:
    """MLflow's own id and place are in the result."""
    tags = {KEY: run.key, NAME: run.name, RUN_KEY: run.run_key}
    made = client.create_run(
        experiment_id, start_time=run.began_ms, run_name=run.name, tags=tags
    ).info  # fmt: skip
    return replace(
        run, run_id=made.run_id, experiment_id=experiment_id, artifact_uri=made.artifact_uri
    )


def open_experiment(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    """Id of the experiment, made if need be; artifact_root: where a database keeps artifacts.

    Raises:
        TrackingError: it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_root))
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            "tracking.experiment", "an active experiment", f"{name!r}, deleted",
            "restore it in MLflow or choose another name (--experiment)",
        )  # fmt: skip
    return str(found.experiment_id)


def cause(error: BaseException) -> str:
    """The innermost reason, without the URL and class names that libraries wrap around it."""
    while error.__cause__ is not None or error.__context__ is not None:
        inner = error.__cause__ or error.__context__
        assert inner is not None
        error = inner
    return redact(reason(error))[:160]
