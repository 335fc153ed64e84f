"""Pascal VOC and YOLO datasets as the COCO json that training reads."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from model.data import voc, yolo
from model.data.converted import (
    ConvertedSplit,
    common_folder,
    document,
    refuse_malformed,
    relative,
)
from model.data.folder import find_split
from orchestrator.config import codec
from orchestrator.config.convert_cli import ConvertOptions, ConvertRequest
from orchestrator.errors import ConfigError, DataError
from orchestrator.launch.progress import Row, print_table

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
IMAGES, ANNOTATIONS = "images", "annotations"


@dataclass(frozen=True)
class ConvertOutcome:
    code: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """splits by name (train, val); names: the classes in the order of their ids."""

    splits: dict[str, ConvertedSplit]
    names: tuple[str, ...]
    notes: tuple[str, ...]


def run_convert_job(
    request: ConvertRequest, options: ConvertOptions, out: TextIO | None = None
) -> ConvertOutcome:
    """Read everything, then write: nothing is left behind of what cannot be converted.

    Raises:
        UserError: a source that is no such dataset, an output that is in use.
    """
    out = out or sys.stdout
    if not os.path.exists(request.source):  # Path's raises below a folder that may not be entered
        raise DataError("SOURCE", "a folder", f"none at {request.source}", "correct it")
    _check_output(request.output)
    read = _read_voc if request.kind == "voc" else _read_yolo
    converted = read(request)
    malformed = [one for split in converted.splits.values() for one in split.malformed]
    if not request.skip_malformed:
        refuse_malformed(malformed)
    try:
        root = _place_images(request, converted)
        _write(request.output, converted, root)
    except OSError as error:
        raise ConfigError("--output", "a folder that can be written", f"{request.output} ({error})") from None  # fmt: skip
    rows = [row for name, split in converted.splits.items() for row in _rows(name, split)]
    shown = ", ".join(converted.names[:10]) + (", …" if len(converted.names) > 10 else "")
    rows += [("classes", f"{len(converted.names)}: {shown}")]
    rows += [("note", note) for note in converted.notes]
    rows += [("left out", str(one)) for one in malformed[:3]]
    rows += [("next", f"python jobs/doctor.py --data {request.output}")]
    print_table(f"{request.kind} to COCO in {request.output}", rows, out)
    return ConvertOutcome(0, {
        "status": "finished", "output": str(request.output), "classes": list(converted.names),
        "splits": {name: _facts(split) for name, split in converted.splits.items()},
        "malformed": len(malformed), "notes": list(converted.notes),
    })  # fmt: skip


def _check_output(output: Path) -> None:
    """Raises ConfigError: training would find those that are there, instead or in doubt."""
    for place in (output / ANNOTATIONS, output):
        for split in ("train", "val"):
            for path in sorted(place.glob(f"*{split}*.json")):
                raise ConfigError("--output", "a folder without annotations", str(path), "remove it, or choose another")  # fmt: skip


def _json_of(output: Path, split: str) -> Path:
    return output / ANNOTATIONS / f"instances_{split}.json"


def _read_voc(request: ConvertRequest) -> Converted:
    train, val = voc.find_sets(request.source, request.train_set, request.val_set)
    splits = {"train": voc.read_set(request.source, train)}
    notes = [f"train is the image set {train}"]
    if val is not None:
        splits["val"] = voc.read_set(request.source, val)
        notes.append(f"val is the image set {val}")
    else:
        notes.append("no image set for val: training would be scored on its own images")
    names = voc.class_names(tuple(splits.values()))
    if not names:
        raise DataError("SOURCE", "at least one object", "none", "annotate some images")
    return Converted(splits, tuple(names), tuple(notes))


def _read_yolo(request: ConvertRequest) -> Converted:
    path = _yaml_of(request.source)
    mapping = codec.read_yaml(path)
    names = _names(mapping, path)
    where = Path(str(mapping.get("path") or "."))
    base = where if where.is_absolute() else path.parent / where
    if not base.is_dir():  # written for the folder above, or on another machine
        base = path.parent
    values = _num_keypoint_values(mapping, path)
    splits = {}
    notes = []
    for split, usual in (("train", ("train",)), ("val", ("val", "valid", "test"))):
        given = request.train_set if split == "train" else request.val_set
        key = given or next((key for key in usual if mapping.get(key)), None)
        if key is None and split == "val":
            notes.append("no val in the data.yaml: training would be scored on its own images")
            continue
        if key is None or not mapping.get(key):
            raise DataError(
                str(path), f"a key {key or split}", "none", "add it: the folder of its images"
            )
        entries = [_entry(value, base, path) for value in _list(mapping[key])]
        splits[split] = yolo.read_images(entries, base, names, values)
    images = [image for split in splits.values() for image in split.images]
    if not any(image.annotated for image in images):
        raise DataError(
            "SOURCE", "label files", f"none; looked for {yolo.labels_of(images[0].file)}",
            "put labels/ beside images/",
        )  # fmt: skip
    return Converted(splits, names, tuple(notes))


def _yaml_of(source: Path) -> Path:
    """Raises DataError: none, or several."""
    if source.is_file():
        return source
    for name in YAML_NAMES:
        if (source / name).is_file():
            return source / name
    found = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    if len(found) != 1:
        got = ", ".join(path.name for path in found) or "none"
        raise DataError(
            "SOURCE", f"a data.yaml in {source}", got, "name it: it says classes and folders"
        )
    return found[0]


def _names(mapping: dict[str, Any], path: Path) -> tuple[str, ...]:
    """Raises DataError: no list of names, gaps in it, or a name twice."""
    given = mapping.get("names")
    if isinstance(given, dict):
        keys = [int(key) if str(key).isdigit() else -1 for key in given]
        if sorted(keys) != list(range(len(keys))):
            raise DataError(str(path), "names numbered from 0 without gaps", ", ".join(map(str, given)), "repair names")  # fmt: skip
        given = [name for _, name in sorted(zip(keys, given.values(), strict=True))]
    if not isinstance(given, list) or not given:
        raise DataError(str(path), "names: a list of the classes", repr(given)[:60], "add it")
    names = tuple(str(name) for name in given)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(str(path), "each name once", repr(twice), "tell them apart, or merge them")
    return names


def _num_keypoint_values(mapping: dict[str, Any], path: Path) -> int:
    shape = mapping.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise DataError(
            str(path), "kpt_shape: [keypoints, numbers of each]", repr(shape)[:60], "repair it"
        )
    return math.prod(shape)


def _list(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def _entry(value: str, base: Path, path: Path) -> Path:
    """A folder or list of the data.yaml; `../train/images` is also looked for beside it.

    Raises:
        DataError: it leads out of the dataset.
    """
    entry = base / value
    if value.startswith("../") and not entry.exists():
        entry = base / value.removeprefix("../")
    return yolo.inside(entry, base, str(path))


def _place_images(request: ConvertRequest, converted: Converted) -> Path:
    """Images where training finds them; the folder that file names are relative to."""
    output = request.output
    root = common_folder(converted.splits.values())
    if output.resolve() == root.resolve() or root.resolve().is_relative_to(output.resolve()):
        # They lie in the output already. `find_split` looks at a few usual places there.
        for place in (output / "JPEGImages", output / IMAGES, output):
            if root.resolve().is_relative_to(place.resolve()):
                return place
    target = output / IMAGES
    if target.exists() or target.is_symlink():
        raise ConfigError(
            "--output", "a folder without images", str(target), "remove it, or choose another"
        )
    output.mkdir(parents=True, exist_ok=True)
    if not request.copy:
        target.symlink_to(root.resolve(), target_is_directory=True)
        return root
    for split in converted.splits.values():
        for image in split.images:
            copied = target / relative(image.file, root)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image.file, copied)
    return root


def _write(output: Path, converted: Converted, root: Path) -> None:
    """Each file appears whole; training must find the images by itself."""
    (output / ANNOTATIONS).mkdir(parents=True, exist_ok=True)
    for name, split in converted.splits.items():
        path = _json_of(output, name)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(document(split, converted.names, root)))
        os.replace(draft, path)
    for name in converted.splits:
        find_split(output, name)  # as training will; it raises where the images are not found


def _facts(split: ConvertedSplit) -> dict[str, int]:
    boxes = [box for image in split.images for box in image.boxes]
    return {
        "images": len(split.images),
        "boxes": len(boxes),
        "ignored": sum(box.ignore for box in boxes),
        "without_annotation": sum(not image.annotated for image in split.images),
        "malformed": len(split.malformed),
    }


def _rows(name: str, split: ConvertedSplit) -> Sequence[Row]:
    facts = _facts(split)
    text = f"{facts['images']:,} images, {facts['boxes'] - facts['ignored']:,} boxes"
    for key, what in (
        ("ignored", "difficult ones, kept as crowds: not trained on, not scored"),
        ("without_annotation", "images without a label file: without objects"),
        ("malformed", "objects that could not be read, left out"),
    ):
        if facts[key]:
            text += f"; {facts[key]:,} {what}"
    return [(name, text)]
