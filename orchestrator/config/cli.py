"""Command line -> configuration: defaults < YAML < flags and --set, left to right."""

from __future__ import annotations

import argparse
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

    def value(self, given: Any) -> Any:
        return given if self.unit is None else {self.unit: given}


TRAIN_FLAGS = (
    Flag("--phi", "model.phi", "size of the network: 0 to 7, or 7x", "N"),
    Flag("--data", "data.root", "folder of a COCO-format dataset, or shapes", "FOLDER", text=True),
    Flag("--epochs", "train.duration", "length in epochs", "N", "epochs"),
    Flag("--steps", "train.duration", "length in steps", "N", "steps"),
    Flag("--batch-size", "train.batch_size", "images of one step over all workers", "N"),
    Flag("--lr", "optim.lr_per_64", "peak learning rate for 64 images", "X"),
    Flag("--image-size", "model.image_size_px", "side of the network's input", "PX"),
    Flag("--fusion", "model.fusion", "fast, softmax, unbounded or sum", "KIND"),
    Flag("--pretrained", "model.pretrained", "ImageNet backbone: auto, yes or no", "WHEN"),
    Flag("--seed", "train.seed", "seed of weights, order and augmentation", "N"),
    Flag("--workers", "launch.workers", "training processes over the cluster", "N"),
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


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        if message.startswith("unrecognized arguments: "):
            argument = message.removeprefix("unrecognized arguments: ").split()[0]
            raise ConfigError("command line", "a known flag", argument, nearest(argument, known))
        raise ConfigError("command line", "valid flags", message)


class _Override(argparse.Action):
    """Collects (path, value) in the order given, so that the last one wins."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
        values: Any, option_string: str | None = None,
    ) -> None:  # fmt: skip
        overrides = [*(getattr(namespace, "overrides", None) or [])]
        flag: Flag | None = self.const
        if flag is not None:
            overrides.append((flag.path, flag.value(values if flag.text else _scalar(values))))
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


def train_parser(program: str, description: str) -> Parser:
    parser = Parser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", help="a training YAML, as in jobs/configs/")
    for flag in TRAIN_FLAGS:
        parser.add_argument(
            flag.name, action=_Override, const=flag, metavar=flag.metavar,
            help=f"{flag.help} ({flag.path})", dest="overrides",
        )  # fmt: skip
    parser.add_argument(
        "--set", action=_Override, const=None, metavar="PATH=VALUE", dest="overrides",
        help="any other setting by its path",
    )  # fmt: skip
    parser.add_argument(
        "--resume", nargs="?", const="must", default="auto", metavar="RUN_ID",
        help="continue this unfinished run, or the newest of this configuration, or fail "
        "(without the flag it is continued if there is one)",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start a new run in any case")
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument("--json", action="store_true", help="last line of output: one json object")
    return parser


def parse_train(parser: Parser, argv: Sequence[str]) -> tuple[TrainJob, Options]:
    """The configuration asked for and what to do with it.

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
    job = codec.decode(TrainJob, mapping)
    resume = "never" if arguments.fresh else str(arguments.resume)
    return job, Options(dry_run=arguments.dry_run, json=arguments.json, resume=resume)
