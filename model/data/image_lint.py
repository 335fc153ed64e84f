"""Looking at image files: there, readable, of the size that was annotated, seen before."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PosixPath, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.data.annotations import RawAnnotations
from model.data.dataset import Reader
from model.data.findings import Finding, finding
from model.data.transforms import decode_image

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
)
EXIF_ORIENTATION = 0x0112
HASH_SIDE = 8
READERS, AT_ONCE = 4, 64
USUAL_MODES = ("RGB",)


@dataclass(frozen=True)
class Look:
    """One file. trouble: why it cannot be used; size_wh: as it is shown, after EXIF rotation."""

    name: str
    digest: bytes = b""
    size_bytes: int = 0
    size_wh: tuple[int, int] = (0, 0)
    mode: str = ""
    rotated: bool = False
    visual: tuple[int, int] = (0, 0)
    missing: bool = False
    trouble: str = ""


@dataclass(frozen=True)
class Looks:
    """What was seen of a split's images. names: of all its files.

    digests: of those that were read, and sizes_bytes; hashes uint64 [n, 2] of `hashed`, those that
    were decoded.
    """

    names: Sequence[str]
    looked_at: int = 0
    digests: dict[str, bytes] = field(default_factory=dict)
    sizes_bytes: dict[str, int] = field(default_factory=dict)
    hashed: list[str] = field(default_factory=list)
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), np.uint64))


def choose(number: int, most: int | None) -> NDArray[np.int64]:
    """Positions of up to `most` of `number` images, spread evenly; all where None."""
    wanted = number if most is None else min(number, most)
    return np.unique(np.linspace(0, number - 1, wanted).astype(np.int64))


def look_at(
    raw: RawAnnotations, read: Reader, where: str, *, most: int | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Looks, list[Finding]]:  # fmt: skip
    """Read and decode images in full, those that are there; most: so many, spread evenly, or all.

    progress: called with the number looked at so far.
    """
    chosen = choose(len(raw), most)
    digests: dict[str, bytes] = {}
    sizes_bytes: dict[str, int] = {}
    hashed: list[str] = []
    hashes: list[tuple[int, int]] = []
    damaged: list[str] = []
    sizes: list[str] = []
    turned: list[str] = []
    modes: dict[str, list[str]] = {}
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        for start in range(0, len(chosen), AT_ONCE):  # not all at once: results would pile up
            part = [int(image) for image in chosen[start : start + AT_ONCE]]
            names = [raw.file_names[image] for image in part]
            for image, seen in zip(
                part, pool.map(lambda name: look(name, read), names), strict=True
            ):
                if seen.missing:  # `lint_files` knows of all of them
                    continue
                if seen.trouble:
                    damaged.append(f"{seen.name} ({seen.trouble})")
                    continue
                digests[seen.name], sizes_bytes[seen.name] = seen.digest, seen.size_bytes
                hashed.append(seen.name)
                hashes.append(seen.visual)
                height, width = raw.sizes_hw[image]
                if (width, height) != seen.size_wh:
                    sizes.append(f"{seen.name} is {seen.size_wh[0]} x {seen.size_wh[1]}, "
                                 f"annotated {width:g} x {height:g}")  # fmt: skip
                if seen.rotated:
                    turned.append(seen.name)
                if seen.mode not in USUAL_MODES:
                    modes.setdefault(seen.mode, []).append(seen.name)
            if progress is not None:
                progress(start + len(part))
    looks = Looks(
        raw.file_names, len(chosen), digests, sizes_bytes, hashed,
        np.array(hashes, np.uint64).reshape(-1, 2),
    )  # fmt: skip
    return looks, [
        *finding("error", "damaged", where, "images that cannot be read", damaged,
                 "replace them, or take them out of the json"),
        *finding("error", "other-size", where, "images of another size than annotated", sizes,
                 "annotate images as they are shown, after EXIF rotation; or scale the boxes"),
        *finding("note", "rotated", where, "images that EXIF turns", turned,
                 "training turns them as viewers do; was the annotation tool one of those?"),
        *[one for mode, names in modes.items()
          for one in finding("note", "mode", where, f"images of mode {mode}, not RGB", names,
                             "they are converted; transparency becomes the mean colour")],
    ]  # fmt: skip


def look(name: str, read: Reader) -> Look:
    """One file, as training would read it."""
    try:
        data = read(name)
    except FileNotFoundError:
        return Look(name, missing=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return Look(name, trouble=getattr(error, "strerror", None) or str(error))
    try:
        with Image.open(io.BytesIO(data)) as header:
            mode, rotated = header.mode, header.getexif().get(EXIF_ORIENTATION, 1) not in (1, 0)
        decoded = decode_image(data)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Look(name, trouble=_short(error))
    return Look(name, digest(data), len(data), decoded.size, mode, rotated, visual_hash(decoded))


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def visual_hash(image: Image.Image) -> tuple[int, int]:
    """Whether it gets lighter to the right and downwards, on an 8 x 8 grid: two words of 64 bits.

    Equal but for a few bits after saving anew or resizing.
    """
    side = HASH_SIDE
    small = np.asarray(
        image.convert("L").resize((side + 1, side + 1), Image.Resampling.BOX), np.int16
    )
    right = small[:side, 1:] > small[:side, :-1]
    down = small[1:, :side] > small[:-1, :side]
    return _word(right), _word(down)


def _word(bits: NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return "not an image" if "cannot identify" in text else text[:80] or type(error).__name__


def with_same_sizes(
    train: Looks, val: Looks, bytes_of: Mapping[str, int], read: Reader,
    progress: Callable[[int], None] | None = None,
) -> Looks:  # fmt: skip
    """`train` with digests of all files that may equal one of val that was looked at.

    Equal files have equal sizes, so only those of such a size are read. bytes_of: of train's files;
    progress: called with how many of them are done.
    """
    wanted = set(val.sizes_bytes.values())
    digests = dict(train.digests)
    for number, (name, size) in enumerate(bytes_of.items()):
        if progress is not None:
            progress(number)
        if size in wanted and name not in digests:
            try:
                digests[name] = digest(read(name))
            except (OSError, ValueError):
                continue  # whoever looks at it says so
    return replace(train, digests=digests)


def list_files(folder: Path, names: Sequence[str]) -> list[str]:
    """What lies below a folder, relative to it; only its own where no name has a folder.

    Of a local folder also `names` that are there under another spelling or in a linked folder.
    """
    deep = any("/" in name for name in names)
    entries = folder.rglob("*") if deep else folder.iterdir()
    found = {entry.relative_to(folder).as_posix() if deep else entry.name for entry in entries}
    if isinstance(folder, PosixPath):  # elsewhere there are no links, and each question takes long
        found |= {n for n in names if n not in found and os.path.isfile(folder / n)}
    return sorted(found)


def lint_files(
    raw: RawAnnotations, present: Sequence[str], others: Iterable[str], where: str
) -> list[Finding]:
    """Images that are listed and not there, and those that are there and not listed.

    present: of the folder; others: names that another split lists in the same folder.
    """
    there, named = set(present), {*raw.file_names, *others}
    listed = named | {posixpath.normpath(name) for name in named}
    missing = [name for name in raw.file_names if name not in there]
    spare = there - listed
    extra = sorted(name for name in spare if PurePosixPath(name).suffix.lower() in SUFFIXES)
    share = len(extra) / max(1, len(extra) + len(set(raw.file_names)))
    return [
        *finding("error", "missing", where, "images that are not there", missing,
                 "add them, or take them out of the json"),
        *finding("warning" if share > 0.1 else "note", "unannotated", where,
                 "images in the folder that the json does not list", extra,
                 "add them, also those without objects: as images without boxes"),
    ]  # fmt: skip
