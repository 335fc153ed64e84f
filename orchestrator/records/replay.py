"""Sends what earlier processes could not: spools on this machine or beside checkpoints."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import ConfigError, StorageError
from orchestrator.records.journal import DRIVER
from orchestrator.records.run import CARD, TrackedRun, read_card
from orchestrator.records.sender import Sender, remove_carried
from orchestrator.records.spool import Spool
from orchestrator.storage.filesystems import Place, open_place, reason

TIMEOUT_S = 600.0
FIRST_ANSWER_S = 20.0


@dataclass(frozen=True)
class Replayed:
    """What became of one run's spool. left: bytes that are still to be sent."""

    run: TrackedRun
    spool: str
    records: int
    left: int
    lost: int


def replay(uri: str, *, tracking_uri: str | None) -> Iterator[Replayed]:
    """Send the spools below a place: a job's output, a run's records or its checkpoints folder.

    tracking_uri: instead of the one each run was begun with.

    Raises:
        StorageError: the place cannot be read.
        ConfigError: a remote one, and nobody said where its records go: a card that others may have
            written does not decide who is sent this environment's password.
    """
    place = open_place(uri, "--replay")
    if place.local is None:
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if tracking_uri is None:
            raise ConfigError(
                "--tracking-uri", "the tracker that takes these records", "none",
                "give it, or set MLFLOW_TRACKING_URI",
            )  # fmt: skip
    try:
        # An object store has no empty folders: with all sent, only the bucket can still be asked for.
        place.filesystem.ls(place.path if place.local else place.path.partition("/")[0])
        folders = sorted(_records_folders(place))
    except Exception as error:  # each filesystem has its own exceptions
        raise StorageError(
            "--replay", "the output folder or the checkpoints of a job",
            f"{uri} ({reason(error)})", "name the place that the job's last line named",
        ) from None  # fmt: skip
    for path in folders:
        yield from _replay_folder(Place(path, place.filesystem, path), place, tracking_uri)


def _records_folders(place: Place) -> set[str]:
    """Folders with a run's card."""
    found = set()
    for pattern in ("", "/records", "/records/*", "/*/records", "/*/artifacts/checkpoints/records"):
        for card in place.filesystem.glob(f"{place.path}{pattern}/{CARD}"):
            found.add(str(card).rpartition("/")[0])
    return found


def _replay_folder(folder: Place, place: Place, tracking_uri: str | None) -> Iterator[Replayed]:
    try:
        run = read_card(folder)
    except (ValueError, TypeError) as error:
        raise StorageError(
            "--replay", f"a card of a run in {folder.path}/{CARD}", reason(error),
            "remove it; the next start of the run writes it again",
        ) from None  # fmt: skip
    run = replace(run, tracking_uri=tracking_uri or run.tracking_uri)
    names = [
        str(path).rsplit("/", 1)[-1] for path in folder.filesystem.glob(f"{folder.path}/*.jsonl")
    ]
    # The driver's first: it creates the run that the others add to.
    for name in sorted(names, key=lambda name: (name != DRIVER, name)):
        if place.local is not None:
            yield _send(run, Spool(Path(folder.path) / name))
            continue
        with tempfile.TemporaryDirectory(prefix="replay-") as copy:
            path = Path(copy) / name
            folder.filesystem.get_file(f"{folder.path}/{name}", str(path))
            sent = _send(run, Spool(path))
        if not sent.left:
            remove_carried(folder, name)
        yield sent


def _send(run: TrackedRun, spool: Spool) -> Replayed:
    """For as long as it goes on; a tracker that does not begin to answer is not waited for."""
    position = spool.position()
    records, _ = spool.read(position, limit=10**9)
    sender = Sender(run, spool, creates=spool.path.name == DRIVER)
    began = moved = time.monotonic()
    size = spool.path.stat().st_size
    while spool.position() < size and moved + FIRST_ANSWER_S > time.monotonic() < began + TIMEOUT_S:
        time.sleep(0.1)
        if spool.position() != position:
            position, moved = spool.position(), time.monotonic()
    sender.close(timeout_s=0.5)  # all that could be waited for was waited for above
    return Replayed(sender.run, spool.path.name, len(records), len(spool.rest()), sender.lost)
