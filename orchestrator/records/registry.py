"""From a run to the model that is served: packaged, judged, registered, named.

The model is packaged and tried before anything is written to the tracker: what is refused leaves no
trace there. The version that was served before keeps an alias of its own.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import LoggedModelOutput, Metric, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from model.training.state import read_metrics, read_network, read_progress
from orchestrator.errors import ConfigError
from orchestrator.records import gates, package
from orchestrator.records.gates import Champion, Gate, RunFacts
from orchestrator.records.scribe import CONTEXT, ROLLED_BACK, STEP
from orchestrator.records.sources import (
    checkpoints_of,
    choose_step,
    find_version,
    get_run,
    tracking,
)
from orchestrator.records.tracker import OUTCOME
from orchestrator.storage.filesystems import reason

CHAMPION, PREVIOUS = "champion", "previous"
RUN, METRIC, BEFORE = "effdet.run", "effdet.metric.", "effdet.previous"
VALIDATION = (CONTEXT, "validation")
PARAMS = (
    "phi", "backbone", "fusion", "topology", "image_size_px", "fpn_channels", "fpn_repeats",
    "head_layers", "num_classes",
)  # fmt: skip
METRIC_NAME = re.compile(r"[/\w.\- :]+")  # MLflow refuses a whole batch for one other name
ALIAS = re.compile(r"(?!v\d+$|latest$)[\w-]{1,200}", re.IGNORECASE)


@dataclass(frozen=True)
class Rules:
    """require: (metric, least). objective: what the champion is beaten in, higher is better."""

    require: tuple[tuple[str, float], ...] = ()
    objective: str = gates.OBJECTIVE
    allow_worse: bool = False
    allow_unfinished: bool = False


@dataclass(frozen=True)
class Promotion:
    """version: None after a dry run; created: False where the alias's version was this one already.

    previous: the version that had the alias before.
    """

    name: str
    alias: str
    version: str | None
    created: bool
    run_id: str
    step: int
    model_id: str | None
    previous: str | None
    metrics: Mapping[str, float]


def promote(
    client: MlflowClient,
    run_id: str,
    name: str,
    *,
    checkpoint: str = "best",
    alias: str = CHAMPION,
    rules: Rules = Rules(),
    dry_run: bool = False,
    show: Callable[[Sequence[Gate]], None] = lambda found: None,
    ask: package.Ask = package.ask_in_new_process,
) -> Promotion:
    """Make a run's checkpoint the registered model `name`, known by `alias`.

    checkpoint: best, last or a step. show: is given every gate's verdict. ask: how the package is
    tried.

    Raises:
        ConfigError: a gate was not passed (nothing was written), or a name that cannot be.
        UserError: no such run or checkpoint, or a tracker that fails.
    """
    _check_names(name, alias)
    with tracking(client.tracking_uri, "to find the run and its model"):
        run, served = get_run(client, run_id), find_version(client, name, alias)
    run_id, store = run.info.run_id, checkpoints_of(run)
    step = choose_step(store, checkpoint)
    with store.open(step) as folder, tempfile.TemporaryDirectory(prefix="promote-") as temporary:
        packaged, metrics = Path(temporary) / "model", read_metrics(folder)
        with tracking(client.tracking_uri, "to read the runs"):
            champion = None if served is None else _champion(client, served, run_id, step)
            verdicts = _judge(run, folder, champion, rules)
        verdicts.append(_tried(folder, packaged, run_id, ask))
        show(verdicts)
        _refuse(verdicts, f"promotion of {run_id} step {step}")
        before = None if served is None else str(served.version)
        if served is not None and _is(served, run_id, step):
            return Promotion(name, alias, before, False, run_id, step, None, before, metrics)
        if dry_run:
            return Promotion(name, alias, None, False, run_id, step, None, before, metrics)
        with tracking(client.tracking_uri, "to store and register the model"):
            model_id = log_detector(client, run, packaged, folder, name=name, step=step)
            version = _register(client, name, model_id, run, step, metrics, before)
            _move_alias(client, name, alias, version, before)
    return Promotion(name, alias, version, True, run_id, step, model_id, before, metrics)


def _refuse(verdicts: Sequence[Gate], where: str) -> None:
    failed = [gate.name for gate in verdicts if not gate.passed]
    if failed:
        raise ConfigError(
            where, "every gate to be passed",
            f"{len(failed)} of {len(verdicts)} failed ({', '.join(failed)})",
            "nothing was registered: choose another run or checkpoint (--help: what can be allowed)",
        )  # fmt: skip


def log_detector(
    client: MlflowClient, run: Run, packaged: Path, checkpoint: Path, *, name: str, step: int
) -> str:
    """Upload a packaged detector as a LoggedModel of the run; its model id.

    The checkpoint's evaluation is tied to it, at the step and time the run recorded it.
    """
    spec = read_network(checkpoint)
    model = client.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"']", "-", name),
        source_run_id=run.info.run_id,
        tags={STEP: str(step)},
        params={param: str(getattr(spec, param)) for param in PARAMS},
        model_type="detector",
    )
    try:
        description = Model.load(str(packaged))
        description.model_id = description.model_uuid = model.model_id
        description.artifact_path = model.artifact_location
        description.save(str(packaged / "MLmodel"))
        client.log_model_artifacts(model.model_id, str(packaged))
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=step)])
        metrics = _with_history(client, run, read_metrics(checkpoint), step, model.model_id)
        if metrics:
            client.log_batch(run.info.run_id, metrics=metrics)
    except BaseException:
        with suppress(MlflowException):  # what went wrong first is what is to be said
            client.finalize_logged_model(model.model_id, "FAILED")
        raise
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _with_history(
    client: MlflowClient, run: Run, metrics: Mapping[str, float], step: int, model_id: str
) -> list[Metric]:
    """Rows that the run has, so that its curves gain no second point; new where it lacks them."""
    name, digest = next(iter(_validation_data(run)), (None, None))
    rows = []
    for key, value in metrics.items():
        if not METRIC_NAME.fullmatch(key):
            continue
        known = [
            row
            for row in client.get_metric_history(run.info.run_id, key)
            if row.step <= step and row.value == value
        ]
        at, when = (known[-1].step, known[-1].timestamp) if known else (step, _now_ms())
        rows.append(Metric(key, value, when, at, model_id, name, digest, run.info.run_id))
    return rows


def _judge(run: Run, folder: Path, champion: Champion | None, rules: Rules) -> list[Gate]:
    facts, metrics = _facts(run), read_metrics(folder)
    return [
        gates.finished(facts, allowed=rules.allow_unfinished),
        gates.stable(facts, read_progress(folder).lr_factor),
        *gates.required(metrics, rules.require),
        gates.not_worse(facts, metrics, champion, rules.objective, allowed=rules.allow_worse),
    ]


def _tried(folder: Path, packaged: Path, run_id: str, ask: package.Ask) -> Gate:
    """Pack the checkpoint and ask it."""
    package.package(folder, packaged, run_id)
    try:
        return Gate("packaged model answers", True, package.check_answers(packaged, folder, ask))
    except RuntimeError as error:
        return Gate("packaged model answers", False, reason(error))


def _facts(run: Run) -> RunFacts:
    data = run.data
    outcome = data.tags.get(OUTCOME)
    if outcome == "finished" and run.info.status != "FINISHED":
        outcome = f"is {run.info.status.lower()}"
    root, number = data.params.get("data.root"), data.params.get("derived.val_images")
    return RunFacts(
        run.info.run_id,
        outcome,
        bool(data.metrics.get(ROLLED_BACK)),
        frozenset(digest for _, digest in _validation_data(run)),
        (root, number) if root and number else None,
    )


def _champion(client: MlflowClient, served: ModelVersion, run_id: str, step: int) -> Champion:
    metrics = {
        key.removeprefix(METRIC): float(value)
        for key, value in served.tags.items()
        if key.startswith(METRIC)
    }
    try:
        facts = _facts(client.get_run(served.run_id)) if served.run_id else None
    except MlflowException:
        facts = None
    return Champion(str(served.version), metrics, facts, _is(served, run_id, step))


def _is(version: ModelVersion, run_id: str, step: int) -> bool:
    return (version.tags.get(RUN), version.tags.get(STEP)) == (run_id, str(step))


def _register(
    client: MlflowClient,
    name: str,
    model_id: str,
    run: Run,
    step: int,
    metrics: Mapping[str, float],
    before: str | None,
) -> str:
    """The new version's number."""
    tags = {RUN: run.info.run_id, STEP: str(step)}
    tags |= {METRIC + key: repr(value) for key, value in metrics.items() if key.startswith("val/")}
    tags |= {BEFORE: before} if before else {}
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = client.create_model_version(
        name, f"models:/{model_id}", run.info.run_id, tags, model_id=model_id,
        description=f"step {step} of {run.info.run_name}",
    )  # fmt: skip
    shown = json.dumps([{"name": name, "version": made.version}])
    client.set_logged_model_tags(
        model_id, {"mlflow.modelVersions": shown}
    )  # MLflow's pages read it
    return str(made.version)


def _move_alias(
    client: MlflowClient, name: str, alias: str, version: str, before: str | None
) -> None:
    if before is not None:
        kept_as = PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"
        client.set_registered_model_alias(name, kept_as, before)
    client.set_registered_model_alias(name, alias, version)


def _validation_data(run: Run) -> list[tuple[str, str]]:
    """(name, digest) of each dataset that the run was evaluated on, as far as it was recorded."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return [
        (each.dataset.name, each.dataset.digest)
        for each in inputs
        if VALIDATION in [(tag.key, tag.value) for tag in each.tags]
    ]


def _check_names(name: str, alias: str) -> None:
    """Before anything is written, which a refused alias would come too late for."""
    if not name.strip() or re.search(r"[/:@]", name):
        raise ConfigError("--name", "a name without / : @", repr(name), "choose another")
    if not ALIAS.fullmatch(alias) or alias == PREVIOUS:
        raise ConfigError(
            "--alias", "letters, digits, - and _; neither latest, previous nor v1", repr(alias),
            "choose another",
        )  # fmt: skip


def _now_ms() -> int:
    return int(time.time() * 1000)
