"""Detections drawn on their image, to be looked at."""

from __future__ import annotations

import colorsys
import io

import torch
from PIL import Image, ImageFont
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from model.predictor import Prediction

SHORTEST_PX, LONGEST_PX = 480, 1280
FONT_PX = 14


def draw(picture: Image.Image, found: Prediction) -> Image.Image:
    """A copy with boxes, names and scores, one colour a category; the best is on top.

    The copy's longer side is brought between 480 and 1280 pixels, so that labels can be read.
    """
    longer = max(picture.size)
    scale = min(max(longer, SHORTEST_PX), LONGEST_PX) / longer
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = picture.resize(size, Image.Resampling.BILINEAR)
    if not len(found):
        return canvas
    worst_first = torch.arange(len(found) - 1, -1, -1)
    boxes = torch.from_numpy(found.boxes_xywh * scale)[worst_first]
    boxes[:, 2:] += boxes[:, :2]
    drawn = draw_bounding_boxes(
        F.pil_to_tensor(canvas),
        boxes,
        labels=[f"{found.names[i]} {found.scores[i]:.2f}" for i in worst_first],
        colors=[_colour(int(found.category_ids[i])) for i in worst_first],
        width=2,
        font=_font(),  # a file will do where a name is asked for
        font_size=FONT_PX,
        fill_labels=True,
    )
    return Image.fromarray(drawn.permute(1, 2, 0).numpy())


def _colour(category_id: int) -> tuple[int, int, int]:
    """Far apart for neighbours (an irrational step around the circle), all light."""
    saturation = 0.7 if category_id % 2 else 0.4
    red, green, blue = colorsys.hsv_to_rgb(category_id * 0.414214 % 1.0, saturation, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _font() -> io.BytesIO | None:
    """Pillow's own, which is a real font where Pillow was built with FreeType."""
    font = ImageFont.load_default(FONT_PX)
    return io.BytesIO(font.font_bytes) if isinstance(font, ImageFont.FreeTypeFont) else None
