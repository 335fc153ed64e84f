"""Parts of a prediction -> one file of COCO results, or a table. Memory does not grow with them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.config.predict_cli import ResultFormat

CHUNK_BYTES = 2**20
ROW_GROUP = 100_000
IMAGE_ID = re.compile(rb'^\{"image_id": (\d+)', re.MULTILINE)

Rows = tuple[Path, int]
"""A file with a row on each line, and what is added to each image_id in it."""


def merge(parts: Iterable[Rows], target: Path, form: ResultFormat) -> None:
    """The rows of all parts in their order."""
    (_to_json if form == "json" else _to_parquet)(parts, target)


def _to_json(parts: Iterable[Rows], target: Path) -> None:
    with target.open("wb") as out:
        before = b"[\n"
        for lines in _lines(parts):
            out.write(before + lines[:-1].replace(b"\n", b",\n"))
            before = b",\n"
        out.write(b"[\n]\n" if before == b"[\n" else b"\n]\n")


def _lines(parts: Iterable[Rows]) -> Iterator[bytes]:
    """Whole lines, about CHUNK_BYTES at a time."""
    for path, offset in parts:
        with path.open("rb") as file:
            while chunk := b"".join(file.readlines(CHUNK_BYTES)):
                yield _shifted(chunk, offset) if offset else chunk


def _shifted(lines: bytes, offset: int) -> bytes:
    return IMAGE_ID.sub(lambda found: b'{"image_id": %d' % (int(found[1]) + offset), lines)


def _to_parquet(parts: Iterable[Rows], target: Path) -> None:
    """Columns image_id, file_name, frame, time_s, category_id, category, score, x, y, width, height."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.json
    import pyarrow.parquet

    text, whole, real = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
    read = pyarrow.schema(
        {
            "image_id": whole, "file_name": text, "frame": whole, "time_s": real,
            "category_id": whole, "category": text, "score": real, "bbox": pyarrow.list_(real),
        }
    )  # fmt: skip
    sides = ("x", "y", "width", "height")
    written = pyarrow.schema([*(f for f in read if f.name != "bbox"), *((s, real) for s in sides)])
    options = pyarrow.json.ParseOptions(explicit_schema=read, unexpected_field_behavior="error")

    def table(lines: bytes) -> Any:
        found = pyarrow.json.read_json(io.BytesIO(lines), parse_options=options)
        columns = [found[name] for name in written.names if name not in sides]
        boxes = found["bbox"].combine_chunks()
        columns += [pyarrow.compute.list_element(boxes, side) for side in range(len(sides))]
        return pyarrow.table(columns, schema=written)

    with pyarrow.parquet.ParquetWriter(target, written, compression="zstd") as out:
        waiting: list[Any] = []
        for lines in _lines(parts):
            waiting.append(table(lines))
            if sum(len(one) for one in waiting) >= ROW_GROUP:
                out.write_table(pyarrow.concat_tables(waiting))
                waiting = []
        if waiting:
            out.write_table(pyarrow.concat_tables(waiting))
