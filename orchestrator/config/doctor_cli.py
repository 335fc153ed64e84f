"""Command line of the doctor: what it looks at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.config import codec
from orchestrator.config.cli import TRAIN_FLAGS, DoctorOptions, add_overrides, plain_parser
from orchestrator.config.schema import RunConfig, TrainJob
from orchestrator.errors import ConfigError

DATA_FLAGS = ("--data", "--phi", "--image-size", "--output", "--tracking-uri",
              "--experiment")  # fmt: skip
TINY_PX = 8.0


@dataclass(frozen=True)
class ReplayRequest:
    """replay: places whose records are sent. tracking_uri: where to (None: where each run says)."""

    replay: tuple[str, ...]
    tracking_uri: str | None


@dataclass(frozen=True)
class CheckUp:
    """What is looked at; job: whose data, network, output and tracker these are.

    storage: a URI to write to. tracker: whether to ask it. every_image: all are decoded, not a
    sample. tiny_px: boxes with a shorter side are counted.
    """

    job: TrainJob = field(default_factory=TrainJob)
    data: bool = False
    environment: bool = False
    storage: str | None = None
    tracker: bool = False
    every_image: bool = False
    tiny_px: float = TINY_PX


def parse_doctor(
    description: str, argv: Sequence[str]
) -> tuple[ReplayRequest | CheckUp, DoctorOptions]:
    """What to look after; this machine, where nothing is named.

    Raises:
        ConfigError: anything that is not understood.
    """
    parser = plain_parser("jobs/doctor.py", description)
    add = parser.add_argument
    add(
        "--replay", nargs="*", metavar="PLACE",
        help="send the records that MLflow did not take: a job's output folder (runs), one run's "
        "records, or the folder or URI of its checkpoints",
    )  # fmt: skip
    add(
        "--cluster", nargs="?", const="", metavar="URI",
        help="measure the cluster of RAY_ADDRESS; URI: also write to it and read from every node",
    )  # fmt: skip
    add("--environment", action="store_true", help="this machine: versions, GPUs, memory, disk")
    add("--storage", metavar="URI", help="write, read, list and delete there, and time it")
    add("--config", metavar="YAML", help="a training YAML, as in jobs/configs/")
    flags = [flag for flag in TRAIN_FLAGS if flag.name in DATA_FLAGS]
    add_overrides(parser, flags, "any other setting by its path")
    add("--all", action="store_true", help="decode every image, not a sample of 256 a split")
    add(
        "--tiny-px", type=float, default=TINY_PX, metavar="N",
        help=f"count boxes with a shorter side ({TINY_PX:g})",
    )  # fmt: skip
    add("--json", action="store_true", help="last line of output: one json object")
    given = parser.parse_args(argv)
    options = DoctorOptions(given.json)
    overrides = given.overrides or []
    if given.replay is not None:
        others = [path for path, _ in overrides if path != "tracking.uri"]
        if others or given.environment or given.storage or given.config or given.all:
            raise ConfigError(
                "--replay",
                "nothing beside it but --tracking-uri",
                "more",
                "ask one after the other",
            )
        places = tuple(given.replay) or (RunConfig().output,)
        uri = next((value for path, value in reversed(overrides) if path == "tracking.uri"), None)
        return ReplayRequest(places, uri), options
    mapping = codec.read_yaml(Path(given.config)) if given.config else {}
    for path, value in overrides:
        if not path:
            raise ConfigError("--set", "PATH=VALUE", "an empty path")
        mapping = codec.merge(mapping, codec.nest(path, value))
    job = codec.decode(TrainJob, mapping)
    data = "data" in mapping
    if not data and (given.all or {"model", "train"} & set(mapping)):
        raise ConfigError(
            "--data", "a folder, a URL or shapes", "nothing", "as in --data ~/my-dataset"
        )
    if given.tiny_px < 0:
        raise ConfigError("--tiny-px", "at least 0", f"{given.tiny_px:g}")
    tracker = job.tracking.uri is not None
    asked = data or tracker or given.storage is not None
    environment = given.environment or not asked
    if environment and os.environ.get("MLFLOW_TRACKING_URI"):
        tracker = True
    return CheckUp(
        job, data, environment, given.storage, tracker, given.all, given.tiny_px
    ), options
