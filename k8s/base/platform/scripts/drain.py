"""Before a worker pod ends: tell Ray that this node goes, and give training the time to leave it.

Training saves a checkpoint at once when it hears of it, and starts again elsewhere. Returns as soon as
nothing of Ray's works here any more, at the latest after --seconds, which must be less than the pod's
terminationGracePeriodSeconds. A pod that ends is never held up by an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ANSWER_S = 10.0


def busy(proc: Path = Path("/proc")) -> bool:
    """Whether a task or actor of Ray runs in this pod; its idle processes do not count."""
    return any(
        title.startswith("ray::") and not title.startswith("ray::IDLE") for title in _titles(proc)
    )


def _titles(proc: Path) -> Iterator[str]:
    for entry in proc.glob("[0-9]*"):
        try:
            yield (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue


def announce(address: str, seconds: float) -> bool:
    """Drain the node that has this pod's address; whether Ray agreed."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    client = GcsClient(address=address)
    here = os.environ.get("POD_IP") or ray.util.get_node_ip_address()
    deadline_ms = int((time.time() + seconds) * 1000)
    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted = False
    for node_id, node in client.get_all_node_info(timeout=ANSWER_S).items():
        if node.node_manager_address == here and node.state == 0:
            accepted, _ = client.drain_node(node_id.hex(), preemption, "the pod ends", deadline_ms)
    return bool(accepted)


def wait(seconds: float, working: Callable[[], bool] = busy) -> None:
    end = time.monotonic() + seconds
    while working() and (left := end - time.monotonic()) > 0:
        time.sleep(min(1.0, left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0)
    seconds: float = parser.parse_args().seconds
    if not busy():
        return
    try:
        accepted = announce(os.environ["RAY_ADDRESS"], seconds)
        print(f"drain: {'accepted' if accepted else 'refused'}", flush=True)
    except Exception as error:  # the head may be gone already
        print(f"drain: {error}", file=sys.stderr, flush=True)
        return
    wait(seconds)


if __name__ == "__main__":
    main()
