"""Bring a dataset into the bucket: `prefetch.py --to s3://bucket/coco ARCHIVE.zip...`, or `shapes`.

Archives are read where they lie (any fsspec URL) and unpacked on the way, several files at once. What
is there with the right size is left alone, so it may be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

import fsspec

from model.data.shapes import ShapesConfig, ensure_shapes
from orchestrator.storage.filesystems import Place, open_place, reason

THREADS = 16
BLOCK_BYTES = 8 * 2**20


def sizes(place: Place) -> dict[str, int]:
    """Of what is there, by path below the place."""
    place.filesystem.invalidate_cache()
    try:
        found = place.filesystem.find(place.path, detail=True)
    except FileNotFoundError:
        return {}
    root = len(place.path.rstrip("/")) + 1
    return {str(path)[root:]: int(info["size"]) for path, info in found.items()}


def members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Files; none may point out of the folder."""
    files = [info for info in archive.infolist() if not info.is_dir()]
    for info in files:
        path = PurePosixPath(info.filename)
        if path.is_absolute() or ".." in path.parts:
            raise SystemExit(f"{info.filename}: a path that leaves the archive's folder")
    return files


def open_archive(url: str) -> zipfile.ZipFile:
    """Raises SystemExit: nothing there, or no archive."""
    try:
        return zipfile.ZipFile(fsspec.open(url, "rb", block_size=BLOCK_BYTES).open())
    except FileNotFoundError as error:  # what fsspec says of any URL that does not answer
        why = f": {reason(error.__cause__)}" if error.__cause__ else ""
        raise SystemExit(f"{url}: expected a zip archive, found nothing{why}") from None
    except zipfile.BadZipFile:
        raise SystemExit(f"{url}: expected a zip archive, got something else") from None


def unpack(url: str, place: Place, threads: int = THREADS) -> tuple[int, int]:
    """(files copied, files that were there)."""
    local = threading.local()

    def archive() -> zipfile.ZipFile:
        if not hasattr(local, "archive"):  # one reader a thread: a reader has one position
            local.archive = open_archive(url)
        opened: zipfile.ZipFile = local.archive
        return opened

    def copy(info: zipfile.ZipInfo) -> None:
        place.filesystem.pipe_file(f"{place.path}/{info.filename}", archive().read(info))

    there = sizes(place)
    files = members(archive())
    missing = [info for info in files if there.get(info.filename) != info.file_size]
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(copy, info) for info in missing]
        for number, done in enumerate(as_completed(waiting), 1):
            done.result()
            if number % 5000 == 0:
                print(f"{url}: {number} of {len(missing)}", flush=True)
    return len(missing), len(files) - len(missing)


def draw(place: Place) -> int:
    """The generated demo dataset; how many files were written."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shapes"
        ensure_shapes(root, ShapesConfig())
        there = sizes(place)
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        missing = [
            p for p in files if there.get(p.relative_to(root).as_posix()) != p.stat().st_size
        ]
        for path in missing:
            remote = f"{place.path}/{path.relative_to(root).as_posix()}"
            place.filesystem.pipe_file(remote, path.read_bytes())
    return len(missing)


def run(to: str, sources: Iterable[str]) -> None:
    place = open_place(to, "--to")
    for source in sources:
        if source == "shapes":
            print(f"shapes: {draw(place)} files written to {to}", flush=True)
        else:
            copied, kept = unpack(source, place)
            print(f"{source}: {copied} files copied to {to}, {kept} were there", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", required=True, metavar="URI")
    parser.add_argument("sources", nargs="+", metavar="ARCHIVE")
    given = parser.parse_args()
    run(given.to, given.sources)
    return 0


if __name__ == "__main__":
    sys.exit(main())
