"""Graphs as ONNX files, for onnxruntime and what reads its format."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray

from model.network.detector import Detector
from orchestrator.export.graph import IMAGES, Graph, Run
from orchestrator.export.torch_files import program

OPSET = 18  # the exporter's own; every later runtime reads it
CPU = ["CPUExecutionProvider"]


def write_onnx(
    graph: Graph, detector: Detector, dtype: torch.dtype, path: Path, metadata: Mapping[str, str]
) -> None:
    """One file, its weights inside it."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        made = torch.onnx.export(
            program(graph, detector, dtype), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=graph.inputs, output_names=graph.outputs,
        )  # fmt: skip
    finally:
        exporter.setLevel(level)
    assert made is not None
    model = made.model_proto
    _name_sides(model, graph)
    _forget_sources(model)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def set_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Of a file that another program has rewritten."""
    model = onnx.load_model(path)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save_model(model, path)


def open_onnx(path: Path) -> Run:
    """On the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of every optimisation it cannot do
    session = onnxruntime.InferenceSession(str(path), options, providers=CPU)
    names = [found.name for found in session.get_inputs()]

    def run(*arrays: NDArray[Any]) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = session.run(None, dict(zip(names, arrays, strict=True)))
        return found

    return run


def _name_sides(model: onnx.ModelProto, graph: Graph) -> None:
    """Sizes that may change are called batch, height and width, those of the raw outputs anchors."""
    for value in [*model.graph.input, *model.graph.output]:
        sides = value.type.tensor_type.shape.dim
        if sides[0].dim_param:
            sides[0].dim_param = "batch"
        if len(sides) > 1 and sides[1].dim_param:
            sides[1].dim_param = "anchors"
        if value.name == IMAGES and graph.size_hw is None:
            sides[2].dim_param, sides[3].dim_param = "height", "width"
    # Of what lies between, under the exporter's names; every runtime infers it anew.
    del model.graph.value_info[:]


def _forget_sources(model: onnx.ModelProto) -> None:
    """Each node remembers its lines in the files of the machine that exported it."""
    graphs = [model.graph]
    while graphs:
        one = graphs.pop()
        del one.metadata_props[:]
        for value in [*one.input, *one.output, *one.value_info, *one.initializer]:
            del value.metadata_props[:]
        for node in one.node:
            del node.metadata_props[:]
            node.doc_string = ""
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
