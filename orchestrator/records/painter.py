"""The process that draws what `gallery` hands it: `python -m orchestrator.records.painter`.

It reads from a pipe that only the worker which started it can write to.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import sys
import threading
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from numpy.typing import NDArray
from PIL import Image

from model.training import analysis
from model.training.fit import FUSION
from orchestrator.records import figures
from orchestrator.records.exhibits import FIXED, Exhibits
from orchestrator.records.gallery import LONGEST_S, NICE, Exhibition, Showing, stepped_name
from orchestrator.records.run import TrackedRun
from orchestrator.records.sender import Sender, open_spool
from orchestrator.storage.filesystems import open_place

logger = logging.getLogger(__name__)

DPI = 110
CLOSE_TIMEOUT_S = 6.0
HISTORY_TIMEOUT_S = "5"


class Painter:
    """Draws into the run's folder and spools what it drew."""

    def __init__(self, exhibition: Exhibition) -> None:
        self.exhibition = exhibition
        self.carried = open_place(exhibition.carried_uri, "checkpoint.uri")
        self.spool = open_spool(exhibition.folder / "figures.jsonl", self.carried)
        self.sender = Sender(exhibition.run, self.spool, carry_to=self.carried)
        self.fixed = [int(i) for i in analysis.fixed_images(exhibition.index, FIXED)]
        self.history = _recall(exhibition.run)

    def paint(self, showing: Showing) -> None:
        evaluation, index, step = showing.evaluation, self.exhibition.index, showing.step
        for key, value in showing.fusion.items():
            steps, values = self.history.setdefault(key, ([], []))
            if not steps or steps[-1] < step:
                steps.append(step)
                values.append(value)
        exhibits = Exhibits.of(index, self.exhibition.read, evaluation, step)
        for key, sheet in exhibits.sheets(self.fixed, "the same images at every evaluation"):
            self._stepped(key, sheet, showing)
        drawn = dict(exhibits.figures(self.exhibition.anchor_ious, "training boxes"))
        if self.history:
            drawn["fusion_weights"] = figures.fusion_weights(history=self.history)
            self._stepped("fusion weights", figures.rgb(drawn["fusion_weights"]), showing)
        for name, figure in drawn.items():
            self._latest(name, figure)
        self._table("eval/per_class.json", ["class", "AP"], exhibits.class_ap())
        self.sender.log({"op": "tags", "tags": {MLFLOW_LOGGED_IMAGES: "True"}})

    def close(self) -> None:
        self.sender.close(CLOSE_TIMEOUT_S)

    def _stepped(self, key: str, pixels: NDArray[np.uint8], showing: Showing) -> None:
        """An image of MLflow's charts, with a small twin as it wants it."""
        folder = self.exhibition.folder / "images"
        folder.mkdir(exist_ok=True)
        name = stepped_name(self.exhibition.run.run_key, key, showing.step, showing.time_ms)
        image = Image.fromarray(pixels)
        image.save(folder / f"{name}.png")
        compress_image_size(image).save(folder / f"{name}+compressed.webp")
        for file in (f"{name}.png", f"{name}+compressed.webp"):
            self._file(f"images/{file}", once=True)

    def _latest(self, name: str, figure: Figure) -> None:
        path = self.exhibition.folder / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=DPI)
        self._file(f"figures/{path.name}")

    def _table(self, to: str, columns: list[str], rows: dict[str, float]) -> None:
        """As MLflow's own tables are kept, so that its UI shows it as one."""
        data = [[name, round(value, 4)] for name, value in rows.items()]
        text = json.dumps({"columns": columns, "data": data})
        self.sender.log({"op": "text", "to": to, "text": text})

    def _file(self, relative: str, *, once: bool = False) -> None:
        """once: it is not needed here any more when it is sent."""
        self.sender.log({"op": "file", "file": relative, "to": relative, "once": once})


def _recall(run: TrackedRun) -> dict[str, tuple[list[int], list[float]]]:
    """Fusion weights of earlier processes of this run, where MLflow answers."""
    if run.run_id is None:
        return {}
    found: dict[str, tuple[list[int], list[float]]] = {}
    try:
        client = MlflowClient(run.tracking_uri)
        for key in client.get_run(run.run_id).data.metrics:
            if key.startswith(FUSION):
                history = sorted(
                    client.get_metric_history(run.run_id, key), key=lambda metric: metric.step
                )
                found[key.removeprefix(FUSION)] = (
                    [metric.step for metric in history],
                    [metric.value for metric in history],
                )
    except Exception as error:  # the figure begins later then
        logger.warning("earlier fusion weights are not known: %s", error)
    return found


class _Newest:
    """What came last through the pipe and was not taken yet."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._ready = pipe, threading.Condition()
        self._showing: Showing | None = None
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def take(self) -> Showing | None:
        """None at the end."""
        with self._ready:
            self._ready.wait_for(lambda: self._showing is not None or self._ended)
            showing, self._showing = self._showing, None
            return showing

    def _read(self) -> None:
        while True:
            try:
                showing: Any = pickle.load(self._pipe)
            except (EOFError, pickle.UnpicklingError):  # the latter: the worker was killed
                showing = None
            with self._ready:
                self._showing = showing or self._showing
                self._ended = showing is None
                self._ready.notify_all()
            if showing is None:
                signal.alarm(int(LONGEST_S))
                return


def main() -> int:
    os.nice(NICE)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = HISTORY_TIMEOUT_S
    pipe = sys.stdin.buffer
    painter = Painter(pickle.load(pipe))
    newest = _Newest(pipe)
    failed = False
    while showing := newest.take():
        try:
            painter.paint(showing)
        except Exception:  # the next evaluation may be drawn; the log says what is missing
            logger.exception("the figures of step %d", showing.step)
            failed = True
    painter.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
