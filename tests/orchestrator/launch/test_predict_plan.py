from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config.predict_cli import PredictRequest
from orchestrator.launch.packed_model import PackedModel
from orchestrator.launch.predict_plan import DrawnNames, Shards, draws, plan_of
from orchestrator.launch.predict_worker import one_line, valid_text
from orchestrator.storage.filesystems import open_place
from orchestrator.storage.images import ImageFile, ImageList, list_images

HERE = open_place(".", "here")


def listed(folder: Path, names: list[str]) -> ImageList:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return list_images([str(folder)])


def drawn(*names: str) -> list[str]:
    known = DrawnNames()
    return [known.of(ImageFile(name, HERE), k) for k, name in enumerate(names)]


@pytest.mark.parametrize(
    ("images", "batch_size", "size"),
    [(5, 8, 8), (1000, 8, 16), (3000, 8, 48), (20_000, 8, 256), (20_000, 10, 260), (1000, 300, 300)],
)  # fmt: skip
def test_shards_are_whole_batches(images: int, batch_size: int, size: int) -> None:
    known = ImageList()
    known.roots = list_images([__file__]).roots
    for number in range(images):
        known.add(0, f"{number}.jpg", 1)
    shards = Shards(known, batch_size, draw=False)
    assert shards.size == size
    assert size % batch_size == 0
    assert len(shards) == -(-images // size)
    assert sum(shards.files(number) for number in range(len(shards))) == images
    left = [shard.number for shard in shards.without({0})]
    assert left == list(range(1, len(shards)))
    ids = [item.image_id for shard in shards.without(()) for item in shard.items]
    assert ids == list(range(images))


def test_a_video_is_a_shard_between_others(tmp_path: Path) -> None:
    images = listed(tmp_path / "in", ["1.jpg", "2.jpg", "3.jpg", "4.mp4", "5.MOV", "6.jpg"])
    shards = Shards(images, 2, draw=False)
    assert [[item.file.name for item in shard.items] for shard in shards.without(())] == [
        ["1.jpg", "2.jpg"], ["3.jpg"], ["4.mp4"], ["5.MOV"], ["6.jpg"],
    ]  # fmt: skip
    assert (shards.videos, shards.shifted) == (2, True)
    assert [shard.video is not None for shard in shards.without({0})] == [False, True, True, False]
    # Until the end nobody knows how many frames come before.
    assert [[item.image_id for item in shard.items] for shard in shards.without({2, 3})] == [
        [0, 1], [0], [0],
    ]  # fmt: skip
    assert [shards.files(number) for number in range(5)] == [2, 1, 1, 1, 1]


def test_names_are_drawn_alike_whatever_was_done_before(tmp_path: Path) -> None:
    images = listed(tmp_path / "in", ["a.jpg", "a.png", "a.webp", "b.jpg"])
    shards = Shards(images, 2, draw=True)
    whole = [item.drawn for shard in shards.without(()) for item in shard.items]
    assert whole == ["a.jpg", "a-2.jpg", "a-3.jpg", "b.jpg"]
    assert [item.drawn for shard in shards.without({0}) for item in shard.items] == whole[2:]


def test_what_is_drawn_stays_in_its_folder() -> None:
    hostile = [
        "../../etc/passwd.jpg", "/etc/passwd.jpg", "..", "a/../../b.jpg", "./a//b.png", ".jpg",
        "x\0y.jpg", "",
    ]  # fmt: skip
    found = drawn(*hostile)
    assert found == [
        "etc/passwd.jpg", "etc/passwd-2.jpg", "image.jpg", "a/b.jpg", "a/b-5.jpg", ".jpg.jpg",
        "xy.jpg", "image-8.jpg",
    ]  # fmt: skip
    assert drawn("film.mp4", "film.jpg", "film.avi") == ["film.mp4", "film.jpg", "film-3.mp4"]


def test_a_name_that_is_a_folder_elsewhere_is_evaded() -> None:
    """On an object store both can be: a.jpg and a.jpg/b.jpg."""
    assert drawn("a.jpg", "a.jpg/b.jpg") == ["a.jpg", "image-2.jpg"]
    assert drawn("a.jpg/b.jpg", "a.jpg") == ["a.jpg/b.jpg", "a-2.jpg"]
    assert drawn("b-2.jpg", "b.jpg", "b.png") == ["b-2.jpg", "b.jpg", "b-3.jpg"]
    assert drawn("b-3.jpg", "b.jpg", "b.png", "image-3.jpg") == [
        "b-3.jpg", "b.jpg", "image-3.jpg", "image-3-4.jpg",
    ]  # fmt: skip


def test_names_too_long_for_a_filesystem_are_cut(tmp_path: Path) -> None:
    one, other = drawn("é" * 300 + "1.jpg", "é" * 300 + "2.jpg")
    assert one != other
    for name in (one, other):
        (tmp_path / name).write_bytes(b"")


def test_the_plan_has_what_results_depend_on() -> None:
    images = list_images([__file__])
    model = PackedModel({"ema.safetensors": b"1", "meta.json": b"2"})

    def plan(model: PackedModel = model, batch_size: int = 8, **more: object) -> dict[str, object]:
        request = PredictRequest("m", ("i",), batch_size=batch_size, **more)  # type: ignore[arg-type]
        return plan_of(request, Shards(images, batch_size, draw=False), model)

    same = plan()
    assert plan(workers=4, gpus_per_worker=0.0, max_failures=9) == same
    assert plan(PackedModel({**model.files, "meta.json": b"3"})) == same
    for other in (
        plan(PackedModel({**model.files, "ema.safetensors": b"3"})),
        plan(batch_size=2), plan(score=0.1), plan(threads_per_worker=2), plan(cpus_per_worker=2.0),
        plan(every_s=1.0), plan(frames_every=2), plan(format="parquet"),
    ):  # fmt: skip
        assert other != same


def test_few_are_drawn_unless_said_otherwise() -> None:
    few, many = ImageList(), ImageList()
    few.roots = many.roots = list_images([__file__]).roots
    for number in range(1001):
        many.add(0, f"{number}.jpg", 0)
    few.add(0, "1.jpg", 0)
    for draw, expected in ((None, (True, False)), (True, (True, True)), (False, (False, False))):
        request = PredictRequest("m", ("i",), draw=draw)
        assert (draws(request, few), draws(request, many)) == expected


def test_names_do_not_confuse_a_terminal_or_a_reader() -> None:
    assert one_line("a\x1b[2Jb\nc é") == "a\\x1b[2Jb\\nc é"
    assert valid_text("caf\udce9.jpg") == "caf\\udce9.jpg"
    assert valid_text("café.jpg") == "café.jpg"
