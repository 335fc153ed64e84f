"""The application of Ray Serve: one front, and as many detectors as there are to be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from orchestrator.serving.detector import Copy, Detector
from orchestrator.serving.ingress import Front
from orchestrator.serving.messages import About, Limits

UNLIMITED = 1_000_000
"""Requests at the front: its door counts those that cost something."""


@dataclass(frozen=True)
class Scale:
    """replicas: a number, or up to `room` as the load asks (None)."""

    replicas: int | None
    room: int
    cpus: float
    gpus: float

    def options(self, max_batch: int) -> dict[str, Any]:
        """A copy holds a batch at work and the next one being decoded."""
        held = 2 * max_batch
        if self.replicas is not None:
            return {"num_replicas": self.replicas, "max_ongoing_requests": held}
        grow = AutoscalingConfig(
            min_replicas=1, max_replicas=max(1, self.room), target_ongoing_requests=held
        )
        return {"autoscaling_config": grow, "max_ongoing_requests": held}


def build(
    files: ray.ObjectRef[dict[str, bytes]],
    copy: Copy,
    scale: Scale,
    about: About,
    limits: Limits,
    token_digest: bytes | None,
) -> serve.Application:
    """What Serve runs."""
    detector = serve.deployment(
        name="detector", max_queued_requests=limits.max_queued,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        graceful_shutdown_timeout_s=limits.timeout_s, **scale.options(copy.max_batch),
    )(Detector)  # fmt: skip
    front = serve.deployment(
        name="front", num_replicas=1, max_ongoing_requests=UNLIMITED,
        ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=limits.timeout_s,
    )(serve.ingress()(Front))  # fmt: skip
    return front.bind(detector.bind(files, copy), about, limits, token_digest)
