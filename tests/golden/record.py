"""Writes tiny_losses.json anew; run it only for a change that is meant to move the numbers.

PYTHONPATH=.:tests .venv/bin/python tests/golden/record.py
"""

import json
import tempfile
from pathlib import Path

from helpers.loop import Record, dataset, run

with tempfile.TemporaryDirectory() as folder:
    record = Record()
    run(dataset(Path(folder) / "shapes"), Path(folder) / "run", record)
    losses = [value for _, value in record.values("train/loss")]
target = Path(__file__).with_name("tiny_losses.json")
target.write_text(json.dumps({"losses": losses}, indent=1) + "\n")
print(target.name, losses)
