"""Our training step, matching, loader and evaluation beside the peers', in one run.

    python tests/benchmarks/against_effdet.py step --phi 0 --size 256 --batch 4 --modes eager compiled
    python tests/benchmarks/against_effdet.py loss --phi 4 --batch 16 --boxes 50
    python tests/benchmarks/against_effdet.py loader --images 32
    python tests/benchmarks/against_effdet.py evaluation --images 5000

Rounds alternate between the sides, so that whatever else the machine does hits both; printed are
medians and ratios (above 1: ours is faster or smaller). The last line is json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effdet import create_model
from effdet.anchors import AnchorLabeler, Anchors
from effdet.config import get_efficientdet_config
from effdet.loss import DetectionLoss
from timm.utils import ModelEmaV3
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.data.dataset import Batch, DetectionDataset, collate
from model.data.index import CocoIndex, parse_coco
from model.data.sampler import plan_batch
from model.data.transforms import AugmentConfig
from model.detection.anchors import make_anchors
from model.detection.loss import LossConfig, detection_loss
from model.detection.matching import match
from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from model.network.scaling import ModelConfig, Phi, resolve
from model.training.config import Duration, OptimConfig, Recipe, TrainConfig
from model.training.fit import peak_memory_bytes
from model.training.step import Schedule, Trainee

NUM_CLASSES = 90
EMA_DECAY, LR, MOMENTUM, WEIGHT_DECAY, CLIP = 0.9998, 0.01, 0.9, 4e-5, 10.0


def random_boxes(images: int, boxes: int, size_px: int) -> tuple[Tensor, Tensor]:
    """xyxy [B, M, 4] with sides from 4 % to 60 % of the image, labels [B, M]."""
    generator = torch.Generator().manual_seed(0)
    sides = (0.04 + 0.56 * torch.rand(images, boxes, 2, generator=generator) ** 2) * size_px
    corner = torch.rand(images, boxes, 2, generator=generator) * (size_px - sides)
    labels = torch.randint(0, NUM_CLASSES, (images, boxes), generator=generator)
    return torch.cat([corner, corner + sides], dim=-1), labels


def random_batch(images: int, size_px: int, boxes: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(
        0, 256, (images, size_px, size_px, 3), dtype=torch.uint8, generator=generator
    )
    xyxy, labels = random_boxes(images, boxes, size_px)
    return Batch(
        pixels.permute(0, 3, 1, 2), xyxy, labels,
        torch.full((images, 2), float(size_px)), torch.ones(images, dtype=torch.float64),
        torch.arange(images), torch.zeros(images, dtype=torch.int64),
    )  # fmt: skip


def our_step(args: argparse.Namespace, mode: str) -> Callable[[], float]:
    """mode: eager, compiled, bf16 or compiled-bf16."""
    torch.manual_seed(0)
    spec = resolve(ModelConfig(phi=args.phi, image_size_px=args.size, drop_path=0.0), NUM_CLASSES)
    recipe = Recipe(
        network=spec,
        pretrained=False,
        train=TrainConfig(
            duration=Duration(steps=1000),
            batch_size=args.batch,
            precision="bf16" if "bf16" in mode else "fp32",
            compile="compiled" in mode,
        ),
        optim=OptimConfig(
            lr_per_64=LR * 64 / args.batch, warmup=Duration(steps=1), warmup_from=1.0
        ),
        loss=LossConfig(),
        augment=AugmentConfig(),
        evaluation=PostprocessConfig(),
        evaluation_batch=args.batch,
        loader_workers=0,
        bn_group=args.batch,
    )
    device = torch.device(args.device)
    plan = plan_batch(args.batch, args.batch, 1)
    trainee = Trainee(Detector(spec), recipe, plan, 0, device)
    schedule = Schedule.of(recipe, 1000)
    batch = random_batch(args.batch, args.size)
    number = 0

    def step() -> float:
        nonlocal number
        row = trainee.step(number, schedule, [batch.to(device)])
        number += 1
        return float(row[0])

    return step


def peer_step(args: argparse.Namespace, precision: str = "fp32") -> Callable[[], float]:
    """Its own bench with labeler; flips and letterboxing aside, what its train.py does in a step."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    name = f"tf_efficientdet_d{args.phi}"
    with contextlib.redirect_stderr(io.StringIO()):
        bench = create_model(
            name, bench_task="train", num_classes=NUM_CLASSES, pretrained=False,
            pretrained_backbone=False, image_size=(args.size, args.size), bench_labeler=True,
        ).to(device).train()  # fmt: skip
    optimizer = torch.optim.SGD(
        bench.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    ema = ModelEmaV3(bench, decay=EMA_DECAY, use_warmup=True)
    batch = random_batch(args.batch, args.size)
    mean = torch.tensor((0.485, 0.456, 0.406), device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor((0.229, 0.224, 0.225), device=device).view(1, 3, 1, 1) * 255
    images = batch.images.contiguous()
    boxes = batch.boxes_xyxy[..., [1, 0, 3, 2]].contiguous()
    number = 0

    def step() -> float:
        nonlocal number
        target = {"bbox": boxes.to(device), "cls": (batch.labels + 1).float().to(device)}
        pixels = (images.to(device).float() - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = bench(pixels, target)
        optimizer.zero_grad()
        out["loss"].backward()
        torch.nn.utils.clip_grad_norm_(bench.parameters(), CLIP)
        optimizer.step()
        number += 1
        ema.update(bench, step=number)
        return float(out["loss"])

    return step


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, float]:
    """Median seconds of a call of each, called in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, call in sides.items():
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warmup:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_of(side: str, args: argparse.Namespace) -> float:
    """Peak MiB of three steps in a process of its own, beyond what it held before the network."""
    command = [sys.executable, __file__, "peak", "--side", side, "--phi", args.phi]
    command += ["--size", str(args.size), "--batch", str(args.batch), "--device", args.device]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.strip().splitlines()[-1])


def peak(args: argparse.Namespace) -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    peer = args.side.startswith("effdet")
    step = (
        peer_step(args, "bf16" if "bf16" in args.side else "fp32")
        if peer
        else our_step(args, args.side)
    )
    for _ in range(3):
        step()
    after = peak_memory_bytes(torch.device(args.device))
    print((after - (before if args.device == "cpu" else 0)) / 2**20)


def compare_step(args: argparse.Namespace) -> dict[str, Any]:
    sides: dict[str, Callable[[], float]] = {"effdet": peer_step(args)}
    if args.device == "cuda":
        sides["effdet-bf16"] = peer_step(args, "bf16")
    for mode in args.modes:
        sides[mode] = our_step(args, mode)
    medians = interleaved(sides, args.rounds, warmup=3)
    reference = medians.get("effdet-bf16", medians["effdet"])
    report: dict[str, Any] = {"img_per_s": {k: args.batch / v for k, v in medians.items()}}
    report["speed-up"] = {mode: reference / medians[mode] for mode in args.modes}
    if not args.no_memory:
        memory = {side: peak_of(side, args) for side in ("effdet", *args.modes)}
        report["peak_mib"] = memory
        report["memory"] = {mode: memory[mode] / memory["effdet"] for mode in args.modes}
    return report


def compare_loss(args: argparse.Namespace) -> dict[str, Any]:
    """Targets and loss with their gradient, on the same outputs."""
    size = resolve(ModelConfig(phi=args.phi), NUM_CLASSES).image_size_px
    spec = resolve(ModelConfig(phi=args.phi, image_size_px=size), NUM_CLASSES)
    config = get_efficientdet_config(f"tf_efficientdet_d{args.phi}")
    config.update(num_classes=NUM_CLASSES, image_size=(size, size))
    device = torch.device(args.device)
    anchors = make_anchors(spec).to(device)
    labeler = AnchorLabeler(
        Anchors.from_config(config).to(device), NUM_CLASSES, match_threshold=0.5
    )
    criterion = DetectionLoss(config)
    boxes, labels = (t.to(device) for t in random_boxes(args.batch, args.boxes, size))
    boxes_yxyx = boxes[..., [1, 0, 3, 2]].contiguous()
    generator = torch.Generator().manual_seed(2)
    levels = [spec.level_sizes_px()[level] for level in range(spec.min_level, spec.max_level + 1)]

    def raw(width: int, shift: float) -> list[Tensor]:
        made = [
            torch.randn(args.batch, 9 * width, side, side, generator=generator) * 0.5 + shift
            for side in levels
        ]
        return [
            t.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
            for t in made
        ]

    class_levels, box_levels = raw(NUM_CLASSES, -4.6), raw(4, 0.0)

    def flat(tensors: list[Tensor], width: int) -> Tensor:
        return torch.cat(
            [t.permute(0, 2, 3, 1).reshape(args.batch, -1, width) for t in tensors], dim=1
        ).detach()

    logits = flat(class_levels, NUM_CLASSES).requires_grad_()
    codes = flat(box_levels, 4).requires_grad_()
    losses: dict[str, float] = {}

    def ours() -> None:
        logits.grad = codes.grad = None
        targets = match(anchors, boxes, labels)
        loss = detection_loss(
            logits, codes, targets, targets.num_positives() + 1.0, LossConfig()
        ).total
        loss.backward()
        losses["ours"] = float(loss)

    def theirs() -> None:
        for tensor in (*class_levels, *box_levels):
            tensor.grad = None
        cls, box, positives = labeler.batch_label_anchors(boxes_yxyx, (labels + 1).float())
        loss = criterion(class_levels, box_levels, cls, box, positives)[0]
        loss.backward()
        losses["effdet"] = float(loss)

    medians = interleaved({"effdet": theirs, "ours": ours}, args.rounds, warmup=1)
    assert abs(losses["ours"] / losses["effdet"] - 1) < 1e-4, losses
    return {
        "anchors": len(anchors),
        "seconds": medians,
        "speed-up": medians["effdet"] / medians["ours"],
        "loss": losses,
    }


def photographs(number: int) -> tuple[list[bytes], CocoIndex]:
    """JPEGs 640 px wide with the statistics of photographs (1/f noise), and boxes on them."""
    from PIL import Image

    rng = np.random.default_rng(0)
    files, images, annotations = [], [], []
    fy, fx = np.meshgrid(np.fft.fftfreq(480), np.fft.fftfreq(640), indexing="ij")
    amplitude = 1.0 / np.maximum(1 / 640, np.hypot(fy, fx))
    for number_ in range(number):
        spectrum = amplitude[..., None] * np.exp(2j * np.pi * rng.random((480, 640, 3)))
        scene = np.fft.ifft2(spectrum, axes=(0, 1)).real
        scene = (scene - scene.min()) / (scene.max() - scene.min()) * 255
        buffer = io.BytesIO()
        Image.fromarray(scene.astype(np.uint8)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
        images.append({"id": number_, "file_name": f"{number_}.jpg", "width": 640, "height": 480})
        for _ in range(8):
            w, h = (float(v) for v in rng.uniform(20, 200, 2))
            box = [float(rng.uniform(0, 640 - w)), float(rng.uniform(0, 480 - h)), w, h]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number_, "category_id": 1, "bbox": box,
                 "area": w * h, "iscrowd": 0}
            )  # fmt: skip
    text = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    return files, parse_coco(json.dumps(text).encode(), "photographs")


def compare_loader(args: argparse.Namespace) -> dict[str, Any]:
    """JPEG bytes -> augmented training batch of 512 px, on one core."""
    from effdet.data.loader import DetectionFastCollate
    from effdet.data.transforms import transforms_coco_train
    from PIL import Image

    torch.set_num_threads(1)
    files, index = photographs(args.images)
    names = {str(name): data for name, data in zip(index.file_names, files, strict=True)}
    ours_set = DetectionDataset(index, names.__getitem__, 512, AugmentConfig(), 0)
    transform = transforms_coco_train((512, 512), "bilinear", True, "mean")
    collate_theirs = DetectionFastCollate()
    epoch = 0

    def ours() -> None:
        nonlocal epoch
        epoch += 1
        for first in range(0, len(index), 8):
            collate([ours_set[(epoch, i)] for i in range(first, first + 8)])

    def theirs() -> None:
        for first in range(0, len(index), 8):
            samples = []
            for image in range(first, first + 8):
                picture = Image.open(io.BytesIO(files[image])).convert("RGB")
                boxes, labels = index.training_boxes(image)
                target = {
                    "bbox": boxes[:, [1, 0, 3, 2]].copy(),
                    "cls": labels + 1,
                    "img_idx": image,
                    "img_size": picture.size,
                }
                samples.append(transform(picture, target))
            collate_theirs(samples)

    medians = interleaved({"effdet": theirs, "ours": ours}, args.rounds, warmup=1)
    return {
        "img_per_s_per_core": {k: len(index) / v for k, v in medians.items()},
        "speed-up": medians["effdet"] / medians["ours"],
    }


def compare_evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """COCO metrics of random detections: ours against pycocotools, and how far they are apart."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from model.training.evaluation import score

    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image in range(args.images):
        images.append({"id": image + 1, "file_name": f"{image}.jpg", "width": 640, "height": 480})
        for _ in range(rng.integers(1, 15)):
            w, h = (float(v) for v in rng.uniform(5, 200, 2))
            box = [float(rng.uniform(0, 640 - w)), float(rng.uniform(0, 480 - h)), w, h]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image + 1, "bbox": box, "area": w * h,
                 "category_id": int(rng.integers(1, 81)), "iscrowd": int(rng.random() < 0.02)}
            )  # fmt: skip
    categories = [{"id": k, "name": f"c{k}"} for k in range(1, 81)]
    text = {"images": images, "annotations": annotations, "categories": categories}
    index = parse_coco(json.dumps(text).encode(), "random")
    rows_of_all, results = [], []
    for image in range(args.images):
        rows = slice(index.offsets[image], index.offsets[image + 1])
        true, classes = index.boxes_xyxy[rows], index.labels[rows]
        pick = rng.integers(0, len(true), 100)
        boxes = (true[pick] + rng.normal(0, 8, (100, 4))).astype(np.float32)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.where(rng.random(100) < 0.8, classes[pick], rng.integers(0, 80, 100))
        scores = np.sort(rng.random(100).astype(np.float32))[::-1].copy()
        xywh = boxes.astype(float)
        xywh[:, 2:] -= xywh[:, :2]
        columns = (np.full(100, image), *xywh.T, scores.astype(float), labels)
        rows_of_all.append(np.stack(columns, axis=1).astype(np.float64))
        for box, confidence, label in zip(xywh.tolist(), scores.tolist(), labels, strict=True):
            category = int(index.classes.category_ids[label])
            results.append(
                {"image_id": image + 1, "category_id": category, "bbox": box, "score": confidence}
            )
    detected = np.concatenate(rows_of_all)
    oracle: dict[str, float] = {}
    ours_found: dict[str, float] = {}

    def ours() -> None:
        ours_found.update(score(index, detected))

    def theirs() -> None:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.NamedTemporaryFile("w") as file:
            json.dump(text, file)
            file.flush()
            truth = COCO(file.name)
            evaluator = COCOeval(truth, truth.loadRes([dict(row) for row in results]), "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        oracle.update(
            {f"val/{k}": float(v) for k, v in zip(keys, evaluator.stats[:6], strict=True)}
        )

    medians = interleaved({"pycocotools": theirs, "ours": ours}, args.rounds, warmup=0)
    apart = max(abs(ours_found[key] - value) for key, value in oracle.items())
    return {
        "seconds": medians,
        "speed-up": medians["pycocotools"] / medians["ours"],
        "largest difference": apart,
        "AP": oracle["val/AP"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "loss", "loader", "evaluation", "peak"])
    parser.add_argument("--phi", default="0")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--boxes", type=int, default=50)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--side", default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    phi: Phi = args.phi
    assert phi
    if args.what == "peak":
        peak(args)
        return
    compare = {
        "step": compare_step,
        "loss": compare_loss,
        "loader": compare_loader,
        "evaluation": compare_evaluation,
    }[args.what]
    report = compare(args)
    for key, value in report.items():
        print(f"{key}: {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
