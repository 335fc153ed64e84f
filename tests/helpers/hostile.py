"""Images as nobody sends them by accident, and the odd ones that many people do.

Each is what it is said to be, and is small on the wire: what makes it hostile is inside.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

Verdict = Literal["read", "unknown", "large", "unusable"]
SIZE = (64, 48)


@dataclass(frozen=True)
class Sent:
    """verdict: read (then size_wh is what it is shown as), or why not."""

    data: bytes
    verdict: Verdict
    size_wh: tuple[int, int] = SIZE


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A red disc and a blue box on grey."""
    image = Image.new("RGB", size, (120, 120, 120))
    draw = ImageDraw.Draw(image)
    draw.ellipse((4, 4, size[0] // 2, size[1] // 2), fill=(220, 40, 40))
    draw.rectangle((size[0] // 2, size[1] // 2, size[0] - 4, size[1] - 4), fill=(40, 60, 220))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, *extra: bytes, depth: int = 8) -> bytes:
    """A PNG of RGB pixels, or of whatever is given as such."""
    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(pixels, 9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def jpeg_with_size(width: int, height: int) -> bytes:
    """A whole JPEG whose header says another size."""
    data = bytearray(encoded(picture(), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def many_passes(scans: int, size: tuple[int, int]) -> bytes:
    """A progressive JPEG whose last pass comes again and again: all of them are decoded."""
    whole = encoded(Image.new("L", size, 90), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * scans + b"\xff\xd9"


def _mpo() -> bytes:
    """Two JPEGs in one file; Pillow marks the frames it has written as such."""
    return encoded(picture(), "MPO", save_all=True, append_images=[picture()])


def _as_mpo(jpeg: bytes) -> bytes:
    """With the segment that announces several pictures."""
    several = _mpo()
    start = several.index(b"\xff\xe2")
    length = 2 + int.from_bytes(several[start + 2 : start + 4], "big")
    return jpeg[:2] + several[start : start + length] + jpeg[2:]


def _png_bombs() -> dict[str, Sent]:
    row = b"\0" + bytes(3 * 30_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 40_000_000, zip=True)
    lines = b"".join(b"\0" + bytes(SIZE[0] * 3) for _ in range(SIZE[1]))
    return {
        "png, 30,000 x 30,000 pixels of nothing": Sent(png(30_000, 30_000, row * 300), "large"),
        "png, header of 50,000 x 50,000": Sent(png(50_000, 50_000, b"0"), "large"),
        "png, header of 2^31 x 2^31": Sent(png(2**31 - 1, 2**31 - 1, b"0"), "large"),
        "png, size 0": Sent(png(0, 9, b""), "unknown"),
        "png, fewer rows than it says": Sent(png(64, 48, row[:193]), "read"),
        "png, far more rows than it says": Sent(png(*SIZE, lines + bytes(50_000_000)), "read"),
        "png, 40 MB of text in a few bytes": Sent(
            encoded(picture(), "PNG", pnginfo=text), "unusable"
        ),
        "png, chunk longer than the file": Sent(
            encoded(picture(), "PNG")[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT", "unusable"
        ),
        "png, wrong checksum": Sent(
            encoded(picture(), "PNG").replace(b"IDAT", b"IDAU", 1), "unknown"
        ),
    }


def _jpegs() -> dict[str, Sent]:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees
    nonsense = Image.Exif()
    nonsense[0x0112] = 99
    whole = encoded(picture(), "JPEG", quality=95)
    turned = encoded(picture(), "JPEG", exif=exif)
    return {
        "jpeg, truncated": Sent(whole[: len(whole) // 2], "unusable"),
        "jpeg, only its first bytes": Sent(whole[:4], "unknown"),
        "jpeg, header of 65,000 x 65,000": Sent(jpeg_with_size(65_000, 65_000), "large"),
        "jpeg, 2,000 passes over 4,000 x 4,000": Sent(many_passes(2000, (4000, 4000)), "large"),
        "mpo, 2,000 passes over 4,000 x 4,000": Sent(
            _as_mpo(many_passes(2000, (4000, 4000))), "large"
        ),
        "jpeg, CMYK": Sent(encoded(picture("CMYK"), "JPEG"), "read"),
        "jpeg, grey": Sent(encoded(picture("L"), "JPEG"), "read"),
        "jpeg, progressive": Sent(encoded(picture(), "JPEG", progressive=True), "read"),
        "jpeg, rotated by EXIF": Sent(turned, "read", SIZE[::-1]),
        "jpeg, nonsense in EXIF": Sent(encoded(picture(), "JPEG", exif=nonsense), "read"),
        "jpeg, broken EXIF": Sent(turned.replace(b"Exif\0\0MM", b"Exif\0\0XX"), "read"),
        "jpeg, a zip archive behind it": Sent(whole + b"PK\3\4" * 1000, "read"),
    }


def _odd() -> dict[str, Sent]:
    palette = picture().quantize(8)
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    moving: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 50}
    sixteen = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint16)
    rgb16 = bytes(SIZE[1] * (1 + SIZE[0] * 6))
    gif = bytearray(encoded(palette, "GIF"))
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    return {
        "gif, animated": Sent(encoded(frames[0], "GIF", **moving), "read"),
        "gif, screen of 65,000 x 65,000": Sent(bytes(gif), "large"),
        "webp, animated": Sent(encoded(frames[0], "WEBP", **moving), "read"),
        "webp, truncated": Sent(encoded(picture(), "WEBP", lossless=True)[:-60], "unusable"),
        "apng, animated": Sent(encoded(frames[0], "PNG", **moving), "read"),
        "mpo, two pictures as phones store them": Sent(_mpo(), "read"),
        "tiff, two pages": Sent(encoded(frames[0], "TIFF", **moving), "read"),
        "tiff, 16 bits grey": Sent(encoded(Image.fromarray(sixteen), "TIFF"), "read"),
        "tiff, floating point": Sent(
            encoded(Image.fromarray(sixteen.astype(np.float32)), "TIFF"), "read"
        ),
        "png, 16 bits grey": Sent(encoded(Image.fromarray(sixteen), "PNG"), "read"),
        "png, 16 bits colour": Sent(png(*SIZE, rgb16, depth=16), "read"),
        "png, palette with transparency": Sent(encoded(palette, "PNG", transparency=0), "read"),
        "png, half transparent": Sent(encoded(picture("RGBA"), "PNG"), "read"),
        "png, one bit": Sent(encoded(picture("1"), "PNG"), "read"),
        "png, 1 x 1": Sent(encoded(Image.new("RGB", (1, 1)), "PNG"), "read", (1, 1)),
        "png, 20,000 x 1": Sent(encoded(Image.new("RGB", (20_000, 1)), "PNG"), "read", (20_000, 1)),
    }


def _no_images() -> dict[str, Sent]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    xxe = b'<!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
    texts = {
        "svg": svg,
        "svg with an entity": xxe,
        "html": b"<html><script>alert(1)</script></html>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "pdf": b"%PDF-1.7\n1 0 obj<<>>endobj\ntrailer<<>>\n%%EOF",
        "json": b'{"image": "none"}',
        "zeros": bytes(100_000),
        "zip": b"PK\3\4" + bytes(300),
        "icon": encoded(picture(), "ICO"),
        "text": "naïve ☃".encode(),
    }
    return {name: Sent(data, "unknown") for name, data in texts.items()}


def hostile() -> dict[str, Sent]:
    """All of them by name."""
    return _png_bombs() | _jpegs() | _odd() | _no_images()
