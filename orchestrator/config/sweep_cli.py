"""Command line of a sweep: its YAML, and what is changed in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config.cli import Flag, add_overrides, plain_parser
from orchestrator.config.codec import merge, nest, read_yaml
from orchestrator.errors import ConfigError

SWEEP_FLAGS = (
    Flag("--name", "name", "name of the sweep", "NAME", text=True),
    Flag("--trials", "trials.num", "configurations to train", "N"),
    Flag("--concurrent", "trials.concurrent", "trials at once (auto: as many as fit)", "N"),
    Flag("--workers", "trials.workers_per_trial", "training processes of each trial", "N"),
    Flag("--output", "train.run.output", "folder for everything that stays here", "FOLDER", text=True),
    Flag("--tracking-uri", "train.tracking.uri", "MLflow server or database", "URI", text=True),
    Flag("--experiment", "train.tracking.experiment", "MLflow experiment", "NAME", text=True),
)  # fmt: skip


@dataclass(frozen=True)
class SweepRequest:
    """A sweep's YAML, as far as it is read; folder: where a relative `train:` is looked for."""

    mapping: dict[str, Any]
    folder: Path
    name: str


@dataclass(frozen=True)
class SweepOptions:
    """resume: fail where there is no sweep of this name to go on with. extend: so many trials more."""

    resume: bool
    extend: int | None
    dry_run: bool
    json: bool


def parse_tune(description: str, argv: Sequence[str]) -> tuple[SweepRequest, SweepOptions]:
    """The sweep asked for and what to do with it.

    Raises:
        ConfigError: anything that is not understood.
    """
    parser = plain_parser("jobs/tune.py", description)
    parser.add_argument("--config", metavar="YAML", help="a sweep, as in jobs/sweeps/")
    add_overrides(
        parser, SWEEP_FLAGS,
        "any other setting by its path; those of the training job begin with train.",
    )  # fmt: skip
    parser.add_argument(
        "--resume", action="store_true",
        help="go on with an interrupted sweep, or fail "
        "(without the flag it is gone on with if there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--extend", type=int, metavar="N", help="train N configurations more than there are"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument("--json", action="store_true", help="last line of output: one json object")
    given = parser.parse_args(argv)
    if given.config is None:
        raise ConfigError(
            "--config", "a sweep's YAML", "nothing", "as in --config jobs/sweeps/smoke.yaml"
        )
    if given.extend is not None and given.extend < 1:
        raise ConfigError("--extend", "at least 1", str(given.extend), "correct it")
    path = Path(given.config)
    mapping = read_yaml(path)
    for where, value in given.overrides or []:
        mapping = _laid_on(mapping, where, value, path.parent)
    request = SweepRequest(mapping, path.parent, path.stem)
    return request, SweepOptions(given.resume, given.extend, given.dry_run, given.json)


def _laid_on(mapping: dict[str, Any], where: str, value: Any, folder: Path) -> dict[str, Any]:
    if not where:
        raise ConfigError("--set", "PATH=VALUE", "an empty path", "correct it")
    if where.startswith("space."):  # one key of the space is a whole path
        knobs = {**(mapping.get("space") or {}), where.removeprefix("space."): value}
        return {**mapping, "space": knobs}
    train = mapping.get("train")
    if where.startswith("train.") and isinstance(train, str):
        mapping = {**mapping, "train": read_yaml(folder / Path(train).expanduser())}
    return merge(mapping, nest(where, value))
