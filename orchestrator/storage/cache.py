"""Remote files, once on each node.

    <folder>/<hash>/<hash>        an image, under its place and its name: a name may hold ".."
    <folder>/whole/<hash>         an annotation file, under its address, version and size

A file appears under its name only when it is whole (written beside it, then renamed), so processes
need no lock to read it. The folder is kept below a size by dropping what was not used for longest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.storage.retry import RETRY_FOR_S, retrying

READERS = 16  # images on their way at once
LOOK_EVERY = 64  # files written by this process between two looks at the cache's size


@dataclass
class NodeCache:
    """Files of remote places in a local folder of at most `limit_bytes`."""

    folder: Path
    limit_bytes: int
    written: int = 0

    def image(self, place: Path, name: str, retry_for_s: float = RETRY_FOR_S) -> bytes:
        """Content of place/name. A name stands for one content: new images need a new place.

        Raises:
            OSError: there is no such file.
            StorageError: the place does not answer.
        """
        kept = self.folder / _hash(str(place)) / _hash(name)
        with suppress(OSError):
            data = kept.read_bytes()
            os.utime(kept)
            if data:  # a machine that lost power may have kept the name without the content
                return data
        data = fetch(place / name, retry_for_s)
        self._keep(kept, data)
        return data

    def has(self, place: Path, name: str) -> bool:
        return (self.folder / _hash(str(place)) / _hash(name)).exists()

    def whole(self, path: Path) -> bytes:
        """Content of an annotation file as it is now; one process of the node fetches it.

        Raises:
            OSError, StorageError: as for `image`.
        """
        stat = retrying(path.stat, str(path))
        version = getattr(stat, "_info", {}).get("ETag") or stat.st_mtime
        kept = self.folder / "whole" / _hash(f"{path} {version} {stat.st_size}")
        with self._locked(kept.with_suffix(".lock")):
            with suppress(OSError):
                data = kept.read_bytes()
                if len(data) == stat.st_size:
                    os.utime(kept)
                    return data
            data = fetch(path)
            self._keep(kept, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        """A cache that cannot be written costs time, not the run."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=path.parent, prefix=".part-", delete=False
            ) as file:
                try:
                    file.write(data)
                    file.close()
                    os.replace(file.name, path)
                except OSError:
                    os.unlink(file.name)
                    raise
        except OSError:
            pass
        self.written += 1  # or tried: a full disk must not cost a look at every file
        if self.written % LOOK_EVERY == 1:
            self.shrink()

    def shrink(self) -> None:
        """Below nine tenths of the limit if it is exceeded; not while another process does it."""
        with suppress(OSError), self._locked(self.folder / "shrink.lock", wait=False):
            files = [p for p in self.folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
            stats = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in files)
            total = sum(size for _, size, _ in stats)
            if total <= self.limit_bytes:
                return
            for _, size, path in stats:
                path.unlink(missing_ok=True)
                total -= size
                if total <= 0.9 * self.limit_bytes:
                    return

    @contextmanager
    def _locked(self, path: Path, *, wait: bool = True) -> Iterator[None]:
        """Across processes. Without `wait` BlockingIOError where somebody has the lock."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield


@dataclass
class CachedReader:
    """`read(name)` for `model.data`; picklable, for loader processes."""

    place: Path
    cache: NodeCache
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False, compare=False)

    def __call__(self, name: str) -> bytes:
        return self.cache.image(self.place, name)

    def ahead(self, names: Sequence[str]) -> None:
        """Begin to fetch images that will soon be asked for, READERS at a time; returns at once."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead")
        for name in names:
            if not self.cache.has(self.place, name):
                self._pool.submit(self._fetch, name)

    def _fetch(self, name: str) -> None:
        with suppress(OSError, StorageError):  # whoever asks for the image will be told
            self.cache.image(self.place, name, retry_for_s=0.0)

    def close(self) -> None:
        """Fetch nothing any more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None}


def fetch(path: Path, retry_for_s: float = RETRY_FOR_S) -> bytes:
    return retrying(path.read_bytes, str(path), retry_for_s=retry_for_s)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
