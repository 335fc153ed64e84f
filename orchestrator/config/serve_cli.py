"""Command line of the prediction server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.cli import plain_parser
from orchestrator.errors import ConfigError

MOST_PIXELS = 178_956_970
"""Pillow opens nothing larger."""


@dataclass(frozen=True)
class ServeRequest:
    """model: any name of one. host, port: where the cluster's head listens.

    replicas: None is as many as there is room for, started as the load asks. gpus_per_replica: None
    is one where the cluster has GPUs. score: detections above it are answered, unless a request says
    otherwise. max_queued: requests at once, waiting or at work; timeout_s: for an answer, after the
    image has arrived.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int | None = None
    cpus_per_replica: float = 1.0
    gpus_per_replica: float | None = None
    max_batch: int = 8
    batch_wait_ms: float = 10.0
    score: float = 0.3
    max_image_mb: float = 20.0
    max_pixels: int = 50_000_000
    max_queued: int = 256
    timeout_s: float = 30.0
    tracking_uri: str | None = None


@dataclass(frozen=True)
class ServeOptions:
    dry_run: bool
    json: bool


def parse_serve(description: str, argv: Sequence[str]) -> tuple[ServeRequest, ServeOptions]:
    """Which model is served, where and within which limits.

    Raises:
        ConfigError: anything that is not understood.
    """
    parser = plain_parser("jobs/serve.py", description)
    add, default = parser.add_argument, ServeRequest("")
    add(
        "model", metavar="MODEL",
        help="a checkpoint, runs:/RUN_ID, models:/NAME@ALIAS or models:/NAME/VERSION",
    )  # fmt: skip
    add("--host", default=default.host, metavar="ADDRESS", help=f"to listen on ({default.host})")
    add("--port", type=int, default=default.port, metavar="N", help=f"({default.port})")
    add(
        "--replicas", default="auto", metavar="N",
        help="copies of the model (auto: by load, as many as there is room for)",
    )  # fmt: skip
    for name, help_text in (
        ("cpus_per_replica", "cores of each, and its threads"),
        ("batch_wait_ms", "wait so long for a batch to fill"),
        ("score", "answer detections above it"),
        ("max_image_mb", "refuse larger files"),
        ("timeout_s", "for one answer"),
    ):
        value = getattr(default, name)
        add(_flag(name), type=float, default=value, metavar="X", help=f"{help_text} ({value:g})")
    add(
        "--gpus-per-replica", type=float, metavar="X",
        help="0 predicts on the CPU (1 where the cluster has GPUs)",
    )  # fmt: skip
    for name, help_text in (
        ("max_batch", "images at once"),
        ("max_pixels", "refuse larger pictures"),
        ("max_queued", "requests at once; others are told to come again"),
    ):
        value = getattr(default, name)
        add(_flag(name), type=int, default=value, metavar="N", help=f"{help_text} ({value})")
    add("--tracking-uri", metavar="URI", help="MLflow server or database (MLFLOW_TRACKING_URI)")
    add("--dry-run", action="store_true", help="load the model and answer once, serve nothing")
    add("--json", action="store_true", help="last line of output: one json object")
    given = vars(parser.parse_args(argv))
    options = ServeOptions(given.pop("dry_run"), given.pop("json"))
    request = ServeRequest(**given | {"replicas": _replicas(given["replicas"])})
    _check(request)
    return request, options


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _replicas(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ConfigError("--replicas", "auto or at least 1", repr(text), "correct it")
    return int(text)


def _check(request: ServeRequest) -> None:
    gpus = 0.0 if request.gpus_per_replica is None else request.gpus_per_replica
    # nan is smaller than nothing and greater than nothing, so every bound is asked for.
    for name, expected, fits in (
        ("port", "1 to 65535", 1 <= request.port <= 65535),
        ("cpus_per_replica", "more than 0", 0 < request.cpus_per_replica < 1e4),
        ("gpus_per_replica", "0 or more", 0 <= gpus < 1e4),
        ("max_batch", "1 to 1024", 1 <= request.max_batch <= 1024),
        ("batch_wait_ms", "0 to 10000", 0 <= request.batch_wait_ms <= 10_000),
        ("score", "0 <= X < 1", 0 <= request.score < 1),
        ("max_image_mb", "more than 0, at most 1000", 0 < request.max_image_mb <= 1000),
        ("max_pixels", f"1 to {MOST_PIXELS}", 1 <= request.max_pixels <= MOST_PIXELS),
        ("max_queued", "1 to 100000", 1 <= request.max_queued <= 100_000),
        ("timeout_s", "more than 0, at most 3600", 0 < request.timeout_s <= 3600),
    ):
        if not fits:
            raise ConfigError(_flag(name), expected, f"{getattr(request, name)}", "correct it")
    if not request.host:
        raise ConfigError("--host", "an address", "nothing", "127.0.0.1, or 0.0.0.0 for all")
