"""Graphs as files that torch itself opens: TorchScript and torch.export programs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as shape_rules

from model.detection.exported import nms_of, suppress_once, suppress_rounds
from model.detection.postprocess import PostprocessConfig
from model.network.detector import Detector
from orchestrator.export.graph import Graph, Run, as_arrays

MOST_IMAGES, MOST_MULTIPLES = 4096, 64
METADATA = "metadata.json"


def write_torchscript(
    graph: Graph, detector: Detector, dtype: torch.dtype, path: Path, metadata: Mapping[str, str]
) -> None:
    """A trace; NMS, which loops, is compiled as it stands."""
    with _quiet():
        compiled = torch.jit.script(suppress_rounds)

    def suppress(
        boxes: Tensor, scores: Tensor, labels: Tensor, config: PostprocessConfig
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = compiled(boxes, scores, labels, *nms_of(config))
        return found

    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(
            graph.module(detector, suppress, dtype), graph.example(), check_trace=False
        )
        torch.jit.save(torch.jit.freeze(traced), str(path), _extra_files=_extra(metadata))


def open_torchscript(path: Path) -> Run:
    with _quiet():
        return _runs(torch.jit.load(str(path), map_location="cpu"))


def write_pt2(
    graph: Graph, detector: Detector, dtype: torch.dtype, path: Path, metadata: Mapping[str, str]
) -> None:
    with _quiet():
        torch.export.save(program(graph, detector, dtype), path, extra_files=_extra(metadata))


def open_pt2(path: Path) -> Run:
    with _quiet():
        return _runs(torch.export.load(path).module())


def program(graph: Graph, detector: Detector, dtype: torch.dtype) -> ExportedProgram:
    """The graph in torch's own form, for any number of images and, without `size_hw`, any size."""
    batch = Dim("batch", min=1, max=MOST_IMAGES)
    shape: dict[int, Any] = {0: batch}
    if graph.size_hw is None:
        high, wide = (Dim(name, min=1, max=MOST_MULTIPLES) for name in ("high", "wide"))
        shape |= {2: graph.multiple * high, 3: graph.multiple * wide}
    shapes = (shape, {0: batch})[: len(graph.inputs)]
    # Else a side of one cell, or one image, would be refused: the example has two.
    with _quiet(), torch.no_grad(), cast(Any, shape_rules).patch(backed_size_oblivious=True):
        made = torch.export.export(
            graph.module(detector, _as_scan, dtype), graph.example(), dynamic_shapes=shapes
        )
    _forget_sources(made)
    return made


def _as_scan(
    boxes: Tensor, scores: Tensor, labels: Tensor, config: PostprocessConfig
) -> tuple[Tensor, Tensor]:
    """`suppress_rounds` as one node with a body: written out, a hundred rounds take minutes."""
    nms, limit, num_kept = nms_of(config)

    def once(left: Tensor, _: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        left, index, best = suppress_once(left, boxes, labels, nms, limit)
        return left, (index, best)

    _, (indices, kept) = scan(once, scores.clone(), torch.zeros(num_kept, 1))
    return indices.squeeze(-1).transpose(0, 1), kept.squeeze(-1).transpose(0, 1)


def _forget_sources(made: ExportedProgram) -> None:
    """Each node remembers its line in the files of the machine that exported it."""
    for module in made.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _runs(module: Any) -> Run:
    @torch.no_grad()
    def run(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
        found = module(*(torch.from_numpy(array) for array in arrays))
        return cast("list[NDArray[Any]]", as_arrays(found))

    return run


def _extra(metadata: Mapping[str, str]) -> dict[str, Any]:
    return {METADATA: json.dumps(metadata, indent=1)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations and a tracer's doubts, which the check after it answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
