"""Remove checkpoints that nobody will go on from: `retain_checkpoints.py s3://bucket/runs …`.

Of a run that MLflow calls finished for --finished-days, the newest and the best stay. A folder whose run
MLflow does not know any more goes when nothing was written to it for --orphan-days. Every other run is
left alone, and so is everything while the tracker does not answer. What may not be removed is named and
left as it was; the others go, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orchestrator.storage.checkpoints import FOLDER, Kept, to_keep
from orchestrator.storage.filesystems import Place, abandon_uploads, open_place

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

DAY_S = 86400.0
METRIC = "val/AP"
URI_TAG = "effdet.checkpoint_uri"
FORBIDDEN = 403


@dataclass(frozen=True)
class Found:
    """A run's folder. written: time of its newest object; steps: (name, value) of its checkpoints."""

    place: Place
    written: float
    steps: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Tally:
    """removed: how many checkpoints went, or would go. refused: URIs of those that had to stay."""

    removed: int = 0
    refused: tuple[str, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.removed + other.removed, self.refused + other.refused)


def look(base: Place, name: str) -> Found | None:
    """None for a folder without checkpoints, such as Ray's notes."""
    place = base.join(name)
    files = place.filesystem.find(place.path, detail=True)
    root = len(place.path.rstrip("/")) + 1
    steps: dict[str, float | None] = {}
    written = 0.0
    for path, info in files.items():
        folder, _, file = str(path)[root:].partition("/")
        written = max(written, _time(info))
        if FOLDER.fullmatch(folder):
            steps.setdefault(folder, None)
            if file == "meta.json":
                steps[folder] = _value(place, str(path))
    return Found(place, written, tuple(sorted(steps.items()))) if steps else None


def _time(info: dict[str, Any]) -> float:
    found = info.get("LastModified") or info.get("mtime") or time.time()
    return found.timestamp() if isinstance(found, datetime) else float(found)


def _value(place: Place, path: str) -> float | None:
    try:
        value: float | None = (
            json.loads(place.filesystem.cat_file(path)).get("metrics", {}).get(METRIC)
        )
        return value
    except ValueError:
        return None


def superfluous(
    found: Found, run: Run | None, *, now: float, finished_s: float, orphan_s: float
) -> list[str]:
    """Names of the checkpoints that go."""
    names = [name for name, _ in found.steps]
    if run is None:
        return names if now - found.written > orphan_s else []
    ended_ms = run.info.end_time
    if run.info.status != "FINISHED" or ended_ms is None or now - ended_ms / 1000 < finished_s:
        return []
    kept = [Kept(int(name.removeprefix("step_")), value) for name, value in found.steps]
    keep = to_keep(kept, latest=1, best=1)
    return [name for name in names if int(name.removeprefix("step_")) not in keep]


def find_run(client: MlflowClient, experiments: list[str], key: str) -> Run | None:
    """By the name of its folder, deleted ones included."""
    from mlflow.entities import ViewType

    from orchestrator.records.tracker import RUN_KEY

    runs = client.search_runs(
        experiments, f"tags.`{RUN_KEY}` = '{key}'", run_view_type=ViewType.ALL, max_results=1
    )
    return runs[0] if runs else None


def forget(client: MlflowClient, run: Run, uri: str) -> None:
    """The tracker's entry of a checkpoint goes with it.

    Raises:
        PermissionError: it is somebody else's.
    """
    from mlflow.exceptions import MlflowException

    models = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
    )
    for model in models:
        if model.tags.get(URI_TAG) != uri:
            continue
        try:
            client.delete_logged_model(model.model_id)
        except MlflowException as error:
            if error.get_http_status_code() != FORBIDDEN:
                raise
            raise PermissionError(
                f"the tracker's model {model.model_id} in experiment {run.info.experiment_id} "
                "is somebody else's"
            ) from None


def remove(client: MlflowClient, run: Run | None, checkpoint: Place) -> None:
    """The tracker's entry first: where that must stay, it keeps its files.

    Raises:
        PermissionError: the tracker or the store refuses it.
    """
    if run is not None:
        forget(client, run, checkpoint.uri)
    # Without its marker it does not exist, so that comes before the other files.
    marker = f"{checkpoint.path}/meta.json"
    if checkpoint.filesystem.exists(marker):
        checkpoint.filesystem.rm_file(marker)
    checkpoint.filesystem.rm(checkpoint.path, recursive=True)


def clear(client: MlflowClient, run: Run | None, found: Found, names: list[str]) -> Tally:
    """The named checkpoints of one run, and its uploads that were never finished."""
    tally = Tally()
    for name in names:
        checkpoint = found.place.join(name)
        try:
            remove(client, run, checkpoint)
            print(f"removed {checkpoint.uri}", flush=True)
            tally += Tally(1)
        except PermissionError as error:
            print(f"kept {checkpoint.uri}: {error}", flush=True)
            tally += Tally(refused=(checkpoint.uri,))
    try:
        abandon_uploads(found.place)
    except PermissionError as error:
        print(f"kept unfinished uploads in {found.place.uri}: {error}", flush=True)
        tally += Tally(refused=(found.place.uri,))
    return tally


def known_experiments(client: MlflowClient) -> list[str]:
    """Raises SystemExit: none, so it is hardly the tracker that these checkpoints belong to."""
    from mlflow.entities import ViewType

    experiments, token = list[str](), None
    while True:
        page = client.search_experiments(view_type=ViewType.ALL, max_results=1000, page_token=token)
        experiments += [found.experiment_id for found in page]
        token = page.token
        if not token:
            break
    if not experiments:
        raise SystemExit("the tracker knows no experiment: is it the right one?")
    return experiments


def run(base_uri: str, *, finished_days: float, orphan_days: float, dry_run: bool) -> Tally:
    """Raises whatever the tracker raises when it does not answer, before anything is removed."""
    from mlflow.tracking import MlflowClient

    base, client = open_place(base_uri, "BASE"), MlflowClient()
    experiments = known_experiments(client)
    there = base.filesystem.exists(base.path)
    entries = base.filesystem.ls(base.path, detail=False) if there else []
    tally = Tally()
    for name in sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries):
        found = look(base, name)
        if found is None:
            continue
        known = find_run(client, experiments, name)
        gone = superfluous(
            found, known, now=time.time(),
            finished_s=finished_days * DAY_S, orphan_s=orphan_days * DAY_S,
        )  # fmt: skip
        if dry_run:
            for step in gone:
                print(f"would remove {found.place.join(step).uri}")
            tally += Tally(len(gone))
        elif gone:
            tally += clear(client, known, found, gone)
    print(
        f"{base_uri}: {tally.removed} checkpoint(s) {'would go' if dry_run else 'removed'}",
        flush=True,
    )
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", metavar="BASE", nargs="+", help="as in checkpoint.uri")
    parser.add_argument("--finished-days", type=float, default=30.0)
    parser.add_argument("--orphan-days", type=float, default=90.0)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    tally = Tally()
    for base in given.bases:
        tally += run(
            base, finished_days=given.finished_days, orphan_days=given.orphan_days,
            dry_run=given.dry_run,
        )  # fmt: skip
    if tally.refused:
        print(
            f"{len(tally.refused)} thing(s) may not be removed and were kept: {', '.join(tally.refused)}; "
            "give MLFLOW_TRACKING_USERNAME the permission MANAGE on their experiments, and this pod's "
            "role s3:DeleteObject and s3:AbortMultipartUpload",
            file=sys.stderr,
        )
    return 1 if tally.refused else 0


if __name__ == "__main__":
    sys.exit(main())
