"""Image files and what train and val share: every mistake is made with real files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.data.annotations import RawAnnotations, read_raw
from model.data.findings import Finding
from model.data.folder import FolderReader
from model.data.image_lint import Looks, lint_files, list_files, look_at, with_same_sizes
from model.data.split_lint import count_classes, lint_classes, lint_duplicates, lint_splits


def picture(seed: int, width: int = 64, height: int = 48) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def annotate(
    names: list[str], classes: dict[int, str], boxes: list[tuple[int, int]]
) -> RawAnnotations:
    """boxes: (position of the image, category id)."""
    import json

    raw, findings = read_raw(json.dumps({
        "images": [{"id": i, "file_name": n, "width": 64, "height": 48} for i, n in enumerate(names)],
        "annotations": [{"id": n, "image_id": i, "category_id": c, "bbox": [1, 1, 20, 20]}
                        for n, (i, c) in enumerate(boxes)],
        "categories": [{"id": i, "name": n} for i, n in classes.items()],
    }).encode(), "train", "x.json")  # fmt: skip
    assert raw is not None
    assert findings == []
    return raw


def folder(path: Path, seeds: range) -> tuple[Path, RawAnnotations]:
    path.mkdir()
    for seed in seeds:
        (path / f"{seed}.jpg").write_bytes(jpeg(picture(seed), quality=90))
    return path, annotate([f"{seed}.jpg" for seed in seeds], {1: "thing"}, [])


def by_kind(findings: list[Finding]) -> dict[str, Finding]:
    return {one.kind: one for one in findings}


def look(
    path: Path, raw: RawAnnotations, most: int | None = None
) -> tuple[Looks, dict[str, Finding]]:
    looks, findings = look_at(raw, FolderReader(path), "train", most=most)
    return looks, by_kind(findings)


def test_good_images_are_well(tmp_path: Path) -> None:
    path, raw = folder(tmp_path / "a", range(6))
    looks, findings = look(path, raw)
    assert findings == {}
    assert (looks.looked_at, len(looks.digests), looks.hashes.shape) == (6, 6, (6, 2))
    assert lint_files(raw, list_files(path, raw.file_names), [], "train") == []


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(picture(1, 48, 64), exif=exif)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("damaged", jpeg(picture(1))[:300]),
        ("damaged", b"<html>"),
        ("damaged", b""),
        ("other-size", jpeg(picture(1, 48, 64))),
        ("other-size", jpeg(picture(1, 32, 24))),
        ("rotated", turned()),
        ("mode", jpeg(picture(1).convert("L"))),
        ("mode", jpeg(picture(1).convert("CMYK"))),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, kind: str, data: bytes) -> None:
    path, raw = folder(tmp_path / "a", range(4))
    (path / "2.jpg").write_bytes(data)
    _, findings = look(path, raw)
    assert set(findings) == {kind}
    assert findings[kind].examples[0].startswith("2.jpg")
    assert findings[kind].severity == ("note" if kind in ("rotated", "mode") else "error")


def test_missing_and_unlisted_files(tmp_path: Path) -> None:
    path, raw = folder(tmp_path / "a", range(20))
    (path / "3.jpg").rename(path / "spare.jpg")
    (path / "notes.txt").write_text("no image")
    found = by_kind(lint_files(raw, list_files(path, raw.file_names), [], "train"))
    assert found["missing"].examples == ("3.jpg",)
    assert (found["unannotated"].examples, found["unannotated"].severity) == (
        ("spare.jpg",),
        "note",
    )
    assert "unannotated" not in by_kind(
        lint_files(raw, list_files(path, []), ["spare.jpg"], "train")
    )
    _, seen = look(path, raw)
    assert seen == {}, "the listing has named it"


def test_files_that_training_reads_are_there(tmp_path: Path) -> None:
    """In a linked folder, and under another spelling, also of the other split."""
    path, _ = folder(tmp_path / "a", range(3))
    elsewhere, _ = folder(tmp_path / "b", range(1))
    (path / "linked").symlink_to(elsewhere, target_is_directory=True)
    raw = annotate(["linked/0.jpg", "./0.jpg", "1.jpg", "none/0.jpg"], {1: "thing"}, [])
    found = lint_files(raw, list_files(path, raw.file_names), ["./2.jpg"], "train")
    assert [(one.kind, one.examples) for one in found] == [("missing", ("none/0.jpg",))]


def test_a_name_that_no_file_can_have_is_damaged(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "a", range(1))
    raw = annotate(["0.jpg", "a\0b.jpg"], {1: "thing"}, [])
    _, findings = look(path, raw)
    assert findings["damaged"].count == 1
    assert "missing" in by_kind(lint_files(raw, list_files(path, raw.file_names), [], "train"))


def test_a_sample_is_spread_over_the_set(tmp_path: Path) -> None:
    path, raw = folder(tmp_path / "a", range(9))
    looks, _ = look(path, raw, most=3)
    assert sorted(looks.digests) == ["0.jpg", "4.jpg", "8.jpg"]


def shared(tmp_path: Path, spoil: Callable[[Path, Path], None], most: int | None = None) -> dict[str, Finding]:  # fmt: skip
    train_folder, train = folder(tmp_path / "train", range(8))
    val_folder, val = folder(tmp_path / "val", range(100, 104))
    spoil(train_folder, val_folder)
    ours, _ = look(train_folder, train, most)
    theirs, _ = look(val_folder, val)
    sizes = {name: (train_folder / name).stat().st_size for name in train.file_names}
    done: list[int] = []
    ours = with_same_sizes(ours, theirs, sizes, FolderReader(train_folder), done.append)
    assert done == list(range(len(train)))
    return by_kind(lint_duplicates(ours, theirs, same_files=False))


def test_different_pictures_are_no_duplicates(tmp_path: Path) -> None:
    assert shared(tmp_path, lambda train, val: None) == {}


@pytest.mark.parametrize("most", [None, 2])
def test_the_same_file_in_both_splits_is_an_error(tmp_path: Path, most: int | None) -> None:
    """Also where only a sample of train was looked at: 5.jpg is not in it."""

    def copy(train: Path, val: Path) -> None:
        (val / "101.jpg").write_bytes((train / "5.jpg").read_bytes())

    found = shared(tmp_path, copy, most)
    assert found["leak-content"].examples == ("101.jpg = 5.jpg",)
    assert found["leak-content"].severity == "error"
    assert "leak-near" not in found


def test_a_picture_that_was_saved_anew_is_suspected(tmp_path: Path) -> None:
    def resave(train: Path, val: Path) -> None:
        with Image.open(train / "5.jpg") as image:
            (val / "101.jpg").write_bytes(jpeg(image.resize((60, 45)), quality=60))

    found = shared(tmp_path, resave)
    assert set(found) == {"leak-near"}
    assert found["leak-near"].examples == ("101.jpg ~ 5.jpg",)


def test_flat_pictures_are_not_alike(tmp_path: Path) -> None:
    """A blue sky and a white wall have nothing in them to compare."""

    def flatten(train: Path, val: Path) -> None:
        (train / "5.jpg").write_bytes(jpeg(Image.new("RGB", (64, 48), (90, 140, 230))))
        (val / "101.jpg").write_bytes(jpeg(Image.new("RGB", (64, 48), (250, 250, 250))))

    assert shared(tmp_path, flatten) == {}


def test_repeated_files_within_a_split(tmp_path: Path) -> None:
    def copy(train: Path, val: Path) -> None:
        (train / "6.jpg").write_bytes((train / "5.jpg").read_bytes())

    assert shared(tmp_path, copy)["repeated-content"].examples == ("6.jpg = 5.jpg",)


def test_a_file_that_both_splits_name() -> None:
    found = by_kind(lint_duplicates(Looks(["a.jpg", "b.jpg"]), Looks(["b.jpg"]), same_files=True))
    assert (found["leak-name"].severity, found["leak-name"].examples) == ("error", ("b.jpg",))
    assert not lint_duplicates(Looks(["a.jpg"]), Looks(["a.jpg"]), same_files=False)


def test_classes_are_counted_and_those_that_cannot_be_learned_named() -> None:
    classes = {1: "often", 2: "rare", 3: "only in val", 4: "only in train", 5: "never"}
    train = annotate(["a", "b"], classes, [(0, 1)] * 25 + [(1, 1), (1, 2)] + [(0, 4)] * 30)
    val = annotate(["c"], classes, [(0, 1), (0, 2), (0, 3)])
    counts = count_classes(train, val)
    assert [one.name for one in counts] == [
        "only in train",
        "often",
        "rare",
        "only in val",
        "never",
    ]
    assert (counts[1].train_boxes, counts[1].train_images, counts[1].val_boxes) == (26, 2, 1)
    found = by_kind(lint_classes(counts, with_val=True))
    assert found["untaught-class"].examples == ("only in val",)
    assert found["unmeasured-class"].examples == ("only in train",)
    assert found["unused-class"].examples == ("never",)
    assert found["rare-class"].examples == ("rare (1)",)
    assert "unmeasured-class" not in by_kind(
        lint_classes(count_classes(train, None), with_val=False)
    )


def test_categories_must_mean_the_same() -> None:
    train, val = (
        annotate(["a"], {1: "cat", 2: "dog"}, []),
        annotate(["b"], {1: "dog", 2: "cat"}, []),
    )
    (found,) = lint_splits(train, val)
    assert (found.severity, found.count, found.examples[0]) == ("error", 2, "1: cat / dog")
    assert lint_splits(train, train) == []
