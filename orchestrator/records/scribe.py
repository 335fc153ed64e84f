"""Writes records into one run of MLflow, each once however often it is repeated.

Kinds of records ("op"):
    metrics     step, time_ms, metrics
    params      params: those that the run has keep their values
    tags        tags
    text        text, to: an artifact
    file        file (relative to the spool's folder), to: an artifact; once: removed when sent
    dataset     name, digest, source, context, profile
    checkpoint  step, time_ms, uri, metrics, dataset, best_by: one that is kept, as a LoggedModel
                without files
    dropped     step: one that is not kept any more
    kept        steps: all that are kept
    begin       time_ms: a restart, the run is active again
    end         status, outcome, time_ms
A metric is dropped if the run already has its (key, step): steps run again after a restart are the
same steps. State (tags, texts, begin, end) of an earlier process does not replace a later one's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities.logged_model import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.records.run import TrackedRun
from orchestrator.records.tracker import OUTCOME, RUN_KEY

TOLD, BEGUN = "effdet.told_ms", "effdet.begun_ms"
STEP, URI, ROLE = "effdet.step", "effdet.checkpoint_uri", "effdet.role"
EXTERNAL = "mlflow.model.isExternal"
CONTEXT = "mlflow.data.context"
ROLLED_BACK = "train/rolled_back"
NO_MODEL_NAME = re.compile(r"[/:.%\"']")
MAX_BATCH = 1000  # MLflow's limit for log_batch
MAX_PARAM_CHARS, MAX_PARAMS, MAX_TAG_CHARS = 500, 100, 5000


class Scribe:
    """Of the run with this id; folder: where files lie. Any method may raise what MLflow raises."""

    def __init__(self, client: MlflowClient, run: TrackedRun, run_id: str, folder: Path) -> None:
        self.client, self.run, self.run_id, self.folder = client, run, run_id, folder
        self._there: set[str] | None = None  # metrics that the run had when it was first asked
        self._newest: dict[str, int] = {}  # step of each metric
        # What the run has of a metric, step -> (time, value), while older steps are run again.
        self._recorded: dict[str, dict[int, tuple[int, float]]] = {}
        self._rollback: tuple[int, int] | None = None  # (step gone back to, time)
        self._told_ms: int | None = None
        self._kinds: dict[str, Callable[[dict[str, Any]], None]] = {
            "params": self._params, "tags": self._tags, "text": self._text, "file": self._file,
            "dataset": self._dataset, "checkpoint": self._checkpoint, "dropped": self._dropped,
            "kept": self._kept, "begin": self._begin, "end": self._end,
        }  # fmt: skip

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """In order; metrics that follow one another go together.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE for a record of no known kind.
        """
        metrics: list[dict[str, Any]] = []
        for record in records:
            if record["op"] == "metrics":
                metrics.append(record)
                continue
            self._metrics(metrics)
            metrics = []
            if record["op"] not in self._kinds:
                raise MlflowException.invalid_parameter_value("a record of no known kind")
            self._kinds[record["op"]](record)
        self._metrics(metrics)

    def _metrics(self, records: Sequence[dict[str, Any]]) -> None:
        batch: list[Metric] = []
        new: dict[str, dict[int, int]] = {}
        for record in records:
            step, time_ms = int(record["step"]), int(record["time_ms"])
            if ROLLED_BACK in record["metrics"]:
                self._rollback = step, time_ms
            for key, value in record["metrics"].items():
                steps = new.setdefault(key, {})
                if self._is_new(key, step, time_ms, steps):
                    steps[step] = time_ms
                    batch.append(Metric(key, value, time_ms, step))
        try:
            for first in range(0, len(batch), MAX_BATCH):
                self.client.log_batch(self.run_id, metrics=batch[first : first + MAX_BATCH])
        except BaseException:
            for key in new:  # what arrived is asked anew
                self._newest.pop(key, None)
                self._recorded.pop(key, None)
            self._there = None
            raise
        for key, steps in new.items():
            if steps and max(steps) > self._newest[key]:
                self._newest[key] = max(steps)
                self._recorded.pop(key, None)  # it has caught up

    def _is_new(self, key: str, step: int, time_ms: int, batch: Mapping[int, int]) -> bool:
        """batch: step -> time of what is about to be sent of this metric.

        After a rollback steps are run again that are not the same: theirs is added to what was.
        """
        self._look_up(key)
        known = batch.get(step)
        if known is None and step <= self._newest[key]:
            known = self._history(key).get(step, (None, 0.0))[0]
        if known is None:
            return True
        since = self._rollback
        return since is not None and step > since[0] and known < since[1] <= time_ms

    def _look_up(self, key: str) -> None:
        """What the run has of a metric, once."""
        if self._there is None:
            self._there = set(self.client.get_run(self.run_id).data.metrics)
            if ROLLED_BACK in self._there and self._rollback is None:
                last = self.client.get_metric_history(self.run_id, ROLLED_BACK)[-1]
                self._rollback = last.step, last.timestamp
        if key not in self._newest:
            self._newest[key] = max(self._history(key), default=-1) if key in self._there else -1

    def _history(self, key: str) -> dict[int, tuple[int, float]]:
        """Step -> (time, value) of what the run has of a metric."""
        if key not in self._recorded:
            history = self.client.get_metric_history(self.run_id, key)
            self._recorded[key] = {m.step: (m.timestamp, m.value) for m in history}
        return self._recorded[key]

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
        if self._outdated(record):
            return
        tags = dict(record["tags"])
        if "time_ms" in record:
            self._told_ms = int(record["time_ms"])
            tags[TOLD] = str(self._told_ms)
        new = [RunTag(key, value[:MAX_TAG_CHARS]) for key, value in tags.items()]
        self.client.log_batch(self.run_id, tags=new)

    def _text(self, record: dict[str, Any]) -> None:
        if not self._outdated(record):
            self.client.log_text(self.run_id, record["text"], record["to"])

    def _outdated(self, record: dict[str, Any]) -> bool:
        """Of an earlier driver, sent after a later one has already said more."""
        if self._told_ms is None:
            self._told_ms = int(self.client.get_run(self.run_id).data.tags.get(TOLD, 0))
        return int(record.get("time_ms", self._told_ms)) < self._told_ms

    def _file(self, record: dict[str, Any]) -> None:
        path = (self.folder / record["file"]).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise MlflowException.invalid_parameter_value("a file outside the run's records")
        if path.is_file():  # else it was drawn on a node that is gone
            self.client.log_artifact(self.run_id, str(path), _folder(record["to"]))
            if record.get("once"):
                path.unlink()

    def _dataset(self, record: dict[str, Any]) -> None:
        kind, sign, _ = record["source"].partition("://")
        dataset = Dataset(
            record["name"], record["digest"], kind if sign else "local",
            json.dumps({"uri": record["source"]}), profile=json.dumps(record["profile"]),
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
        metrics = []
        for key, value in record["metrics"].items():
            # The run's own point, if it has one: another would be a second one in its curve.
            at_ms, value = self._history(key).get(step, (int(record["time_ms"]), value))
            metrics.append(
                Metric(
                    key, value, at_ms, step, model_id=model.model_id, run_id=self.run_id,
                    dataset_name=dataset.get("name"), dataset_digest=dataset.get("digest"),
                )
            )  # fmt: skip
        self.client.log_batch(self.run_id, metrics=metrics)
        for key in record["metrics"]:
            self._recorded.pop(key, None)
        self._mark(record["best_by"])

    def _dropped(self, record: dict[str, Any]) -> None:
        for model in self._models(int(record["step"])):
            self.client.delete_logged_model(model.model_id)

    def _kept(self, record: dict[str, Any]) -> None:
        """Models of checkpoints that were removed while nobody could say so."""
        for model in self._models():
            if int(model.tags[STEP]) not in record["steps"]:
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
        if int(record["time_ms"]) >= self._last_word_ms():
            self.client.set_tag(self.run_id, BEGUN, str(record["time_ms"]))
            self.client.update_run(self.run_id, status="RUNNING")

    def _end(self, record: dict[str, Any]) -> None:
        """Unless the run went on, or ended, later: then this is an earlier process's last word."""
        if int(record["time_ms"]) >= self._last_word_ms():
            self.client.set_tag(self.run_id, OUTCOME, record["outcome"][:MAX_PARAM_CHARS])
            self.client.set_terminated(self.run_id, record["status"], record["time_ms"])

    def _last_word_ms(self) -> int:
        run = self.client.get_run(self.run_id)
        return max(int(run.data.tags.get(BEGUN, 0)), int(run.info.end_time or 0))


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
