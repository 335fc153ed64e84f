"""Command line -> configuration: defaults < YAML < flags and --set, left to right."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from orchestrator.config import codec
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError, nearest


@dataclass(frozen=True)
class Flag:
    """A curated flag bound to one path of the configuration."""

    name: str
    path: str
    help: str
    metavar: str
    unit: str | None = None
    """Key that the value is put under: epochs or steps of a duration."""
    text: bool = False
    """Taken as it is, where YAML would make a number or a date of it."""
    several: bool = False
    """A list, separated by commas."""
    most: str | None = None
    """Path of an upper bound, given after a colon."""

    def values(self, given: str) -> list[tuple[str, Any]]:
        """(path, value) of what was given."""
        if self.most is None:
            return [(self.path, self.value(given))]
        least, colon, most = given.partition(":")
        if colon and not (least and most):
            raise ConfigError(self.name, "N or MIN:MAX", repr(given), "as in --workers 2:16")
        return [(self.path, self.value(least)), (self.most, self.value(most) if most else None)]

    def value(self, given: str) -> Any:
        if self.several:
            return [part.strip() for part in given.split(",")]
        value = given if self.text else _scalar(given)
        return value if self.unit is None else {self.unit: value}


TRAIN_FLAGS = (
    Flag("--phi", "model.phi", "size of the network: 0 to 7, or 7x", "N"),
    Flag("--data", "data.root", "folder of a COCO-format dataset, or shapes", "FOLDER", text=True),
    Flag("--epochs", "train.duration", "length in epochs", "N", "epochs"),
    Flag("--steps", "train.duration", "length in steps", "N", "steps"),
    Flag("--batch-size", "train.batch_size", "images of one step over all workers", "N"),
    Flag("--lr", "optim.lr_per_64", "peak learning rate for 64 images", "X"),
    Flag("--image-size", "model.image_size_px", "side of the network's input", "PX"),
    Flag("--fusion", "model.fusion", "fast, softmax, unbounded or sum", "KIND"),
    Flag(
        "--init",
        "model.init",
        "weights to start from: a checkpoint or weight file, or a name effdet published",
        "WEIGHTS",
        text=True,
    ),
    Flag(
        "--freeze",
        "model.freeze",
        "parts that stay as they are: backbone, pyramid, class_head, box_head",
        "A,B",
        several=True,
    ),
    Flag("--pretrained", "model.pretrained", "ImageNet backbone: auto, yes or no", "WHEN"),
    Flag("--seed", "train.seed", "seed of weights, order and augmentation", "N"),
    Flag(
        "--workers",
        "launch.workers",
        "training processes over the cluster; MIN:MAX takes as many as there is room for",
        "N",
        most="launch.max_workers",
    ),
    Flag("--gpus-per-worker", "launch.gpus_per_worker", "0 trains on the CPU", "X"),
    Flag("--cpus-per-worker", "launch.cpus_per_worker", "cores reserved for each worker", "X"),
    Flag("--launcher", "launch.launcher", "ray, or local for plain python and torchrun", "KIND"),
    Flag("--name", "run.name", "name of the run", "NAME", text=True),
    Flag(
        "--output",
        "run.output",
        "folder for everything that stays on this machine",
        "FOLDER",
        text=True,
    ),
    Flag(
        "--checkpoint-activations",
        "train.checkpoint_activations",
        "auto, yes or no: compute activations again instead of keeping them",
        "WHEN",
    ),
    Flag("--tracking-uri", "tracking.uri", "MLflow server or database", "URI", text=True),
    Flag("--experiment", "tracking.experiment", "MLflow experiment", "NAME", text=True),
)


@dataclass(frozen=True)
class Options:
    """What a job does, besides what it trains.

    resume: "auto" continues an unfinished run of the same configuration, "never" starts anew, a
    run id or "must" continues that run or fails.
    """

    dry_run: bool
    json: bool
    resume: str


@dataclass(frozen=True)
class BenchmarkOptions:
    """rounds: repetitions of which the median is taken. model_scale: workers to predict for.

    latency_us, gb_per_s: of an all-reduce between two workers there; None: as measured here.
    """

    rounds: int
    json: bool
    model_scale: int | None = None
    latency_us: float | None = None
    gb_per_s: float | None = None


@dataclass(frozen=True)
class PromoteRequest:
    """run_id: whose checkpoint (best, last or a step) becomes the model `name`, known by `alias`.

    require: (metric, least). objective: what the champion is beaten in, higher is better.
    """

    run_id: str
    name: str
    checkpoint: str = "best"
    alias: str = "champion"
    require: tuple[tuple[str, float], ...] = ()
    objective: str = "val/AP"
    allow_worse: bool = False
    allow_unfinished: bool = False
    tracking_uri: str | None = None


@dataclass(frozen=True)
class PromoteOptions:
    dry_run: bool
    json: bool


@dataclass(frozen=True)
class DoctorOptions:
    json: bool


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized arguments: "):
            argument = message.removeprefix("unrecognized arguments: ").split()[0]
            raise ConfigError("command line", "a known flag", argument, nearest(argument, known))
        raise ConfigError("command line", "valid flags", message)


class Override(argparse.Action):
    """Collects (path, value) in the order given, so that the last one wins."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
        values: Any, option_string: str | None = None,
    ) -> None:  # fmt: skip
        overrides = [*(getattr(namespace, "overrides", None) or [])]
        flag: Flag | None = self.const
        if flag is not None:
            overrides += flag.values(str(values))
        else:
            path, sign, text = str(values).partition("=")
            if not sign:
                raise ConfigError(
                    "--set", "PATH=VALUE", repr(values), "as in --set optim.momentum=0.9"
                )
            overrides.append((path.strip(), _scalar(text)))
        namespace.overrides = overrides


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _job_parser(program: str, description: str) -> Parser:
    """All that says what is trained."""
    parser = Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help="a training YAML, as in jobs/configs/")
    add_overrides(parser, TRAIN_FLAGS, "any other setting by its path")
    parser.add_argument("--json", action="store_true", help="last line of output: one json object")
    return parser


def add_overrides(parser: Parser, flags: Sequence[Flag], set_help: str) -> None:
    """Flags bound to paths, and --set for all others; both are collected in `overrides`, in order."""
    for flag in flags:
        parser.add_argument(
            flag.name, action=Override, const=flag, metavar=flag.metavar,
            help=f"{flag.help} ({flag.path})", dest="overrides",
        )  # fmt: skip
    parser.add_argument(
        "--set", action=Override, const=None, metavar="PATH=VALUE", dest="overrides",
        help=set_help,
    )  # fmt: skip


def benchmark_parser(program: str, description: str) -> Parser:
    parser = _job_parser(program, description)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="medians of N (10)")
    parser.add_argument(
        "--model-scale", type=int, metavar="N", help="predict the speed of N workers"
    )
    parser.add_argument(
        "--link-latency-us", type=float, metavar="X",
        help="of a small all-reduce between two workers there (measured here)",
    )  # fmt: skip
    parser.add_argument(
        "--link-gb-per-s", type=float, metavar="X",
        help="of a large all-reduce between two workers there (measured here)",
    )  # fmt: skip
    return parser


def train_parser(program: str, description: str) -> Parser:
    parser = _job_parser(program, description)
    parser.add_argument(
        "--resume", nargs="?", const="must", default="auto", metavar="RUN_ID",
        help="continue this unfinished run, or the newest of this configuration, or fail "
        "(without the flag it is continued if there is one)",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start a new run in any case")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    return parser


def parse_train(parser: Parser, argv: Sequence[str]) -> tuple[TrainJob, Options]:
    """The configuration asked for and what to do with it.

    Raises:
        ConfigError: anything that is not understood.
    """
    job, arguments = parse_job(parser, argv)
    resume = "never" if arguments.fresh else str(arguments.resume)
    return job, Options(dry_run=arguments.dry_run, json=arguments.json, resume=resume)


def parse_benchmark(parser: Parser, argv: Sequence[str]) -> tuple[TrainJob, BenchmarkOptions]:
    """The configuration to measure and how.

    Raises:
        ConfigError: anything that is not understood.
    """
    job, arguments = parse_job(parser, argv)
    return job, BenchmarkOptions(
        rounds=arguments.rounds,
        json=arguments.json,
        model_scale=arguments.model_scale,
        latency_us=arguments.link_latency_us,
        gb_per_s=arguments.link_gb_per_s,
    )


def parse_promote(description: str, argv: Sequence[str]) -> tuple[PromoteRequest, PromoteOptions]:
    """Which run's checkpoint to promote, and what it must show.

    Raises:
        ConfigError: anything that is not understood.
    """
    parser = plain_parser("jobs/promote.py", description)
    add = parser.add_argument
    add("run_id", metavar="RUN_ID", help="the training run")
    add("--name", required=True, metavar="NAME", help="of the registered model")
    add("--checkpoint", default="best", metavar="WHICH", help="best, last or a step (best)")
    add("--alias", default="champion", metavar="NAME", help="what it is served by (champion)")
    add(
        "--require", action="append", default=[], metavar="METRIC>=VALUE",
        help="as in --require 'val/AP>=0.3'; may be given several times",
    )  # fmt: skip
    add(
        "--objective", default="val/AP", metavar="METRIC",
        help="must not be below the champion's (val/AP)",
    )  # fmt: skip
    add("--allow-worse", action="store_true", help="than the champion, or not comparable with it")
    add("--allow-unfinished", action="store_true", help="a run that did not come to its end")
    add("--tracking-uri", metavar="URI", help="MLflow server or database (MLFLOW_TRACKING_URI)")
    add("--dry-run", action="store_true", help="look at every gate, register nothing")
    add("--json", action="store_true", help="last line of output: one json object")
    given = parser.parse_args(argv)
    request = PromoteRequest(
        given.run_id, given.name, given.checkpoint, given.alias,
        tuple(_requirement(text) for text in given.require), given.objective,
        given.allow_worse, given.allow_unfinished, given.tracking_uri,
    )  # fmt: skip
    return request, PromoteOptions(given.dry_run, given.json)


def _requirement(text: str) -> tuple[str, float]:
    metric, sign, least = (part.strip() for part in text.partition(">="))
    try:
        value = float(least)
    except ValueError:
        value = math.nan
    if not metric or not sign or math.isnan(value):
        raise ConfigError(
            "--require", "METRIC>=VALUE", repr(text), "as in --require 'val/AP>=0.3', in quotes"
        )
    return metric, value


def plain_parser(program: str, description: str) -> Parser:
    return Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def local_path(text: str, where: str, expected: str, remedy: str) -> Path:
    """Raises ConfigError: a URL, which `Path` would take for a folder of that name."""
    if "://" in text:
        raise ConfigError(where, expected, text, remedy)
    return Path(os.path.expanduser(text))


def parse_job(parser: Parser, argv: Sequence[str]) -> tuple[TrainJob, argparse.Namespace]:
    """The configuration asked for and the rest of the command line.

    Raises:
        ConfigError: anything that is not understood.
    """
    arguments = parser.parse_args(argv)
    mapping: dict[str, Any] = {}
    if arguments.config:
        mapping = codec.read_yaml(Path(arguments.config))
    for path, value in arguments.overrides or []:
        if not path:
            raise ConfigError("--set", "PATH=VALUE", "an empty path")
        mapping = codec.merge(mapping, codec.nest(path, value))
    return codec.decode(TrainJob, mapping), arguments
