"""Images to look at, wherever they lie: files, folders, globs, fsspec URLs; videos among them."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar, overload

from orchestrator.errors import DataError, StorageError, UserError
from orchestrator.storage.filesystems import Place, open_place, reason
from orchestrator.storage.listing import Found, is_pattern, match, split_pattern, walk
from orchestrator.storage.retry import retrying

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2",
)  # fmt: skip
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".wmv", ".flv")
SUFFIXES = IMAGE_SUFFIXES + VIDEO_SUFFIXES
READERS = 8
PATIENCE_S = 60.0
TELL_EVERY = 10_000  # files found
MOST_DIGITS = 18  # that a 64-bit number surely holds

Content = TypeVar("Content")


@dataclass(frozen=True)
class ImageFile:
    """name: below the folder that was given, else the file's own; place: the file."""

    name: str
    place: Place

    @property
    def is_video(self) -> bool:
        return is_video(self.name)

    def read(self) -> bytes:
        """Raises DataError: missing or unreadable; StorageError: a storage that stays away."""
        what = f"image {self.place.uri}"
        try:
            if self.place.local is not None:
                return self.place.local.read_bytes()
            data: bytes = fetch(
                self.place, what, lambda: self.place.filesystem.cat_file(self.place.path)
            )
        except OSError as error:
            raise DataError(what, "a file that can be read", reason(error), "correct it") from None
        return data


def fetch(place: Place, what: str, work: Callable[[], Content]) -> Content:
    """`work()`, which gets a remote file.

    Raises:
        DataError: the file is archived, which concerns no other. StorageError: as `retrying`.
        FileNotFoundError
    """

    def get() -> Content:
        try:
            return work()
        except PermissionError as error:
            answer = getattr(error.__cause__, "response", None) or {}
            if answer.get("Error", {}).get("Code") == "InvalidObjectState":
                raise DataError(
                    what, "an object that is not archived", reason(error),
                    "restore it or take it out",
                ) from None  # fmt: skip
            raise

    return retrying(get, place.uri, where="IMAGES", retry_for_s=PATIENCE_S)


def is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES)


@dataclass(frozen=True)
class _Root:
    """Where files were found. protocol: what their URLs begin with, "" for a path.

    whole: a file is named by its path below here, not by its last part alone.
    """

    protocol: str
    filesystem: Any
    folder: str
    whole: bool

    def image(self, path: str) -> ImageFile:
        full = self.path(path)
        name = path if self.whole else path.rpartition("/")[2]
        return ImageFile(name, Place(self.protocol + full, self.filesystem, full))

    def path(self, path: str) -> str:
        return f"{self.folder.rstrip('/')}/{path}" if self.folder else path


class ImageList(Sequence[ImageFile]):
    """Files by position, of which only the names are held: about 150 bytes each.

    sha256: of all paths and sizes in their order.
    """

    def __init__(self) -> None:
        self.roots: list[_Root] = []
        self._owners = array("L")
        self._paths: list[str] = []
        self._digest = hashlib.sha256()

    def add(self, owner: int, path: str, size: int) -> None:
        self._owners.append(owner)
        self._paths.append(path)
        root = self.roots[owner]
        line = f"{root.protocol}{root.path(path)}\0{size}\n"
        self._digest.update(line.encode(errors="surrogateescape"))

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, position: int) -> ImageFile: ...
    @overload
    def __getitem__(self, position: slice) -> list[ImageFile]: ...
    def __getitem__(self, position: int | slice) -> ImageFile | list[ImageFile]:
        if isinstance(position, slice):
            return [self[one] for one in range(*position.indices(len(self)))]
        return self.roots[self._owners[position]].image(self._paths[position])

    def names(self) -> Iterator[str]:
        for owner, path in zip(self._owners, self._paths, strict=True):
            yield path if self.roots[owner].whole else path.rpartition("/")[2]

    def local_folders(self, most: int = 100) -> list[str]:
        """Folders of this machine, or that it shares, that files were found in."""
        return [root.folder for root in self.roots if not root.protocol][:most]


def list_images(
    sources: Iterable[str],
    tell: Callable[[int], None] | None = None,
    without: Place | None = None,
) -> ImageList:
    """Every image and video once, in the order given, a folder's by path.

    A folder (or prefix) is searched to its bottom for files with a known suffix; a file that is named
    itself is taken whatever it is called. tell: how many were found, now and then. without: a folder
    whose files are left out.

    Raises:
        DataError: a source without an image. StorageError: one that cannot be listed.
    """
    sources = list(sources)
    images, roots = ImageList(), dict[_Root, int]()
    seen: set[str] | None = set() if len(sources) > 1 else None
    for source in sources:
        place, any_there = open_place(source, "IMAGES"), False
        try:
            for root, path, size in _below(place, without):
                any_there = True
                if seen is not None:
                    full = root.path(path)
                    if full in seen:
                        continue
                    seen.add(full)
                if root not in roots:
                    roots[root] = len(images.roots)
                    images.roots.append(root)
                images.add(roots[root], path, size)
                if tell is not None and len(images) % TELL_EVERY == 0:
                    tell(len(images))
        except UserError:
            raise
        except Exception as error:  # each filesystem has its own exceptions
            raise StorageError(
                "IMAGES", "to list them", f"{source} ({reason(error)})",
                "correct it, or check the credentials",
            ) from None  # fmt: skip
        if not any_there:
            raise DataError(
                "IMAGES", "image or video files, folders with some, or globs", f"none at {source}",
                f"correct it; known suffixes: {', '.join(SUFFIXES)}",
            )  # fmt: skip
    return images


def _below(place: Place, without: Place | None) -> Iterator[tuple[_Root, str, int]]:
    """(where, path below it, size) of a source's files."""
    filesystem, path = place.filesystem, place.path
    protocol, sign, _ = place.uri.partition("://")
    prefix = protocol + sign if sign and place.local is None else ""
    if filesystem.isfile(path):
        folder, _, name = path.rpartition("/")
        root = _Root(prefix, filesystem, folder or "/", whole=False)
        if not name.startswith(_left_out(root, without)):
            yield root, name, int(filesystem.size(path) or 0)
        return
    found: Iterator[Found]
    if is_pattern(path) and not filesystem.exists(path):
        folder, pattern = split_pattern(path)
        if place.local is not None and not os.path.isdir(folder or "/"):
            return
        root = _Root(prefix, filesystem, folder or ("/" if place.local else ""), whole=False)
        found = match(filesystem, folder, pattern)
    else:
        if place.local is not None and not os.path.isdir(path):
            return
        root = _Root(prefix, filesystem, path, whole=True)
        found = walk(filesystem, path)
    left_out = _left_out(root, without)
    for name, size in found:
        if name.lower().endswith(SUFFIXES) and not name.startswith(left_out):
            yield root, name, size


def _left_out(root: _Root, without: Place | None) -> tuple[str, ...]:
    """What the paths below a root begin with that lie in `without`: "" where all do; () where none."""
    if without is None or root.filesystem != without.filesystem:
        return ()
    folder, inner = root.folder, without.path
    if without.local is not None:
        folder, inner = os.path.realpath(folder), os.path.realpath(inner)
    folder, inner = f"{folder.strip('/')}/".lstrip("/"), f"{inner.strip('/')}/"
    if inner.startswith(folder):
        return (inner[len(folder) :],)
    return ("",) if folder.startswith(inner) else ()


def image_ids(images: ImageList) -> tuple[Sequence[int], str]:
    """Numbers for COCO's image_id, and what they are: the file names' if all are different numbers."""
    numbers = array("q")
    for name in images.names():
        stem = PurePosixPath(name).stem
        if not (stem.isascii() and stem.isdigit() and len(stem) <= MOST_DIGITS) or is_video(name):
            break
        numbers.append(int(stem))
    if len(numbers) == len(images) and len(set(numbers)) == len(numbers):
        return numbers, "the file name's number"
    return range(1, len(images) + 1), "a running number"


def read_batches(
    images: Iterable[ImageFile], size: int
) -> Iterator[list[tuple[ImageFile, bytes | DataError]]]:
    """The bytes of `size` images at a time, read side by side; in place of some, what was wrong.

    The next ones are read while these are looked at.

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

        def begin() -> list[Future[tuple[ImageFile, bytes | DataError]]]:
            return [pool.submit(read, image) for image in islice(waiting, size)]

        ahead = begin()
        while ahead:
            batch, ahead = ahead, begin()
            yield [one.result() for one in batch]
