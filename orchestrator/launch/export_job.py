"""A model as a file that other programs run; it gets its name when it has proved right."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file

from model.data.dataset import DetectionDataset
from model.network.detector import Detector
from model.network.effdet_format import to_effdet
from model.predictor import Predictor
from model.training.state import EMA_WEIGHTS, read_classes, read_network
from orchestrator.config.export_cli import SUFFIXES, ExportOptions, ExportRequest, Format
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.export import torch_files
from orchestrator.export.calibration import calibration_inputs, choose_images
from orchestrator.export.check import Checked, cases_of, check, try_out
from orchestrator.export.graph import Graph, Run, plan
from orchestrator.export.metadata import describe, how_to_run, sizes
from orchestrator.export.score import ap_of_file, ap_of_torch, validation_data
from orchestrator.export.timing import measure
from orchestrator.launch.progress import Row, print_table
from orchestrator.launch.resolve import output_folder
from orchestrator.records.sources import open_model
from orchestrator.records.tracker import tracking_uri
from orchestrator.storage.images import ImageFile

Write = Callable[[Graph, Detector, torch.dtype, Path, Mapping[str, str]], None]
FAILED = 1


@dataclass(frozen=True)
class ExportOutcome:
    """code: 0, or 1 if the file was not what PyTorch computes; then there is none."""

    code: int
    report: dict[str, Any]


@dataclass(frozen=True)
class Proof:
    """What was found out about a file. ap: in PyTorch and in the file, where there was data."""

    checked: Checked
    ap: tuple[float, float] | None
    max_ap_loss: float | None

    @property
    def passed(self) -> bool:
        return self.checked.passed and not self.lost_too_much

    @property
    def lost_too_much(self) -> bool:
        if self.ap is None or self.max_ap_loss is None:
            return False
        return self.ap[0] - self.ap[1] > self.max_ap_loss


def run_export_job(
    request: ExportRequest, options: ExportOptions, out: TextIO | None = None
) -> ExportOutcome:
    """Write the averaged weights, the ones that are evaluated, and what surrounds them.

    Raises:
        UserError: no such model, a damaged one, data that are not its own, an output that cannot
        be written.
    """
    images = choose_images(request.calibrate, request.calibration_images)
    uri = tracking_uri(request.tracking_uri, output_folder(TrainJob())[0])
    stream = out or sys.stdout
    with _draft(request.output) as draft, open_model(request.model, uri) as folder:
        if request.format == "effdet":
            return _weights(request, folder, draft, stream)
        return _graph(request, options, images, folder, draft, stream)


@contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """A file's place beside its own, that is gone afterwards.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise IsADirectoryError("a folder of that name is there")
        temporary = tempfile.TemporaryDirectory(prefix=".exporting-", dir=output.parent)
    except OSError as error:
        raise ConfigError("OUTPUT", "a file that can be written", f"{output} ({error})") from None
    with temporary:
        yield Path(temporary.name) / output.name


def _weights(request: ExportRequest, folder: Path, draft: Path, stream: TextIO) -> ExportOutcome:
    """Under effdet's names."""
    if draft.suffix not in SUFFIXES["effdet"]:
        raise ConfigError("OUTPUT", "a .pth or .safetensors file", str(request.output))
    spec, classes = read_network(folder), read_classes(folder)
    tensors = to_effdet(load_file(folder / EMA_WEIGHTS), spec)
    if draft.suffix == ".pth":
        torch.save(tensors, draft)
    else:
        save_file(tensors, draft)
    os.replace(draft, request.output)
    said = f"{len(tensors)} tensors of EfficientDet-D{spec.phi}, {classes.num_classes} classes"
    print(f"{request.output}: {said}, effdet's names", file=stream)
    report = {"status": "finished", "output": str(request.output), "tensors": len(tensors)}
    return ExportOutcome(0, report | {"num_classes": classes.num_classes})


def _graph(
    request: ExportRequest,
    options: ExportOptions,
    images: list[ImageFile],
    folder: Path,
    draft: Path,
    stream: TextIO,
) -> ExportOutcome:
    predictor = Predictor.load(folder, "cpu")
    graph = plan(predictor, request)
    data = None
    if request.data is not None:
        data = validation_data(
            request.data, folder, predictor.classes, graph, request.data_images
        )  # fmt: skip
    metadata = describe(graph, predictor.classes, folder, request.precision)
    print(f"writing {request.format}, {graph.content}, {request.precision} ...", file=stream)
    run = _write(request, graph, predictor, images, draft, metadata)
    print("comparing it with PyTorch ...", file=stream)
    proof = _prove(request, run, graph, predictor, data, draft)
    rows = _rows(request, graph, proof, draft, len(data) if data else 0)
    report = _report(request, predictor, proof, draft)
    if options.benchmark and proof.passed:
        latency = measure(run, graph, predictor)
        report["latency"] = asdict(latency)
        rows.append(_speed(latency.file_ms, latency.pytorch_ms, graph))
    if proof.passed:
        os.replace(draft, request.output)
        rows += how_to_run(graph)
    else:
        rows.append(("FAILED", f"{request.output} was not written"))
    print_table(str(request.output), rows, stream)
    return ExportOutcome(0 if proof.passed else FAILED, report)


def _write(
    request: ExportRequest,
    graph: Graph,
    predictor: Predictor,
    images: list[ImageFile],
    draft: Path,
    metadata: Mapping[str, str],
) -> Run:
    """The draft, opened."""
    write, open_file = _format(request.format)
    detector = predictor.detector
    assert isinstance(detector, Detector)
    dtype = torch.float16 if request.precision == "fp16" else torch.float32
    write(graph, detector, dtype, draft, metadata)
    if request.precision == "int8":
        from orchestrator.export.onnx_file import set_metadata
        from orchestrator.export.quantise import quantise

        quantise(draft, draft, calibration_inputs(images, graph))
        set_metadata(draft, metadata)
    return open_file(draft)


def _format(kind: Format) -> tuple[Write, Callable[[Path], Run]]:
    if kind == "torchscript":
        return torch_files.write_torchscript, torch_files.open_torchscript
    if kind == "pt2":
        return torch_files.write_pt2, torch_files.open_pt2
    # Takes seconds, and packages that the other formats do without.
    from orchestrator.export import onnx_file

    return onnx_file.write_onnx, onnx_file.open_onnx


def _prove(
    request: ExportRequest,
    run: Run,
    graph: Graph,
    predictor: Predictor,
    data: DetectionDataset | None,
    draft: Path,
) -> Proof:
    """Of fp32 that it equals PyTorch; of less, that it runs at every size, and what it loses."""
    if request.precision == "fp32":
        checked = check(run, graph, predictor.detector, cases_of(graph))
        if checked.found_nothing:
            checked = _check_twin(request, graph, predictor, draft)
    else:
        checked = try_out(run, graph, cases_of(graph))
    ap = None
    if data is not None and checked.passed:
        ap = ap_of_torch(predictor, graph, data), ap_of_file(run, graph, data)
    return Proof(checked, ap, request.max_ap_loss)


def _check_twin(request: ExportRequest, graph: Graph, predictor: Predictor, draft: Path) -> Checked:
    """Of a run with a high score: the same graph with every score, so that there is what to compare."""
    twin = replace(graph, config=replace(graph.config, score=0.0))
    run = _write(request, twin, predictor, [], draft.with_stem("twin"), {})
    return replace(check(run, twin, predictor.detector, cases_of(twin)), silent=True)


def _rows(
    request: ExportRequest, graph: Graph, proof: Proof, draft: Path, num_images: int
) -> list[Row]:
    kept = f", {graph.config.nms} NMS, at most {graph.config.detections}"
    what = f"{graph.content}{kept if graph.content == 'detections' else ''}; {sizes(graph)}"
    mib = draft.stat().st_size / 2**20
    rows = [
        ("content", what),
        ("file", f"{request.format}, {request.precision}, {mib:.1f} MiB"),
        ("checked", f"{', '.join(proof.checked.cases)}: {proof.checked.line(graph)}"),
    ]
    if proof.ap is not None:
        pytorch, file = proof.ap
        change = f"{abs(pytorch - file):.4f} {'lost' if pytorch >= file else 'won'}"
        said = f"{file:.4f}, {pytorch:.4f} in PyTorch fp32: {change} on {num_images} images"
        if proof.lost_too_much:
            said += f", MORE than --max-ap-loss {proof.max_ap_loss:g}"
        rows.append(("AP", said))
    return rows


def _speed(file_ms: float, pytorch_ms: float, graph: Graph) -> Row:
    height, width = graph.native_hw
    said = f"{file_ms:g} ms for one image of {height} x {width} px, {pytorch_ms:g} ms in PyTorch"
    return "speed", f"{said} (medians, {torch.get_num_threads()} CPU thread(s))"


def _report(
    request: ExportRequest, predictor: Predictor, proof: Proof, draft: Path
) -> dict[str, Any]:
    raw = proof.checked.raw  # infinite, which json cannot say, where the outputs are no numbers
    report = {
        "status": "finished" if proof.passed else "failed",
        "output": str(request.output),
        "format": request.format,
        "content": request.content,
        "precision": request.precision,
        "bytes": draft.stat().st_size,
        "num_classes": predictor.classes.num_classes,
        "checked": asdict(proof.checked) | {"raw": raw if math.isfinite(raw) else None},
    }
    if proof.ap is not None:
        report["ap"] = {"pytorch": proof.ap[0], "file": proof.ap[1]}
    return report
