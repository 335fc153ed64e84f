"""Records on their way to MLflow, in a local file first.

A record is a json object with its kind under "op" (see `scribe`). Appending is one system call; what
follows the sent position is still to be sent, by this process or by any later one.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

Record = Mapping[str, Any]


class Spool:
    """Append-only file of json lines beside a file with the position up to which they are sent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position_path = path.with_suffix(".sent")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end_torn_line()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._unsynced = self._torn = False
        self._lock = threading.Lock()

    def append(self, record: Record) -> None:
        """Raises OSError, TypeError, ValueError: it could not be written down."""
        line = _encoded(record) + b"\n"
        with self._lock:
            if self._torn:
                line = b"\n" + line
            self._torn = os.write(self._file, line) != len(line)  # a full disk may take a part
            self._unsynced = True
            if self._torn:
                raise OSError("no space left for a record")

    def read(self, position: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Up to `limit` whole records after `position`, and the position after them."""
        records: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            file.seek(position)
            while len(records) < limit:
                line = file.readline()
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue  # torn by a kill; its step is run and logged again
        return records, position

    def next_batch(self, position: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """As `read`: metrics that follow one another, or one record of another kind."""
        records, after = self.read(position, 1)
        if not records or records[0].get("op") != "metrics":
            return records, after
        while len(records) < limit:
            more, beyond = self.read(after, 1)
            if not more or more[0].get("op") != "metrics":
                break
            records, after = records + more, beyond
        return records, after

    def rest(self) -> bytes:
        """What is still to be sent."""
        with self.path.open("rb") as file:
            file.seek(self.position())
            return file.read()

    def adopt(self, rest: bytes) -> None:
        """Take over what another node could not send."""
        with self._lock:
            os.write(self._file, rest if rest.endswith(b"\n") else rest + b"\n")

    def position(self) -> int:
        try:
            return int(self.position_path.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def set_position(self, position: int) -> None:
        draft = self.position_path.with_suffix(".tmp")
        draft.write_text(str(position))
        os.replace(draft, self.position_path)

    def sync(self) -> None:
        """To the disk, so that not even a power cut takes it. Appending does not wait for it."""
        if self._unsynced and self._file >= 0:
            self._unsynced = False
            os.fsync(self._file)

    def close(self) -> None:
        """Later records are refused."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _end_torn_line(self) -> None:
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


def _encoded(record: Record) -> bytes:
    """json on one line. The training thread waits for it, so by the quick encoder where it can.

    That one writes null where a number is not finite, and refuses what json coerces.
    """
    try:
        line: bytes = orjson.dumps(record)
    except TypeError:
        line = b""
    return line if line and b"null" not in line else json.dumps(record).encode()
