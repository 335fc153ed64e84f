"""What Ray Tune runs, and stops, and gives the next trial."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from ray import tune

from orchestrator.search.group import Group
from orchestrator.search.training import Errand, Training

POINTER = "checkpoints.json"
STUCK = 75  # exit code


class Trial(tune.Trainable):
    """What Ray Tune runs; its process is used for one trial after another."""

    def setup(self, config: dict[str, Any], errand: Errand | None = None) -> None:
        assert errand is not None
        self.errand = errand
        self.training: Training | None = None
        self.donor: str | None = None
        self.group: Group | None = None

    def step(self) -> dict[str, Any]:
        """To the next evaluation, or the end."""
        if self.training is None:
            launch = self.errand.resolved.job.launch
            several = launch.workers > 1 or launch.max_workers is not None
            if several and (self.group is None or self.group.broken):
                self.group = self._new_group()
            self.training = Training(self.errand, self.config, self.donor, self.group)
        return self.training.next()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial; the group of workers stays."""
        self._end()
        self.config = new_config
        return True

    def cleanup(self) -> None:
        self._end()
        if self.group is not None:
            self.group.close()
            self.group = None

    def _end(self) -> None:
        if self.training is not None and not self.training.end():
            os._exit(STUCK)  # two trainings must not share a process; Tune starts another one
        self.training, self.donor = None, None

    def _new_group(self) -> Group:
        launch, storage = self.errand.resolved.job.launch, self.errand.storage
        name = f"{self.errand.sweep}-{uuid.uuid4().hex[:8]}"
        return Group(launch, self.errand.hardware, name, storage)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """For PBT: where the weights are, not the weights."""
        assert self.training is not None
        pointer = {"uri": self.training.checkpoints_uri, "trial": self.training.trial}
        Path(checkpoint_dir, POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        pointer = json.loads(Path(str(checkpoint), POINTER).read_text())
        # Its own: a trial finds its newest checkpoint by itself.
        self.donor = pointer["uri"] if pointer["trial"] != self.config["trial"] else None
