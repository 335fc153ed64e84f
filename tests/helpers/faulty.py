"""A server that fails on demand: a proxy in front of a real one, with S3's words for its errors."""

from __future__ import annotations

import http.client
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlparse

ERRORS = {
    500: "InternalError",
    503: "ServiceUnavailable",
    # The same status as above, but another code: what S3 says when it wants fewer requests.
    -503: "SlowDown",
}


class FaultyProxy:
    """A proxy on 127.0.0.1 in front of `endpoint`.

    share: of requests that get an error, drawn from `seed`. hang_s: seconds before each answer.
    away: connections are closed without an answer. part_s: seconds before each part of a multipart
    upload. Each may be set while it runs.
    """

    def __init__(self, endpoint: str, seed: int = 0) -> None:
        self.share, self.hang_s, self.part_s, self.away = 0.0, 0.0, 0.0, False
        self.seen: list[str] = []
        self.failed = 0
        target = urlparse(endpoint)
        draw, lock, faults = random.Random(seed), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                return

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    faults.seen.append(f"{self.command} {self.path}")
                    unlucky = draw.random() < faults.share
                    code = draw.choice(list(ERRORS))
                    faults.failed += unlucky
                if faults.away:
                    self.close_connection = True
                    self.connection.close()
                    return
                time.sleep(faults.hang_s)
                if "partNumber=" in self.path:
                    time.sleep(faults.part_s)
                if unlucky:
                    text = f"<Error><Code>{ERRORS[code]}</Code><Message>try again</Message></Error>"
                    self.answer(abs(code), {"Content-Type": "application/xml"}, text.encode())
                    return
                upstream = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
                try:
                    upstream.request(self.command, self.path, body or None, headers)
                    answer = upstream.getresponse()
                    data = answer.read()
                except OSError:  # killed, or it hangs: the client sees a connection that breaks
                    self.close_connection = True
                    return
                kept = {
                    key: value
                    for key, value in answer.getheaders()
                    if key.lower() not in ("connection", "transfer-encoding", "date", "server")
                }
                upstream.close()
                self.answer(answer.status, kept, data)

            def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
                try:
                    self.send_response(status)
                    for key, value in headers.items():
                        if key.lower() != "content-length" or self.command == "HEAD":
                            self.send_header(key, value)
                    if self.command != "HEAD":
                        self.send_header("Content-Length", str(len(data)))
                    elif "content-length" not in {key.lower() for key in headers}:
                        self.send_header("Content-Length", "0")
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(data)
                except OSError:  # the client did not wait
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = pass_on

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
