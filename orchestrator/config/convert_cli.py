"""Command line of the converters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from orchestrator.config.cli import local_path, plain_parser
from orchestrator.errors import ConfigError

Source = Literal["voc", "yolo"]


@dataclass(frozen=True)
class ConvertRequest:
    """source: a VOC folder, or a YOLO folder or data.yaml. output: a folder, which may be the source's.

    train_set, val_set: of VOC's image sets, or of data.yaml's keys (None: the usual ones). copy: the
    images too, which else are linked. skip_malformed: objects that cannot be read are left out.
    """

    kind: Source
    source: Path
    output: Path
    train_set: str | None = None
    val_set: str | None = None
    copy: bool = False
    skip_malformed: bool = False


@dataclass(frozen=True)
class ConvertOptions:
    json: bool


def parse_convert(description: str, argv: Sequence[str]) -> tuple[ConvertRequest, ConvertOptions]:
    """What to convert and where to.

    Raises:
        ConfigError: anything that is not understood.
    """
    parser = plain_parser("jobs/convert.py", description)
    add = parser.add_argument
    add("kind", metavar="FORMAT", choices=get_args(Source), help="voc or yolo")
    add("source", metavar="SOURCE", help="the dataset's folder, or YOLO's data.yaml")
    add("--output", metavar="FOLDER", help="for jobs/train.py --data; may be SOURCE")
    add("--train-set", metavar="NAME", help="VOC: train, else trainval; YOLO: train")
    add("--val-set", metavar="NAME", help="VOC: val, else test; YOLO: val, else test")
    add("--copy", action="store_true", help="copy the images (without it they are linked)")
    add("--skip-malformed", action="store_true", help="leave out objects that cannot be read")
    add("--json", action="store_true", help="last line of output: one json object")
    given = parser.parse_args(argv)
    if given.output is None:
        raise ConfigError("--output", "a folder", "nothing", "as in --output ~/my-dataset")
    source = local_path(given.source, "SOURCE", "a local folder", "fetch it first")
    output = local_path(given.output, "--output", "a local folder", "convert, then copy it there")
    request = ConvertRequest(
        given.kind, source.absolute(), output.absolute(), given.train_set, given.val_set,
        given.copy, given.skip_malformed,
    )  # fmt: skip
    return request, ConvertOptions(given.json)
