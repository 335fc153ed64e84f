"""Converted datasets: where the images are found, what is refused, and that the doctor is content."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.data.folder import FolderReader, find_split
from model.data.index import CocoIndex, parse_coco
from model.data.lint import check_images
from orchestrator.config.convert_cli import ConvertOptions, ConvertRequest
from orchestrator.errors import ConfigError, DataError, UserError
from orchestrator.launch.convert_job import run_convert_job

VOC_OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def source(shapes: Path, split: str) -> CocoIndex:
    return parse_coco((shapes / "annotations" / f"instances_{split}.json").read_bytes(), split)


@pytest.fixture
def as_yolo(shapes: Path, tmp_path: Path) -> Path:
    """The shapes, written as YOLO."""
    root = tmp_path / "yolo"
    for split in ("train", "val"):
        index = source(shapes, split)
        shutil.copytree(shapes / "images" / split, root / "images" / split)
        labels = root / "labels" / split
        labels.mkdir(parents=True)
        for image, name in enumerate(index.file_names):
            height, width = index.sizes_hw[image]
            boxes, classes = index.training_boxes(image)
            lines = [
                f"{k} {(x0 + x1) / 2 / width:.8f} {(y0 + y1) / 2 / height:.8f} "
                f"{(x1 - x0) / width:.8f} {(y1 - y0) / height:.8f}"
                for (x0, y0, x1, y1), k in zip(boxes, classes, strict=True)
            ]
            if lines:
                (labels / f"{Path(name).stem}.txt").write_text("\n".join(lines) + "\n")
    names = list(source(shapes, "train").classes.names)
    (root / "data.yaml").write_text(
        f"path: ../datasets/elsewhere\ntrain: images/train\nval: images/val\nnc: 6\nnames: {names}\n"
    )
    return root


@pytest.fixture
def as_voc(shapes: Path, tmp_path: Path) -> Path:
    """The shapes in whole pixels, written as VOC."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        index = source(shapes, split)
        for image, name in enumerate(index.file_names):
            shutil.copy(shapes / "images" / split / name, root / "JPEGImages")
            height, width = index.sizes_hw[image]
            boxes, labels = index.training_boxes(image)
            objects = "".join(
                VOC_OBJECT.format(index.classes.names[k], 0, *(round(float(v)) + 1 for v in box[:2]),
                                  *(round(float(v)) for v in box[2:]))
                for box, k in zip(boxes, labels, strict=True)
            )  # fmt: skip
            (root / "Annotations" / f"{Path(name).stem}.xml").write_text(
                f"<annotation><size><width>{width}</width><height>{height}</height></size>{objects}</annotation>"
            )
        stems = "\n".join(Path(name).stem for name in index.file_names)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(stems)
    return root


def convert(kind: Any, source: Path, output: Path, **options: Any) -> dict[str, Any]:
    request = ConvertRequest(kind, source, output, **options)
    done = run_convert_job(request, ConvertOptions(json=True), io.StringIO())
    json.dumps(done.report)
    assert done.code == 0
    return done.report


def read_back(output: Path, split: str) -> CocoIndex:
    found = find_split(output, split)
    assert found is not None
    index = parse_coco(found.annotations.read_bytes(), split)
    assert check_images(index, FolderReader(found.images)) == len(index)
    return index


def same(ours: CocoIndex, theirs: CocoIndex, tolerance_px: float) -> None:
    """By file: the same boxes of the same classes."""
    assert len(ours) == len(theirs)
    place = {Path(name).name: image for image, name in enumerate(ours.file_names)}
    for image, name in enumerate(theirs.file_names):
        boxes, labels = ours.training_boxes(place[name])
        expected, classes = theirs.training_boxes(image)
        assert boxes.shape == expected.shape
        assert abs(boxes - expected).max(initial=0) <= tolerance_px
        assert [ours.classes.names[k] for k in labels] == [theirs.classes.names[k] for k in classes]


@pytest.mark.parametrize("options", [{}, {"copy": True}])
def test_yolo_comes_back_as_it_was(
    as_yolo: Path, shapes: Path, tmp_path: Path, options: dict[str, bool]
) -> None:
    output = tmp_path / "coco"
    report = convert("yolo", as_yolo, output, **options)
    for split in ("train", "val"):
        same(read_back(output, split), source(shapes, split), 0.01)
    assert report["splits"]["train"]["images"] == 8
    assert report["classes"] == list(source(shapes, "train").classes.names)
    assert (output / "images").is_symlink() == (not options)


def test_voc_comes_back_as_it_was(as_voc: Path, shapes: Path, tmp_path: Path) -> None:
    convert("voc", as_voc, tmp_path / "coco")
    for split in ("train", "val"):
        same(read_back(tmp_path / "coco", split), source(shapes, split), 0.51)


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_the_source_may_be_the_output(kind: str, as_voc: Path, as_yolo: Path, shapes: Path) -> None:
    root = {"voc": as_voc, "yolo": as_yolo}[kind]
    before = {path for path in root.rglob("*") if path.is_file()}
    convert(kind, root, root)
    same(read_back(root, "train"), source(shapes, "train"), 0.51)
    added = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() and path not in before}  # fmt: skip
    assert added == {"annotations/instances_train.json", "annotations/instances_val.json"}
    with pytest.raises(ConfigError, match="a folder without annotations"):
        convert(kind, root, root)


def test_folders_of_splits_that_hold_images_and_labels(as_yolo: Path, shapes: Path) -> None:
    """train/images, valid/images, and a data.yaml that was written for the folder below."""
    for split, name in (("train", "train"), ("val", "valid")):
        for part in ("images", "labels"):
            (as_yolo / name).mkdir(exist_ok=True)
            (as_yolo / part / split).rename(as_yolo / name / part)
    for part in ("images", "labels"):
        (as_yolo / part).rmdir()
    names = dict(enumerate(source(shapes, "train").classes.names))
    (as_yolo / "data.yaml").write_text(
        f"train: ../train/images\nval: ../valid/images\nnames: {names}\n"
    )
    convert("yolo", as_yolo / "data.yaml", as_yolo)
    for split in ("train", "val"):
        same(read_back(as_yolo, split), source(shapes, split), 0.01)


def test_malformed_objects_are_refused_or_counted(as_yolo: Path, tmp_path: Path) -> None:
    label = sorted((as_yolo / "labels" / "train").iterdir())[0]
    label.write_text("0 0.5 0.5 0.1\n9 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(DataError, match=r"labels/train/train_0000\d\.txt:1: .*2 like it"):
        convert("yolo", as_yolo, tmp_path / "coco")
    assert not (tmp_path / "coco").exists()
    report = convert("yolo", as_yolo, tmp_path / "coco", skip_malformed=True)
    assert report["malformed"] == 2
    read_back(tmp_path / "coco", "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\n", "names: a list"),
        ("train: images/train\nnames: [a, a]\n", "each name once"),
        ("train: images/train\nnames: {0: a, 2: b}\n", "without gaps"),
        ("names: [a]\n", "a key train"),
        ("train: images/nope\nnames: [a]\n", "a folder of images"),
        ("train: /etc\nnames: [a]\n", "a place below"),
        ("train: ../../..\nnames: [a]\n", "a place below"),
        ("train: labels/train\nnames: [a]\n", "expected images, got none"),
        ("train: [\n", "expected YAML"),
        ("train: images/train\nnames: [a]\nkpt_shape: 17\n", "kpt_shape"),
    ],
)
def test_a_data_yaml_that_is_wrong(as_yolo: Path, tmp_path: Path, text: str, message: str) -> None:
    (as_yolo / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        convert("yolo", as_yolo, tmp_path / "coco")
    assert "\n" not in str(caught.value)


def test_what_is_there_is_not_overwritten(as_yolo: Path, tmp_path: Path) -> None:
    output = tmp_path / "coco"
    (output / "images").mkdir(parents=True)
    with pytest.raises(ConfigError, match="a folder without images"):
        convert("yolo", as_yolo, output)
    with pytest.raises(DataError, match="SOURCE"):
        convert("voc", tmp_path / "nowhere", tmp_path / "other")


def test_voc_difficult_objects_and_missing_val_are_told(as_voc: Path, tmp_path: Path) -> None:
    (as_voc / "ImageSets/Main/val.txt").unlink()
    path = sorted((as_voc / "Annotations").iterdir())[0]
    with Image.open(as_voc / "JPEGImages" / f"{path.stem}.jpg") as image:
        assert min(image.size) > 9
    path.write_text(f"<annotation>{VOC_OBJECT.format('ring', 1, 1, 1, 9, 9)}</annotation>")
    report = convert("voc", as_voc, tmp_path / "coco")
    assert report["splits"]["train"]["ignored"] == 1
    assert "val" not in report["splits"]
    assert any("no image set for val" in note for note in report["notes"])
    assert read_back(tmp_path / "coco", "train").crowd.sum() == 1


def test_labels_that_lie_elsewhere_are_missed(as_yolo: Path, tmp_path: Path) -> None:
    (as_yolo / "labels").rename(as_yolo / "annotated")
    with pytest.raises(DataError, match=r"label files, got none; looked for .*/labels/train/"):
        convert("yolo", as_yolo, tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


@pytest.mark.parametrize("name", ["annotations/instances_train2017.json", "my_val.json"])
def test_other_annotations_are_not_mixed_with_ours(as_yolo: Path, name: str) -> None:
    (as_yolo / name).parent.mkdir(exist_ok=True)
    (as_yolo / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"a folder without annotations, got .*{name}"):
        convert("yolo", as_yolo, as_yolo)
    assert len(list(as_yolo.rglob("*.json"))) == 1
    (as_yolo / name).unlink()
    convert("yolo", as_yolo, as_yolo)


def test_a_source_that_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="SOURCE: expected a folder, got none"):
        convert("voc", tmp_path / ("x" * 300) / "y", tmp_path / "coco")


def test_a_relative_source_leads_nowhere_else(
    as_yolo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret" / "a.png")
    monkeypatch.chdir(as_yolo)
    (as_yolo / "train.txt").write_text("../secret/a.png\n")
    (as_yolo / "data.yaml").write_text("train: train.txt\nnames: [a]\n")
    with pytest.raises(DataError, match="a place below"):
        convert("yolo", Path("."), Path("out"), copy=True)
