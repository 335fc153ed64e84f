"""Prediction as a job: images in shards -> parts, committed one by one -> one file of results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TextIO, cast

from orchestrator.config.predict_cli import PredictOptions, PredictRequest
from orchestrator.config.schema import RunConfig, TrainJob
from orchestrator.errors import GaveUpError
from orchestrator.launch.crew import Crew
from orchestrator.launch.fleet import work_through
from orchestrator.launch.packed_model import PackedModel
from orchestrator.launch.predict_plan import Shards, draws, plan_of, threads_of
from orchestrator.launch.predict_progress import PredictProgress
from orchestrator.launch.predict_worker import Looker
from orchestrator.launch.progress import Row, print_table
from orchestrator.launch.resolve import output_folder
from orchestrator.launch.signals import interruptible
from orchestrator.records.sources import open_model
from orchestrator.records.tracker import tracking_uri
from orchestrator.storage.filesystems import open_place
from orchestrator.storage.images import list_images
from orchestrator.storage.merging import merge
from orchestrator.storage.predictions import DRAWN, FAILED, OUTPUT, Part, PredictionFolder
from orchestrator.storage.videos import Every

FEW_IMAGES = 32
SAID_FAILURES = 100


@dataclass(frozen=True)
class PredictOutcome:
    """code: 0; 1 if an image could not be used, or workers died too often."""

    code: int
    report: dict[str, Any]


def run_predict_job(
    request: PredictRequest, options: PredictOptions, out: TextIO | None = None
) -> PredictOutcome:
    """Look at every image; a bad one is said in a line, counted and left out.

    What an interrupted prediction of the same plan has done is not done again.

    Raises:
        UserError: no such model or images, an output that cannot be written, a storage that fails.
    """
    out = out or sys.stdout
    every = Every(request.frames_every, request.every_s)
    crew = _crew(request)
    uri = tracking_uri(request.tracking_uri, output_folder(TrainJob())[0])
    with open_model(request.model, uri) as checkpoint:
        model = PackedModel.of(checkpoint)
    folder = PredictionFolder(open_place(_output(request), OUTPUT))
    with folder.alone():
        images = list_images(
            request.images,
            tell=lambda n: print(f"found {n} images …", file=out),
            without=folder.place.join(DRAWN),  # where the output lies below the images
        )
        shards = Shards(images, request.batch_size, draw=draws(request, images))
        plan = plan_of(request, shards, model)
        folder.begin(plan, fresh=options.fresh)
        job = _Prediction(request, shards, folder, out)
        known = folder.report()
        if known is not None and folder.has(job.results):
            folder.remove_parts()
            print("finished before: nothing is left to do; --fresh predicts anew", file=out)
            return job.conclude(known)
        looker = Looker(
            model, folder, plan, tuple(images.local_folders()), request.score,
            request.batch_size, every, use_gpu=False if request.gpus_per_worker == 0 else None,
        )  # fmt: skip
        if crew.workers is None and len(images) <= FEW_IMAGES and not os.environ.get("RAY_ADDRESS"):
            crew = replace(crew, workers=0)
        return job.run(looker, crew)


class _Prediction:
    """The driver's part of one prediction."""

    def __init__(
        self, request: PredictRequest, shards: Shards, folder: PredictionFolder, out: TextIO
    ) -> None:
        self.request, self.shards, self.folder, self.out = request, shards, folder, out
        self.results = f"detections.{request.format}"

    def run(self, looker: Looker, crew: Crew) -> PredictOutcome:
        done = self.folder.done()
        if done:
            print(
                f"goes on: {len(done)} of {len(self.shards)} shards are there already",
                file=self.out,
            )
        began = time.monotonic()
        progress = PredictProgress(
            images=len(self.shards.images),
            done=sum(self.shards.files(number) for number in done),
            frames=self.shards.shifted, stream=self.out,
        )  # fmt: skip
        try:
            with interruptible():
                self._look(looker, crew, progress, done)
        except GaveUpError as error:
            progress.close()
            print(f"failed: {error}\n{error.cause}", file=sys.stderr, flush=True)
            return self._unfinished("failed", done)
        except KeyboardInterrupt:
            progress.close()
            return self._unfinished("interrupted", done, code=130)
        finally:
            progress.close()
        seconds = time.monotonic() - began
        report = self._merge(done)
        report["img_per_s"] = round(progress.looked_at / seconds, 2)
        self.folder.finish(report)
        return self.conclude(report)

    def _look(
        self, looker: Looker, crew: Crew, progress: PredictProgress, done: dict[int, Part]
    ) -> None:
        """done: is added to."""
        said = 0
        working = work_through(self.shards.without(done), looker, crew, say=progress.say)
        with closing(cast("Any", working)):
            for shard, part in working:
                done[part.number] = replace(part, failed=())
                for failure in part.failed:
                    said += 1
                    if said <= SAID_FAILURES:
                        print(failure.problem, file=sys.stderr, flush=True)
                    elif said == SAID_FAILURES + 1:
                        print(f"more of them will be in {FAILED}", file=sys.stderr, flush=True)
                progress.add(len(shard.items), part)

    def _merge(self, done: Mapping[int, Part]) -> dict[str, Any]:
        """All parts into one file, in order; what is to be said of them."""
        with self.folder.writing(self.results) as draft:
            merge(self.folder.all_rows(self._offsets(done)), draft, self.request.format)
        failed = self.folder.write_failed(len(self.shards))
        images = sum(part.images for part in done.values())
        return {
            "status": "finished",
            "model": self.request.model,
            "images": images,
            "failed": failed,
            "detections": sum(part.detections for part in done.values()),
            "image_ids": self.shards.numbered_by,
            "devices": sorted({part.device for part in done.values()}),
            "output": self.folder.shown,
        }

    def _offsets(self, done: Mapping[int, Part]) -> Iterator[tuple[int, int]]:
        """(shard, what its image_ids are raised by)."""
        first = 1
        for number in range(len(self.shards)):
            yield number, first if self.shards.shifted else 0
            first += done[number].images

    def _unfinished(self, status: str, done: Mapping[int, Part], code: int = 1) -> PredictOutcome:
        left = len(self.shards) - len(done)
        print(
            f"{status}: the same command goes on with the {left} of {len(self.shards)} shards left",
            file=self.out,
        )
        return PredictOutcome(
            code,
            {
                "status": status,
                "shards": len(self.shards),
                "shards_done": len(done),
                "output": self.folder.shown,
            },
        )

    def conclude(self, report: Mapping[str, Any]) -> PredictOutcome:
        """The table at the end."""
        devices = ", ".join(report["devices"])
        numbered_by, failed = report["image_ids"], report["failed"]
        rows: list[Row] = [
            ("images", f"{report['images']}; files that could not be used: {failed}"),
            (
                "detections",
                f"{report['detections']} above {self.request.score:g}; image_id is {numbered_by}",
            ),
            ("speed", f"{report['img_per_s']:g} images/s on {devices}"),
            ("output", f"{self.folder.shown}/{self.results}"),
        ]
        rows += [("drawn", f"{self.folder.shown}/{DRAWN}/")] if self.shards.draw else []
        rows += [("failed", f"{self.folder.shown}/{FAILED}")] if failed else []
        print_table(self.request.model, rows, self.out)
        return PredictOutcome(1 if failed else 0, dict(report))


def _crew(request: PredictRequest) -> Crew:
    """Raises ConfigError: one that cannot be."""
    return Crew(
        workers=request.workers,
        cpus_per_worker=request.cpus_per_worker,
        gpus_per_worker=request.gpus_per_worker,
        threads=threads_of(request),
        max_failures=request.max_failures,
    )


def _output(request: PredictRequest) -> str:
    if "://" in request.output:
        return request.output
    folder, _ = output_folder(TrainJob(run=RunConfig(output=request.output)))
    return str(folder)
