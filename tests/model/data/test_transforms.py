from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model.data.transforms import (
    PAD_RGB,
    AugmentConfig,
    View,
    apply_to_boxes,
    apply_to_image,
    decode_image,
    letterbox_view,
    random_view,
)

RED = (255, 0, 0)


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def mean_colour(image: Image.Image) -> list[float]:
    assert image.mode == "RGB"
    return [float(v) for v in np.asarray(image, dtype=np.float64).mean(axis=(0, 1))]


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("RGB", (200, 100, 50), "JPEG", (200, 100, 50)),
        ("RGB", (200, 100, 50), "PNG", (200, 100, 50)),
        ("L", 90, "JPEG", (90, 90, 90)),
        ("L", 90, "PNG", (90, 90, 90)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "JPEG", RED),
        ("RGBA", (200, 100, 50, 255), "PNG", (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), "PNG", PAD_RGB),  # transparent is padding, not black
        ("LA", (90, 0), "PNG", PAD_RGB),
        ("I;16", 0x8040, "PNG", (128, 128, 128)),  # the high byte, not white
        ("I;16", 0x8040, "TIFF", (128, 128, 128)),
    ],
)
def test_every_mode_becomes_rgb(mode: str, colour: Any, kind: str, expected: Any) -> None:
    decoded = decode_image(file_of(Image.new(mode, (20, 12), colour), kind))
    assert decoded.size == (20, 12)
    assert mean_colour(decoded) == pytest.approx(expected, abs=3)


def test_palette_with_transparency() -> None:
    image = Image.new("P", (20, 12), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 10, 12))
    decoded = decode_image(file_of(image, "PNG", transparency=0))
    assert decoded.getpixel((2, 2)) == (0, 0, 255)
    assert decoded.getpixel((15, 2)) == PAD_RGB


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind: str, orientation: int) -> None:
    """A scene with a red top left corner, stored as a camera held in each way would."""
    scene = Image.new("RGB", (40, 24), (0, 0, 255))
    scene.paste(RED, (0, 0, 20, 8))
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = scene
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    decoded = decode_image(file_of(stored, kind, exif=exif, **options))
    assert decoded.size == (40, 24)
    difference = np.asarray(decoded, dtype=np.int64) - np.asarray(scene, dtype=np.int64)
    assert np.abs(difference).mean() < 3


def test_jpegs_shrink_while_both_sides_stay_large_enough() -> None:
    data = file_of(Image.new("RGB", (400, 240), RED), "JPEG")
    assert decode_image(data).size == (400, 240)
    assert decode_image(data, draft_size_px=121).size == (400, 240)
    assert decode_image(data, draft_size_px=120).size == (200, 120)
    assert decode_image(data, draft_size_px=30).size == (50, 30)
    assert decode_image(data, draft_size_px=1).size == (50, 30)
    png = file_of(Image.new("RGB", (400, 240), RED), "PNG")
    assert decode_image(png, draft_size_px=30).size == (400, 240)


def damaged() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg, png = (file_of(Image.fromarray(noise), kind) for kind in ("JPEG", "PNG"))
    huge = bytearray(file_of(Image.fromarray(noise), "BMP"))
    huge[18:26] = (60_000).to_bytes(4, "little") * 2  # a header that promises 3.6 billion pixels
    return {
        "empty": b"",
        "text": b"<html>not found</html>",
        "half jpeg": jpeg[: len(jpeg) // 2],
        "half png": png[: len(png) // 2],
        "huge": bytes(huge),
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_files_raise_errors_that_callers_catch(kind: str) -> None:
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decode_image(damaged()[kind])


@pytest.mark.parametrize(
    ("height", "width", "scale", "size_hw"),
    [(480, 640, 0.2, (96, 128)), (64, 32, 2.0, (128, 64)), (3, 900, 128 / 900, (1, 128))],
)
def test_letterbox_by_hand(height: int, width: int, scale: float, size_hw: tuple[int, int]) -> None:
    view = letterbox_view(height, width, 128)
    assert view == View(pytest.approx(scale), (0.0, 0.0), False, size_hw)


def test_padding_is_the_mean_colour_and_content_top_left() -> None:
    image = Image.new("RGB", (64, 32), RED)
    pixels = apply_to_image(image, letterbox_view(32, 64, 128), 128)
    assert pixels.shape == (128, 128, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[:64] == RED).all()
    assert (pixels[64:] == PAD_RGB).all()


def test_boxes_by_hand() -> None:
    boxes = np.array([[10, 20, 30, 40], [0, 0, 4, 4], [80, 0, 100, 50]], dtype=np.float32)
    labels = np.array([4, 5, 6])
    view = View(scale=2.0, offset_xy=(30.0, 20.0), flip=True, size_hw=(60, 128))
    moved, kept = apply_to_boxes(boxes, labels, view)
    # doubled and moved: x -10..30, -30..-22, 130..170; mirrored in 128: 98..138, 150..158, -42..-2
    assert moved.tolist() == [[98, 20, 128, 60]]
    assert kept.tolist() == [4]
    plain, kept = apply_to_boxes(boxes, labels, replace(view, flip=False))
    assert plain.tolist() == [[0, 20, 30, 60]]
    assert boxes[0].tolist() == [10, 20, 30, 40], "the index's own boxes stay as they are"


def extent(pixels: NDArray[np.uint8]) -> list[int] | None:
    red = (pixels[..., 0].astype(int) - pixels[..., 2] > 0) & (pixels[..., 1] < 60)
    ys, xs = np.nonzero(red)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None


def scene(rng: np.random.Generator) -> tuple[Image.Image, NDArray[np.float32]]:
    """A red rectangle on blue and its box."""
    width, height = (int(side) for side in rng.integers(90, 260, 2))
    x0, y0 = int(rng.integers(0, width - 40)), int(rng.integers(0, height - 40))
    x1, y1 = int(rng.integers(x0 + 30, width + 1)), int(rng.integers(y0 + 30, height + 1))
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste(RED, (x0, y0, x1, y1))
    return image, np.array([[x0, y0, x1, y1]], dtype=np.float32)


def test_pixels_and_boxes_move_together() -> None:
    compared, flips, crops = 0, 0, 0
    for seed in range(250):
        rng = np.random.default_rng(seed)
        image, boxes = scene(rng)
        if seed % 10 == 0:
            view = letterbox_view(image.height, image.width, 128)
        else:
            view = random_view(image.height, image.width, 128, AugmentConfig(), rng)
        pixels = apply_to_image(image, view, 128)
        moved, _ = apply_to_boxes(boxes, np.zeros(1, dtype=np.int64), view)
        seen = extent(pixels)
        if seen is None:
            assert len(moved) == 0 or (moved[0, 2:] - moved[0, :2]).min() < 2
        elif len(moved) == 0:
            assert min(seen[2] - seen[0], seen[3] - seen[1]) <= 2, "only slivers may lose their box"
        else:
            np.testing.assert_allclose(seen, moved[0], atol=1.5, err_msg=f"seed {seed}, {view}")
            compared, flips = compared + 1, flips + view.flip
            crops += view.offset_xy != (0.0, 0.0)
    assert compared > 180
    assert min(flips, crops) > 50


@pytest.mark.parametrize("size_wh", [(640, 480), (333, 500)])
def test_resizing_equals_pillow(size_wh: tuple[int, int]) -> None:
    """Whole images, up and down: the same filter, to rounding."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (*reversed(size_wh), 3), dtype=np.uint8))
    for size_px in (128, 512, 896):
        view = letterbox_view(noise.height, noise.width, size_px)
        height, width = view.size_hw
        ours = apply_to_image(noise, view, size_px)[:height, :width].astype(int)
        theirs = np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(ours - theirs).max() <= 2


def test_random_views_stay_inside_and_use_their_range() -> None:
    config = AugmentConfig(flip=0.25)
    views = [
        random_view(100, 200, 128, config, np.random.default_rng(seed)) for seed in range(2000)
    ]
    jitter = np.array([view.scale * 200 / 128 for view in views])
    assert 0.1 <= jitter.min() < 0.11
    assert 1.99 < jitter.max() <= 2.0
    assert np.mean([view.flip for view in views]) == pytest.approx(0.25, abs=0.03)
    for view in views:
        assert 1 <= view.size_hw[0] <= 128
        assert 1 <= view.size_hw[1] <= 128
        room = (200 * view.scale - view.size_hw[1], 100 * view.scale - view.size_hw[0])
        assert -0.5 <= view.offset_xy[0] <= max(0.0, room[0]) + 0.5
        assert -0.5 <= view.offset_xy[1] <= max(0.0, room[1]) + 0.5
