"""Images to look at, wherever they lie: files, folders, globs, fsspec URLs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

from orchestrator.errors import DataError, StorageError
from orchestrator.storage.filesystems import Place, open_place, reason
from orchestrator.storage.retry import retrying

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
READERS = 8
PATIENCE_S = 60.0


@dataclass(frozen=True)
class ImageFile:
    """name: below the folder that was given, else the file's own; place: the file."""

    name: str
    place: Place

    def read(self) -> bytes:
        """Raises DataError: missing or unreadable; StorageError: a storage that stays away."""
        what = f"image {self.place.uri}"
        try:
            if self.place.local is not None:
                return self.place.local.read_bytes()
            data: bytes = retrying(
                lambda: self.place.filesystem.cat_file(self.place.path),
                self.place.uri,
                where="IMAGES",
                retry_for_s=PATIENCE_S,
            )
        except OSError as error:
            raise DataError(what, "a file that can be read", reason(error), "correct it") from None
        return data


def list_images(sources: Iterable[str]) -> list[ImageFile]:
    """Every image once, in the order given, a folder's by name.

    A folder (or prefix) is searched to its bottom for files with an image's suffix; a file that is
    named itself is taken whatever it is called.

    Raises:
        DataError: a source without an image. StorageError: one that cannot be listed.
    """
    found: dict[str, ImageFile] = {}
    for source in sources:
        place = open_place(source, "IMAGES")
        try:
            files = list(_below(place))
        except Exception as error:  # each filesystem has its own exceptions
            raise StorageError(
                "IMAGES", "to list them", f"{source} ({reason(error)})",
                "correct it, or check the credentials",
            ) from None  # fmt: skip
        if not files:
            raise DataError(
                "IMAGES", "image files, folders with some, or globs", f"none at {source}",
                f"correct it; known suffixes: {', '.join(SUFFIXES)}",
            )  # fmt: skip
        for file in files:
            found.setdefault(file.place.path, file)
    return list(found.values())


def _below(place: Place) -> Iterator[ImageFile]:
    filesystem, path = place.filesystem, place.path
    if filesystem.isfile(path):
        yield ImageFile(PurePosixPath(path).name, place)
        return
    globbed = any(sign in path for sign in "*?[") and not filesystem.exists(path)
    listed = filesystem.glob(path) if globbed else filesystem.find(path)
    for entry in sorted(str(one) for one in listed):
        pure = PurePosixPath(entry)
        if pure.suffix.lower() in SUFFIXES and (not globbed or filesystem.isfile(entry)):
            name = pure.name if globbed else str(pure.relative_to(path))
            protocol, sign, _ = place.uri.partition("://")
            uri = f"{protocol}://{entry}" if sign else entry
            yield ImageFile(name, Place(uri, filesystem, entry))


def read_batches(
    images: Iterable[ImageFile], size: int
) -> Iterator[list[tuple[ImageFile, bytes | DataError]]]:
    """The bytes of `size` images at a time, read side by side; in place of some, what was wrong.

    Raises:
        StorageError: a storage that stays away.
    """

    def read(image: ImageFile) -> tuple[ImageFile, bytes | DataError]:
        try:
            return image, image.read()
        except DataError as error:
            return image, error

    waiting = iter(images)
    with ThreadPoolExecutor(max_workers=min(size, READERS)) as pool:
        while batch := list(islice(waiting, size)):
            yield list(pool.map(read, batch))
