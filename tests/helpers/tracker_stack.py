"""The tracker's pods as processes of this machine, from their manifests: commands, flags and settings.

Changed is only what a cluster brings: addresses of Services, mounted folders and secrets.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from helpers import environment, free_ports
from helpers.manifests import K8S, Doc, find, pods_of
from helpers.postgres import Postgres

SCRIPTS = K8S / "base" / "platform" / "scripts"
START_S = 240.0


class Service:
    """What the name of a Service stands for in a cluster: its pods, one after the other.

    Clients reach it as their HTTP proxy, so that they use the name that the manifests say.
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.taken = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        """One request: a proxy's target is a whole URL, a server's is a path."""
        self.taken += 1
        port = self.ports[self.taken % len(self.ports)]
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", port)) as server:
            text = b""
            while b"\r\n\r\n" not in text:
                text += client.recv(65536)
            head, _, body = text.partition(b"\r\n\r\n")
            head = re.sub(rb"^(\w+) http://[^/ ]+", rb"\1 ", head)
            head = re.sub(rb"(?mi)^connection:.*\r\n", b"", head)
            server.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
            threading.Thread(target=self._copy, args=(client, server), daemon=True).start()
            self._copy(server, client)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)

    def close(self) -> None:
        self.listener.close()


@dataclass
class Stack:
    """What Services and Secrets are here. replicas: ports of the servers."""

    docs: list[Doc]
    secrets: dict[str, dict[str, str]]
    folder: Path
    postgres: Postgres
    s3: str
    service: Service = field(default_factory=Service)
    replicas: list[int] = field(default_factory=list)
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def container(self, kind: str, name: str, container: str) -> Doc:
        (pod,) = pods_of(find(self.docs, kind, name))
        (found,) = [one for one in pod.containers() if one["name"] == container]
        return found

    def environment_of(self, container: Doc, where: Path) -> dict[str, str]:
        """As kubelet makes it, with the cluster's addresses and folders replaced by those here."""
        values: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            if "configMapRef" in source:
                values |= find(self.docs, "ConfigMap", source["configMapRef"]["name"])["data"]
            else:
                values |= self.secrets[source["secretRef"]["name"]]
        values |= {"POSTGRES_HOST": "127.0.0.1", "MLFLOW_AUTH_CONFIG_PATH": str(where / "auth.ini")}
        for env in container.get("env", ()):
            if "value" in env:
                value = re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], env["value"])
                values[env["name"]] = value.replace(":5432/", f":{self.postgres.port}/")
            else:
                ref = env["valueFrom"]["secretKeyRef"]
                values[env["name"]] = self.secrets[ref["name"]][ref["key"]]
        if "AWS_ENDPOINT_URL" in values:
            values["AWS_ENDPOINT_URL"] = self.s3
        return values | {
            "HOME": str(where), "http_proxy": self.service.url, "no_proxy": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def command(self, container: Doc, env: dict[str, str]) -> list[str]:
        words = [*container.get("command", ()), *container.get("args", ())]
        words = [re.sub(r"\$\((\w+)\)", lambda m: env[m[1]], word) for word in words]
        words = [
            str(SCRIPTS / w.removeprefix("/scripts/")) if "/scripts/" in w else w for w in words
        ]
        if words[0] == "python":
            return [sys.executable, *words[1:]]
        return [str(Path(sys.executable).with_name(words[0])), *words[1:]]

    def run(
        self, kind: str, name: str, container: str, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """A container to its end."""
        spec = self.container(kind, name, container)
        env = self.environment_of(spec, self.folder) | changes
        return subprocess.run(
            self.command(spec, env), env=environment(**env), cwd=self.folder,
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def launch(self) -> int:
        """A replica, without waiting for it: its init container first, as kubelet does. Returns its port."""
        (port,) = free_ports(1)
        where = self.folder / f"replica-{port}"
        where.mkdir()
        wait = self.container("Deployment", "mlflow", "wait-for-schema")
        env = self.environment_of(wait, where)
        prepared = subprocess.run(
            self.command(wait, env),
            env=environment(**env),
            cwd=where,
            capture_output=True,
            text=True,
        )
        assert prepared.returncode == 0, prepared.stderr
        spec = self.container("Deployment", "mlflow", "mlflow")
        env = self.environment_of(spec, where)
        words = self.command(spec, env)
        assert {"--host=0.0.0.0", "--port=5000"} <= set(words)
        here = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={port}"}
        with (where / "log.txt").open("wb") as log:
            self.processes[port] = subprocess.Popen(
                [here.get(word, word) for word in words], env=environment(**env), cwd=where,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.replicas.append(port)
        self.service.ports.append(port)
        return port

    def wait_for(self, port: int) -> None:
        end = time.monotonic() + START_S
        log = self.folder / f"replica-{port}" / "log.txt"
        while not self.ready(port):
            assert self.processes[port].poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)

    def ready(self, port: int) -> bool:
        """What the readiness probe finds."""
        spec = self.container("Deployment", "mlflow", "mlflow")
        probe = spec["readinessProbe"]
        words = self.command({"command": probe["exec"]["command"]}, {})
        words = [f"--port={port}" if word == "--port=5000" else word for word in words]
        env = self.environment_of(spec, self.folder)
        try:
            done = subprocess.run(
                words, env=environment(**env), capture_output=True, timeout=probe["timeoutSeconds"]
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def stop(self) -> None:
        self.service.close()
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


def ask(
    port: int, path: str, *, user: str = "", password: str = "", host: str = "mlflow:5000",
    method: str = "GET", origin: str = "",
) -> int:  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    headers = {"Host": host}
    if user:
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        headers["Authorization"] = f"Basic {token}"
    if origin:
        headers["Origin"] = origin
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()
