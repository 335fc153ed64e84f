"""MLflow's runs and models: reach the tracker, find what is asked for as a local folder."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
import mlflow.artifacts
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from model.training.state import META, verify_checkpoint
from orchestrator.config.schema import CheckpointConfig
from orchestrator.errors import ConfigError, TrackingError, UserError, nearest
from orchestrator.records.package import CHECKPOINT
from orchestrator.records.scribe import EXTERNAL
from orchestrator.records.secrets import without_secret
from orchestrator.records.tracker import (
    CHECK_RETRIES,
    CHECK_TIMEOUT_S,
    CHECKPOINTS,
)
from orchestrator.storage.checkpoints import CheckpointStore
from orchestrator.storage.filesystems import open_place, reason
from orchestrator.storage.retry import retrying
from orchestrator.storage.weights import open_initial

FORMS = "a checkpoint's folder or URI, runs:/RUN_ID, models:/NAME@ALIAS or models:/NAME/VERSION"
MODEL_ID = re.compile(r"\bm-[0-9a-f]{32}\b")
PATIENCE_S = 30.0


def connect(uri: str) -> MlflowClient:
    """Raises TrackingError: it does not answer. A database that is not there is not made."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(CHECK_RETRIES))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(CHECK_TIMEOUT_S))
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    protocol, _, path = uri.partition(":///")
    if protocol == "sqlite" and not Path(path).is_file():
        raise TrackingError(
            "tracking.uri", "an MLflow server or database", f"no file {path}",
            "give --tracking-uri, or train first",
        )  # fmt: skip
    with tracking(uri, "an MLflow server or database that answers"):
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
        return client


@contextmanager
def tracking(uri: str, expected: str) -> Iterator[None]:
    """What fails inside becomes a TrackingError that names the tracker.

    It is also made MLflow's current one, which models:/ is looked up in whatever client asks.
    """
    mlflow.set_tracking_uri(uri)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # MLflow, databases, object stores and HTTP have their own
        raise TrackingError(
            "tracking.uri", expected, f"{without_secret(uri)} ({reason(error)})",
            "check the tracker and its artifact store",
        ) from None  # fmt: skip


def get_run(client: MlflowClient, run_id: str) -> Run:
    """Raises ConfigError, TrackingError: it is not there, deleted, or no run's id at all."""
    if run_id.startswith(("models:/", "m-")):
        raise _no_run(client, run_id)
    run_id = run_id.removeprefix("runs:/")
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise TrackingError(
            "RUN_ID", "a run of this tracker", repr(run_id), "jobs/train.py prints it at its end"
        ) from None
    if run.info.lifecycle_stage != "active":
        raise TrackingError("RUN_ID", "an active run", f"{run_id}, deleted", "restore it in MLflow")
    return run


def _no_run(client: MlflowClient, given: str) -> ConfigError:
    model_id = given.removeprefix("models:/")
    got, remedy = f"the model {given}", "give the id of the run that made it"
    with suppress(MlflowException):
        model = client.get_logged_model(model_id)
        if is_external(client, model_id):
            got += ", which is external: it has no files of its own"
        if model.source_run_id:
            remedy = f"promote its run {model.source_run_id}"
    return ConfigError("RUN_ID", "a run's id", got, remedy)


def is_external(client: MlflowClient, model_id: str) -> bool:
    """A model that MLflow knows by name only; its registered versions cannot be downloaded."""
    return client.get_logged_model(model_id).tags.get(EXTERNAL, "").lower() == "true"


def checkpoints_of(run: Run) -> CheckpointStore:
    """Raises ConfigError: it recorded none."""
    uri = run.data.tags.get(CHECKPOINTS)
    if uri is None:
        raise ConfigError(
            f"run {run.info.run_id}", f"a training run (tag {CHECKPOINTS})", "none",
            "give the run of a jobs/train.py",
        )  # fmt: skip
    metric = run.data.params.get("checkpoint.metric", CheckpointConfig().metric)
    place = open_place(uri, "checkpoint.uri")
    return CheckpointStore(place, CheckpointConfig(metric=metric), say=lambda text: None)


def choose_step(store: CheckpointStore, asked: str) -> int:
    """asked: best, last or a step.

    Raises:
        ConfigError: there is no such checkpoint.
        StorageError: its place cannot be read.
    """
    where = store.place.uri
    steps = retrying(store.steps, where, where="checkpoint.uri", retry_for_s=PATIENCE_S)
    if not steps:
        raise ConfigError(
            "checkpoint.uri", "checkpoints", f"none in {where}", "is that place still there?"
        )
    if asked == "last":
        return steps[-1]
    if asked == "best":
        best = retrying(store.best, where, where="checkpoint.uri", retry_for_s=PATIENCE_S)
        if best is None:
            raise ConfigError(
                "--checkpoint", f"a checkpoint with {store.config.metric}", f"none in {where}",
                "--checkpoint last",
            )  # fmt: skip
        return best
    if not asked.isdigit() or int(asked) not in steps:
        raise ConfigError(
            "--checkpoint",
            "best, last or a step that was kept",
            asked,
            nearest(asked, map(str, steps)),
        )
    return int(asked)


@contextmanager
def open_model(source: str, uri: str) -> Iterator[Path]:
    """A model by any of its names as a verified local checkpoint folder.

    source: see FORMS; of a run it is the best checkpoint, the newest where none was evaluated.
    uri: of the tracker, asked only for runs:/ and models:/.

    Raises:
        UserError: not there, damaged, or not a detector of ours.
    """
    if source.startswith("runs:/"):
        with tracking(uri, f"{source}"):
            store = checkpoints_of(get_run(connect(uri), source))
        best = retrying(store.best, store.place.uri, where="model", retry_for_s=PATIENCE_S)
        step = choose_step(store, "last") if best is None else best
        with store.open(step) as folder:
            yield folder
    elif source.startswith("models:/"):
        client = connect(uri)
        with tempfile.TemporaryDirectory(prefix="model-") as temporary:
            folder = _download(client, uri, source, temporary)
            verify_checkpoint(folder)
            yield folder
    else:
        if "://" not in source and not Path(source).exists():
            raise ConfigError("MODEL", FORMS, repr(source), "correct it")
        with open_initial(source, "MODEL") as folder:
            if not (folder / META).is_file():
                raise ConfigError("MODEL", f"a checkpoint folder with {META}", source, FORMS)
            verify_checkpoint(folder)
            yield folder


def _download(client: MlflowClient, uri: str, source: str, target: str) -> Path:
    name, at, alias = source.removeprefix("models:/").rpartition("@")
    version: ModelVersion | None = None
    with tracking(uri, f"the model {source}"):
        if at:
            version = find_version(client, name, alias)
        else:
            name, _, number = source.removeprefix("models:/").rpartition("/")
            if name and number.isdigit():
                version = _by_number(client, name, number)
        if version is None:
            raise ConfigError(
                "MODEL", "a registered model: models:/NAME@ALIAS or models:/NAME/VERSION", source,
                "look it up in MLflow, or promote one",
            )  # fmt: skip
        model_id = logged_model_of(version)
        if model_id and is_external(client, model_id):
            raise ConfigError(
                "MODEL", "a model with files", f"{source}, which is external",
                "promote its run with jobs/promote.py",
            )  # fmt: skip
        folder = mlflow.artifacts.download_artifacts(
            f"models:/{name}/{version.version}", dst_path=target, tracking_uri=uri
        )
    if not (Path(folder) / CHECKPOINT / META).is_file():
        raise ConfigError(
            "MODEL", f"a detector of jobs/promote.py (with {CHECKPOINT})", source, "promote one"
        )
    return Path(folder) / CHECKPOINT


def find_version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that has the alias, None if there is none."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def logged_model_of(version: ModelVersion) -> str | None:
    """Id of the model that was registered; databases keep it only as part of the source."""
    found = MODEL_ID.search(version.source or "")
    return version.model_id or (found[0] if found else None)


def _by_number(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
