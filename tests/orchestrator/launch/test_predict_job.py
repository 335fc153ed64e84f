from __future__ import annotations

import io
import json
import os
import shutil
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from model.predictor import Predictor
from orchestrator.config.predict_cli import PredictOptions, PredictRequest
from orchestrator.errors import ConfigError, UserError
from orchestrator.launch import predict_plan, predict_worker
from orchestrator.launch.packed_model import PackedModel
from orchestrator.launch.predict_job import run_predict_job
from orchestrator.launch.predict_worker import Item, Looker, Shard
from orchestrator.storage.filesystems import open_place
from orchestrator.storage.images import ImageFile
from orchestrator.storage.predictions import Part, PredictionFolder
from orchestrator.storage.videos import Every, Video, VideoWriter

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
    options["output"] = str(options["output"])
    fresh = options.pop("fresh", False)
    request = PredictRequest(model, tuple(map(str, images)), **({"score": 0.0} | options))
    done = run_predict_job(request, PredictOptions(json=False, fresh=fresh), io.StringIO())
    rows = json.loads((Path(request.output) / "detections.json").read_text())
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


def test_a_finished_prediction_is_not_begun_again(
    model: str, pictures: Path, tmp_path: Path
) -> None:
    first = predict(model, pictures, output=tmp_path / "out")
    written = (tmp_path / "out" / "detections.json").stat().st_mtime_ns
    assert predict(model, pictures, output=tmp_path / "out") == first
    assert (tmp_path / "out" / "detections.json").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match=r"with another: score 0\.0 \(now 0\.5\); give another"):
        predict(model, pictures, output=tmp_path / "out", score=0.5)
    _, report, rows = predict(model, pictures, output=tmp_path / "out", score=0.5, fresh=True)
    assert report["detections"] == len(rows) < first[1]["detections"]
    (tmp_path / "out" / "detections.json").unlink()
    assert predict(model, pictures, output=tmp_path / "out", score=0.5)[2] == rows


def test_an_interrupted_prediction_goes_on_with_what_is_left(
    model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _, report, expected = predict(model, pictures, output=tmp_path / "whole", batch_size=1)
    looked: list[int] = []
    look = predict_worker._Desk.look

    def stopping(self: Any, shard: Shard) -> Part:
        looked.append(shard.number)
        if looked == [0, 1, 2]:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(self, shard)

    monkeypatch.setattr(predict_worker._Desk, "look", stopping)
    request = PredictRequest(
        model, (str(pictures),), str(tmp_path / "cut"), score=0.0, batch_size=1
    )
    out = io.StringIO()
    done = run_predict_job(request, PredictOptions(json=False), out)
    assert (done.code, done.report["status"], done.report["shards_done"]) == (130, "interrupted", 2)
    assert "the same command goes on with the 2 of 4 shards left" in out.getvalue()
    assert not (tmp_path / "cut" / "detections.json").exists()
    code, again, rows = predict(model, pictures, output=tmp_path / "cut", batch_size=1)
    assert (code, looked) == (0, [0, 1, 2, 2, 3])
    assert rows == expected
    assert {**again, "output": "", "img_per_s": 0} == {**report, "output": "", "img_per_s": 0}
    assert not (tmp_path / "cut" / "parts").exists()


def test_an_output_below_the_images_is_none_of_them(model: str, pictures: Path) -> None:
    first = predict(model, pictures, output=pictures / "found")
    assert first[1]["images"] == len(list((pictures / "found" / "drawn").rglob("*.jpg"))) == 4
    assert predict(model, pictures, output=pictures / "found") == first


def test_an_output_that_is_taken_is_said_before_images_are_listed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PredictionFolder(open_place(str(tmp_path / "out"), ""))
    with folder.alone(), pytest.raises(ConfigError, match="a folder that no other prediction"):
        predict(model, "nowhere", output=tmp_path / "out")


def test_too_many_images_for_the_device_are_one_line(
    model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Predictor, *images: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    monkeypatch.setattr(Predictor, "predict", full)
    with pytest.raises(ConfigError) as said:
        predict(model, pictures, output=tmp_path / "out", batch_size=3)
    assert str(said.value) == (
        "--batch-size: expected images that fit the device's memory, "
        "got 3 (CUDA out of memory. Tried); lower it"
    )


def test_a_worker_keeps_no_second_copy_of_the_model(model: str, tmp_path: Path) -> None:
    folder = PredictionFolder(open_place(str(tmp_path), ""))
    folder.begin({}, fresh=False)
    looker = Looker(PackedModel.of(Path(model)), folder, {}, (), 0.5, 1, Every(), use_gpu=False)
    look: Any = looker()
    assert (look.__self__.order.model.files, look.__self__.order.score) == ({}, 0.5)


def test_a_shard_says_what_is_in_it(tmp_path: Path) -> None:
    files = [ImageFile(f"{k}\x1b.jpg", open_place(str(tmp_path), "")) for k in range(3)]
    items = tuple(Item(file, 1, None) for file in files)
    assert str(Shard(7, items)) == "shard 7: 0\\x1b.jpg and 2 more"
    assert str(Shard(7, items[:1])) == "shard 7: 0\\x1b.jpg"


def test_results_do_not_depend_on_shards_or_parts(
    model: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict(model, pictures, output=tmp_path / "many", batch_size=2)
    monkeypatch.setattr(predict_plan, "PARTS_AT_LEAST", 1)
    predict(model, pictures, output=tmp_path / "one", batch_size=2)
    plans = [json.loads((tmp_path / name / "plan.json").read_text()) for name in ("many", "one")]
    assert [plan["shards"] for plan in plans] == [2, 1]
    many, one = ((tmp_path / name / "detections.json").read_bytes() for name in ("many", "one"))
    assert many == one


def test_a_table_has_the_same_rows(model: str, pictures: Path, tmp_path: Path) -> None:
    _, _, expected = predict(model, pictures, output=tmp_path / "json")
    request = PredictRequest(
        model, (str(pictures),), str(tmp_path / "table"), score=0.0, format="parquet"
    )
    assert run_predict_job(request, PredictOptions(json=False), io.StringIO()).code == 0
    found = pyarrow.parquet.read_table(tmp_path / "table" / "detections.parquet").to_pylist()
    for one, other in zip(found, expected, strict=True):
        assert [one[side] for side in ("x", "y", "width", "height")] == other["bbox"]
        for name in ("image_id", "category_id", "score", "category", "file_name"):
            assert one[name] == other[name]
        assert one["frame"] is None


def test_frames_of_a_video_among_images(model: str, pictures: Path, tmp_path: Path) -> None:
    stills = [Image.open(path) for path in sorted(pictures.glob("*.jpg"))]
    with VideoWriter(pictures / "000000000140.mp4", Fraction(10)) as film:
        for number in range(12):
            film.add(stills[number % 3])
    (pictures / "x.mp4").write_text("no video")
    code, report, rows = predict(
        model, pictures, output=tmp_path / "out", frames_every=3, batch_size=2, score=0.0
    )
    assert (code, report["failed"]) == (1, 1)
    assert report["images"] == 4 + 4
    assert report["image_ids"] == "a running number"
    names = {row["image_id"]: (row["file_name"], row.get("frame")) for row in rows}
    film_name = "000000000140.mp4"
    assert names == {
        1: ("000000000139.jpg", None),
        2: (film_name, 0), 3: (film_name, 3), 4: (film_name, 6), 5: (film_name, 9),
        6: ("000000000141.jpg", None), 7: ("000000000142.jpg", None),
        8: ("deep/000000000140.jpg", None),
    }  # fmt: skip
    assert [row["image_id"] for row in rows] == sorted(row["image_id"] for row in rows)
    assert {row["time_s"] for row in rows if row["image_id"] == 4} == {0.6}
    predictor = Predictor.load(Path(model))
    with Video(open_place(str(pictures / film_name), ""), Every(3)) as video:
        (expected,) = predictor.predict([list(video)[2].picture], score_threshold=0.0)
    mine = [row for row in rows if row["image_id"] == 4]
    np.testing.assert_allclose([row["bbox"] for row in mine], expected.boxes_xywh, atol=1e-3)
    with Video(open_place(str(tmp_path / "out" / "drawn" / film_name), ""), Every()) as video:
        assert len(list(video)) == 4
    failed = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert [one["file_name"] for one in failed] == ["x.mp4"]


def test_hostile_names_stay_inside(model: str, pictures: Path, tmp_path: Path) -> None:
    """An object store takes any name."""
    memory = fsspec.filesystem("memory")
    picture = (pictures / "000000000139.jpg").read_bytes()
    store = memory.store  # its own methods tidy names up
    evil = (
        "/evil/../../../outside.jpg", "/evil/\x1b[2J.jpg", "/evil/a.jpg", "/evil/a.jpg/b.jpg",
    )  # fmt: skip
    for name in evil:
        memory.pipe_file("/evil/x", picture)
        store[name] = store.pop("/evil/x")
    try:
        code, report, _ = predict(model, "memory://evil", output=tmp_path / "a/b/c/out", score=0.5)
    finally:
        for name in evil:
            store.pop(name)
    assert (code, report["failed"], report["images"]) == (0, 0, 4)
    drawn = [path for path in tmp_path.rglob("*.jpg") if path.is_file()]
    mine = [path for path in drawn if pictures not in path.parents]
    assert len(mine) == 4
    assert {path.parents[0] for path in mine} == {tmp_path / "a/b/c/out/drawn"}


@pytest.mark.integration
def test_from_s3_to_s3(
    model: str, pictures: Path, tmp_path: Path, bucket: str, s3_client: Any
) -> None:
    (pictures / "bad.jpg").write_text("no image")
    for path in pictures.rglob("*.*"):
        s3_client.upload_file(str(path), bucket, f"in/{path.relative_to(pictures)}")
    _, _, expected = predict(model, pictures, output=tmp_path / "local", batch_size=4)
    request = PredictRequest(
        model, (f"s3://{bucket}/in",), f"s3://{bucket}/out", score=0.0, batch_size=4
    )
    done = run_predict_job(request, PredictOptions(json=False), io.StringIO())
    assert (done.code, done.report["output"]) == (1, f"s3://{bucket}/out")
    listed = s3_client.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]
    local = [str(p.relative_to(tmp_path / "local")) for p in (tmp_path / "local").rglob("*.*")]
    assert sorted(one["Key"].removeprefix("out/") for one in listed) == sorted(local)
    body = s3_client.get_object(Bucket=bucket, Key="out/detections.json")["Body"].read()
    assert json.loads(body) == expected
    assert body == (tmp_path / "local" / "detections.json").read_bytes()


@pytest.mark.parametrize(
    ("images", "output", "message"),
    [
        ("nowhere/*.jpg", "out", "IMAGES: expected image or video files"),
        (".", "out", "IMAGES: expected image or video files"),
        ("{pictures}", "taken", "--output: expected a place to write"),
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
