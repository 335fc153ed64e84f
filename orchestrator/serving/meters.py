"""What the server counts of itself, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from orchestrator.serving.messages import Answer

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
PATHS = ("/", "/predict", "/model", "/healthz", "/readyz", "/metrics", "/openapi.json")
"""Others share one label: a caller must not be able to make more of them."""

TURNED_AWAY = "x-effdet-turned-away"
"""Header by which the front learns how many requests never came to it."""


class Inside:
    """Requests that were let in and are not answered yet."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        self.number += 1
        try:
            yield
        finally:
            self.number -= 1


class Meters:
    """Of one server process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.inside = Inside()
        self.body_bytes = 0
        self.requests = Counter(
            "effdet_requests", "Requests by path and HTTP status (499: the caller went away)",
            ["path", "status"], registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "effdet_request_seconds", "From a request's first byte to the end of its answer",
            ["path"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            "effdet_stage_seconds", "Of an image: decode, wait for its batch, detect",
            ["stage"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batches = Histogram(
            "effdet_batch_images", "Images that the network looked at together",
            buckets=IMAGES, registry=self.registry,
        )  # fmt: skip
        self.turned_away = Gauge(
            "effdet_turned_away", "Requests that Serve's HTTP proxy refused by itself so far",
            registry=self.registry,
        )  # fmt: skip
        waiting = Gauge("effdet_requests_inside", "Waiting or at work", registry=self.registry)
        waiting.set_function(lambda: self.inside.number)
        held = Gauge("effdet_body_bytes", "Of request bodies in memory", registry=self.registry)
        held.set_function(lambda: self.body_bytes)

    def answered(self, path: str, status: int, seconds: float) -> None:
        known = path if path in PATHS else "other"
        self.requests.labels(known, str(status)).inc()
        self.seconds.labels(known).observe(seconds)

    def looked_at(self, answer: Answer) -> None:
        for stage, ms in (
            ("decode", answer.decode_ms),
            ("wait", answer.wait_ms),
            ("detect", answer.detect_ms),
        ):
            self.stages.labels(stage).observe(ms / 1e3)
        if answer.leads:
            self.batches.observe(answer.batch)

    def page(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
