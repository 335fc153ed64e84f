"""int8: convolutions in eight bits, with the ranges of their activations measured on images.

Weights have a scale for each channel, activations one for each tensor, written as pairs of
QuantizeLinear and DequantizeLinear (QDQ) that each runtime turns into what its processor has. The
last convolution of each head, which scores and boxes come from directly, stays in float, and so do
squeeze-and-excite's, which are small and feel every bit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnxruntime.quantization import (  # type: ignore[import-untyped]
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from orchestrator.export.onnx_file import CPU

IN_FLOAT = (".predict.pointwise.weight", ".se.")
"""Parts of the names of weights that stay as they are."""


def quantise(source: Path, target: Path, inputs: Iterable[dict[str, NDArray[Any]]]) -> int:
    """An fp32 ONNX file as an int8 one, without its metadata; how many convolutions were quantised.

    inputs: of the file, by name, for images like those it will see.
    """
    folded = target.with_suffix(".folded")
    try:
        _fold(source, folded)
        model = onnx.load_model(folded)
        convs = [node for node in model.graph.node if node.op_type == "Conv"]
        kept = [node.name for node in convs if any(part in node.input[1] for part in IN_FLOAT)]
        with _quiet():
            quantize_static(
                model, target, _Reader(inputs),
                quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"],
                nodes_to_exclude=kept, per_channel=True, reduce_range=True,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )  # fmt: skip
    finally:
        folded.unlink(missing_ok=True)
    return len(convs) - len(kept)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, inputs: Iterable[dict[str, NDArray[Any]]]) -> None:
        self.waiting = iter(inputs)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self.waiting, None)


def _fold(source: Path, target: Path) -> None:
    """Batch norms into the convolutions before them, so that none stands between two pairs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(source), options, providers=CPU)
    model = onnx.load_model(target)
    used = {node.domain for node in model.graph.node}
    domains = [domain for domain in model.opset_import if domain.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    onnx.save_model(model, target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It recommends what was done a moment ago, and prints each tensor it leaves alone."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
