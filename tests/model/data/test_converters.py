"""VOC and YOLO to COCO: known values, round trips, and everything malformed said with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model.data import voc, yolo
from model.data.converted import common_folder, document, refuse_malformed, safe_name, shown_size
from model.data.index import parse_coco
from model.errors import DataError

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin>
<ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
</object>"""
SIZE = "<size><width>100</width><height>80</height><depth>3</depth></size>"


def thing(*corners: object, name: str = "cat", difficult: int = 0) -> str:
    return OBJECT.format(*corners, name=name, difficult=difficult)


def save(path: Path, size: tuple[int, int] = (100, 80), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 99, 199)).save(path, **options)


def voc_folder(root: Path, *, body: str = SIZE, stem: str = "0001") -> Path:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    save(root / "JPEGImages" / f"{stem}.jpg")
    (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{body}</annotation>")
    (root / "ImageSets" / "Main" / "train.txt").write_text(f"{stem}\n")
    return root


def test_voc_corners_count_from_one_and_are_inside(tmp_path: Path) -> None:
    body = SIZE + thing(1, 1, 100, 80) + thing(11, 21, 11, 40, name="dog", difficult=1)
    split = voc.read_set(voc_folder(tmp_path, body=body), "train")
    (image,) = split.images
    assert [box.xywh for box in image.boxes] == [(0, 0, 100, 80), (10, 20, 1, 20)]
    assert [(box.class_name, box.ignore) for box in image.boxes] == [("cat", False), ("dog", True)]
    names = voc.class_names([split])
    index = parse_coco(
        json.dumps(document(split, names, tmp_path / "JPEGImages")).encode(), "x.json"
    )
    assert index.file_names.tolist() == ["0001.jpg"]
    assert index.classes.names == ("cat", "dog")
    assert index.boxes_xyxy.tolist() == [[0, 0, 100, 80], [10, 20, 11, 40]]
    assert index.crowd.tolist() == [False, True]


def test_voc_without_a_size_takes_the_image_s(tmp_path: Path) -> None:
    for body in ("", "<size><width>0</width><height>0</height></size>"):
        (image,) = voc.read_set(voc_folder(tmp_path, body=body), "train").images
        assert (image.width, image.height, image.boxes) == (100, 80, ())


def test_voc_sets(tmp_path: Path) -> None:
    root = voc_folder(tmp_path)
    assert voc.find_sets(root, None, None) == ("train", None)
    sets = root / "ImageSets" / "Main"
    (sets / "val.txt").write_text("0001\n")
    assert voc.find_sets(root, None, None) == ("train", "val")
    (sets / "train.txt").rename(sets / "trainval.txt")
    assert voc.find_sets(root, None, None) == ("trainval", None), "val is a part of trainval"
    (sets / "test.txt").write_text("0001  1\n")
    assert voc.find_sets(root, None, None) == ("trainval", "test")
    assert len(voc.read_set(root, "test").images) == 1
    with pytest.raises(DataError, match="did you mean 'trainval'"):
        voc.find_sets(root, "trainvl", None)
    with pytest.raises(DataError, match="Annotations/, got none"):
        voc.find_sets(tmp_path / "elsewhere", None, None)


BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]>
<annotation><size><width>&c;</width></size></annotation>"""
OUTSIDE = """<?xml version="1.0"?>
<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"0001\.xml:1: expected XML without a document type"),
        (OUTSIDE, r"0001\.xml:2: expected XML without a document type"),
        (BOMB.encode("utf-16").decode("latin-1"), "without a document type|expected XML"),
        ("<annotation><size>", r"0001\.xml:1: expected XML"),
        ("", r"0001\.xml:1: expected XML"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "expected XML"),
    ],
)
def test_dangerous_or_broken_xml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    root = voc_folder(tmp_path)
    (root / "Annotations" / "0001.xml").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message) as caught:
        voc.read_set(root, "train")
    assert "\n" not in str(caught.value)


def test_a_document_type_in_another_encoding_is_refused(tmp_path: Path) -> None:
    root = voc_folder(tmp_path)
    bomb = BOMB.replace('version="1.0"', 'version="1.0" encoding="utf-16"')
    (root / "Annotations" / "0001.xml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(DataError, match="without a document type"):
        voc.read_set(root, "train")


@pytest.mark.parametrize("stem", ["../0001", "/etc/passwd", "a/../../b", "a\\b"])
def test_image_sets_do_not_lead_out(tmp_path: Path, stem: str) -> None:
    root = voc_folder(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").write_text(f"0001\n{stem}\n")
    with pytest.raises(DataError, match=r"train\.txt:2: expected a name inside"):
        voc.read_set(root, "train")


def test_an_image_that_is_named_elsewhere_is_refused(tmp_path: Path) -> None:
    root = voc_folder(tmp_path, body="<filename>../../secret.jpg</filename>" + SIZE)
    (root / "JPEGImages" / "0001.jpg").rename(root / "JPEGImages" / "other.jpg")
    with pytest.raises(DataError, match="a name inside the dataset"):
        voc.read_set(root, "train")
    (root / "Annotations" / "0001.xml").write_text(
        f"<annotation><filename>other.jpg</filename>{SIZE}</annotation>"
    )
    assert voc.read_set(root, "train").images[0].file.name == "other.jpg"


@pytest.mark.parametrize(
    "body", [thing(10, 10, 5, 20), thing("a", 1, 2, 3), thing(1, 2, "nan", 4), thing("", 1, 2, 3),
             "<object><name>cat</name></object>", thing(1, 2, 3, 4, name=" ")],
)  # fmt: skip
def test_a_malformed_object_is_named_with_its_line_and_counted(tmp_path: Path, body: str) -> None:
    split = voc.read_set(
        voc_folder(tmp_path, body=SIZE + "\n\n" + body + thing(1, 1, 9, 9)), "train"
    )
    (complaint,) = split.malformed
    assert complaint.where.startswith("Annotations/0001.xml:3")
    assert len(split.images[0].boxes) == 1
    with pytest.raises(DataError, match="--skip-malformed"):
        refuse_malformed(split.malformed * 3)


def yolo_folder(
    root: Path, text: str | None, image: str = "images/train/a.jpg", **options: Any
) -> Path:
    save(root / image, **options)
    if text is not None:
        path = root / image.replace("images", "labels").replace(".jpg", ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def yolo_boxes(root: Path, names: tuple[str, ...] = ("cat", "dog"), **options: int) -> list[Any]:
    split = yolo.read_images([root / "images" / "train"], root, names, **options)
    assert split.malformed == ()
    return [(box.class_name, *box.xywh) for image in split.images for box in image.boxes]


def test_yolo_boxes_and_outlines(tmp_path: Path) -> None:
    text = "1 0.5 0.5 0.5 0.25\n\n0 0.1 0.1 0.3 0.1 0.3 0.35 0.1 0.2\n0 1.0 0.5 0.2 0.5\n"
    found = yolo_boxes(yolo_folder(tmp_path, text))
    assert [row[0] for row in found] == ["dog", "cat", "cat"]
    assert found[0][1:] == pytest.approx((25, 30, 50, 20))
    assert found[1][1:] == pytest.approx((10, 8, 20, 20))
    assert found[2][1:] == pytest.approx((90, 20, 10, 40)), "clipped at the edge"


def test_yolo_keypoints_are_no_outline(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path, "0 0.5 0.5 0.5 0.25 0.1 0.1 0.9 0.9")
    ((_, *box),) = yolo_boxes(root, num_keypoint_values=4)
    assert box == pytest.approx([25, 30, 50, 20])


def test_yolo_images_without_labels_are_empty(tmp_path: Path) -> None:
    yolo_folder(tmp_path, None)
    yolo_folder(tmp_path, "", "images/train/deep/b.jpg")
    split = yolo.read_images([tmp_path / "images"], tmp_path, ["cat"])
    assert [(image.file.name, image.annotated, image.boxes) for image in split.images] == [
        ("a.jpg", False, ()), ("b.jpg", True, ()),
    ]  # fmt: skip


def test_yolo_turned_images_are_measured_as_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    root = yolo_folder(tmp_path, "0 0.5 0.5 1 1", exif=exif)
    assert yolo_boxes(root)[0][1:] == pytest.approx((0, 0, 80, 100))
    assert shown_size(root / "images/train/a.jpg") == (80, 100)


@pytest.mark.parametrize(
    "line",
    [
        "0 0.5 0.5 0.5", "0 0.5 0.5 0.5 0.5 0.9", "cat 0.5 0.5 0.1 0.1", "2 0.5 0.5 0.1 0.1",
        "-1 0.5 0.5 0.1 0.1", "0.5 0.5 0.5 0.1 0.1", "0 50 50 10 10", "0 0.5 nan 0.1 0.1",
        "0 0.5 0.5 0 0.1", "0 0.5 0.5 -0.1 0.1", "\x00\x01", "0 1e999 0.5 0.1 0.1",
    ],
)  # fmt: skip
def test_a_malformed_label_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    root = yolo_folder(tmp_path, f"0 0.5 0.5 0.1 0.1\n{line}\n")
    split = yolo.read_images([root / "images"], root, ["cat", "dog"])
    (complaint,) = split.malformed
    assert complaint.where == "labels/train/a.txt:2"
    assert len(split.images[0].boxes) == 1
    assert "\n" not in str(complaint)


def test_yolo_lists_of_images(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path, "0 0.5 0.5 0.5 0.5")
    listed = root / "train.txt"
    listed.write_text("./images/train/a.jpg\n\n")
    assert yolo.read_images([listed], root, ["cat"]).images[0].boxes
    listed.write_text("./images/train/a.jpg\n../../etc/x.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt:2: expected a place below"):
        yolo.read_images([listed], root, ["cat"])
    listed.write_text("./images/train/nope.jpg\n")
    with pytest.raises(DataError, match="expected a file, got none"):
        yolo.read_images([listed], root, ["cat"])


def test_labels_lie_where_the_last_images_is() -> None:
    of = yolo.labels_of
    assert of(Path("/d/images/train/a.jpg")) == Path("/d/labels/train/a.txt")
    assert of(Path("/images/d/images/a.b.jpg")) == Path("/images/d/labels/a.b.txt")
    assert of(Path("/d/a.jpg")) == Path("/d/a.txt")


def test_round_trip_of_yolo(tmp_path: Path) -> None:
    """Boxes of a COCO document written as YOLO come back to within what its digits hold."""
    boxes = [(10.5, 20.25, 30.0, 40.0), (0.0, 0.0, 100.0, 80.0), (99.0, 79.0, 1.0, 1.0)]
    lines = [f"0 {(x + w / 2) / 100:.6f} {(y + h / 2) / 80:.6f} {w / 100:.6f} {h / 80:.6f}" for x, y, w, h in boxes]  # fmt: skip
    root = yolo_folder(tmp_path, "\n".join(lines))
    split = yolo.read_images([root / "images"], root, ["cat"])
    made = document(split, ["cat"], common_folder([split]))
    assert made["images"][0]["file_name"] == "a.jpg"
    assert [row["bbox"] for row in made["annotations"]] == pytest.approx(
        [pytest.approx(list(box), abs=1e-3) for box in boxes]
    )


def test_names_that_stay_inside() -> None:
    assert safe_name("a/b.jpg", "x") == "a/b.jpg"
    for name in ("", "..", "/a", "a/../b", "a\\b", "a\0"):
        with pytest.raises(DataError, match="name inside the dataset"):
            safe_name(name, "x")


def test_yolo_from_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yolo_folder(tmp_path / "set", "0 0.5 0.5 0.5 0.5")
    save(tmp_path / "outside" / "images" / "x.jpg")
    monkeypatch.chdir(root)
    for outside in ("..", "../outside/images", "images/../../outside", str(tmp_path / "outside")):
        with pytest.raises(DataError, match="a place below"):
            yolo.inside(Path(outside), Path("."), "data.yaml")
    (root / "train.txt").write_text("../outside/images/x.jpg\n")
    with pytest.raises(DataError, match=r"train\.txt:1: expected a place below"):
        yolo.read_images([Path("train.txt")], Path("."), ["cat"])
    absolute = root / "images" / "train"
    assert yolo.inside(absolute, Path("."), "data.yaml") == absolute
    assert yolo.inside(Path("./images/../images"), Path("."), "data.yaml") == Path("images")


def test_yolo_follows_links_once(tmp_path: Path) -> None:
    root = yolo_folder(tmp_path / "set", "0 0.5 0.5 0.5 0.5")
    yolo_folder(tmp_path / "other", "", "images/more/b.jpg")
    linked = root / "images" / "train" / "linked"
    linked.symlink_to(tmp_path / "other" / "images", target_is_directory=True)
    (root / "images" / "train" / "circle").symlink_to(root / "images", target_is_directory=True)
    split = yolo.read_images([root / "images" / "train"], root, ["cat"])
    names = sorted(image.file.name for image in split.images)
    assert names == ["a.jpg", "b.jpg"]


def test_voc_sizes_without_an_end(tmp_path: Path) -> None:
    body = "<size><width>1e999</width><height>80</height></size>"
    with pytest.raises(DataError, match="width and height in pixels"):
        voc.read_set(voc_folder(tmp_path, body=body), "train")
