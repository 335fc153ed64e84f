"""Is a file what PyTorch computes? Asked on several numbers of images and sizes, answered in figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from model.detection.anchors import make_anchors
from model.detection.exported import AnchorGrid
from model.detection.postprocess import Detections, postprocess
from orchestrator.export.graph import Graph, Run, as_arrays

BOX_PX, SCORE = 1e-3, 1e-4
"""Most that a detection may differ; boxes of sides above 512 px in proportion."""
RAW = 1e-4
"""Most that a raw output may differ, as a share of the largest one."""
# What PyTorch itself could have found is seen by moving its raw outputs by as much as sums in
# another order move them. Two candidates whose scores differ in their last digits may be taken in
# either order, and soft NMS then lowers the one or the other; and a large box moves by more pixels
# than a small one.
NUDGES, NUDGE = 8, 1e-6
MOST_ROUNDING = 10.0  # tolerances; beyond it a counterpart is another detection, not a rounded one
NEVER = 1e9


@dataclass(frozen=True)
class Checked:
    """cases: "2 x 256 x 384 px"; compared: detections or raw numbers; box_px, score: the largest
    difference of those that have a counterpart; rounding: detections that have none, as PyTorch's
    own rounding explains; unexplained: all others. raw: largest difference as a share of the
    largest output. exact: whether it was compared; else only that all outputs are numbers.
    silent: the file found nothing above its score, as PyTorch; its twin of score 0 was compared.
    """

    cases: tuple[str, ...] = ()
    compared: int = 0
    box_px: float = 0.0
    score: float = 0.0
    rounding: int = 0
    unexplained: int = 0
    raw: float = 0.0
    exact: bool = True
    silent: bool = False

    @property
    def found_nothing(self) -> bool:
        """Neither the file nor PyTorch: nothing is wrong, and nothing is shown."""
        return self.compared == 0 and self.unexplained == 0

    @property
    def passed(self) -> bool:
        return self.compared > 0 and self.unexplained == 0 and self.raw <= RAW

    def __add__(self, other: Checked) -> Checked:
        return Checked(
            self.cases + other.cases,
            self.compared + other.compared,
            max(self.box_px, other.box_px),
            max(self.score, other.score),
            self.rounding + other.rounding,
            self.unexplained + other.unexplained,
            max(self.raw, other.raw),
            self.exact and other.exact,
            self.silent or other.silent,
        )

    def line(self, graph: Graph) -> str:
        """For people."""
        if not self.exact:
            wrong = f", {self.unexplained} of them NO numbers" if self.unexplained else ""
            return f"{self.compared} outputs{wrong}; what less than fp32 loses is said as AP"
        if graph.content == "network":
            return f"raw outputs to {self.raw:.1e} of the largest (at most {RAW:.0e})"
        said = (
            f"{self.compared} detections, boxes to {self.box_px:.1e} px (at most {BOX_PX:.0e} up to 512 px), "
            f"scores to {self.score:.1e} (at most {SCORE:.0e})"
        )
        if self.rounding:
            said += f"; {self.rounding} differ as PyTorch's own do by rounding"
        if self.unexplained:
            said += f"; {self.unexplained} WITHOUT a counterpart"
        if self.silent:
            said += f"; none of them is above the run's score of {graph.config.score:g}"
        return said


def check(
    run: Run, graph: Graph, detector: nn.Module, cases: Sequence[tuple[int, int, int]]
) -> Checked:
    """Every case (images, height, width) through the file and through PyTorch."""
    found = Checked()
    for number, (num_images, height, width) in enumerate(cases):
        images = pictures(num_images, height, width, seed=number)
        # The picture does not fill its canvas in one direction.
        sizes = torch.tensor([[height, width * 3 // 4 + 1]] * num_images)
        with torch.no_grad():
            raw = detector(images)
        outputs = run(*as_arrays(graph.arguments(images, sizes)))
        if graph.content == "network":
            part = _compare_raw([torch.from_numpy(array) for array in outputs], raw)
        else:
            part = _compare(detections_of(outputs), raw, graph, sizes, (height, width))
        found += replace(part, cases=(f"{num_images} x {height} x {width} px",))
    return found


def try_out(run: Run, graph: Graph, cases: Sequence[tuple[int, int, int]]) -> Checked:
    """Every case through a file of less than float32: that it runs, and gives numbers."""
    found = Checked(exact=False)
    for number, (num_images, height, width) in enumerate(cases):
        images = pictures(num_images, height, width, seed=number)
        sizes = torch.tensor([[height, width]] * num_images)
        outputs = run(*as_arrays(graph.arguments(images, sizes)))
        wrong = sum(int((~np.isfinite(array)).sum()) for array in outputs)
        case = f"{num_images} x {height} x {width} px"
        found += Checked((case,), sum(a.size for a in outputs), unexplained=wrong, exact=False)
    return found


def cases_of(graph: Graph) -> list[tuple[int, int, int]]:
    """(images, height, width): the native size, and where it may change others, oblong."""
    m = graph.multiple
    if graph.size_hw is not None:
        return [(1, *graph.size_hw), (3, *graph.size_hw)]
    cases = [(1, *graph.native_hw), (2, m, 2 * m), (3, 3 * m, m), (1, 2 * m, 2 * m)]
    return [*dict.fromkeys(cases)]


def pictures(num_images: int, height: int, width: int, seed: int) -> Tensor:
    """uint8 [B, 3, H, W]: rectangles of one colour on a slope, with some noise."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(60, 180, width)[None, None, None]
    pixels = np.broadcast_to(slope, (num_images, 3, height, width)).copy()
    for image in pixels:
        for _ in range(16):
            y, x = rng.integers(0, height * 7 // 8), rng.integers(0, width * 7 // 8)
            h, w = (int(side) for side in rng.integers(6, max(8, min(height, width) // 2), 2))
            image[:, y : y + h, x : x + w] = rng.integers(0, 256, (3, 1, 1))
    pixels += rng.normal(0, 6, pixels.shape)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8))


def detections_of(outputs: Sequence[np.ndarray]) -> list[Detections]:
    """The file's padded outputs, image by image."""
    boxes, scores, labels, counts = (torch.from_numpy(array) for array in outputs)
    return [
        Detections(boxes[i, :count], scores[i, :count], labels[i, :count])
        for i, count in enumerate(counts.tolist())
    ]


def anchors_of(graph: Graph, height: int, width: int) -> Tensor:
    if height == width:
        return make_anchors(replace(graph.spec, image_size_px=height))
    anchors: Tensor = AnchorGrid(graph.spec)(height, width)
    return anchors


def _compare_raw(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Checked:
    raw = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        if mine.shape != theirs.shape or not mine.isfinite().all():
            return Checked(compared=1, raw=float("inf"))
        raw = max(raw, float((mine - theirs).abs().max() / theirs.abs().max()))
    return Checked(compared=sum(tensor.numel() for tensor in found), raw=raw)


def _compare(
    found: Sequence[Detections],
    raw: tuple[Tensor, Tensor],
    graph: Graph,
    sizes: Tensor,
    size_hw: tuple[int, int],
) -> Checked:
    anchors = anchors_of(graph, *size_hw)
    expected = postprocess(*raw, anchors, sizes, graph.config)
    box_px = BOX_PX * max(1.0, max(size_hw) / 512)
    total = Checked()
    nudged: list[list[Detections]] | None = None
    for image, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        alone, explained = _alone(mine, theirs, box_px), 0
        if alone:
            nudged = nudged or _nudged(raw, anchors, sizes, graph)
            explained = alone - _unexplained(mine, theirs, [one[image] for one in nudged], box_px)
        box, score = _differences(mine, theirs, box_px)
        part = Checked((), len(theirs.scores), box, score, explained, alone - explained)
        total += part
    return total


def _alone(mine: Detections, theirs: Detections, box_px: float) -> int:
    """Detections of either that the other lacks."""
    forth, back = _distance(mine, theirs, box_px), _distance(theirs, mine, box_px)
    apart = abs(len(mine.scores) - len(theirs.scores))
    return max(int((forth > 1).sum() + (back > 1).sum()), apart)


def _unexplained(
    mine: Detections, theirs: Detections, nudged: Sequence[Detections], box_px: float
) -> int:
    """Those of `_alone` that PyTorch's own rounding does not explain."""
    forth, back = _distance(mine, theirs, box_px), _distance(theirs, mine, box_px)
    moved = torch.stack([_distance(theirs, one, box_px) for one in nudged]).amax(0)
    pool = torch.stack([_distance(mine, one, box_px) for one in nudged]).amin(0)
    nearest = _pairs(mine, theirs, box_px)[0].argmin(1) if len(theirs.scores) else None
    rounded = moved.clamp(max=MOST_ROUNDING)
    near = forth <= 2 * rounded[nearest] if nearest is not None else forth <= 1
    lost = (back > 1) & (back > 2 * moved)
    new = (forth > 1) & (pool > 1) & ~near
    apart = abs(len(mine.scores) - len(theirs.scores)) - int((moved > 1).sum())
    return max(int(lost.sum() + new.sum()), apart)


def _nudged(
    raw: tuple[Tensor, Tensor], anchors: Tensor, sizes: Tensor, graph: Graph
) -> list[list[Detections]]:
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(NUDGES):
        logits, codes = (
            tensor + NUDGE * tensor.abs().max() * torch.randn(tensor.shape, generator=generator)
            for tensor in raw
        )
        results.append(postprocess(logits, codes, anchors, sizes, graph.config))
    return results


def _pairs(a: Detections, b: Detections, box_px: float) -> tuple[Tensor, Tensor, Tensor]:
    """[len(a), len(b)]: distance in tolerances (NEVER for other labels), in pixels, in scores."""
    box = (a.boxes_xyxy[:, None] - b.boxes_xyxy[None]).abs().amax(-1)
    score = (a.scores[:, None] - b.scores[None]).abs()
    distance = torch.maximum(box / box_px, score / SCORE)
    return torch.where(a.labels[:, None] == b.labels[None], distance, NEVER), box, score


def _distance(a: Detections, b: Detections, box_px: float) -> Tensor:
    """[len(a)]: how far each of `a` is from its nearest in `b`."""
    if not len(b.scores):
        return torch.full((len(a.scores),), NEVER)
    return _pairs(a, b, box_px)[0].amin(1)


def _differences(a: Detections, b: Detections, box_px: float) -> tuple[float, float]:
    """The largest in pixels and in scores of those that have a counterpart."""
    if not len(a.scores) or not len(b.scores):
        return 0.0, 0.0
    distance, box, score = _pairs(a, b, box_px)
    nearest = distance.argmin(1, keepdim=True)
    close = distance.gather(1, nearest)[:, 0] <= 1
    found = [values.gather(1, nearest)[:, 0][close] for values in (box, score)]
    return (float(found[0].max()), float(found[1].max())) if close.any() else (0.0, 0.0)
