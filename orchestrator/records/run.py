"""Which run it is, known without asking the tracker.

The key of a run is made here, so restarts, preemptions and resubmissions find the same run in MLflow
by its tag, or, while MLflow does not answer, by a card that lies with the run's records.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.records.secrets import without_secret
from orchestrator.storage.filesystems import Place, reason, within

CARD = "run.json"
CARD_TIMEOUT_S = 20.0
FINISHED, DIVERGED = "finished", "diverged"


@dataclass(frozen=True)
class TrackedRun:
    """A run as workers and reports need it; plain data.

    key: of name and configuration. run_key: of this run. run_id, experiment_id, artifact_uri: MLflow's,
    None until it has answered. outcome: how it ended, "" if it has not.
    """

    tracking_uri: str
    experiment: str
    artifact_root: str | None
    name: str
    key: str
    run_key: str
    began_ms: int
    run_id: str | None = None
    experiment_id: str | None = None
    artifact_uri: str | None = None
    checkpoints_uri: str = ""
    outcome: str = ""
    continued: bool = False

    @property
    def done(self) -> bool:
        """Nothing is left that a restart could go on with."""
        return self.outcome in (FINISHED, DIVERGED)


def new_run(
    tracking_uri: str, experiment: str, artifact_root: str | None, name: str, key: str
) -> TrackedRun:
    readable = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:40] or "run"
    run_key = f"{readable}-{uuid.uuid4().hex[:10]}"
    began_ms = int(time.time() * 1000)
    return TrackedRun(tracking_uri, experiment, artifact_root, name, key, run_key, began_ms)


def to_card(run: TrackedRun) -> bytes:
    card = asdict(run) | {"tracking_uri": without_secret(run.tracking_uri)}
    del card["continued"]
    return json.dumps(card, indent=1).encode()


def from_card(card: bytes) -> TrackedRun:
    """Raises ValueError, TypeError: it is not a card of ours."""
    found: dict[str, Any] = json.loads(card)
    known = {field.name for field in fields(TrackedRun)}
    return TrackedRun(**{key: value for key, value in found.items() if key in known})


class Cards:
    """The newest run of each configuration, in every place that may still be there tomorrow."""

    def __init__(self, places: Sequence[Place], *, say: Callable[[str], None]) -> None:
        self.places, self.say = places, say

    def newest(self, key: str) -> TrackedRun | None:
        """The newest run of this configuration, ended or not, as far as the places answer."""
        found = []
        for place in self.places:
            with suppress(Exception):  # each filesystem has its own exceptions
                card = within(CARD_TIMEOUT_S, partial(read_bytes, place, _name(key)))
                found.append(from_card(card))
        return max(found, key=lambda run: (run.began_ms, run.done), default=None)

    def keep(self, run: TrackedRun) -> None:
        """Never raises: what could not be kept is said."""
        for place in self.places:
            try:
                within(CARD_TIMEOUT_S, partial(_write, place, _name(run.key), run))
            except Exception as error:  # each filesystem has its own exceptions
                self.say(f"the run's card was not kept in {place.uri}: {reason(error)}")


def keep_card(place: Place, run: TrackedRun) -> None:
    """Beside the records of one run."""
    _write(place, CARD, run)


def read_card(place: Place) -> TrackedRun:
    """Raises FileNotFoundError, ValueError, TypeError."""
    return from_card(read_bytes(place, CARD))


def _name(key: str) -> str:
    return f"by-configuration/{key}.json"


def read_bytes(place: Place, name: str) -> bytes:
    """Content of a file in a place."""
    content: bytes = place.filesystem.cat_file(f"{place.path}/{name}")
    return content


def _write(place: Place, name: str, run: TrackedRun) -> None:
    path = f"{place.path}/{name}"
    place.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
    if place.local is None:
        place.filesystem.pipe_file(path, to_card(run))
        return
    draft = Path(f"{path}.{uuid.uuid4().hex[:8]}")  # several processes keep the same card
    draft.write_bytes(to_card(run))
    draft.replace(path)
