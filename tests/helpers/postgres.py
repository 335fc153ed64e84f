"""A real Postgres on 127.0.0.1 that can be killed and started again."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from helpers import free_ports

START_S = 60.0


def binaries() -> Path:
    """Folder of initdb and postgres; skips the test where there is none."""
    named = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: p.parts[-3])
    if named is None and not found:
        pytest.skip("Postgres is not installed (Debian: postgresql)")
    folder = Path(named).resolve().parent if named else found[-1].parent
    if not (folder / "postgres").exists():
        pytest.skip(f"{folder} has no postgres")
    return folder


class Postgres:
    """One database, owned by one user with a password, as the container's image sets it up."""

    def __init__(self, user: str, password: str, database: str, arguments: list[str]) -> None:
        self.bin, self.arguments = binaries(), arguments
        self.user, self.password, self.database = user, password, database
        (self.port,) = free_ports(1)
        # Postgres refuses to run as root, and who it runs as must reach its folder.
        self.folder = Path(tempfile.mkdtemp(prefix="effdet-postgres-"))
        self.account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self.account:
            os.chown(self.folder, self.account.pw_uid, self.account.pw_gid)
        self.process: subprocess.Popen[bytes] | None = None

    def _run(self, *command: str, stdin: str = "") -> None:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, cwd=self.folder, **self._who()
        )
        assert done.returncode == 0, done.stderr

    def _who(self) -> dict[str, Any]:
        if self.account is None:
            return {}
        return {"user": self.account.pw_uid, "group": self.account.pw_gid}

    def create(self) -> None:
        data, secret = str(self.folder / "data"), self.folder / "password"
        secret.write_text(f"{self.password}\n")
        if self.account:
            os.chown(secret, self.account.pw_uid, self.account.pw_gid)
        self._run(
            str(self.bin / "initdb"), f"--pgdata={data}", f"--username={self.user}", f"--pwfile={secret}",
            "--auth-host=scram-sha-256", "--data-checksums", "--no-sync",
        )  # fmt: skip
        self._run(
            str(self.bin / "postgres"), "--single", "-D", data, "postgres",
            stdin=f"CREATE DATABASE {self.database}\n",
        )  # fmt: skip
        secret.unlink()

    def start(self) -> None:
        log = (self.folder / "log.txt").open("ab")
        self.process = subprocess.Popen(
            [
                str(self.bin / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port),
                "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}",
                *self.arguments,
            ],
            stdout=log, stderr=log, cwd=self.folder, start_new_session=True, **self._who(),
        )  # fmt: skip
        log.close()
        end = time.monotonic() + START_S
        check = [str(self.bin / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        while subprocess.run(check).returncode:
            assert self.process.poll() is None, (self.folder / "log.txt").read_text()[-2000:]
            assert time.monotonic() < end, "Postgres did not come up"
            time.sleep(0.2)

    def kill(self) -> None:
        """The server and all that serve a connection, as a node does that loses its power."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def __enter__(self) -> Postgres:
        self.create()
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
