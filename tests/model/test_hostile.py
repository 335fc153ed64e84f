"""Whatever is sent as an image is read, or refused for the right reason; and soon."""

from __future__ import annotations

import time
import tracemalloc
import warnings

import numpy as np
import pytest
from helpers.hostile import Sent, encoded, hostile, picture

from model.errors import DataError
from model.predictor import LargeImageError, UnknownImageError, read_image

SENT = hostile()
MAX_PIXELS = 50_000_000
SOON_S = 10.0
MOST_BYTES = 64 * 2**20


def verdict(error: DataError) -> str:
    if isinstance(error, LargeImageError):
        return "large"
    return "unknown" if isinstance(error, UnknownImageError) else "unusable"


@pytest.mark.parametrize("name", SENT)
def test_an_image_or_one_line(name: str) -> None:
    sent = SENT[name]
    began = time.process_time()
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow says in words what is asserted here
            found = judged(sent)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == (sent.verdict, sent.size_wh if sent.verdict == "read" else None)
    assert peak < MOST_BYTES
    assert time.process_time() - began < SOON_S


def judged(sent: Sent) -> tuple[str, tuple[int, int] | None]:
    try:
        image = read_image(sent.data, MAX_PIXELS)
    except DataError as error:
        said = str(error)
        return (verdict(error) if "\n" not in said and len(said) < 500 else said), None
    assert image.mode == "RGB"
    assert len(image.getdata()) == image.width * image.height  # all of it was decoded
    return "read", image.size


def test_of_several_pictures_the_first_is_read() -> None:
    first = np.asarray(picture()).astype(int)
    for name in ("gif, animated", "webp, animated", "apng, animated", "tiff, two pages"):
        read = np.asarray(read_image(SENT[name].data)).astype(int)
        assert np.abs(read - first).mean() < 8, name


def test_sixteen_bits_keep_their_brightness() -> None:
    for name in ("png, 16 bits grey", "tiff, 16 bits grey"):
        read = np.asarray(read_image(SENT[name].data))
        assert read[0, 0].tolist() == [0, 0, 0]
        assert read[-1, -1].tolist() == [255, 255, 255]


def test_colours_of_other_modes_are_those_of_rgb() -> None:
    expected = np.asarray(picture()).astype(int)
    for name in ("jpeg, CMYK", "png, half transparent", "jpeg, progressive"):
        read = np.asarray(read_image(SENT[name].data)).astype(int)
        assert np.abs(read - expected).mean() < 8, name


@pytest.mark.parametrize("side", [8, 3000])
def test_honest_progressive_images_are_read(side: int) -> None:
    image = picture(size=(side, side))
    data = encoded(image, "JPEG", progressive=True, quality=98)
    assert read_image(data).size == (side, side)
