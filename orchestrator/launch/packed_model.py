"""A model as bytes: what is sent to workers, wherever they are.

All workers get the same files, whatever "the best checkpoint of a run" is by the time they start, and
none needs to reach the place they came from.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from model.predictor import copy_served
from model.training.state import META
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class PackedModel:
    """The part of a checkpoint that predictions need: content by file name."""

    files: Mapping[str, bytes]

    @classmethod
    def of(cls, checkpoint: Path) -> PackedModel:
        """checkpoint: a verified folder."""
        with tempfile.TemporaryDirectory(prefix="served-") as temporary:
            folder = Path(temporary) / "checkpoint"
            copy_served(checkpoint, folder)
            return cls({path.name: path.read_bytes() for path in sorted(folder.iterdir())})

    @property
    def sha256(self) -> str:
        """Of weights, configuration and classes."""
        found = hashlib.sha256()
        for name in sorted(self.files.keys() - {META}):
            found.update(hashlib.sha256(self.files[name]).digest())
        return found.hexdigest()

    @contextmanager
    def unpacked(self) -> Iterator[Path]:
        """A checkpoint folder for as long as it takes to load it."""
        with tempfile.TemporaryDirectory(prefix="model-") as temporary:
            for name, content in self.files.items():
                (Path(temporary) / name).write_bytes(content)
            yield Path(temporary)


@contextmanager
def within_memory(images: int) -> Iterator[None]:
    """A model looks at so many images at once.

    Raises:
        ConfigError: the device's memory does not hold them.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "--batch-size", "images that fit the device's memory",
            f"{images} ({str(error).splitlines()[0]})", "lower it",
        ) from None  # fmt: skip


def device_held() -> torch.device:
    """A GPU where this worker of a cluster reserved one; outside of Ray where there is one."""
    import ray

    held = bool(ray.get_gpu_ids()) if ray.is_initialized() else torch.cuda.is_available()
    return torch.device("cuda" if held else "cpu")
