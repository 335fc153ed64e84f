"""One door to every place: a local path or any fsspec URL.

s3:// takes its endpoint from AWS_ENDPOINT_URL and its credentials from the usual chain; neither is
ever part of a configuration. The listing cache is off: it hides what other processes write.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from s3fs import S3FileSystem
from upath import UPath

from orchestrator.errors import StorageError

CONNECT_TIMEOUT_S, READ_TIMEOUT_S, ATTEMPTS = 5, 30, 3
PROBE_TIMEOUT_S = 20.0

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A folder on some filesystem. uri: as the user wrote it; path: as the filesystem takes it."""

    uri: str
    filesystem: Any
    path: str

    @property
    def local(self) -> Path | None:
        """The folder as a local path, None if it is remote."""
        return Path(self.path) if isinstance(self.filesystem, LocalFileSystem) else None

    def join(self, name: str) -> Place:
        return Place(f"{self.uri.rstrip('/')}/{name}", self.filesystem, f"{self.path}/{name}")


def open_place(uri: str, where: str) -> Place:
    """Connects to nothing yet.

    Raises:
        StorageError: a protocol that fsspec does not know.
    """
    protocol, sign, rest = uri.partition("://")
    if not sign:
        return Place(uri, LocalFileSystem(), str(Path(uri).absolute()))
    if protocol == "file":
        return Place(uri, LocalFileSystem(), str(Path(rest).absolute()))
    try:
        filesystem = fsspec.filesystem(protocol, **_options(protocol))
    except (ValueError, ImportError) as error:
        raise StorageError(where, "a path or a URL fsspec knows", uri, str(error)) from None
    return Place(uri, filesystem, rest.rstrip("/"))


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("s3", "s3a"):
        return {}
    return {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"max_attempts": ATTEMPTS, "mode": "standard"},
        },
    }


def open_path(uri: str, where: str) -> Path:
    """A local path, or one on any filesystem that fsspec knows, with pathlib's methods.

    Raises:
        StorageError: a protocol that fsspec does not know.
    """
    place = open_place(uri, where)
    if place.local is not None:
        return Path(uri.removeprefix("file://")).expanduser()
    protocol = uri.partition("://")[0]
    return cast(Path, UPath(uri, **_options(protocol)))


def is_remote(path: Path) -> bool:
    return isinstance(path, UPath)


def check_writable(place: Place, where: str) -> None:
    """Write, read back and remove a small object.

    Raises:
        StorageError: naming the place and the cause.
    """
    probe = f"{place.path}/.probe-{uuid.uuid4().hex}"

    def write_and_read() -> bytes:
        if place.local is not None:
            place.local.mkdir(parents=True, exist_ok=True)
        place.filesystem.pipe_file(probe, b"probe")
        found: bytes = place.filesystem.cat_file(probe)
        place.filesystem.rm_file(probe)
        return found

    try:
        found = within(PROBE_TIMEOUT_S, write_and_read)
    except Exception as error:  # each filesystem has its own exceptions
        raise StorageError(where, "a place to write", f"{place.uri} ({reason(error)})", _remedy(place)) from None  # fmt: skip
    if found != b"probe":
        raise StorageError(where, "a place that keeps what is written", place.uri, _remedy(place))


def abandon_uploads(place: Place) -> int:
    """Abort the unfinished multipart uploads below a place; how many there were.

    Their parts are invisible but cost money until they are aborted. A server that does not know
    multipart uploads has none.
    """
    if not isinstance(place.filesystem, S3FileSystem):
        return 0
    bucket, _, prefix = place.path.partition("/")
    call = place.filesystem.call_s3
    found = call("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/").get("Uploads") or []
    for upload in found:
        call(
            "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
        )
    return len(found)


def within(timeout_s: float, work: Callable[[], T]) -> T:
    """`work()`, or TimeoutError. A server that accepts and never answers holds only a daemon thread."""
    box: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            box.append(work())
        except BaseException as error:  # handed to the caller's thread
            raised.append(error)

    thread = threading.Thread(target=run, name="probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if raised:
        raise raised[0]
    if not box:
        raise TimeoutError(f"no answer in {timeout_s:g} s")
    return box[0]


def reason(error: BaseException) -> str:
    """One line of an exception, whatever library it comes from."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]


def _remedy(place: Place) -> str:
    if place.local is not None:
        return "choose a folder you may write to (--output)"
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if place.uri.startswith("s3"):
        at = f"at {endpoint}" if endpoint else "(AWS_ENDPOINT_URL is not set)"
        return f"check that the bucket exists {at} and that the credentials may write to it"
    return "check the URL and the credentials"
