"""Batches come in the sampler's order, and are announced before their turn."""

from __future__ import annotations

import io
import json

import torch
from PIL import Image

from model.data.dataset import DetectionDataset
from model.data.index import parse_coco
from model.data.loader import READ_AHEAD, training_loader
from model.data.sampler import StepSampler, plan_batch
from model.data.transforms import AugmentConfig

NUMBER, BATCH = 24, 2


class FarReader:
    """Knows what it was told would come, when each image is read."""

    def __init__(self) -> None:
        self.announced: list[str] = []
        self.known_at_read: list[int] = []
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, "PNG")
        self.picture = buffer.getvalue()

    def __call__(self, name: str) -> bytes:
        assert name in self.announced
        self.known_at_read.append(len(self.announced))
        return self.picture

    def ahead(self, names: list[str]) -> None:
        self.announced += names


def test_each_batch_is_announced_before_its_turn() -> None:
    document = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} for i in range(NUMBER)
        ],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [],
    }
    index = parse_coco(json.dumps(document).encode(), "far.json")
    reader = FarReader()
    data = DetectionDataset(index, reader, 32, AugmentConfig(enabled=False), 0)
    steps = NUMBER // BATCH
    sampler = StepSampler(
        plan=plan_batch(BATCH, BATCH, 1), rank=0, num_images=NUMBER, seed=3, start=0, stop=steps
    )
    loader = training_loader(data, sampler, workers=0, device=torch.device("cpu"))
    assert len(loader) == steps
    got = [batch.indices.tolist() for batch in loader]  # type: ignore[attr-defined]
    assert got == [[image for _, image in batch] for batch in sampler]
    first, last = reader.known_at_read[0], reader.known_at_read[-1]
    assert (first, last) == (BATCH * (READ_AHEAD + 1), NUMBER)
