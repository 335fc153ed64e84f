"""What each size of network would need here: memory by tracing, time by two measured rates.

Arithmetic at the rate of a matrix product and memory traffic at the rate of a copy, both measured on
this machine just now, say what a step of one image lasts at least; real steps (jobs/benchmark.py, D0
and D1 on a CPU) took 1.9 to 2.7 times that. The traffic is taken from the saved activations: tracing
it for all of the table (`model.training.benchmark.step_traffic`) gave 6.9 to 8.2 times these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.network.footprint import activations, network_cost
from model.network.scaling import PHI_TABLE, ModelConfig, NetworkSpec, Phi, resolve
from model.training.benchmark import Ceilings, ceilings
from orchestrator.launch.preflight import BASE_BYTES, COPIES_OF_WEIGHTS, Hardware

PASSES = 3  # forward, and twice as much backward
TRAFFIC_OF_ACTIVATIONS = 7.4
STEP_OVER_LEAST = 2.4
AROUND = 2  # sizes below and above the one that is asked for


@dataclass(frozen=True)
class SizeEstimate:
    """One phi at its published size. Memory in bytes: fixed, for an image, and with activations
    computed again; images: at once on one device of this machine (None: its memory is not known).
    """

    phi: str
    image_size_px: int
    params: int
    gmacs: float
    fixed_bytes: float
    image_bytes: int
    recomputed_bytes: int
    images: int | None
    images_recomputed: int | None
    img_per_s: float
    asked: bool

    def epoch_h(self, num_images: int) -> float:
        return num_images / self.img_per_s / 3600


def estimate_sizes(
    model: ModelConfig, num_classes: int, hardware: Hardware, device: torch.device
) -> tuple[list[SizeEstimate], Ceilings]:
    """The size that is asked for, with its own settings, and its neighbours in the phi table."""
    half = device.type == "cuda"
    rates = ceilings(device, torch.bfloat16 if half else torch.float32, rounds=3)
    names, sizes = list(PHI_TABLE), []
    here = names.index(model.phi)
    for phi in names[max(0, here - AROUND) : here + AROUND + 1]:
        spec = _spec(model, phi, num_classes)
        sizes.append(_estimate(spec, hardware, rates, half=half, asked=phi == model.phi))
    return sizes, rates


def _spec(model: ModelConfig, phi: str, num_classes: int) -> NetworkSpec:
    if phi == model.phi:
        return resolve(model, num_classes)
    number: Phi = phi  # type: ignore[assignment]
    return resolve(ModelConfig(phi=number), num_classes)


def _estimate(
    spec: NetworkSpec, hardware: Hardware, rates: Ceilings, *, half: bool, asked: bool
) -> SizeEstimate:
    cost = network_cost(spec).total
    traced = activations(spec, half_precision=half)
    fixed = cost.params * 4 * COPIES_OF_WEIGHTS + BASE_BYTES
    image, again = traced.total(recompute=False), traced.total(recompute=True)
    arithmetic_s = PASSES * 2 * cost.macs / (rates.tflop_per_s * 1e12)
    traffic_s = TRAFFIC_OF_ACTIVATIONS * image / (rates.gb_per_s * 1e9)

    def fitting(each: int) -> int | None:
        if hardware.memory_bytes is None:
            return None
        return max(0, int((hardware.memory_bytes - fixed) // each))

    return SizeEstimate(
        spec.phi, spec.image_size_px, cost.params, cost.macs / 1e9, fixed, image, again,
        fitting(image), fitting(again), 1 / (STEP_OVER_LEAST * (arithmetic_s + traffic_s)), asked,
    )  # fmt: skip
