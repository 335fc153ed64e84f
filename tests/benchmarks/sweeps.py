"""What deciding costs in a large sweep: python tests/benchmarks/sweeps.py simulation [NAME ...]

    random    10,000 trials on 1,000 simulated workers, random search and ASHA
    median    the same with median stopping
    tpe       2,000 trials on 200 workers, TPE and ASHA
    recall    going on with the ledger of the first: seconds until it could

Milliseconds of a scheduler's decision and of a suggestion, and KiB of memory for each trial between
a half and the whole of them beside those up to the half.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers.simulation import planted, simulate, sweep_mapping  # noqa: E402

from orchestrator.search.config import decode_sweep  # noqa: E402

CASES = {  # trials, workers, algorithm, scheduler
    "random": (10_000, 1_000, "random", "asha"),
    "median": (10_000, 1_000, "random", "median"),
    "tpe": (2_000, 200, "tpe", "asha"),
}


def simulation(names: list[str], folder: Path) -> None:
    for name in names or [*CASES, "recall"]:
        if name == "recall" and not (folder / "random").exists():
            large("random", folder / "random")
        case = "random" if name == "recall" else name
        found = large(case, folder / case)
        print(json.dumps({name: {k: round(v, 3) for k, v in found.items()}}), flush=True)


def large(name: str, folder: Path) -> dict[str, float]:
    num, workers, algorithm, kind = CASES[name]
    sweep = decode_sweep(sweep_mapping(num, algorithm=algorithm, kind=kind))
    memory = {0: resident_kib()}

    def on_end(ended: int) -> None:
        if ended in (num // 10, num // 2, num):
            memory[ended] = resident_kib()

    began = time.perf_counter()
    found = simulate(sweep, planted(27), workers, folder, on_end=on_end)
    total_s = time.perf_counter() - began
    figures = {"trials": len(found.entries), "build_s": found.build_s, "total_s": total_s}
    if found.decision_s:
        figures |= milliseconds("decision", found.decision_s)
        figures |= milliseconds("suggestion", found.suggest_s)
        figures["evaluations"] = len(found.decision_s)
        early, half, end = memory[num // 10], memory[num // 2], memory[num]
        figures["kib_per_trial_first_half"] = (half - early) / (num * 0.4)
        figures["kib_per_trial_second_half"] = (end - half) / (num * 0.5)
        figures["resident_mib"] = end / 1024
    return figures


def milliseconds(name: str, seconds: array[float]) -> dict[str, float]:
    values = sorted(1e3 * value for value in seconds)
    return {
        f"{name}_median_ms": statistics.median(values),
        f"{name}_p99_ms": values[int(0.99 * len(values))],
        f"{name}_max_ms": values[-1],
    }


def resident_kib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def main() -> None:
    if sys.argv[1:2] != ["simulation"]:
        raise SystemExit(__doc__)
    folder = Path(tempfile.mkdtemp(prefix="sweeps-"))
    try:
        simulation(sys.argv[2:], folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
