from __future__ import annotations

import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

from orchestrator.errors import ConfigError, DataError
from orchestrator.storage.filesystems import open_place
from orchestrator.storage.videos import Every, Frame, Video, VideoWriter

FPS = 10


def film(path: Path, frames: int = 25, size: tuple[int, int] = (64, 48)) -> Path:
    """Grey, darker at first; 10 frames a second."""
    with VideoWriter(path, Fraction(FPS)) as writer:
        for number in range(frames):
            writer.add(Image.new("RGB", size, (number * 8, number * 8, number * 8)))
    return path


def look(path: Path | str, every: Every = Every()) -> list[Frame]:
    with Video(open_place(str(path), "IMAGES"), every) as video:
        return list(video)


def test_every_frame_with_its_time(tmp_path: Path) -> None:
    frames = look(film(tmp_path / "a.mp4"))
    assert [frame.index for frame in frames] == list(range(25))
    assert [frame.time_s for frame in frames] == pytest.approx([k / FPS for k in range(25)])
    greys = [np.asarray(frame.picture).mean() for frame in frames]
    assert greys == pytest.approx([k * 8 for k in range(25)], abs=6)
    assert {(frame.picture.mode, frame.picture.size) for frame in frames} == {("RGB", (64, 48))}


@pytest.mark.parametrize(
    ("every", "indices", "fps"),
    [
        (Every(frames=10), [0, 10, 20], 1),
        (Every(seconds=0.5), [0, 5, 10, 15, 20], 2),
        (Every(seconds=0.25), [0, 3, 5, 8, 10, 13, 15, 18, 20, 23], 4),
        (Every(seconds=0.01), list(range(25)), 10),
        (Every(seconds=60), [0], 1),
    ],
)
def test_some_of_the_frames(tmp_path: Path, every: Every, indices: list[int], fps: int) -> None:
    path = film(tmp_path / "a.mp4")
    assert [frame.index for frame in look(path, every)] == indices
    with Video(open_place(str(path), "IMAGES"), every) as video:
        assert video.fps == fps


def test_phones_keep_which_way_is_up_beside_the_pixels(tmp_path: Path) -> None:
    """A red upper half, stored turned: shown as it was seen."""
    upright = Image.new("RGB", (48, 64), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 48, 32))
    with av.open(str(tmp_path / "turned.mov"), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(90)
        for packet in stream.encode(av.VideoFrame.from_image(upright.rotate(-90, expand=True))):
            container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    (frame,) = look(tmp_path / "turned.mov")
    assert frame.picture.size == (48, 64)
    assert frame.picture.getpixel((24, 8))[0] > 200


def test_odd_sizes_are_made_even(tmp_path: Path) -> None:
    assert look(film(tmp_path / "a.mp4", 2, (65, 47)))[0].picture.size == (64, 46)


@pytest.mark.parametrize("size", [(1, 48), (64, 1), (1, 1)])
def test_the_smallest_sides(tmp_path: Path, size: tuple[int, int]) -> None:
    made = look(film(tmp_path / "a.mp4", 2, size))[0].picture.size
    assert made == tuple(max(2, side) for side in size)


def test_what_cannot_be_encoded_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="a drawn video: expected frames that can be encoded, got"),
        VideoWriter(tmp_path / "a.mp4", Fraction(FPS)) as writer,
    ):
        writer.add(Image.new("RGB", (20_000, 2)))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mov", "mpeg4"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"),
        ("a.mpg", "mpeg2video"), ("a.wmv", "wmv2"), ("a.flv", "flv"), ("a.m4v", "mpeg4"),
    ],
)  # fmt: skip
def test_the_formats_of_known_suffixes(tmp_path: Path, name: str, codec: str) -> None:
    with av.open(str(tmp_path / name), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        make: Any = av.VideoFrame.from_image
        for _ in range(5):
            container.mux(stream.encode(make(Image.new("RGB", (64, 48)))))
        container.mux(stream.encode(None))
    assert len(look(tmp_path / name)) == 5


def test_a_list_of_other_files_is_no_video(tmp_path: Path) -> None:
    """Whatever it is called: it would show files that nobody gave."""
    film(tmp_path / "secret.mp4")
    (tmp_path / "x.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(DataError, match=r"x\.mp4: expected a readable video, got another format;"):
        look(tmp_path / "x.mp4")


def test_a_long_gap_is_skipped_at_once(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "gap.mkv"), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        make: Any = av.VideoFrame.from_image
        frame = make(Image.new("RGB", (64, 48)))
        for packet in (*stream.encode(frame), *stream.encode(None)):
            packet.time_base = Fraction(1, 1000)
            for time_ms in (0, 40, 10**12):
                packet.pts = packet.dts = time_ms
                container.mux(packet)
    began = time.monotonic()
    frames = look(tmp_path / "gap.mkv", Every(seconds=0.001))
    assert time.monotonic() - began < 5
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.04, 1e9])


def test_a_remote_video(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/videos-test/a.mp4", film(tmp_path / "a.mp4").read_bytes())
    try:
        assert len(look("memory://videos-test/a.mp4")) == 25
        with pytest.raises(
            DataError, match=r"video memory://videos-test/b\.mp4: expected a readable"
        ):
            look("memory://videos-test/b.mp4")
    finally:
        memory.rm("/videos-test", recursive=True)


def test_no_video_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video at all" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg")
    for name in ("text.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(DataError, match=f"{name}: expected a readable video, got [^\\[]*;"):
            look(tmp_path / name)


def test_a_cut_video_gives_its_frames_up_to_the_cut(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (60, 48, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "cut.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in noise:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    whole = (tmp_path / "cut.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    frames: list[Frame] = []
    with (
        Video(open_place(str(tmp_path / "cut.avi"), "IMAGES"), Every()) as video,
        pytest.raises(DataError, match=r"cut\.avi: expected a video that is whole"),
    ):
        frames.extend(video)  # as far as it goes
    assert 10 < len(frames) < 60


@pytest.mark.parametrize(
    "values", [{"frames": 0}, {"seconds": 0.0}, {"seconds": -1.0}, {"seconds": float("nan")}]
)
def test_refusals(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="every"):
        Every(**values)  # type: ignore[arg-type]
