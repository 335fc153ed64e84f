"""Files below a place, one after another in the order of their paths, however many there are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from fsspec.utils import glob_translate
from s3fs import S3FileSystem

from orchestrator.storage.retry import retrying

MAGIC = re.compile(r"[*?\[]")
UNKNOWN_SIZE = -1
PATIENCE_S = 60.0
PAGE_KEYS = 1000  # the most that S3 gives at once

Found = tuple[str, int]
"""Path below the folder that was asked for, size in bytes."""


def is_pattern(path: str) -> bool:
    return MAGIC.search(path) is not None


def split_pattern(path: str) -> tuple[str, str]:
    """The folder that has all that can match, and the pattern below it."""
    magic = MAGIC.search(path)
    assert magic is not None
    cut = path.rfind("/", 0, magic.start()) + 1
    return path[:cut].rstrip("/"), path[cut:]


def match(filesystem: Any, folder: str, pattern: str) -> Iterator[Found]:
    """The files below a folder whose path fits a pattern, where ** stands for any number of folders."""
    depth = None if "**" in pattern else pattern.count("/") + 1
    fits = re.compile(glob_translate(pattern)).match
    return ((path, size) for path, size in walk(filesystem, folder, depth) if fits(path))


def walk(filesystem: Any, folder: str, depth: int | None = None) -> Iterator[Found]:
    """All files below a folder, `depth` levels down; a folder that is a link is not entered.

    Only the names of one local folder, or of one answer of an object store, are held at a time.

    Raises:
        OSError, StorageError and what else the filesystem raises.
    """
    if "file" in _protocols(filesystem):
        return _walk_local(folder or "/", "", depth)
    if isinstance(filesystem, S3FileSystem):
        return _walk_s3(filesystem, folder, depth)
    return _walk_any(filesystem, folder, depth)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    known = filesystem.protocol
    return (known,) if isinstance(known, str) else tuple(known)


def _walk_local(folder: str, below: str, depth: int | None) -> Iterator[Found]:
    """A folder's name counts with its slash, so that the order is that of whole paths."""
    with os.scandir(folder) as scanned:
        entries = [
            (f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry)
            for entry in scanned
        ]
    for name, entry in sorted(entries, key=lambda one: one[0]):
        if not name.endswith("/"):
            if not (entry.is_symlink() and entry.is_dir()):
                yield below + name, _size(entry)
        elif depth is None or depth > 1:
            deeper = None if depth is None else depth - 1
            yield from _walk_local(entry.path, below + name, deeper)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere; who reads it is told
        return UNKNOWN_SIZE


def _walk_s3(filesystem: S3FileSystem, folder: str, depth: int | None) -> Iterator[Found]:
    """Keys come sorted, PAGE_KEYS to an answer."""
    bucket, _, key = folder.partition("/")
    prefix = f"{key}/" if key else ""
    more: dict[str, str] = {"Delimiter": "/"} if depth == 1 else {}
    while True:
        ask = partial(
            filesystem.call_s3, "list_objects_v2",
            Bucket=bucket, Prefix=prefix, MaxKeys=PAGE_KEYS, **more,
        )  # fmt: skip
        page = retrying(ask, f"s3://{folder}", where="IMAGES", retry_for_s=PATIENCE_S)
        for found in page.get("Contents", ()):
            path = found["Key"][len(prefix) :]
            if path and not path.endswith("/") and (depth is None or path.count("/") < depth):
                yield path, found["Size"]
        if not page.get("IsTruncated"):
            return
        more["ContinuationToken"] = page["NextContinuationToken"]


def _walk_any(filesystem: Any, folder: str, depth: int | None) -> Iterator[Found]:
    folder = str(filesystem._strip_protocol(folder)).rstrip("/")  # as its paths begin
    start = len(folder) + 1 if folder else 0
    found = filesystem.find(folder, maxdepth=depth, detail=True)
    for path in sorted(found):
        size = found[path].get("size")
        yield str(path)[start:], UNKNOWN_SIZE if size is None else int(size)
