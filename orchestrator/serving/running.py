"""Serve on a cluster: started, watched and ended by one driver."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from orchestrator.config.serve_cli import ServeRequest
from orchestrator.errors import ClusterError
from orchestrator.launch.ray_runtime import Cluster, connect, free_room
from orchestrator.serving.app import Scale, build
from orchestrator.serving.detector import Copy
from orchestrator.serving.door import BODY_TIMEOUT_S, digest
from orchestrator.serving.messages import About, Limits
from orchestrator.serving.turnstile import environment
from orchestrator.storage.filesystems import reason

APP = "detector"
KEEP_ALIVE_S = 30
ENDED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.NOT_STARTED, ApplicationStatus.DELETING)


@contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Raises ClusterError: it does not answer, or serves something else."""
    for name in ("ray.serve", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        joined = connect(root)
        there = serve.status()
        if there.applications or there.proxies:
            names = ", ".join(there.applications) or "no application yet"
            raise ClusterError(
                "Ray Serve", "a cluster that serves nothing yet", f"one that does ({names})",
                "stop that one, end what it left with `serve shutdown`, or use another cluster",
            )  # fmt: skip
        yield joined
    finally:
        ray.shutdown()


def scale_of(request: ServeRequest, there: Cluster) -> Scale:
    """Raises ClusterError: there is no room for what was asked."""
    gpus = request.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if there.gpus >= 1 else 0.0
    room = there.room(request.cpus_per_replica, gpus)
    if room < (request.replicas or 1):
        raise ClusterError(
            "--replicas", f"at most {room}, of {request.cpus_per_replica:g} CPUs and {gpus:g} GPUs each",
            f"{request.replicas or 1} on {there.cpus:g} CPUs and {there.gpus:g} GPUs",
            "ask for fewer, or less for each, or add nodes",
        )  # fmt: skip
    return Scale(request.replicas, room, request.cpus_per_replica, gpus)


def free(scale: Scale) -> int:
    """How many copies fit beside what others use now."""
    return free_room(scale.cpus, scale.gpus)


def start(
    request: ServeRequest,
    about: About,
    files: dict[str, bytes],
    scale: Scale,
    token: str | None,
) -> None:
    """Returns when requests are answered.

    Raises:
        ClusterError: it could not be started there.
    """
    copy = Copy(
        device="cuda" if scale.gpus else "cpu", threads=max(1, int(scale.cpus)),
        max_batch=request.max_batch, batch_wait_s=request.batch_wait_ms / 1e3,
        max_pixels=request.max_pixels,
    )  # fmt: skip
    limits = Limits(
        score=request.score, max_image_bytes=int(request.max_image_mb * 1e6),
        max_pixels=request.max_pixels, max_queued=request.max_queued, timeout_s=request.timeout_s,
    )  # fmt: skip
    http = HTTPOptions(
        host=request.host, port=request.port, keep_alive_timeout_s=KEEP_ALIVE_S,
        # The server's own limits come first, and say more.
        request_timeout_s=2 * (BODY_TIMEOUT_S + request.timeout_s),
    )  # fmt: skip
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    secret = digest(token) if token else None
    try:
        serve.start(
            proxy_location="HeadOnly", http_options=http, logging_config=quiet,
            controller_options={"runtime_env": {"env_vars": environment(limits, secret)}},
        )  # fmt: skip
        app = build(ray.put(files), copy, scale, about, limits, secret)
        serve.run(app, name=APP, route_prefix="/", logging_config=quiet)
    except (RayServeException, RayError, RuntimeError, TimeoutError) as error:
        where = f"{request.host}:{request.port}"
        raise ClusterError(
            "Ray Serve", f"a server at {where} with a copy of the model", reason(error),
            "see the logs of the cluster (/tmp/ray/session_latest/logs/serve)",
        ) from None  # fmt: skip


def _delete(timeout_s: float) -> None:
    """Raises TimeoutError: Serve itself waits a minute, which answers may take longer than."""
    latest = time.monotonic() + timeout_s
    while True:
        try:
            serve.delete(APP)
            return
        except TimeoutError:
            if time.monotonic() > latest:
                raise


def problem() -> str | None:
    """Why the service is no more; None as long as it works, or mends itself."""
    try:
        there = serve.status().applications.get(APP)
    except (RayServeException, RayError) as error:
        return f"the cluster does not answer ({reason(error)})"
    if there is None or there.status in ENDED:
        return "it was ended from outside" if there is None else f"{there.status}: {there.message}"
    return None


def end(there: Cluster, timeout_s: float) -> None:
    """Answers under way are finished first, which takes up to timeout_s. What was started here goes
    with this process.
    """
    if not ray.is_initialized():
        return
    try:
        _delete(timeout_s)
        if not there.embedded:
            # Serve's controller ends itself, which Ray tells every driver as a failed task.
            with redirect_stdout(io.StringIO()):
                serve.shutdown()
                ray.shutdown()
    except (RayServeException, RayError, TimeoutError) as error:
        print(f"the cluster does not answer ({reason(error)})", file=sys.stderr, flush=True)
