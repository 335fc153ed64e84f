"""Writes records into one run of MLflow, each once however often it is repeated.

Kinds of records ("op"):
    metrics     step, time_ms, metrics
    params      params: those that the run has keep their values
    tags        tags
    text        text, to: an artifact
    file        file (relative to the spool's folder), to: an artifact
    dataset     name, digest, source, context, profile
    checkpoint  step, time_ms, uri, metrics, dataset, best_by: one that is kept, as a LoggedModel
                without files
    dropped     step: one that is not kept any more
    begin       a restart: the run is active again
    end         status, outcome, time_ms
A metric is dropped if the run already has its (key, step): steps run again after a restart are the
same steps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities.logged_model import LoggedModel
from mlflow.tracking import MlflowClient

from orchestrator.records.run import TrackedRun
from orchestrator.records.tracker import OUTCOME, RUN_KEY

STEP, URI, ROLE = "effdet.step", "effdet.checkpoint_uri", "effdet.role"
EXTERNAL = "mlflow.model.isExternal"
CONTEXT = "mlflow.data.context"
NO_MODEL_NAME = re.compile(r"[/:.%\"']")
MAX_BATCH = 1000  # MLflow's limit for log_batch
MAX_PARAM_CHARS, MAX_PARAMS, MAX_TAG_CHARS = 500, 100, 5000


class Scribe:
    """Of the run with this id; folder: where files lie. Any method may raise what MLflow raises."""

    def __init__(self, client: MlflowClient, run: TrackedRun, run_id: str, folder: Path) -> None:
        self.client, self.run, self.run_id, self.folder = client, run, run_id, folder
        self._there: set[str] | None = None
        self._known: dict[str, dict[int, int]] = {}

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """In order; metrics that follow one another go together."""
        metrics: list[dict[str, Any]] = []
        for record in records:
            if record["op"] == "metrics":
                metrics.append(record)
                continue
            self._metrics(metrics)
            metrics = []
            getattr(self, f"_{record['op']}")(record)
        self._metrics(metrics)

    def _metrics(self, records: Sequence[dict[str, Any]]) -> None:
        batch: list[Metric] = []
        for record in records:
            step, time_ms = int(record["step"]), int(record["time_ms"])
            for key, value in record["metrics"].items():
                known = self._times(key)
                if step not in known:
                    known[step] = time_ms
                    batch.append(Metric(key, value, time_ms, step))
        try:
            for first in range(0, len(batch), MAX_BATCH):
                self.client.log_batch(self.run_id, metrics=batch[first : first + MAX_BATCH])
        except BaseException:
            self._there, self._known = None, {}  # what arrived is asked anew
            raise

    def _times(self, key: str) -> dict[int, int]:
        """Step -> time of what the run has of a metric."""
        if self._there is None:
            self._there = set(self.client.get_run(self.run_id).data.metrics)
        if key not in self._known:
            history = self.client.get_metric_history(self.run_id, key) if key in self._there else []
            self._known[key] = {metric.step: metric.timestamp for metric in history}
        return self._known[key]

    def _params(self, record: dict[str, Any]) -> None:
        there = self.client.get_run(self.run_id).data.params
        new = [
            Param(key, value[:MAX_PARAM_CHARS])
            for key, value in record["params"].items()
            if key not in there
        ]
        for first in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[first : first + MAX_PARAMS])

    def _tags(self, record: dict[str, Any]) -> None:
        tags = [RunTag(key, value[:MAX_TAG_CHARS]) for key, value in record["tags"].items()]
        self.client.log_batch(self.run_id, tags=tags)

    def _text(self, record: dict[str, Any]) -> None:
        self.client.log_text(self.run_id, record["text"], record["to"])

    def _file(self, record: dict[str, Any]) -> None:
        path = self.folder / record["file"]
        if path.is_file():  # else it was drawn on a node that is gone
            self.client.log_artifact(self.run_id, str(path), _folder(record["to"]))

    def _dataset(self, record: dict[str, Any]) -> None:
        source = json.dumps({"uri": record["source"]})
        dataset = Dataset(
            record["name"], record["digest"], "http" if "://" in record["source"] else "local",
            source, profile=json.dumps(record["profile"]),
        )  # fmt: skip
        tags = [InputTag(CONTEXT, record["context"])]
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])

    def _checkpoint(self, record: dict[str, Any]) -> None:
        step, name = int(record["step"]), f"step-{record['step']}-{self.run.name}"
        found = self._models(step)
        if found:
            model = found[0]
        else:
            run = self.client.get_run(self.run_id)
            kept = {k: v for k, v in run.data.params.items() if k.startswith("network.")}
            model = self.client.create_logged_model(
                run.info.experiment_id, name=NO_MODEL_NAME.sub("-", name), source_run_id=self.run_id,
                tags={STEP: str(step), URI: record["uri"], EXTERNAL: "true"}, params=kept,
                model_type="detector",
            )  # fmt: skip
            self.client.finalize_logged_model(model.model_id, "READY")
        dataset = record.get("dataset") or {}
        # With the time that the run has for it, a metric of the model adds no second one to the run.
        metrics = [
            Metric(
                key, value, self._times(key).get(step, int(record["time_ms"])), step,
                model_id=model.model_id, dataset_name=dataset.get("name"),
                dataset_digest=dataset.get("digest"), run_id=self.run_id,
            )
            for key, value in record["metrics"].items()
        ]  # fmt: skip
        self.client.log_batch(self.run_id, metrics=metrics)
        self._mark(record["best_by"])

    def _dropped(self, record: dict[str, Any]) -> None:
        for model in self._models(int(record["step"])):
            self.client.delete_logged_model(model.model_id)

    def _mark(self, metric: str) -> None:
        """Say of each kept checkpoint whether it is the best and the last."""
        scores: dict[str, tuple[float, int]] = {}
        models = {model.model_id: model for model in self._models()}
        for model_id, model in models.items():
            value = [found.value for found in model.metrics or [] if found.key == metric]
            scores[model_id] = (value[-1] if value else -math.inf, int(model.tags[STEP]))
        best = max(scores, key=lambda model_id: scores[model_id])
        last = max(scores, key=lambda model_id: scores[model_id][1])
        for model_id, model in models.items():
            roles = [role for role, of in (("best", best), ("last", last)) if of == model_id]
            if model.tags.get(ROLE, "") != " ".join(roles):
                self.client.set_logged_model_tags(model_id, {ROLE: " ".join(roles)})

    def _models(self, step: int | None = None) -> list[LoggedModel]:
        """This run's checkpoints as LoggedModels, all or those of a step."""
        experiment = self.client.get_run(self.run_id).info.experiment_id
        which = f"source_run_id = '{self.run_id}' AND tags.`{EXTERNAL}` = 'true'"
        if step is not None:
            which += f" AND tags.`{STEP}` = '{step}'"
        return list(self.client.search_logged_models([experiment], filter_string=which))

    def _begin(self, record: dict[str, Any]) -> None:
        self.client.update_run(self.run_id, status="RUNNING")

    def _end(self, record: dict[str, Any]) -> None:
        self.client.set_tag(self.run_id, OUTCOME, record["outcome"][:MAX_PARAM_CHARS])
        self.client.set_terminated(self.run_id, record["status"], record["time_ms"])


def find_run(client: MlflowClient, run: TrackedRun) -> str | None:
    """Id of the run with this key, None if MLflow does not know it."""
    experiment = client.get_experiment_by_name(run.experiment)
    if experiment is None:
        return None
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`{RUN_KEY}` = '{run.run_key}'", ViewType.ALL, 1
    )
    return str(found[0].info.run_id) if found else None


def _folder(to: str) -> str | None:
    """MLflow takes the folder of an artifact and keeps the file's name."""
    parent = str(PurePosixPath(to).parent)
    return None if parent == "." else parent
