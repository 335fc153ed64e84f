"""Images with predicted and true boxes, side by side on one sheet.

Predicted: solid, in the class's colour, with label and score. True: white dashes on black, named
only where no prediction agrees, so white names are what the detector got wrong.
Boxes are xyxy in pixels of the image as given; RGB uint8 [H, W, 3] in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from model.detection.boxes import pairwise_iou
from model.training.analysis import FOREGROUND_IOU
from orchestrator.records.figures import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW

COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
"""Of class k: k modulo their number; the label tells classes of one colour apart."""
CELL_PX, GAP_PX, TEXT_PX = 480, 12, 12
HEADER_PX, CAPTION_PX = 58, 24
LINE_PX, DASH_PX = 3, 7

T = TypeVar("T")
Area = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """image uint8 [H, W, 3]; boxes [n, 4], scores [n], labels [n]; true boxes [m, 4], labels [m]."""

    image: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.floating]
    scores: NDArray[np.floating]
    labels: NDArray[np.integer]
    true_boxes_xyxy: NDArray[np.floating]
    true_labels: NDArray[np.integer]
    caption: str = ""


def picture_sheet(
    *, pictures: Sequence[Picture], names: Sequence[str], title: str, columns: int = 4
) -> NDArray[np.uint8]:
    """Pictures in rows of `columns`, each scaled to fit CELL_PX, captions below."""
    columns = max(1, min(columns, len(pictures)))
    scales = [CELL_PX / max(picture.image.shape[:2]) for picture in pictures]
    heights = [
        max(round(picture.image.shape[0] * scale) for picture, scale in row) + CAPTION_PX + GAP_PX
        for row in _rows(list(zip(pictures, scales, strict=True)), columns)
    ]
    width = max(columns * (CELL_PX + GAP_PX) + GAP_PX, 2 * CELL_PX)
    sheet = Image.new("RGB", (width, HEADER_PX + (sum(heights) or CELL_PX // 2)), "white")
    draw = ImageDraw.Draw(sheet)
    _header(draw, title, width)
    if not pictures:
        draw.text((width / 2, HEADER_PX + CELL_PX / 4), "no images", "#555555", _font(18), "mm")
    top = HEADER_PX
    for height, row in zip(heights, _rows(pictures, columns), strict=True):
        for column, picture in enumerate(row):
            left = GAP_PX + column * (CELL_PX + GAP_PX)
            drawn = draw_boxes(picture, names)
            sheet.paste(Image.fromarray(drawn), (left, top))
            text = _shortened(picture.caption, CELL_PX)
            draw.text((left, top + drawn.shape[0] + 5), text, BLACK, _font(TEXT_PX + 1))
        top += height
    return np.asarray(sheet)


def draw_boxes(picture: Picture, names: Sequence[str]) -> NDArray[np.uint8]:
    """One picture whose longer side is CELL_PX. Best scores are drawn last, so on top."""
    height, width = picture.image.shape[:2]
    scale = CELL_PX / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = Image.fromarray(picture.image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    predicted = np.argsort(picture.scores, kind="stable")
    texts: list[tuple[Area, str, str]] = []
    for k in predicted:
        box, colour = _scaled(picture.boxes_xyxy[k], scale, size), _colour(picture.labels[k])
        draw.rectangle(box, outline=colour, width=LINE_PX)
        texts.append((box, f"{names[int(picture.labels[k])]} {picture.scores[k]:.2f}", colour))
    true_texts: list[tuple[Area, str, str]] = []
    agreed = _agreed(picture)
    for k, label in enumerate(picture.true_labels):
        box = _scaled(picture.true_boxes_xyxy[k], scale, size)
        _dashed(draw, box)
        if not agreed[k]:
            true_texts.append((box, names[int(label)], "white"))
    used: list[Area] = []
    for box, text, colour in [*reversed(texts), *true_texts]:
        _label(draw, box, text, colour, size, used)
    return np.asarray(canvas)


def _agreed(picture: Picture) -> NDArray[np.bool_]:
    """True boxes [m] that some prediction of their class covers at FOREGROUND_IOU."""
    iou = pairwise_iou(
        torch.from_numpy(np.asarray(picture.true_boxes_xyxy, dtype=np.float64).reshape(-1, 4)),
        torch.from_numpy(np.asarray(picture.boxes_xyxy, dtype=np.float64).reshape(-1, 4)),
    ).numpy()
    same = np.asarray(picture.true_labels)[:, None] == np.asarray(picture.labels)[None]
    covered: NDArray[np.bool_] = ((iou >= FOREGROUND_IOU) & same).any(axis=1)
    return covered


def _scaled(box: NDArray[np.floating], scale: float, size: tuple[int, int]) -> Area:
    """In pixels of the canvas and inside it, never inverted."""
    x0, y0, x1, y1 = (float(v) * scale for v in box)
    x0, y0 = min(max(x0, 0.0), size[0] - 1.0), min(max(y0, 0.0), size[1] - 1.0)
    return x0, y0, min(max(x1, x0), size[0] - 1.0), min(max(y1, y0), size[1] - 1.0)


def _colour(label: int | np.integer) -> str:
    return COLOURS[int(label) % len(COLOURS)]


def _dashed(draw: ImageDraw.ImageDraw, box: Area) -> None:
    """A thin black line with white dashes on it: to be seen on any picture and any other box."""
    x0, y0, x1, y1 = box
    draw.rectangle(box, outline=BLACK, width=2)
    for start in np.arange(x0, x1, 2 * DASH_PX):
        for y in (y0, y1 - 1):
            draw.line((start, y, min(start + DASH_PX, x1), y), "white", 2)
    for start in np.arange(y0, y1, 2 * DASH_PX):
        for x in (x0, x1 - 1):
            draw.line((x, start, x, min(start + DASH_PX, y1)), "white", 2)


def _label(
    draw: ImageDraw.ImageDraw,
    box: Area,
    text: str,
    colour: str,
    size: tuple[int, int],
    used: list[Area],
) -> None:
    """At the first place around the box that is inside the picture and free; else left out.

    A predicted label begins at the top, a true one (white) at the bottom.
    """
    font = _font(TEXT_PX)
    width, height = draw.textlength(text, font) + 4, TEXT_PX + 3
    x0, y0, x1, y1 = box
    tops = [y0 - height, y0, y1 - height, y1]
    if colour == "white":
        tops.reverse()
    for top in tops:
        for left in (x0, x1 - width, (x0 + x1 - width) / 2):
            left = min(max(left, 0.0), size[0] - width)
            area = (left, top, left + width, top + height)
            if top < 0 or area[3] > size[1] or any(_touch(area, other) for other in used):
                continue
            used.append(area)
            draw.rectangle(area, fill=colour)
            ink = BLACK if _bright(colour) else "white"
            draw.text((left + 2, top + height / 2), text, ink, font, "lm")
            return


def _touch(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _bright(colour: str) -> bool:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128


def _header(draw: ImageDraw.ImageDraw, title: str, width: int) -> None:
    draw.text((GAP_PX, 8), _shortened(title, width, 18), BLACK, _font(18))
    draw.rectangle((GAP_PX, 37, GAP_PX + 26, 49), outline=BLUE, width=LINE_PX)
    draw.text((GAP_PX + 34, 43), "predicted, with score", BLACK, _font(TEXT_PX), "lm")
    left = GAP_PX + 200
    draw.rectangle((left - 4, 33, left + 30, 53), fill="#b0b0b0")
    _dashed(draw, (left, 37, left + 26, 49))
    draw.text(
        (left + 38, 43), "true, named where no prediction agrees", BLACK, _font(TEXT_PX), "lm"
    )


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def _shortened(text: str, width_px: float, size_px: int = TEXT_PX + 1) -> str:
    """The text, cut with … where it is wider than width_px."""
    font = _font(size_px)
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"


def _rows(items: Sequence[T], columns: int) -> list[Sequence[T]]:
    return [items[i : i + columns] for i in range(0, len(items), columns)]
