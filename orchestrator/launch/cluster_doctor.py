"""What a cluster is like, measured from each of its nodes: before a long training, or when one is slow.

One small task runs on every node, then as many processes as there are GPUs (or one a node on the CPU)
add up a tensor together. Nothing of a training is started, nothing is left behind.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config.cli import DoctorOptions, Parser
from orchestrator.launch.node_probe import clock, probe
from orchestrator.launch.ray_runtime import connect
from orchestrator.storage.filesystems import reason

MOST_SKEW_S = (
    2.0  # signed requests to S3 bear minutes, records of two nodes do not look right with more
)
LEAST_SHM_GIB = 1.0  # a container's default is 64 MiB
NODE_TIMEOUT_S, MOST_AT_ONCE = 300.0, 32
REDUCE_MIB, REDUCE_ROUNDS, REDUCE_TIMEOUT_S = 64, 10, 120.0


@dataclass(frozen=True)
class ClusterRequest:
    """store: a URI to write to from every node. tracking_uri: a server to ask from every node."""

    store: str | None
    tracking_uri: str | None


@dataclass(frozen=True)
class NodeReport:
    """What one node says. skew_s: of its clock against the driver's; mib_per_s: (write, read).

    gpus: names as CUDA sees them; expected_gpus: as Ray does. tracker and store: None if all is well
    or nothing was asked, else what is not. tracker_s: until it answered, None if it was not asked.
    """

    host: str
    versions: dict[str, str]
    skew_s: float
    shm_gib: float
    disk_free_gib: float
    gpus: tuple[str, ...] = ()
    expected_gpus: int = 0
    tracker: str | None = None
    tracker_s: float | None = None
    store: str | None = None
    mib_per_s: tuple[float, float] | None = None


@dataclass(frozen=True)
class Reduced:
    """An all-reduce. gb_per_s: of the bus, as NCCL's own tests count it: 2 (n - 1) / n of the bytes."""

    ranks: int
    backend: str
    gb_per_s: float = 0.0
    error: str | None = None


@dataclass
class Verdict:
    """rows: of the table. problems: what is wrong, each with its node."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def parse_cluster_doctor(
    description: str, argv: Sequence[str]
) -> tuple[ClusterRequest, DoctorOptions]:
    """Raises ConfigError: anything that is not understood."""
    parser = Parser(
        prog="jobs/doctor.py", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--cluster", nargs="?", const="", metavar="URI",
        help="measure the cluster of RAY_ADDRESS; URI: also write to it and read from every node",
    )  # fmt: skip
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="a tracker to ask (MLFLOW_TRACKING_URI)"
    )
    parser.add_argument("--json", action="store_true", help="last line of output: one json object")
    given = parser.parse_args(argv)
    tracking_uri = given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return ClusterRequest(given.cluster or None, tracking_uri), DoctorOptions(given.json)


def examine(request: ClusterRequest, root: Path) -> tuple[Verdict, dict[str, Any]]:
    """The table, and the same for a machine.

    Raises:
        ClusterError: no cluster.
    """
    connect(root)
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        with ThreadPoolExecutor(max_workers=min(len(alive), MOST_AT_ONCE)) as pool:
            answers = list(pool.map(lambda node: _ask(node, request), alive))
        reports = [answer for answer in answers if isinstance(answer, NodeReport)]
        # A head that runs no tasks takes no part in training either.
        reduced = _all_reduce([_gpus(node) for node in alive if node["Resources"].get("CPU")])
    finally:
        ray.shutdown()
    verdict = judge(reports, reduced)
    for silent in (answer for answer in answers if not isinstance(answer, NodeReport)):
        verdict.rows.append((silent.host, f"does not answer: {silent.why}"))
        verdict.problems.append(
            f"{silent.host}: no answer within {NODE_TIMEOUT_S:g} s; is it busy? end its jobs, or drain it"
        )
    facts = {
        "nodes": [vars(report) | {"gpus": list(report.gpus)} for report in reports],
        "all_reduce": vars(reduced) if reduced else None,
        "problems": verdict.problems,
    }
    return verdict, facts


def judge(reports: Sequence[NodeReport], reduced: Reduced | None) -> Verdict:
    """Pure: from what was measured to what it means."""
    verdict = Verdict()
    usual = _usual_versions(reports)
    for report in reports:
        cells, wrong = _describe(report, usual)
        verdict.rows.append((report.host, "; ".join(cells)))
        verdict.problems += [f"{report.host}: {problem}" for problem in wrong]
    listed = ", ".join(f"{name} {version}" for name, version in usual.items())
    verdict.rows.append(("versions", listed))
    if reduced is None:
        verdict.rows.append(("all-reduce", "one process only: nothing to measure"))
    elif reduced.error:
        verdict.rows.append(("all-reduce", f"failed: {reduced.error}"))
        verdict.problems.append(f"all-reduce of {reduced.ranks} over {reduced.backend} failed")
    else:
        text = f"{reduced.gb_per_s:.2f} GB/s, {reduced.ranks} processes over {reduced.backend}"
        verdict.rows.append(("all-reduce", text))
    for problem in verdict.problems:
        verdict.rows.append(("PROBLEM", problem))
    return verdict


def _usual_versions(reports: Sequence[NodeReport]) -> dict[str, str]:
    """Of each package, what most nodes have; the first of those at a tie."""
    usual = {}
    for name in dict.fromkeys(name for report in reports for name in report.versions):
        found = [report.versions.get(name, "none") for report in reports]
        usual[name] = max(dict.fromkeys(found), key=found.count)
    return usual


def _describe(report: NodeReport, usual: dict[str, str]) -> tuple[list[str], list[str]]:
    """(cells, problems) of one node."""
    kinds = {name: report.gpus.count(name) for name in dict.fromkeys(report.gpus)}
    gpus = ", ".join(f"{number} x {name}" for name, number in kinds.items()) or "no GPU"
    cells = [
        gpus, f"/dev/shm {report.shm_gib:.1f} GiB", f"disk {report.disk_free_gib:.0f} GiB free",
        f"clock {report.skew_s:+.2f} s",
    ]  # fmt: skip
    problems = []
    if len(report.gpus) != report.expected_gpus:
        problems.append(f"{report.expected_gpus} GPU(s) in Ray, {len(report.gpus)} in CUDA")
    if abs(report.skew_s) > MOST_SKEW_S:
        problems.append(f"its clock differs by {report.skew_s:+.1f} s")
    if report.shm_gib < LEAST_SHM_GIB:
        problems.append(f"/dev/shm has {report.shm_gib:.2f} GiB, at least {LEAST_SHM_GIB:g} wanted")
    for name, version in usual.items():
        if (there := report.versions.get(name, "none")) != version:
            problems.append(f"{name} {there}, others have {version}")
    if report.mib_per_s is not None:
        write, read = report.mib_per_s
        cells.append(f"store {write:.0f} MiB/s out, {read:.0f} MiB/s in")
    if report.store:
        problems.append(f"store: {report.store}")
    if report.tracker_s is not None:
        cells.append(f"tracker answers in {report.tracker_s * 1000:.0f} ms")
    if report.tracker:
        problems.append(f"tracker: {report.tracker}")
    return cells, problems


@dataclass(frozen=True)
class Silent:
    """A node that does not answer, and what came instead."""

    host: str
    why: str


def _gpus(node: dict[str, Any]) -> int:
    return int(node["Resources"].get("GPU", 0))


def _ask(node: dict[str, Any], request: ClusterRequest) -> NodeReport | Silent:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    gpus = _gpus(node)
    asked = probe.options(scheduling_strategy=there, num_gpus=gpus)
    ticking = clock.options(scheduling_strategy=there)
    try:
        found: dict[str, Any] = ray.get(
            asked.remote(request.store, request.tracking_uri), timeout=NODE_TIMEOUT_S
        )
        before = time.time()
        theirs = ray.get(ticking.remote(), timeout=NODE_TIMEOUT_S)
        skew_s = theirs - (before + time.time()) / 2
    except Exception as error:  # lost, busy, out of memory: whatever it is, it is this node
        return Silent(str(node["NodeManagerHostname"]), reason(error)[:200])
    return NodeReport(skew_s=skew_s, expected_gpus=gpus, **found)


def _all_reduce(gpus_per_node: Sequence[int]) -> Reduced | None:
    """One process for each GPU of the cluster; without GPUs one for each node, over gloo."""
    gpus = sum(gpus_per_node)
    ranks, backend = (gpus, "nccl") if gpus else (len(gpus_per_node), "gloo")
    if ranks < 2:
        return None
    resources = {"GPU": 1} if gpus else {"CPU": 0.01}
    group = ray.util.placement_group([resources] * ranks, strategy="SPREAD")
    try:
        ray.get(group.ready(), timeout=REDUCE_TIMEOUT_S)
        rank_class: Any = _Rank
        actors = [
            rank_class.options(
                num_gpus=1 if gpus else 0,
                num_cpus=0 if gpus else 0.01,
                scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            ).remote()
            for rank in range(ranks)
        ]
        address = ray.get(actors[0].address.remote(), timeout=REDUCE_TIMEOUT_S)
        work = [
            actor.measure.remote(rank, ranks, address, backend) for rank, actor in enumerate(actors)
        ]
        seconds = max(ray.get(work, timeout=REDUCE_TIMEOUT_S))
    except Exception as error:  # NCCL's, gloo's and Ray's all mean the same
        return Reduced(ranks, backend, error=reason(error)[:300])
    finally:
        ray.util.remove_placement_group(group)
    moved = 2 * (ranks - 1) / ranks * REDUCE_MIB * 2**20
    return Reduced(ranks, backend, moved / seconds / 1e9)


@ray.remote
class _Rank:
    """One process of the group."""

    def address(self) -> str:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return f"tcp://{ray.util.get_node_ip_address()}:{port}"

    def measure(self, rank: int, ranks: int, address: str, backend: str) -> float:
        """Seconds of one all-reduce, the median of several."""
        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks)
        tensor = torch.ones(REDUCE_MIB * 2**18, device=device)
        took = []
        for _ in range(REDUCE_ROUNDS + 2):
            dist.barrier()
            began = time.monotonic()
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            if backend == "nccl":
                torch.cuda.synchronize()
            took.append(time.monotonic() - began)
        dist.destroy_process_group()
        return sorted(took[2:])[REDUCE_ROUNDS // 2]
