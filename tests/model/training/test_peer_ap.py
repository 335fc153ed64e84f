"""The whole way from weights to COCO AP, ours and the peer's, on the same images."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effdet import EfficientDet
from effdet.bench import DetBenchPredict
from effdet.config import get_efficientdet_config
from helpers.peer import randomise

from model.data.dataset import DetectionDataset
from model.data.folder import FolderReader
from model.data.index import CocoIndex, parse_coco
from model.data.shapes import ShapesConfig, ensure_shapes
from model.data.transforms import AugmentConfig
from model.detection.anchors import make_anchors
from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from model.network.effdet_format import from_effdet
from model.network.scaling import ModelConfig, resolve
from model.training.evaluation import detect, score

SIZE_PX = 128


@pytest.fixture(scope="module")
def pair() -> tuple[Detector, EfficientDet]:
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(image_size=(SIZE_PX, SIZE_PX), num_classes=6, fpn_cell_repeats=1, soft_nms=False)
    peer = EfficientDet(config, pretrained_backbone=False).eval()
    randomise(peer)
    spec = resolve(ModelConfig(image_size_px=SIZE_PX, fpn_repeats=1), 6)
    ours = Detector(spec).eval()
    ours.load_state_dict(from_effdet(peer.state_dict(), ours.state_dict(), spec), strict=True)
    return ours, peer


def peer_rows(peer: EfficientDet, ours: Detector, data: DetectionDataset) -> np.ndarray:
    """The peer's detections as our evaluation takes them: image, x, y, width, height, score, label."""
    bench, rows = DetBenchPredict(peer), []
    for image in range(len(data)):
        sample = data.evaluation()[(0, image)]
        pixels = torch.from_numpy(sample.pixels).permute(2, 0, 1).unsqueeze(0)
        height, width = sample.size_hw
        info = {
            "img_scale": torch.tensor([1.0 / sample.scale]),
            "img_size": torch.tensor([[width / sample.scale, height / sample.scale]]),
        }
        with torch.no_grad():
            found = bench(ours.normalise(pixels), info)[0].double().numpy()
        found = found[found[:, 4] > 0.001]
        boxes = found[:, :4]
        rows.append(
            np.column_stack(
                [
                    np.full(len(found), image),
                    boxes[:, :2],
                    boxes[:, 2:] - boxes[:, :2],
                    found[:, 4],
                    found[:, 5] - 1,
                ]
            )
        )
    return np.concatenate(rows)


def pycocotools_ap(
    index: CocoIndex, truth: dict[str, Any], rows: np.ndarray, folder: Path
) -> float:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = [
        {"image_id": int(index.image_ids[int(row[0])]), "bbox": row[1:5].tolist(), "score": row[5],
         "category_id": int(index.classes.category_ids[int(row[6])])}
        for row in rows
    ]  # fmt: skip
    (folder / "truth.json").write_text(json.dumps(truth))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return float(evaluator.stats[0])


def test_average_precision_equals_the_peers(
    pair: tuple[Detector, EfficientDet], tmp_path: Path
) -> None:
    """Random weights find nothing real, so some of the peer's detections, jittered, are the truth."""
    ours, peer = pair
    ensure_shapes(tmp_path / "shapes", ShapesConfig(num_train=1, num_val=6, size_px=96))
    path = tmp_path / "shapes" / "annotations" / "instances_val.json"
    text = json.loads(path.read_text())
    reader = FolderReader(tmp_path / "shapes" / "images" / "val")
    blank = parse_coco(path.read_bytes(), "shapes")
    data = DetectionDataset(blank, reader, SIZE_PX, AugmentConfig(), 0)
    theirs = peer_rows(peer, ours, data)

    rng = np.random.default_rng(0)
    text["annotations"] = []
    for row in theirs[rng.random(len(theirs)) < 0.2]:
        x, y, width, height = row[1:5] * (1 + rng.normal(0, 0.04, 4))
        text["annotations"].append(
            {"id": len(text["annotations"]) + 1, "image_id": int(blank.image_ids[int(row[0])]),
             "category_id": int(blank.classes.category_ids[int(row[6])]), "iscrowd": 0,
             "bbox": [max(0.0, x), max(0.0, y), width, height], "area": width * height}
        )  # fmt: skip
    index = parse_coco(json.dumps(text).encode(), "pseudo")
    data = DetectionDataset(index, reader, SIZE_PX, AugmentConfig(), 0)
    mine = detect(
        ours, data.evaluation(), make_anchors(ours.spec), PostprocessConfig(nms="hard"), rank=0, world_size=1,
        batch_size=2, workers=0, device=torch.device("cpu"), autocast=False,
    )  # fmt: skip
    kept = {
        "images": text["images"], "categories": text["categories"],
        "annotations": index.ground_truth()["annotations"],
    }  # fmt: skip
    for annotation in kept["annotations"]:
        annotation["category_id"] = int(index.classes.category_ids[annotation["category_id"]])
    expected = pycocotools_ap(index, kept, theirs, tmp_path)
    assert 0.05 < expected < 0.95, "an AP at either end would prove little"
    assert score(index, mine)["val/AP"] == pytest.approx(expected, abs=1e-6)
