"""Prediction as a job: images in batches -> detections.json and drawn images."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from model.drawing import draw
from model.predictor import Prediction, Predictor, read_image
from orchestrator.config.cli import PredictOptions, PredictRequest
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError, DataError
from orchestrator.launch.progress import print_table
from orchestrator.launch.resolve import output_folder
from orchestrator.records.sources import open_model
from orchestrator.records.tracker import tracking_uri
from orchestrator.storage.images import ImageFile, list_images, read_batches

DETECTIONS, DRAWN = "detections.json", "drawn"
JPEG_QUALITY = 90


@dataclass(frozen=True)
class PredictOutcome:
    """code: 0, or 1 if an image could not be used."""

    code: int
    report: dict[str, Any]


def run_predict_job(
    request: PredictRequest, options: PredictOptions, out: TextIO | None = None
) -> PredictOutcome:
    """Look at every image; a bad one is said in a line, counted and left out.

    Raises:
        UserError: no such model or images, an output that cannot be written, a storage that fails.
    """
    images = list_images(request.images)
    ids, numbered_by = image_ids([image.name for image in images])
    uri = tracking_uri(request.tracking_uri, output_folder(TrainJob())[0])
    with open_model(request.model, uri) as folder:
        predictor = Predictor.load(folder)
    began = time.monotonic()
    try:
        with _json_list(request.output / DETECTIONS) as results:
            writer = _Writer(request, results, dict(zip(images, ids, strict=True)))
            for batch in read_batches(images, request.batch_size):
                writer.add(batch, predictor)
    except OSError as error:
        raise ConfigError(
            "--output", "a folder that can be written", f"{request.output} ({error})",
            "choose another",
        ) from None  # fmt: skip
    seconds = time.monotonic() - began
    report = {
        "status": "finished",
        "model": request.model,
        "images": len(images),
        "failed": len(writer.failed),
        "detections": results.number,
        "image_ids": numbered_by,
        "output": str(request.output.absolute()),
        "img_per_s": round(len(images) / seconds, 2),
    }
    rows = [
        ("images", f"{len(images)}, {len(writer.failed)} of them could not be used"),
        ("detections", f"{results.number} above {request.score:g}; image_id is {numbered_by}"),
        ("speed", f"{report['img_per_s']} images/s on {predictor.device.type}"),
        ("output", str(request.output / DETECTIONS)),
    ]
    rows += [("drawn", f"{request.output / DRAWN}/")] if request.draw else []
    print_table(request.model, rows, out or sys.stdout)
    return PredictOutcome(1 if writer.failed else 0, report)


def image_ids(names: Sequence[str]) -> tuple[list[int], str]:
    """Numbers for COCO's image_id, and what they are: the file names' if all are different numbers."""
    stems = [PurePosixPath(name).stem for name in names]
    if all(stem.isascii() and stem.isdigit() for stem in stems):
        numbers = [int(stem) for stem in stems]
        if len(set(numbers)) == len(numbers):
            return numbers, "the file name's number"
    return list(range(1, len(names) + 1)), "a running number"


class _JsonList:
    """Rows of a json list, written as they come."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.number = file, 0

    def add(self, row: dict[str, Any]) -> None:
        self.file.write((",\n" if self.number else "\n") + json.dumps(row))
        self.number += 1


@contextmanager
def _json_list(path: Path) -> Iterator[_JsonList]:
    """The file gets its name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    with draft.open("w") as file:
        file.write("[")
        yield _JsonList(file)
        file.write("\n]\n")
    os.replace(draft, path)


@dataclass
class _Writer:
    request: PredictRequest
    results: _JsonList
    ids: dict[ImageFile, int]
    failed: list[str] = field(default_factory=list)
    drawn: set[Path] = field(default_factory=set)

    def add(self, batch: Sequence[tuple[ImageFile, bytes | DataError]], ask: Predictor) -> None:
        """Predict, write, draw."""
        readable = [(image, data) for image, data in batch if isinstance(data, bytes)]
        found = ask.predict(
            [data for _, data in readable],
            score_threshold=self.request.score,
            batch_size=self.request.batch_size,
        )
        predicted = dict(zip((image for image, _ in readable), found, strict=True))
        for image, data in batch:
            problem = data if isinstance(data, DataError) else predicted[image].problem
            if problem is not None:
                self._say(image, problem)
                continue
            assert isinstance(data, bytes)
            self._write(image, predicted[image])
            if self.request.draw:
                self._draw(image, data, predicted[image])

    def _say(self, image: ImageFile, problem: DataError) -> None:
        self.failed.append(image.name)
        where = f"image {image.place.uri}"
        said = DataError(where, problem.expected, problem.got, problem.remedy)
        print(said, file=sys.stderr, flush=True)

    def _write(self, image: ImageFile, found: Prediction) -> None:
        for box, score, category_id, name in zip(
            found.boxes_xywh.tolist(), found.scores.tolist(), found.category_ids.tolist(),
            found.names, strict=True,
        ):  # fmt: skip
            self.results.add(
                {
                    "image_id": self.ids[image],
                    "category_id": category_id,
                    "bbox": box,
                    "score": score,
                    "category": name,
                    "file_name": image.name,
                }
            )

    def _draw(self, image: ImageFile, data: bytes, found: Prediction) -> None:
        # A key of an object store may hold what would lead out of the folder.
        parts = [part for part in PurePosixPath(image.name).parts if part not in ("..", "/", ".")]
        stem = PurePosixPath(*parts).with_suffix("")
        path = self.request.output / DRAWN / f"{stem}.jpg"
        if path in self.drawn:  # the same name in another folder, or with another suffix
            path = path.with_stem(f"{path.stem}-{self.ids[image]}")
        self.drawn.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(read_image(data), found).save(path, quality=JPEG_QUALITY)
