"""The folder of a prediction: a plan, parts that are committed one by one, at the end the results.

    plan.json               what is predicted, written once; another plan does not fit in here
    parts/00000012.jsonl    rows of a shard, each a line
    parts/00000012.json     its summary, written last: the shard is done
    drawn/…                 pictures and videos with boxes
    detections.json         (or .parquet) all rows, when all shards are done
    failed.json             the images that could not be used, if there are any
    report.json             written last: the prediction is finished, and the parts are removed

It may lie on any filesystem that fsspec knows. A shard that is predicted twice leaves the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from orchestrator.errors import ConfigError
from orchestrator.storage.filesystems import Place, check_writable
from orchestrator.storage.retry import retrying

PLAN, REPORT, FAILED, DRAWN, PARTS = "plan.json", "report.json", "failed.json", "drawn", "parts"
OUTPUT = "--output"
READERS = 16
AHEAD = 4  # parts
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # how shares say that they have none


@dataclass(frozen=True)
class Failure:
    """An image or video that could not be used, or not to its end."""

    file_name: str
    problem: str


@dataclass(frozen=True)
class Part:
    """What became of a shard. images: looked at or failed, frames of a video; rows_bytes: of its rows."""

    number: int
    images: int
    detections: int
    rows_bytes: int
    device: str
    failed: tuple[Failure, ...] = ()

    @classmethod
    def from_json(cls, text: bytes) -> Part:
        """Raises ValueError, KeyError, TypeError: cut short."""
        fields = json.loads(text)
        return cls(**fields | {"failed": tuple(Failure(**one) for one in fields["failed"])})

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class PredictionFolder:
    """Picklable: workers write their parts themselves."""

    place: Place

    def begin(self, plan: Mapping[str, Any], *, fresh: bool) -> None:
        """Make the folder one of this plan, or find that it is.

        Raises:
            ConfigError: it has another plan, or one that cannot be read.
        """
        known = self._any_plan() if fresh else self.plan()
        if known is not None and fresh:
            self._clear()
        elif known is not None:
            different = sorted(
                name for name in {*plan, *known} if plan.get(name) != known.get(name)
            )
            if different:
                raise ConfigError(
                    OUTPUT, "a new folder, or that of the same prediction",
                    f"{self.place.uri} with another: {_differences(plan, known, different)}",
                    "give another --output, or --fresh to replace what is there",
                )  # fmt: skip
            return
        self.write(PLAN, json.dumps(plan, indent=1).encode())

    def plan(self) -> dict[str, Any] | None:
        """Raises ConfigError: it is cut, or something else."""
        try:
            return self._json(PLAN)
        except ValueError as error:
            raise ConfigError(
                OUTPUT, f"a {PLAN} that is whole", f"{self.place.uri}/{PLAN} ({error})",
                "give another --output, or --fresh to replace what is there",
            ) from None  # fmt: skip

    def _any_plan(self) -> dict[str, Any] | None:
        """{} for one that cannot be read."""
        try:
            return self._json(PLAN)
        except ValueError:
            return {}

    def report(self) -> dict[str, Any] | None:
        """Of a prediction that was finished. One that was cut is none."""
        with suppress(ValueError):
            return self._json(REPORT)
        return None

    def check_reached(self, plan: Mapping[str, Any]) -> None:
        """On another node. Raises ConfigError: it sees another folder under this name, or none."""
        if self.plan() != dict(plan):
            raise ConfigError(
                OUTPUT, "a folder that every node reaches", f"{self.place.uri}, which one does not",
                "give s3://… or a shared folder",
            )  # fmt: skip

    def done(self) -> dict[int, Part]:
        """Shards that are committed, without what failed in them."""
        folder = f"{self.place.path}/{PARTS}"
        if not self.has(PARTS):
            return {}
        find = self.place.filesystem.find
        listed = retrying(lambda: find(folder, detail=True), folder, where=OUTPUT)
        sizes = {path.rpartition("/")[2]: int(info["size"]) for path, info in listed.items()}
        numbers = sorted(int(name[:-5]) for name in sizes if _is_summary(name))
        found: dict[int, Part] = {}
        for part in self.summaries(numbers):
            # A machine that lost power may have kept the name without the content.
            if part is not None and sizes.get(rows_name(part.number)) == part.rows_bytes:
                found[part.number] = replace(part, failed=())
        return found

    def summaries(self, numbers: Sequence[int]) -> Iterator[Part | None]:
        """In the order of `numbers`; None for one that cannot be read."""

        def read(number: int) -> Part | None:
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                return Part.from_json(self._read(f"{PARTS}/{summary_name(number)}"))
            return None

        with ThreadPoolExecutor(READERS if self.place.local is None else 1) as pool:
            for start in range(0, len(numbers), 10 * READERS):
                yield from pool.map(read, numbers[start : start + 10 * READERS])

    def commit(self, part: Part) -> None:
        """Its rows are there."""
        self.write(f"{PARTS}/{summary_name(part.number)}", part.to_json())

    def all_rows(self, parts: Iterable[tuple[int, int]]) -> Iterator[tuple[Path, int]]:
        """(shard, number) -> (its rows as a local file, number); each file until the next is asked for.

        Remote ones are fetched a few ahead.
        """
        if self.place.local is not None:
            folder = self.place.local / PARTS
            yield from ((folder / rows_name(part), number) for part, number in parts)
            return
        with (
            tempfile.TemporaryDirectory(prefix="rows-") as temporary,
            ThreadPoolExecutor(AHEAD) as pool,
        ):

            def fetch(part: int, number: int) -> tuple[Path, int]:
                copy = Path(temporary) / str(part)
                place = self.place.join(f"{PARTS}/{rows_name(part)}")
                get = place.filesystem.get_file
                retrying(lambda: get(place.path, str(copy)), place.uri, where=OUTPUT)
                return copy, number

            waiting = iter(parts)
            ahead = deque(pool.submit(fetch, *one) for one in islice(waiting, AHEAD))
            while ahead:
                found = ahead.popleft().result()
                yield found
                found[0].unlink()
                ahead.extend(pool.submit(fetch, *one) for one in islice(waiting, 1))

    def write_failed(self, shards: int) -> int:
        """The list of what could not be used, in order, where there is any; its length."""
        number = 0
        with self.writing(FAILED) as draft, draft.open("w") as file:
            for part in self.summaries(range(shards)):
                for failure in part.failed if part is not None else ():
                    file.write((",\n" if number else "[\n") + json.dumps(asdict(failure)))
                    number += 1
            file.write("\n]\n" if number else "[]\n")
        if not number:
            self._remove(FAILED)
        return number

    @property
    def shown(self) -> str:
        return str(self.place.local or self.place.uri)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local file to fill, which gets its name in this folder when it is whole."""
        target = self.place.join(name)
        if target.local is None:
            with tempfile.TemporaryDirectory(prefix="writing-") as temporary:
                draft = Path(temporary) / "draft"
                yield draft
                retrying(
                    lambda: target.filesystem.put_file(str(draft), target.path),
                    target.uri, where=OUTPUT,
                )  # fmt: skip
            return
        parts = self.place.join(PARTS).local
        assert parts is not None
        parts.mkdir(parents=True, exist_ok=True)
        draft = parts / f".{uuid.uuid4().hex}"
        try:
            yield draft
            target.local.parent.mkdir(parents=True, exist_ok=True)
            os.replace(draft, target.local)
        finally:
            draft.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as draft:
            draft.write_bytes(content)

    def finish(self, report: Mapping[str, Any]) -> None:
        """All else is written: from now on it is finished, and the parts go."""
        self.write(REPORT, json.dumps(report, indent=1).encode())
        self.remove_parts()

    def remove_parts(self) -> None:
        self._remove(PARTS)

    def has(self, name: str) -> bool:
        path = f"{self.place.path}/{name}"
        return bool(retrying(lambda: self.place.filesystem.exists(path), path, where=OUTPUT))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Two processes must not finish the same prediction. Goes with the process, even killed.

        Only a local folder knows locks, and not each of them.

        Raises:
            StorageError: the folder cannot be written.
            ConfigError: another process is at it.
        """
        check_writable(self.place, OUTPUT)
        local = self.place.local
        if local is None:
            yield
            return
        path = local / ".lock"
        with self._locked(path) as file:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _locked(self, path: Path) -> TextIO:
        """The file, locked; who was there before may have removed it since it was opened."""
        while True:
            file = path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return file
                with file:
                    if not isinstance(error, BlockingIOError):
                        raise
                    file.seek(0)
                    raise ConfigError(
                        OUTPUT, "a folder that no other prediction writes",
                        f"{self.place.uri}, written by process {file.read().strip()}",
                        "wait for it, stop it, or give another --output",
                    ) from None  # fmt: skip
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
            file.close()

    def _clear(self) -> None:
        """Only what a prediction writes. The plan goes last: until then it is one.

        Parts go before what was drawn: a part that is committed has its pictures.
        """
        for name in (REPORT, PARTS, "detections.json", "detections.parquet", FAILED, DRAWN, PLAN):
            self._remove(name)

    def _remove(self, name: str) -> None:
        path = f"{self.place.path}/{name}"
        with suppress(FileNotFoundError):
            retrying(lambda: self.place.filesystem.rm(path, recursive=True), path, where=OUTPUT)

    def _json(self, name: str) -> dict[str, Any] | None:
        """None: not there. Raises ValueError: no object in json."""
        try:
            found = json.loads(self._read(name))
        except FileNotFoundError:
            return None
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found

    def _read(self, name: str) -> bytes:
        place = self.place.join(name)
        content: bytes = retrying(
            lambda: place.filesystem.cat_file(place.path), place.uri, where=OUTPUT
        )
        return content


def rows_name(number: int) -> str:
    return f"{number:08d}.jsonl"


def summary_name(number: int) -> str:
    return f"{number:08d}.json"


def _is_summary(name: str) -> bool:
    return name.endswith(".json") and name[:-5].isdigit()


def _differences(plan: Mapping[str, Any], known: Mapping[str, Any], different: list[str]) -> str:
    """What was there, for what is asked now."""
    parts = [
        f"{name} {known.get(name)} (now {plan.get(name)})"
        if not str(name).endswith("sha256")
        else f"other {name.removesuffix('_sha256').replace('_', ' ')}"
        for name in different
    ]
    return ", ".join(parts)
