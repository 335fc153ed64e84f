"""Looking at a dataset before anything expensive starts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from model.data.dataset import Reader
from model.data.index import CocoIndex
from model.data.transforms import decode_image
from model.errors import DataError

SAMPLE = 256


def check_images(index: CocoIndex, read: Reader, *, everything: bool = False) -> int:
    """Decode images in full and compare their size with the annotation; number of images looked at.

    A set of up to 256 images is checked whole, a larger one at 256 images spread evenly, unless
    `everything`.

    Raises:
        DataError: the first (by id) that is missing, damaged, or of another size than annotated.
    """
    number = len(index) if everything else min(len(index), SAMPLE)
    chosen = np.unique(np.linspace(0, len(index) - 1, number).astype(np.int64))
    with ThreadPoolExecutor(max_workers=4) as pool:
        for problem in pool.map(lambda image: _problem(index, read, int(image)), chosen):
            if problem is not None:
                raise problem
    return len(chosen)


def _problem(index: CocoIndex, read: Reader, image: int) -> DataError | None:
    name = str(index.file_names[image])
    height, width = (int(side) for side in index.sizes_hw[image])
    try:
        data = read(name)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        return DataError(f"image {name}", "a file", reason, "add it or take it out of the json")
    try:
        decoded = decode_image(data)
    except (OSError, SyntaxError, ValueError) as error:
        return DataError(
            f"image {name}", "a readable image", str(error), "replace it or take it out"
        )
    if decoded.size != (width, height):
        return DataError(
            f"image {name}",
            f"{width} x {height} pixels as annotated",
            f"{decoded.width} x {decoded.height}",
            "annotate the image as it is shown (after EXIF rotation)",
        )
    return None
