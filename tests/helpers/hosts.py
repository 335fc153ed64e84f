"""Several hosts on one machine: network, process and mount namespaces, each with a raylet of its own.

They hang on a bridge in a namespace of its own, so that a cable can be pulled. Nothing of it is
visible from the machine's own network, and killing a host's first process takes all others along.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from helpers import ROOT, environment

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379


def why_not() -> str | None:
    """Why namespaces cannot be made here, None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    name = f"effdet-{uuid.uuid4().hex[:6]}"
    made = _run("ip", "netns", "add", name)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    try:
        for kind in (("bridge",), ("veth", "peer", "name", "peer0")):
            linked = _run("ip", "-n", name, "link", "add", "test0" + kind[0], "type", *kind)
            if linked.returncode:
                return f"no {kind[0]} can be made: {linked.stderr.strip()}"
        spaces = ("--pid", "--fork", "--mount-proc", "--mount", "--uts")
        made = _run("ip", "netns", "exec", name, "unshare", *spaces, "true")
        return f"no namespaces can be made: {made.stderr.strip()}" if made.returncode else None
    finally:
        _run("ip", "netns", "delete", name)


@dataclass
class Host:
    """number: also the last part of its address; the first one is the head."""

    network: Network
    number: int
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def init(self) -> int:
        """The host's process 1, as this machine numbers it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.init), "-n", "-p", "-m", "-u", *command]

    def link(self, state: str) -> None:
        """up or down"""
        self.network.ip("link", "set", f"port{self.number}", state)

    def kill(self) -> None:
        """As if its power failed."""
        os.kill(self.init, signal.SIGKILL)
        self.process.wait()


@dataclass
class Network:
    """folder: for what the hosts write. settings: environment of all raylets and drivers."""

    folder: Path
    name: str
    settings: dict[str, str]
    hosts: list[Host] = field(default_factory=list)

    def ip(self, *arguments: str) -> None:
        done = _run("ip", "-n", self.name, *arguments)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"

    @property
    def head(self) -> Host:
        return self.hosts[0]

    def add(self, cpus: int = 1) -> Host:
        """A host with a raylet; returns when the cluster counts it."""
        number = len(self.hosts) + 1
        own, port = f"{self.name}-{number}", f"port{number}"
        address = f"10.77.0.{number}"
        _check("ip", "netns", "add", own)
        self.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", own)
        self.ip("link", "set", port, "master", "br0")
        self.ip("link", "set", port, "up")
        for arguments in (
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _check("ip", "-n", own, *arguments)
        private = self.folder / f"host{number}"
        (private / "ray").mkdir(parents=True)
        (private / "hosts").write_text(f"127.0.0.1 localhost\n{address} {own}\n")
        where = (
            ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1"]
            if number == 1
            else [f"--address=10.77.0.1:{PORT}"]
        )
        start = [
            RAY, "start", "--block", f"--node-ip-address={address}", f"--num-cpus={cpus}",
            "--disable-usage-stats", *where,
        ]  # fmt: skip
        script = (
            f"mkdir -p /tmp/ray && mount --bind {private}/ray /tmp/ray && "
            f"mount --bind {private}/hosts /etc/hosts && hostname {own} && "
            f"exec {' '.join(start)} > {private}/raylet.log 2>&1"
        )
        process = subprocess.Popen(
            [
                "ip", "netns", "exec", own, "unshare", "--pid", "--fork", "--mount-proc",
                "--mount", "--uts", "--kill-child", "bash", "-c", script,
            ],
            env=self.environment(), cwd=self.folder, start_new_session=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        host = Host(self, number, process)
        self.hosts.append(host)
        self._wait_for(host)
        return host

    def environment(self) -> dict[str, str]:
        return environment(
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a-token-of-the-tests-0123456789",
            GLOO_SOCKET_IFNAME="eth0", RAY_DISABLE_IMPORT_WARNING="1", **self.settings,
        )  # fmt: skip

    def driver(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """A process on the head that finds the cluster."""
        env = self.environment() | {"RAY_ADDRESS": f"{self.head.address}:{PORT}"}
        with log.open("ab") as file:
            return subprocess.Popen(
                self.head.enter(*command), env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
            )

    def drain(self, host: Host, *, deadline_s: int) -> None:
        """What the platform does that takes a spot node away: tell Ray, then wait."""
        code = f"""
import time, ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
ray.init(logging_level='ERROR', log_to_driver=False)
(node,) = [n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == {host.address!r}]
client = GcsClient(address={f"{self.head.address}:{PORT}"!r})
reason = DrainNodeReason.Value('DRAIN_NODE_REASON_PREEMPTION')
print(client.drain_node(node, reason, 'spot', int((time.time() + {deadline_s}) * 1000)))
"""
        done = subprocess.run(
            self.head.enter(sys.executable, "-c", code),
            env=self.environment() | {"RAY_ADDRESS": f"{self.head.address}:{PORT}"},
            capture_output=True, text=True, cwd=self.folder, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "True" in done.stdout, done.stdout

    def _wait_for(self, host: Host) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            log = self.folder / f"host{host.number}" / "raylet.log"
            if log.exists() and "Ray runtime started" in log.read_text():
                return
            assert host.process.poll() is None, log.read_text() if log.exists() else "no log"
            time.sleep(0.2)
        raise TimeoutError(f"host {host.number} did not come up")


@contextmanager
def network(folder: Path, **settings: str) -> Iterator[Network]:
    """No hosts yet. All of them, and the namespaces, are gone afterwards."""
    made = Network(folder, f"effdet-{uuid.uuid4().hex[:6]}", settings)
    _check("ip", "netns", "add", made.name)
    try:
        made.ip("link", "add", "br0", "type", "bridge")
        made.ip("link", "set", "br0", "up")
        yield made
    finally:
        for host in made.hosts:
            if host.process.poll() is None:
                host.kill()
            _run("ip", "netns", "delete", f"{made.name}-{host.number}")
        _run("ip", "netns", "delete", made.name)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _check(*command: str) -> None:
    done = _run(*command)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
