"""Frames of a video file, one after another, and a video made of pictures. All of PyAV is here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
from av.error import ArgumentError, FFmpegError
from PIL import Image

from orchestrator.errors import ConfigError, DataError, UserError
from orchestrator.storage.filesystems import Place, reason
from orchestrator.storage.images import fetch

CODECS = ("libx264", "mpeg4")
# Of the files with a suffix that is known. No lists of others: those name files to be read.
FORMATS = "mov,matroska,avi,mpeg,mpegvideo,mpegts,m4v,asf,flv"
LEAST_FPS, MOST_FPS, USUAL_FPS = 1, 120, 25
MOST_SIDE_PX = 16_384
WHOLE = 0.9  # of the frames that a file says it has


@dataclass(frozen=True)
class Every:
    """Which frames are looked at: each `frames`-th, or, where given, one in `seconds`."""

    frames: int = 1
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError("--frames-every", "at least 1", str(self.frames), "correct it")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ConfigError("--every-s", "more than 0", f"{self.seconds:g}", "correct it")


@dataclass(frozen=True, eq=False)
class Frame:
    """index: among all frames of the video; time_s: since its first; picture: RGB, as it is shown."""

    index: int
    time_s: float
    picture: Image.Image


class Video:
    """A video file that is open; iterating gives its frames, once.

    fps: of the frames that are given, as far as the file says.

    Raises:
        DataError: no video, or broken: then after the frames before that.
        StorageError: a storage that stays away.
    """

    def __init__(self, place: Place, every: Every) -> None:
        self.place, self.every = place, every
        self._stack = ExitStack()
        try:
            path = self._stack.enter_context(_local(place))
            self._container = self._stack.enter_context(_open(path))
            if not self._container.streams.video:
                raise self._unusable("a video", "a file without one")
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "SLICE"  # frames in threads would be held by the dozen
        except (OSError, FFmpegError, ValueError) as error:
            self._stack.close()
            raise self._unusable("a readable video", _why(error)) from None
        except UserError:
            self._stack.close()
            raise

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def fps(self) -> Fraction:
        """Between 1 and 120, so that what is written with it can be played."""
        rate = Fraction(self._stream.average_rate or USUAL_FPS) / self.every.frames
        if self.every.seconds is not None:
            rate = min(rate, 1 / Fraction(self.every.seconds).limit_denominator(1000))
        return min(max(rate, Fraction(LEAST_FPS)), Fraction(MOST_FPS)).limit_denominator(1001)

    def __iter__(self) -> Iterator[Frame]:
        began: float | None = None
        index, due_s = -1, 0.0
        try:
            for index, frame in enumerate(self._container.decode(self._stream)):
                time_s = frame.time
                if frame.pts is None:  # the container keeps no times
                    time_s = index / float(self._stream.average_rate or USUAL_FPS)
                began = time_s if began is None else began
                time_s -= began
                if self.every.seconds is None:
                    wanted = index % self.every.frames == 0
                else:
                    wanted = time_s >= due_s
                    if wanted:
                        skipped = int((time_s - due_s) / self.every.seconds)
                        due_s += self.every.seconds * (skipped + 1)
                if wanted:
                    yield Frame(index, time_s, self._picture(frame))
        except (OSError, FFmpegError, ValueError) as error:
            raise self._unusable("a video that is whole", _why(error)) from None
        # Some decoders end at a cut as at the end. Editors may leave out a few frames.
        if index + 1 < WHOLE * self._stream.frames:
            raise self._unusable(
                f"a video that is whole, {self._stream.frames} frames", f"{index + 1} of them"
            )

    def _picture(self, frame: Any) -> Image.Image:
        if max(frame.width, frame.height) > MOST_SIDE_PX:
            size = f"{frame.width} x {frame.height}"
            raise self._unusable(f"at most {MOST_SIDE_PX} pixels a side", size)
        picture: Image.Image = frame.to_image()
        # Phones keep which way is up beside the pixels, counterclockwise as Pillow turns.
        return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture

    def _unusable(self, expected: str, got: str) -> DataError:
        return DataError(f"video {self.place.uri}", expected, got, "replace it or take it out")


class VideoWriter:
    """Pictures as an mp4 file. All get the size of the first, made even.

    Raises:
        DataError: a size that the encoder does not take.
    """

    def __init__(self, path: Path, fps: Fraction) -> None:
        self._container = av.open(str(path), "w", format="mp4")
        self._fps = fps
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            stack.callback(self._container.close)
            if self._stream is not None and error is None:
                self._encode(None)

    def add(self, picture: Image.Image) -> None:
        if self._stream is None:
            self._stream = self._container.add_stream(_codec(), rate=self._fps)
            self._stream.width, self._stream.height = (
                max(2, picture.width // 2 * 2),
                max(2, picture.height // 2 * 2),
            )
            self._stream.pix_fmt = "yuv420p"  # what every player shows
            self._stream.codec_context.thread_count = 1  # the cores are the workers'
        size = (self._stream.width, self._stream.height)
        if picture.size != size:
            picture = picture.resize(size)
        make: Any = av.VideoFrame.from_image
        self._encode(make(picture))

    def _encode(self, frame: Any) -> None:
        """frame: None at the end."""
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except FFmpegError as error:
            size = f"{self._stream.width} x {self._stream.height}"
            raise DataError(
                "a drawn video", "frames that can be encoded", f"{size} ({_why(error)})",
                "take it out, or give --no-draw",
            ) from None  # fmt: skip


@contextmanager
def _local(place: Place) -> Iterator[Path]:
    """A remote video is fetched whole: players' formats keep their table of contents at the end."""
    if place.local is not None:
        yield place.local
        return
    with tempfile.TemporaryDirectory(prefix="video-") as temporary:
        copy = Path(temporary) / "video"
        get = place.filesystem.get_file
        fetch(place, f"video {place.uri}", lambda: get(place.path, str(copy)))
        yield copy


def _open(path: Path) -> Any:
    try:
        return av.open(str(path), "r", options={"format_whitelist": FORMATS})
    except ArgumentError:  # known, and not in the list
        raise ValueError("another format") from None


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or reason(error))


def _codec() -> str:
    """The first that this build of FFmpeg can write."""
    return next(name for name in CODECS if name in av.codecs_available)
