from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.predictor import Predictor
from orchestrator.config.cli import PredictOptions, PredictRequest, parse_predict
from orchestrator.errors import ConfigError, UserError
from orchestrator.launch.predict_job import image_ids, run_predict_job
from orchestrator.storage.images import list_images

from .test_export_job import checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, _ = checkpoint(tmp_path_factory.mktemp("model") / "step_00000001")
    return str(folder)


@pytest.fixture
def pictures(shapes: Path, tmp_path: Path) -> Path:
    """139.jpg … of the validation images, one of them deeper."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    found = sorted(path for path in (shapes / "images" / "val").iterdir())
    assert len(found) == 4
    for number, path in enumerate(found, start=139):
        target = folder / "deep" if number == 140 else folder
        shutil.copy(path, target / f"{number:012d}{path.suffix}")
    (folder / "readme.txt").write_text("no image")
    return folder


def predict(model: str, *images: Any, **options: Any) -> tuple[int, dict[str, Any], list[Any]]:
    request = PredictRequest(model, tuple(map(str, images)), **({"score": 0.0} | options))
    done = run_predict_job(request, PredictOptions(json=False), io.StringIO())
    rows = json.loads((request.output / "detections.json").read_text())
    return done.code, done.report, rows


def test_results_are_the_predictors_in_cocos_format(
    model: str, pictures: Path, tmp_path: Path
) -> None:
    code, report, rows = predict(model, pictures, output=tmp_path / "out", batch_size=1)
    assert (code, report["images"], report["failed"]) == (0, 4, 0)
    assert report["image_ids"] == "the file name's number"
    assert len(rows) == report["detections"] == 400
    predictor = Predictor.load(Path(model))
    for path in pictures.rglob("*.jpg"):
        (expected,) = predictor.predict([path.read_bytes()], score_threshold=0.0)
        mine = [row for row in rows if row["image_id"] == int(path.stem)]
        assert {row["file_name"] for row in mine} == {str(path.relative_to(pictures))}
        np.testing.assert_array_equal([row["bbox"] for row in mine], expected.boxes_xywh)
        np.testing.assert_array_equal([row["score"] for row in mine], expected.scores)
        assert [row["category_id"] for row in mine] == expected.category_ids.tolist()
        assert [row["category"] for row in mine] == list(expected.names)
    drawn = sorted(
        path.relative_to(tmp_path / "out/drawn") for path in (tmp_path / "out/drawn").rglob("*.*")
    )
    assert [str(path) for path in drawn] == [
        "000000000139.jpg", "000000000141.jpg", "000000000142.jpg", "deep/000000000140.jpg",
    ]  # fmt: skip
    assert not list((tmp_path / "out").glob("*.partial"))


def test_bad_images_are_named_counted_and_left_out(
    model: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (pictures / "000000000139.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "gone.jpg").symlink_to(tmp_path / "nowhere")
    code, report, rows = predict(model, pictures, output=tmp_path / "out", batch_size=2, draw=False)
    assert (code, report["failed"], report["image_ids"]) == (1, 2, "a running number")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "cut.jpg: expected a readable image" in said[0]
    assert "gone.jpg: expected a file that can be read" in said[1]
    assert len({row["file_name"] for row in rows}) == 4
    assert not (tmp_path / "out" / "drawn").exists()


def test_the_threshold_and_an_empty_result(model: str, pictures: Path, tmp_path: Path) -> None:
    code, report, rows = predict(model, pictures, output=tmp_path / "out", score=0.99)
    assert (code, report["detections"], rows) == (0, 0, [])
    assert len(list((tmp_path / "out" / "drawn").rglob("*.jpg"))) == 4  # seen, and nothing found


def test_two_files_of_one_name_are_both_drawn(model: str, pictures: Path, tmp_path: Path) -> None:
    Image.open(pictures / "000000000139.jpg").save(pictures / "000000000139.png")
    _, report, _ = predict(model, pictures, output=tmp_path / "out")
    assert report["image_ids"] == "a running number"
    assert len(list((tmp_path / "out" / "drawn").rglob("*.jpg"))) == 5


@pytest.mark.parametrize(
    ("names", "numbers", "by"),
    [
        (["000139.jpg", "a/7.png"], [139, 7], "the file name's number"),
        (["1.jpg", "a/01.jpg"], [1, 2], "a running number"),
        (["5.jpg", "b.jpg"], [1, 2], "a running number"),
        (["5.jpg", "\u00b2.jpg"], [1, 2], "a running number"),
    ],
)
def test_image_ids(names: list[str], numbers: list[int], by: str) -> None:
    assert image_ids(names) == (numbers, by)


def test_images_by_folder_file_and_glob_once_each(pictures: Path) -> None:
    found = list_images([str(pictures / "*.jpg"), str(pictures), str(pictures / "readme.txt")])
    assert [image.name for image in found] == [
        "000000000139.jpg", "000000000141.jpg", "000000000142.jpg", "deep/000000000140.jpg",
        "readme.txt",
    ]  # fmt: skip


@pytest.mark.integration
def test_images_on_s3(
    model: str, pictures: Path, tmp_path: Path, bucket: str, s3_client: Any
) -> None:
    for path in pictures.rglob("*.*"):
        s3_client.upload_file(str(path), bucket, f"in/{path.relative_to(pictures)}")
    _, _, expected = predict(model, pictures, output=tmp_path / "local", batch_size=4)
    code, _, rows = predict(model, f"s3://{bucket}/in", output=tmp_path / "s3", batch_size=4)
    assert (code, rows) == (0, expected)
    (one,) = list_images([f"s3://{bucket}/in/deep/*"])
    assert one.place.uri == f"s3://{bucket}/in/deep/000000000140.jpg"
    with pytest.raises(UserError, match="none at"):
        list_images([f"s3://{bucket}/other"])


@pytest.mark.parametrize(
    ("images", "output", "message"),
    [
        ("nowhere/*.jpg", "out", "IMAGES: expected image files"),
        (".", "out", "IMAGES: expected image files"),
        ("{pictures}", "taken", "--output: expected a folder that can be written"),
        ("unknown://there", "out", "IMAGES: expected a path or a URL fsspec knows"),
    ],
)
def test_refusals(
    model: str, pictures: Path, tmp_path: Path, images: str, output: str, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=message):
        predict(model, images.format(pictures=pictures), output=tmp_path / output)


def test_flags() -> None:
    request, options = parse_predict(
        "", ["m", "a.jpg", "b/", "--score", ".5", "--no-draw", "--json"]
    )
    assert request == PredictRequest("m", ("a.jpg", "b/"), score=0.5, draw=False)
    assert options == PredictOptions(json=True)
    for bad in (["--score", "1.5"], ["--batch-size", "0"], ["--score", "high"]):
        with pytest.raises(ConfigError):
            parse_predict("", ["m", "a.jpg", *bad])
