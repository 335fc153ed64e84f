"""The benchmark as a job: measure, predict, print."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO

import torch

from model.data.dataset import collate
from model.network.detector import Detector
from model.training.benchmark import Report, measure
from model.training.runtime import local_device
from model.training.weak_scaling import Link, Measured, Traffic, measure_two_workers, predict
from orchestrator.config.cli import BenchmarkOptions
from orchestrator.config.schema import TrainJob
from orchestrator.errors import ConfigError
from orchestrator.launch import preflight
from orchestrator.launch.progress import print_table
from orchestrator.launch.resolve import ResolvedJob, derive, resolve_job

GIB = 2**30


@dataclass(frozen=True)
class BenchmarkOutcome:
    code: int
    report: dict[str, Any]


def run_benchmark_job(
    job: TrainJob, options: BenchmarkOptions, out: TextIO | None = None
) -> BenchmarkOutcome:
    """Time one worker on this machine; with a scale to model, two more, and predict.

    Raises:
        UserError: a configuration that could not be trained.
    """
    if options.rounds < 1:
        raise ConfigError("--rounds", "at least 1", str(options.rounds))
    if options.model_scale is not None and options.model_scale < 1:
        raise ConfigError("--model-scale", "at least 1 worker", str(options.model_scale))
    out = out or sys.stdout
    device = torch.device("cpu") if job.launch.gpus_per_worker == 0 else local_device(0)
    # One worker and one group a step, which are decided about like any other job's.
    job = replace(
        job,
        train=replace(job.train, bn_group=job.train.batch_size),
        launch=replace(job.launch, workers=1),
    )
    resolved, train_index, val_index = resolve_job(job)
    derived = derive(resolved, len(train_index), len(val_index))
    hardware = preflight.choose_hardware(
        job, cpus=len(os.sched_getaffinity(0)), gpus=torch.cuda.device_count(), local=True
    )
    resolved, memory = preflight.check_memory(resolved, derived, hardware, 1)
    resolved = preflight.with_loader_workers(resolved, hardware)
    train, _ = resolved.datasets()
    report = measure(resolved.recipe, train, device, options.rounds)
    described = [*describe(resolved, report, device), ("memory estimate", memory)]
    print_table(f"one worker, {device.type}, medians of {options.rounds}", described, out)
    found = asdict(report) | {"img_per_s": report.img_per_s}
    if options.model_scale is not None:
        batch = collate([train[(0, image)] for image in range(job.train.batch_size)])
        measured = measure_two_workers(resolved.recipe, batch, options.rounds)
        rows, scale = model_scale(resolved, report, measured, options)
        print_table(f"{options.model_scale} workers, predicted", rows, out)
        found["scale"] = scale
    return BenchmarkOutcome(0, {"status": "finished", "resolved": resolved.config()} | found)


def describe(resolved: ResolvedJob, report: Report, device: torch.device) -> list[tuple[str, str]]:
    spec, train = resolved.recipe.network, resolved.recipe.train
    step = sum(report.seconds.values())
    rows = [
        ("network", f"phi {spec.phi}, {spec.image_size_px} px, fusion {spec.fusion}, "
         f"batch {report.batch_size}, precision {train.precision}, "
         f"compile {'yes' if train.compile else 'no'}, {torch.get_num_threads()} threads"),
    ]  # fmt: skip
    for name, seconds in report.seconds.items():
        rows.append((name, f"{seconds * 1e3:9.2f} ms  {seconds / step:6.1%}"))
    bounds = report.ceilings
    by_compute = report.tflop_per_s / bounds.tflop_per_s
    by_memory = report.gb_per_s / bounds.gb_per_s
    rows += [
        ("step", f"{report.step_s * 1e3:9.2f} ms  {report.img_per_s:.2f} images/s "
         f"(the first took {report.first_step_s:.1f} s)"),
        ("arithmetic", f"{report.tflop_per_s:.3f} of {bounds.tflop_per_s:.3f} TFLOP/s that a matrix "
         f"product reaches here ({by_compute:.0%})"),
        ("memory traffic", f"{report.gb_per_s:.1f} of {bounds.gb_per_s:.1f} GB/s that a copy reaches "
         f"here ({by_memory:.0%}); unfused, every operation for itself"),
        ("peak memory", f"{report.peak_memory_bytes / GIB:.2f} GiB"),
        ("samples", f"{report.data_img_per_s:.1f} images/s decoded and augmented by one core"),
        ("data wait", f"{report.data_wait_share:.1%} of a step with "
         f"{resolved.recipe.loader_workers} loader processes"),
        ("evaluation", f"{report.evaluation_img_per_s:.1f} images/s, "
         f"{report.postprocess_share:.0%} of it in suppression"),
        ("checkpoint", f"{report.checkpoint_s:.2f} s for {report.checkpoint_bytes / 2**20:.0f} MiB"),
    ]  # fmt: skip
    return rows


def model_scale(
    resolved: ResolvedJob, report: Report, measured: Measured, options: BenchmarkOptions
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Predict the asked number of workers, and hold the model to the two that were run."""
    assert options.model_scale is not None
    recipe = resolved.recipe
    with torch.device("meta"):
        detector = Detector(recipe.network)
    traffic = Traffic.of(recipe, detector, team=1, num_groups=options.model_scale)
    backward_share = report.seconds["backward"] / sum(report.seconds.values())
    here = measured.link
    link = Link(
        here.latency_s if options.latency_us is None else options.latency_us * 1e-6,
        here.bytes_per_s if options.gb_per_s is None else options.gb_per_s * 1e9,
    )
    check = predict(
        workers=2, images_per_worker=report.batch_size, compute_s=measured.alone_s,
        backward_s=backward_share * measured.alone_s, traffic=traffic, link=here,
    )  # fmt: skip
    wanted = predict(
        workers=options.model_scale, images_per_worker=report.batch_size,
        compute_s=report.step_s, backward_s=backward_share * report.step_s,
        traffic=traffic, link=link,
    )  # fmt: skip
    rows = [
        ("link", f"{link.latency_s * 1e6:.0f} us and {link.bytes_per_s / 1e9:.2f} GB/s between two workers"),
        ("a step exchanges", f"{traffic.gradient_bytes / 2**20:.1f} MiB of gradients, "
         + ", ".join(f"{count} x {name}" for name, count in traffic.small.items())),
        ("prediction", f"{wanted.img_per_s:.1f} images/s, efficiency {wanted.efficiency:.1%}; "
         f"dominated by {wanted.dominant}"),
        ("added", ", ".join(f"{name} {s * 1e3:.2f} ms" for name, s in wanted.terms.items())),
        ("model against two workers here", f"step {check.step_s * 1e3:.1f} ms predicted, "
         f"{measured.together_s * 1e3:.1f} ms measured ({check.step_s / measured.together_s:.2f}x)"),
    ]  # fmt: skip
    return rows, {
        "predicted": asdict(wanted) | {"dominant": wanted.dominant},
        "check": {"predicted_s": check.step_s, "measured_s": measured.together_s},
        "link": asdict(link),
    }
