"""A real MLflow server that can be killed, stopped in its tracks and started again."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from helpers import environment, free_ports

START_S = 240.0


class MlflowServer:
    """On 127.0.0.1 with a sqlite database in `folder`; the same port and data after each start."""

    def __init__(
        self, folder: Path, *arguments: str, scheme: str = "http", workers: int = 1, **env: str
    ) -> None:
        (self.port,) = free_ports(1)
        self.folder, self.scheme, self.arguments, self.env = folder, scheme, arguments, env
        self.workers = workers
        self.uri = f"{scheme}://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1",
                    "--port", str(self.port), "--workers", str(self.workers),
                    "--backend-store-uri", f"sqlite:///{self.folder}/m.db", *self._artifacts(),
                    *self.arguments,
                ],
                env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **self.env),
                cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + START_S
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < end, "mlflow server did not come up"
            time.sleep(0.5)

    def answers(self) -> bool:
        trusting = ssl._create_unverified_context() if self.scheme == "https" else None
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5, context=trusting).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(30)

    def signal(self, number: int) -> None:
        """To the server and its workers."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def __enter__(self) -> MlflowServer:
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

    def _artifacts(self) -> Sequence[str]:
        if any(argument.endswith(("-root", "-destination")) for argument in self.arguments):
            return ()
        return ("--artifacts-destination", str(self.folder / "artifacts"))
