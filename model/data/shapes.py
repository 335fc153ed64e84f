"""`shapes`: a generated dataset in COCO format, small but not trivial.

Six classes with sparse category ids, objects from a tenth to over half of the image, rotation,
overlap, outlines and fills, clutter that resembles objects, images without objects. The same
arguments give the same files, byte for byte.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Sparse on purpose: an off-by-gap map from ids to labels must not pass unnoticed.
CATEGORIES = {1: "circle", 3: "square", 7: "triangle", 18: "star", 44: "cross", 90: "ring"}
# Colour hints at the class, as it does in photographs, but does not decide it.
USUAL_HUE = {"circle": 0, "square": 60, "triangle": 120, "star": 180, "cross": 240, "ring": 300}
USUAL_SHARE, HUE_SPREAD_DEG = 0.85, 18.0
NEGATIVE_SHARE = 0.08
MAX_OVERLAP = 0.35
SUPERSAMPLE = 2

Point = tuple[float, float]


@dataclass(frozen=True)
class ShapesConfig:
    """How many images of about which size to draw."""

    num_train: int = 480
    num_val: int = 480
    size_px: int = 160
    max_objects: int = 5
    seed: int = 0


def ensure_shapes(folder: Path, config: ShapesConfig) -> bool:
    """Make the dataset in `folder` unless it is there already; True if it was made.

    The folder appears whole or not at all: it is drawn beside its place and renamed.
    """
    marker = folder / "shapes.json"
    if marker.is_file() and json.loads(marker.read_text()) == asdict(config):
        return False
    if folder.exists():
        raise FileExistsError(f"{folder} holds something else; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".shapes-") as temporary:
        draft = Path(temporary) / "shapes"
        for split, number, stream in (("train", config.num_train, 0), ("val", config.num_val, 1)):
            _draw_split(draft, split, number, config, stream)
        (draft / marker.name).write_text(json.dumps(asdict(config)))
        try:
            os.rename(draft, folder)
        except OSError:
            if not marker.is_file():  # somebody else drew it meanwhile: theirs is as good
                raise
    return True


def _draw_split(folder: Path, split: str, number: int, config: ShapesConfig, stream: int) -> None:
    pictures = folder / "images" / split
    pictures.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(number):
        rng = np.random.default_rng((config.seed, stream, index))
        picture, objects = draw_image(rng, config)
        name, image_id = f"{split}_{index:05d}.jpg", 10 * index + 7
        picture.save(pictures / name, quality=92)
        images.append(
            {"id": image_id, "file_name": name, "width": picture.width, "height": picture.height}
        )
        for category, (x0, y0, x1, y1) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                    "area": round((x1 - x0) * (y1 - y0), 2),
                    "iscrowd": 0,
                }
            )
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


Box = tuple[float, float, float, float]


def draw_image(
    rng: np.random.Generator, config: ShapesConfig
) -> tuple[Image.Image, list[tuple[int, Box]]]:
    """One picture and its objects as (category id, tight xyxy box in pixels)."""
    width, height = (int(config.size_px * rng.uniform(0.75, 1.25)) for _ in range(2))
    canvas = _background(rng, width * SUPERSAMPLE, height * SUPERSAMPLE)
    pen = ImageDraw.Draw(canvas)
    _clutter(rng, pen, canvas.size)
    objects: list[tuple[int, Box]] = []
    wanted = 0 if rng.random() < NEGATIVE_SHARE else int(rng.integers(1, config.max_objects + 1))
    # Large first, so that small objects lie on top and stay visible.
    sizes = sorted(
        (math.exp(rng.uniform(math.log(0.10), math.log(0.6))) for _ in range(wanted)), reverse=True
    )
    for size in sizes:
        category = int(rng.choice(list(CATEGORIES)))
        for _ in range(12):
            radius = size * min(canvas.size) / 2
            centre = (
                rng.uniform(radius, canvas.width - radius),
                rng.uniform(radius, canvas.height - radius),
            )
            outline = _outline(CATEGORIES[category], centre, radius, rng.uniform(0, 2 * math.pi))
            xs, ys = [p[0] for p in outline], [p[1] for p in outline]
            box = (
                max(0.0, min(xs)) / SUPERSAMPLE,
                max(0.0, min(ys)) / SUPERSAMPLE,
                min(max(xs), canvas.width - 1.0) / SUPERSAMPLE,
                min(max(ys), canvas.height - 1.0) / SUPERSAMPLE,
            )
            if all(_iou(box, other) < MAX_OVERLAP for _, other in objects):
                _paint(rng, canvas, pen, CATEGORIES[category], outline, centre, radius)
                objects.append((category, box))
                break
    picture = canvas.resize((width, height), Image.Resampling.BOX)
    noise = rng.normal(0.0, 5.0, (height, width, 3))
    pixels = np.clip(np.asarray(picture, dtype=np.float64) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), objects


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth random light and dark with a little colour."""
    light = rng.uniform(40, 215, (3, 3, 1)) + rng.normal(0, 22, (3, 3, 3))
    coarse = np.clip(light, 0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _clutter(rng: np.random.Generator, pen: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    """Lines, arcs and thin ellipses: things with edges that are no objects."""
    for _ in range(int(rng.integers(2, 8))):
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        x0, x1 = (float(v) for v in rng.uniform(0, size[0], 2))
        y0, y1 = (float(v) for v in rng.uniform(0, size[1], 2))
        box = (min(x0, x1), min(y0, y1), max(x0, x1) + 2, max(y0, y1) + 2)
        thickness = int(rng.integers(1, 5))
        if rng.random() < 0.6:
            pen.line((x0, y0, x1, y1), fill=colour, width=thickness)
        else:
            start = float(rng.uniform(0, 360))
            pen.arc(box, start, start + float(rng.uniform(30, 140)), fill=colour, width=thickness)


def _outline(kind: str, centre: Point, radius: float, angle: float) -> list[Point]:
    """Corner points; circles and rings as 64-gons."""

    def polar(points: list[tuple[float, float]]) -> list[Point]:
        return [
            (
                centre[0] + radius * r * math.cos(angle + a),
                centre[1] + radius * r * math.sin(angle + a),
            )
            for r, a in points
        ]

    turn = 2 * math.pi
    if kind in ("circle", "ring"):
        return polar([(1.0, turn * i / 64) for i in range(64)])
    if kind == "square":
        return polar([(1.0, turn * i / 4) for i in range(4)])
    if kind == "triangle":
        return polar([(1.0, turn * i / 3) for i in range(3)])
    if kind == "star":
        return polar([(1.0 if i % 2 == 0 else 0.42, turn * i / 10) for i in range(10)])
    arm = 0.33
    corners = [(1, arm), (arm, arm), (arm, 1), (-arm, 1), (-arm, arm), (-1, arm)]
    corners += [(-x, -y) for x, y in corners]
    return polar([(math.hypot(x, y), math.atan2(y, x)) for x, y in corners])


def _paint(
    rng: np.random.Generator,
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    kind: str,
    outline: list[Point],
    centre: Point,
    radius: float,
) -> None:
    """Fill with a colour that differs from what lies below; some get an edge; rings a hole."""
    below = canvas.getpixel(
        (
            int(np.clip(centre[0], 0, canvas.width - 1)),
            int(np.clip(centre[1], 0, canvas.height - 1)),
        )
    )
    ground = np.asarray(below, dtype=np.float64)
    fill = _colour(rng, kind)
    for _ in range(20):
        if np.abs(np.asarray(fill, dtype=np.float64) - ground).sum() >= 120:
            break
        fill = _colour(rng, kind)
    if kind == "ring":
        hole = [
            (centre[0] + (x - centre[0]) * 0.55, centre[1] + (y - centre[1]) * 0.55)
            for x, y in outline
        ]
        mask = Image.new("L", canvas.size, 0)
        mask_pen = ImageDraw.Draw(mask)
        mask_pen.polygon(outline, fill=255)
        mask_pen.polygon(hole, fill=0)
        canvas.paste(fill, (0, 0, *canvas.size), mask)
        return
    pen.polygon(outline, fill=fill)
    if rng.random() < 0.4:
        edge = tuple(255 - v for v in fill)
        thickness = max(1, int(radius * 0.06))
        pen.line([*outline, outline[0]], fill=edge, width=thickness)


def _colour(rng: np.random.Generator, kind: str) -> tuple[int, int, int]:
    usual = rng.random() < USUAL_SHARE
    hue = rng.normal(USUAL_HUE[kind], HUE_SPREAD_DEG) if usual else rng.uniform(0, 360)
    saturation, value = rng.uniform(0.55, 1.0), rng.uniform(0.45, 1.0)
    red, green, blue = colorsys.hsv_to_rgb(hue / 360.0 % 1.0, saturation, value)
    return int(255 * red), int(255 * green), int(255 * blue)


def _iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
