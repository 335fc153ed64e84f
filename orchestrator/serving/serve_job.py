"""Serving as a job: check the model, start it on the cluster, stay until told to stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from model.predictor import Predictor
from model.training.state import META
from orchestrator.config.schema import TrainJob
from orchestrator.config.serve_cli import ServeOptions, ServeRequest
from orchestrator.errors import ConfigError
from orchestrator.launch.progress import Row, print_table
from orchestrator.launch.resolve import output_folder
from orchestrator.records.secrets import without_secret
from orchestrator.records.sources import open_model
from orchestrator.records.tracker import tracking_uri
from orchestrator.serving.messages import About, sample_picture

if TYPE_CHECKING:  # it brings Ray, which takes seconds
    from orchestrator.launch.ray_runtime import Cluster

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "EFFDET_SERVE_TOKEN"
LOOK_EVERY_S = 2.0
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeOutcome:
    """code: 0 stopped as asked, 1 ended by itself."""

    code: int
    report: dict[str, Any]


def run_serve_job(
    request: ServeRequest, options: ServeOptions, out: TextIO | None = None
) -> ServeOutcome:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        UserError: no such model, a taken port, a cluster that does not answer or has no room.
    """
    out = out or sys.stdout
    token = os.environ.get(TOKEN) or None
    _check_address(request)
    uri = tracking_uri(request.tracking_uri, output_folder(TrainJob())[0])
    with open_model(request.model, uri) as folder:
        about = describe(folder, request.model)
        if options.dry_run:
            return _dry_run(request, about, folder, token, out)
        from orchestrator.serving.detector import served_files

        files = served_files(folder)
    from orchestrator.serving import running

    # Ray puts a handler of its own in place when it connects, so this one comes after it.
    with running.cluster(ROOT) as cluster, _stop_signals() as signals:
        return _serve(request, about, files, cluster, token, signals, out)


def describe(folder: Path, source: str) -> About:
    """What there is to say of a verified checkpoint.

    Raises:
        CheckpointError: it does not load, or does not answer.
    """
    predictor = Predictor.load(folder, "cpu")
    predictor.predict([sample_picture()])
    meta: dict[str, Any] = json.loads((folder / META).read_text())
    spec, classes = predictor.spec, predictor.classes
    return About(
        source=without_secret(source),
        network=f"EfficientDet-D{spec.phi}",
        image_size_px=spec.image_size_px,
        params=sum(weight.numel() for weight in predictor.detector.parameters()),
        step=int(meta["step"]),
        classes=dict(zip(classes.category_ids, classes.names, strict=True)),
        metrics={key: float(value) for key, value in meta.get("metrics", {}).items()},
    )


def _dry_run(
    request: ServeRequest, about: About, folder: Path, token: str | None, out: TextIO
) -> ServeOutcome:
    rows = [*_model_rows(about), *_limit_rows(request, token)]
    print_table(about.source, rows, out)
    report = {
        "status": "checked",
        "model": about.source,
        "step": about.step,
        "params": about.params,
    }
    return ServeOutcome(0, report)


def _model_rows(about: About) -> list[Row]:
    scores = ", ".join(f"{key} {value:.3f}" for key, value in sorted(about.metrics.items())[:4])
    names = list(about.classes.values())
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    network = f"{about.network}, {about.image_size_px} px, {about.params:,} parameters"
    return [
        ("model", f"{network}, step {about.step}; it answers"),
        ("classes", f"{len(names)}: {shown}"),
        *([("validation", scores)] if scores else []),
    ]


def _limit_rows(request: ServeRequest, token: str | None) -> list[Row]:
    batches = f"up to {request.max_batch} images, waiting {request.batch_wait_ms:g} ms for them"
    image = f"{request.max_image_mb:g} MB, {request.max_pixels:,} pixels"
    who = f"those with the token of {TOKEN}" if token else "everybody who reaches it"
    if not token and request.host not in LOCAL_HOSTS:
        who += f": set {TOKEN}, and put a proxy with TLS before it"
    return [
        ("batches", batches),
        ("limits", f"{image}; {request.max_queued} requests at once, {request.timeout_s:g} s each"),
        ("answers", who),
    ]


def _serve(
    request: ServeRequest,
    about: About,
    files: dict[str, bytes],
    cluster: Cluster,
    token: str | None,
    signals: _Signals,
    out: TextIO,
) -> ServeOutcome:
    from orchestrator.serving import running

    scale = running.scale_of(request, cluster)
    try:
        print(_starting(scale.replicas or 1, running.free(scale)), file=out, flush=True)
        running.start(request, about, files, scale, token)
        signals.ready.set()
        url = f"http://{_shown(request.host)}:{request.port}"
        on = f"GPU, {scale.gpus:g} each" if scale.gpus else f"CPU, {scale.cpus:g} each"
        number = f"1 to {scale.room}" if scale.replicas is None else str(scale.replicas)
        rows = [
            *_model_rows(about),
            ("copies", f"{number}, on the {on}"),
            *_limit_rows(request, token),
            ("page", url),
            ("try it", _curl(url, token)),
        ]
        print_table(about.source, rows, out)
        print(f"ready: {url}", file=out, flush=True)
        problem = None
        while problem is None and not signals.stop.wait(LOOK_EVERY_S):
            problem = running.problem()
        if problem is not None:
            print(f"ended: {problem}", file=sys.stderr, flush=True)
        else:
            print("stopping: answers under way are finished", file=out, flush=True)
    finally:
        running.end(cluster, request.timeout_s)
    status = "stopped" if problem is None else "failed"
    report = {"status": status, "url": url, "model": about.source}
    return ServeOutcome(int(problem is not None), report)


def _starting(wanted: int, free: int) -> str:
    said = f"starting {wanted} {'copy' if wanted == 1 else 'copies'} ..."
    if free < wanted:
        said += f" there is room for {free} now: waiting until others end, or nodes come"
    return said


def _curl(url: str, token: str | None) -> str:
    bearer = f' -H "Authorization: Bearer ${TOKEN}"' if token else ""
    kind = "-H 'Content-Type: image/jpeg'"
    return f"curl -s {url}/predict --data-binary @photo.jpg {kind}{bearer}"


def _shown(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _check_address(request: ServeRequest) -> None:
    """Ray would wait a minute for a port that is taken. Elsewhere only the cluster can tell."""
    if os.environ.get("RAY_ADDRESS"):
        return
    family = socket.AF_INET6 if ":" in request.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((request.host, request.port))
        except OSError as error:
            raise ConfigError(
                "--port", "an address that is free",
                f"{request.host}:{request.port} ({error.strerror or error})",
                "give another --port (or --host)",
            ) from None  # fmt: skip


@dataclass(frozen=True)
class _Signals:
    """stop: asked for. ready: set by whoever waits for `stop` from then on."""

    stop: threading.Event
    ready: threading.Event


@contextmanager
def _stop_signals() -> Iterator[_Signals]:
    """The first SIGTERM or Ctrl-C ends the service in order; the second, or one before it is ready,
    at once.
    """
    signals = _Signals(threading.Event(), threading.Event())

    def ask(number: int, frame: object) -> None:
        if signals.stop.is_set() or not signals.ready.is_set():
            raise KeyboardInterrupt
        signals.stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
