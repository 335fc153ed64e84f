"""What the driver records of a run, through a spool of its own: no call waits or raises."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from orchestrator.records.secrets import redact, without_secret
from orchestrator.records.sender import Sender

DESCRIPTION = "mlflow.note.content"
DRIVER = "driver.jsonl"


class Journal:
    """Secrets are taken out of all text before it is written down."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def begin(self) -> None:
        """Of a restart."""
        self.sender.log({"op": "begin", "time_ms": _now_ms()})

    def params(self, params: Mapping[str, Any]) -> None:
        """Those that differ from recorded ones (a resumed run's) are left as they were."""
        clean = {key: redact(str(value)) for key, value in params.items()}
        self.sender.log({"op": "params", "params": clean})

    def tags(self, tags: Mapping[str, str]) -> None:
        self._tags({key: redact(value) for key, value in tags.items()})

    def place(self, tag: str, uri: str) -> None:
        """A tag that is read back: what looks like a secret's value in it may be a folder's name."""
        self._tags({tag: without_secret(uri)})

    def describe(self, markdown: str) -> None:
        """The run's description."""
        self.tags({DESCRIPTION: markdown})

    def text(self, to: str, text: str) -> None:
        """An artifact."""
        self.sender.log({"op": "text", "to": to, "text": redact(text), "time_ms": _now_ms()})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.sender.log(metrics_record(step, metrics))

    def dataset(self, facts: Mapping[str, Any], context: str) -> None:
        """facts: name, digest, source, profile."""
        source = redact(str(facts["source"]))
        self.sender.log({"op": "dataset", "context": context, **facts, "source": source})

    def end(self, status: str, outcome: str) -> None:
        """status: FINISHED, FAILED or KILLED; outcome: why, in a word or a line."""
        now = int(time.time() * 1000)
        self.sender.log({"op": "end", "status": status, "outcome": redact(outcome), "time_ms": now})

    def close(self, timeout_s: float) -> bool:
        """True if all of it was sent."""
        return self.sender.close(timeout_s)

    def _tags(self, tags: Mapping[str, str]) -> None:
        self.sender.log({"op": "tags", "tags": dict(tags), "time_ms": _now_ms()})


def metrics_record(step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """With the time of now, which is when it happened."""
    clean = dict(zip(_metric_names(tuple(metrics)), metrics.values(), strict=True))
    return {"op": "metrics", "step": step, "time_ms": _now_ms(), "metrics": clean}


@lru_cache(maxsize=1024)
def _metric_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Class names hold characters that MLflow refuses. Every step logs the same few sets of names."""
    return tuple(re.sub(r"[^/\w.\- :]", "_", name) for name in names)


def _now_ms() -> int:
    return int(time.time() * 1000)
