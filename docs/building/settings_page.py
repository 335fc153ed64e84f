"""The page of settings, from the dataclasses that hold them."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docs.building.docstrings import explained, fields_explained
from model.training.config import Duration
from orchestrator.config.cli import TRAIN_FLAGS
from orchestrator.config.codec import encode
from orchestrator.config.schema import TrainJob

TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
# What the dataclasses leave to the name of the field; a test refuses what they say themselves.
ALSO = {
    "model.topology": "how the levels of the pyramid are joined; see the README's list",
    "model.anchor_scale": "side of an anchor over the stride of its level",
    "model.anchor_octaves": "anchor sizes of each level, evenly spaced between it and the next",
    "data.augment.enabled": "false trains on the pictures as they are",
    "data.augment.jitter_min": "least scale of a picture, relative to the network's input",
    "data.augment.jitter_max": "largest scale of a picture, relative to the network's input",
    "data.shapes.num_train": "training pictures that are drawn",
    "data.shapes.num_val": "validation pictures that are drawn",
    "data.shapes.size_px": "about how large the pictures are",
    "data.shapes.max_objects": "objects of a picture, at most",
    "data.shapes.seed": "another seed draws other pictures",
    "data.cache.limit_gib": "the least recently used files are removed above it",
    "train.duration": "length of the training",
    "train.channels_last": "memory layout of pictures and features; the quicker one almost everywhere",
    "train.log_every_steps": "steps between two records of the loss",
    "train.evaluate_every": "between two evaluations on the validation data",
    "train.checkpoint_every": "between two checkpoints, besides those at evaluations",
    "optim.momentum": "of SGD",
    "optim.nesterov": "Nesterov's form of the momentum",
    "optim.weight_decay": "of convolutions' weights, not of batch norms and biases",
    "optim.warmup": "length of the linear warm-up",
    "evaluation.iou": "hard NMS removes a box that overlaps a better one by more",
    "evaluation.sigma": "soft NMS lowers the scores of overlapping boxes the more, the smaller it is",
    "evaluation.score": "detections below it are dropped",
    "evaluation.candidates": "boxes with the best scores that NMS looks at",
    "evaluation.detections": "detections of one picture, at most",
    "checkpoint.keep_latest": "newest checkpoints that are kept, and as many with an evaluation",
    "checkpoint.keep_best": "checkpoints with the best metric that are kept",
    "checkpoint.metric": "what best is measured by",
    "launch.max_workers": "the most training processes of an elastic run: the MAX of `--workers MIN:MAX`",
    "launch.grow_every_s": "how often an elastic run takes up what has become free",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """path: dotted, as for --set. default: as one would write it in YAML."""

    path: str
    type: str
    default: str
    meaning: str
    flags: tuple[str, ...]


def settings(cls: type[Any] = TrainJob, path: str = "") -> Iterator[Setting]:
    """Every setting below a dataclass, in the order in which it is written."""
    hints, said, default = get_type_hints(cls), fields_explained(cls), cls()
    for field in dataclasses.fields(cls):
        where, hint = f"{path}.{field.name}" if path else field.name, hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint is not Duration:
            yield from settings(hint, where)
            continue
        flags = [flag for flag in TRAIN_FLAGS if where in (flag.path, flag.most)]
        meaning = said.get(field.name) or ALSO.get(where) or (flags[0].help if flags else "")
        names = tuple(flag.name for flag in flags)
        value = as_yaml(encode(getattr(default, field.name)))
        yield Setting(where, type_name(hint), value, meaning, names)


def type_name(hint: Any) -> str:
    """In words."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        (one,) = [arg for arg in inside if arg is not type(None)]
        return f"{type_name(one)} or null"
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inside)
    if origin is tuple:
        return f"list of {type_name(inside[0])}"
    if hint is Duration:
        return "`{epochs: N}` or `{steps: N}`"
    return TYPES[hint]


def as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v:g}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(str, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value)


def page() -> str:
    """Markdown."""
    parts = [
        "# Settings\n\nEvery setting of a training job, its type and its default, from the sources "
        "(`orchestrator/config/schema.py`). In a YAML they are a tree, on the command line "
        "`--set train.batch_size=32`; where there is a flag it does the same. Defaults < `--config YAML` < flags and "
        "`--set`, left to right. `null` is *not given*: what is then done stands beside it. "
        "Those of a sweep are in [](../sweeps.md).\n"
    ]
    every = list(settings())
    hints = get_type_hints(TrainJob)
    for section in dataclasses.fields(TrainJob):
        mine = [one for one in every if one.path.split(".")[0] == section.name]
        parts.append(f"## {section.name}\n\n{_intro(hints[section.name])}\n")
        parts += [_entry(one) for one in mine]
    return "\n".join(parts)


def _intro(cls: type[Any]) -> str:
    """The docstring's prose, without what is said of single fields."""
    names = [field.name for field in dataclasses.fields(cls)]
    said = [explained(text, names)[0] for text in inspect.cleandoc(cls.__doc__ or "").split("\n\n")]
    return "\n\n".join(text for text in said if text)


def _entry(setting: Setting) -> str:
    flags = "".join(f", `{name}`" for name in setting.flags)
    anchor = setting.path.replace(".", "-").replace("_", "-")
    term = f"[`{setting.path}`]{{#{anchor}}} — {setting.type}, default `{setting.default}`{flags}"
    return f"{term}\n: {setting.meaning}\n"
