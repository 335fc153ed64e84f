"""Where checkpoints live: committed whole, verified when read, kept by rule.

    <place>/step_00001200/...   one folder a checkpoint; `meta.json` makes it valid

A local folder is written beside its place and renamed; on an object store every file is uploaded
first and `meta.json` last. What has no valid `meta.json` does not exist.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from model.training.state import META, verify_checkpoint
from orchestrator.config.schema import CheckpointConfig
from orchestrator.errors import CheckpointError
from orchestrator.storage.filesystems import Place, abandon_uploads, reason
from orchestrator.storage.retry import retrying

FOLDER = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Kept:
    """A committed checkpoint as the retention rule sees it."""

    step: int
    value: float | None


def to_keep(found: Sequence[Kept], *, latest: int, best: int) -> set[int]:
    """Steps to keep: the `latest` newest, the `latest` newest with a value, so that those saved only
    because time had passed push none of them out, and the `best` highest by value (later wins a tie).
    """
    latest = max(1, latest)
    in_order = sorted(found, key=lambda kept: kept.step)
    scored = [kept for kept in in_order if kept.value is not None]
    top = sorted(scored, key=lambda kept: (kept.value, kept.step))[-best:] if best > 0 else []
    return {kept.step for kept in (*in_order[-latest:], *scored[-latest:], *top)}


class Witness(Protocol):
    """Whoever records what becomes of checkpoints."""

    def carry(self) -> None:
        """Before a commit: what was recorded until then must be as safe. May raise; then it is retried."""
        ...

    def committed(self, step: int, uri: str, metrics: Mapping[str, float]) -> None: ...

    def there(self, found: Mapping[int, tuple[str, Mapping[str, float]]]) -> None:
        """At the start: URI and metrics of each step that is committed."""
        ...

    def dropped(self, step: int) -> None:
        """By the rule of retention."""
        ...


class CheckpointStore:
    """Checkpoints of one run in one place. Used by one process at a time (rank 0) to write."""

    def __init__(
        self,
        place: Place,
        config: CheckpointConfig,
        *,
        say: Callable[[str], None],
        witness: Witness | None = None,
    ) -> None:
        self.place, self.config, self.say, self.witness = place, config, say, witness
        self._figures: dict[str, float] = {}

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(kept.step for kept in self._found())

    def uri(self, step: int) -> str:
        return self.place.join(_name(step)).uri

    def save(self, step: int, metrics: Mapping[str, float], write: Callable[[Path], None]) -> None:
        """Commit what `write` puts into an empty folder; then drop what the rule does not keep.

        Saving a step again replaces it.
        """
        began = time.monotonic()
        local = self.place.local
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)
            self._clean_drafts(local)
        with tempfile.TemporaryDirectory(dir=local, prefix=".writing-") as temporary:
            draft = Path(temporary) / _name(step)
            draft.mkdir()
            write(draft)
            size = sum(file.stat().st_size for file in draft.iterdir())
            if self.witness is not None:
                self.witness.carry()
            if local is not None:
                self._remove(step)
                draft.rename(local / draft.name)
            else:
                self._upload(draft)
        seconds = time.monotonic() - began
        self._figures = {"perf/checkpoint_s": seconds, "perf/checkpoint_mib": size / 2**20}
        if local is not None:
            self._figures["perf/checkpoint_free_gib"] = shutil.disk_usage(local).free / 2**30
        if self.witness is not None:
            self.witness.committed(step, self.uri(step), metrics)
        try:
            self._retain(step)
        except Exception as error:  # what was to be saved is saved; too many are better than none
            self.say(f"old checkpoints were not removed: {reason(error)}")

    def figures(self) -> dict[str, float]:
        """Of the last save, once: seconds, MiB and, on a local disk, the GiB left."""
        figures, self._figures = self._figures, {}
        return figures

    def clean(self) -> None:
        """Take away what a process left behind that was killed while it saved. Before the first save.

        Nothing else writes here, so every unfinished upload is an abandoned one.
        """
        try:
            if self.place.local is not None:
                self._clean_drafts(self.place.local)
            abandoned = abandon_uploads(self.place)
            torn = [name for name in self._names() if self._meta(name) is None]
            for name in torn:
                self._remove(int(name.removeprefix("step_")))
            if self.witness is not None:
                self.witness.there(self._scores())
        except Exception as error:  # litter is no reason not to train
            self.say(f"leftovers of an earlier process were not removed: {reason(error)}")
            return
        if abandoned or torn:
            self.say(
                f"removed what an earlier process had not finished: {len(torn)} checkpoint(s), "
                f"{abandoned} upload(s)"
            )

    @contextmanager
    def open(self, step: int) -> Iterator[Path]:
        """A committed checkpoint as a verified local folder.

        Raises:
            CheckpointError: missing or damaged.
        """
        local = self.place.local
        if local is not None:
            verify_checkpoint(local / _name(step))
            yield local / _name(step)
            return
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
            folder = Path(temporary) / _name(step)
            remote = f"{self.place.path}/{_name(step)}"
            with suppress(FileNotFoundError):  # said by the verification
                retrying(
                    lambda: self._download(remote, folder), self.uri(step), where="checkpoint.uri"
                )
            verify_checkpoint(folder)
            yield folder

    def _download(self, remote: str, folder: Path) -> None:
        # Into a folder that is there, left by an attempt before, it would go one level deeper.
        shutil.rmtree(folder, ignore_errors=True)
        self.place.filesystem.get(remote, str(folder), recursive=True)

    def newest_valid(self) -> int | None:
        """The newest step that proves whole; damaged ones are said and passed over."""
        for step in reversed(retrying(self.steps, self.place.uri, where="checkpoint.uri")):
            try:
                with self.open(step):
                    return step
            except CheckpointError as error:
                self.say(f"skipped a damaged checkpoint: {error}")
        return None

    def best(self) -> int | None:
        """The step with the highest metric, None if none has one."""
        scored = [kept for kept in self._found() if kept.value is not None]
        return max(scored, key=lambda kept: (kept.value, kept.step)).step if scored else None

    def reduce(self, *, latest: int, best: int) -> list[int] | None:
        """Keep so many of a run that has ended; the steps left, None where nothing was taken away."""
        found = self._found()
        scored = [kept for kept in found if kept.value is not None]
        ranked = sorted(scored, key=lambda kept: (kept.value, kept.step), reverse=True)
        newest = sorted(found, key=lambda kept: kept.step, reverse=True)
        keep = {kept.step for kept in [*newest[:latest], *ranked[:best]]}
        gone = [kept.step for kept in found if kept.step not in keep]
        for step in gone:
            self._remove(step)
        return sorted(keep) if gone else None

    def _clean_drafts(self, local: Path) -> None:
        for left in local.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _upload(self, draft: Path) -> None:
        remote = f"{self.place.path}/{draft.name}"
        for file in sorted(draft.iterdir(), key=lambda file: file.name == META):
            self.place.filesystem.put_file(
                str(file), f"{remote}/{file.name}", chunksize=self.config.part_mib * 2**20
            )

    def _found(self) -> list[Kept]:
        found = []
        for name in self._names():
            meta = self._meta(name)
            if meta is not None:
                value = meta.get("metrics", {}).get(self.config.metric)
                found.append(Kept(int(name.removeprefix("step_")), value))
        return found

    def _scores(self) -> dict[int, tuple[str, Mapping[str, float]]]:
        found = {}
        for name in self._names():
            meta, step = self._meta(name), int(name.removeprefix("step_"))
            if meta is not None:
                found[step] = self.uri(step), meta.get("metrics", {})
        return found

    def _names(self) -> list[str]:
        try:
            entries = self.place.filesystem.ls(self.place.path, detail=False)
        except FileNotFoundError:
            return []
        names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return [name for name in names if FOLDER.fullmatch(name)]

    def _meta(self, name: str) -> dict[str, Any] | None:
        """None for a folder that was never finished."""
        try:
            meta = json.loads(self.place.filesystem.cat_file(f"{self.place.path}/{name}/{META}"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}  # damaged: counted as found, refused when opened
        return meta if isinstance(meta, dict) else {}

    def _retain(self, saved: int) -> None:
        """Later steps than the one just saved are damaged, or they would have been gone on from: they
        stay to be looked at until training has passed them, and push nothing out.
        """
        found = [kept for kept in self._found() if kept.step <= saved]
        keep = to_keep(found, latest=self.config.keep_latest, best=self.config.keep_best)
        for kept in found:
            if kept.step not in keep:
                self._remove(kept.step)
                if self.witness is not None and kept.value is not None:
                    self.witness.dropped(kept.step)

    def _remove(self, step: int) -> None:
        """The marker goes first, so that a half removed checkpoint is none."""
        local = self.place.local
        if local is not None:
            folder = local / _name(step)
            (folder / META).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            return
        remote = f"{self.place.path}/{_name(step)}"
        if self.place.filesystem.exists(f"{remote}/{META}"):
            self.place.filesystem.rm_file(f"{remote}/{META}")
        if self.place.filesystem.exists(remote):
            self.place.filesystem.rm(remote, recursive=True)


def _name(step: int) -> str:
    return f"step_{step:08d}"
