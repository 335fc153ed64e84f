"""Seconds of a comparison of two models on a data set of COCO's size, and of one pycocotools pass.

python tests/benchmarks/bootstrap.py --images 5000 --resamples 1000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model.data.index import CocoIndex, parse_coco
from model.training.bootstrap import compare
from model.training.evaluation import assess
from model.training.tally import Tally

CLASSES = 80
PER_IMAGE = 100


def random_index(rng: np.random.Generator, num_images: int) -> CocoIndex:
    """About seven boxes an image, of all sizes."""
    images = [
        {"id": i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480}
        for i in range(num_images)
    ]
    boxes = []
    for image in range(num_images):
        for _ in range(int(rng.integers(1, 15))):
            w, h = np.exp(rng.uniform(np.log(8), np.log(300), 2))
            box = [float(rng.uniform(0, 640 - w)), float(rng.uniform(0, 480 - h)), w, h]
            boxes.append(
                {"id": len(boxes) + 1, "image_id": image + 1, "bbox": box, "area": 0.7 * w * h,
                 "category_id": int(rng.integers(1, CLASSES + 1)), "iscrowd": int(rng.random() < 0.02)}
            )  # fmt: skip
    categories = [{"id": k, "name": f"c{k}"} for k in range(1, CLASSES + 1)]
    document = {"images": images, "annotations": boxes, "categories": categories}
    return parse_coco(json.dumps(document).encode(), "random")


def random_rows(rng: np.random.Generator, index: CocoIndex) -> NDArray[np.float64]:
    """PER_IMAGE detections each: true boxes moved by a little, most of low score and wrong class."""
    found = []
    for image in range(len(index)):
        part = slice(index.offsets[image], index.offsets[image + 1])
        pick = rng.integers(0, part.stop - part.start, PER_IMAGE)
        boxes = index.boxes_xyxy[part][pick].astype(np.float64)
        sides = boxes[:, 2:] - boxes[:, :2]
        right = rng.random(PER_IMAGE) < 0.15
        moved = np.where(right, 0.06, 0.4)[:, None]
        low = boxes[:, :2] + sides * rng.normal(0, moved, (PER_IMAGE, 2))
        sides = sides * np.exp(rng.normal(0, moved, (PER_IMAGE, 2)))
        labels = np.where(right, index.labels[part][pick], rng.integers(0, CLASSES, PER_IMAGE))
        scores = np.where(right, rng.beta(3, 2, PER_IMAGE), rng.beta(1, 12, PER_IMAGE))
        found.append(np.column_stack([np.full(PER_IMAGE, image), low, sides, scores, labels]))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--resamples", type=int, default=1000)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    index = random_index(rng, args.images)
    a, b = random_rows(rng, index), random_rows(rng, index)
    began = time.perf_counter()
    scored = assess(index, a).metrics
    print(f"one evaluation: {time.perf_counter() - began:.1f} s, AP {scored['val/AP']:.4f}")
    began = time.perf_counter()
    tally = Tally(index, a)
    print(f"matching, one model: {time.perf_counter() - began:.1f} s")
    (found,) = tally.averages(np.ones((1, len(index)), dtype=np.int32)).metrics
    print(f"largest difference: {abs(float(found[0]) - scored['val/AP']):.1e}")
    began = time.perf_counter()
    done = compare(index, a, b, resamples=args.resamples)
    seconds = time.perf_counter() - began
    ap = done.metrics["AP"]
    print(
        f"comparison: {seconds:.1f} s for {args.resamples} resamples of {args.images} images x "
        f"{CLASSES} classes x {PER_IMAGE} detections, two models, {len(os.sched_getaffinity(0))} "
        f"cores; AP {ap.value:+.4f} [{ap.low:+.4f}, {ap.high:+.4f}]"
    )


if __name__ == "__main__":
    main()
