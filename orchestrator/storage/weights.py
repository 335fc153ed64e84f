"""Weights to start from, wherever they lie, as a local path."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.network.effdet_format import PUBLISHED, download
from model.training.state import META
from orchestrator.errors import ConfigError, StorageError, nearest
from orchestrator.storage.filesystems import open_place, reason

WHERE = "model.init"


@contextmanager
def open_initial(source: str, where: str = WHERE) -> Iterator[Path]:
    """A checkpoint folder or weight file by path, URI or effdet's name; a remote one is a copy.

    Raises:
        ConfigError, StorageError: it is not there.
    """
    if source in PUBLISHED:
        yield download(source)
        return
    place = open_place(source, where)
    if place.local is not None:
        if not place.local.exists():
            raise ConfigError(
                where, "a path, a URI or a name that effdet published", repr(source),
                nearest(source, PUBLISHED),
            )  # fmt: skip
        yield place.local
        return
    with tempfile.TemporaryDirectory(prefix="initial-") as temporary:
        copy = Path(temporary) / place.path.rsplit("/", 1)[-1]
        try:
            if place.filesystem.exists(f"{place.path}/{META}"):
                place.filesystem.get(place.path, str(copy), recursive=True)
            else:
                place.filesystem.get_file(place.path, str(copy))
        except Exception as error:  # each filesystem has its own exceptions
            raise StorageError(
                where, "a checkpoint or weight file", f"{source} ({reason(error)})",
                "correct the URI, or check the credentials",
            ) from None  # fmt: skip
        yield copy
