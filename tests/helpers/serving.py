"""jobs/serve.py in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from helpers import command, descendants, environment, free_ports

START_S = 240.0


class PredictionServer:
    """On 127.0.0.1, with a Ray of its own. Its output is in `log`."""

    def __init__(
        self, model: str, log: Path, *arguments: str, cwd: Path | None = None, **env: str
    ) -> None:
        (self.port,) = free_ports(1)
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        self.asked = [model, "--port", str(self.port), "--replicas", "1", *arguments, "--json"]
        self.env, self.cwd = env, cwd or log.parent
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PredictionServer:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command(*self.asked, job="serve.py"), cwd=self.cwd, start_new_session=True,
                env=environment(OMP_NUM_THREADS="1", **self.env), stdout=log, stderr=log,
            )  # fmt: skip
        end = time.monotonic() + START_S
        while "ready: " not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, f"not ready in {START_S} s: {self.text()}"
            time.sleep(0.2)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def text(self) -> str:
        return self.log.read_text()

    def below(self, part: str) -> list[int]:
        """Processes of the server whose command line has `part`."""
        assert self.process is not None
        return [pid for pid, line in descendants(self.process.pid) if part in line]

    def ask(
        self, path: str, body: bytes | None = None, timeout_s: float = 60, **headers: str
    ) -> tuple[int, Any]:
        """Status and what the json says."""
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, given)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)
