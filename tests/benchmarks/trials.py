"""What a trial costs beyond its training, and where that goes: medians over trials of one sweep.

python tests/benchmarks/trials.py          one worker each, then two
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.sweeps import SweepJob, events, write_sweep  # noqa: E402

TRIALS = 12
FIRST = 2  # starts processes, which the others find


def measure(workers: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sweep = write_sweep(
            folder,
            trials={"num": TRIALS, "workers_per_trial": workers, "concurrent": 1},
            train={"train.bn_group": 4, "train.duration": "{epochs: 6}"},
        )  # fmt: skip
        done = SweepJob(folder / "out", "--config", str(sweep)).finish()
        assert done.code == 0, done.out
        found = events(folder / "out")
        began = {e["trial"]: e["at"] for e in found if e["op"] == "began"}
        last = {e["trial"]: e for e in found if e["op"] == "scored"}
        ids = sorted(began)
        beyond, before, after, between = [], [], [], []
        for this, following in zip(ids[FIRST:-1], ids[FIRST + 1 :], strict=True):
            whole, fit = began[following] - began[this], last[this]["fit_s"]
            beyond.append(whole - fit)
            inside = last[this]["seconds"]
            before.append(last[this]["fit_began_s"])
            after.append(inside - last[this]["fit_began_s"] - fit)
            between.append(whole - inside)
        first = last[ids[0]]["seconds"] - last[ids[0]]["fit_s"]
        print(
            f"{workers} worker(s), {len(beyond)} trials: {median(beyond):.2f} s beyond training "
            f"(worst {max(beyond):.2f}): {median(before):.2f} before it (run, preflight, records), "
            f"{median(after):.2f} after it (records, figures), {median(between):.2f} between trials "
            f"(Ray Tune); the first trial {first:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    for number in (1, 2):
        measure(number)
