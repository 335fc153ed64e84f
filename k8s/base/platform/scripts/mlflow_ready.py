"""Readiness of a tracker: its API answers from the database. /health would say yes without one.

A tracker without its database answers 401 too. A real 401, after a password was changed and before the
pods have it, must not take the tracker away: then the database itself is asked.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import os

TIMEOUT_S = 5.0


def status(host: str, port: int) -> int:
    user = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME", "")
    password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD", "")
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request(
            "GET", "/api/2.0/mlflow/experiments/search?max_results=1",
            headers={"Host": "localhost", "Authorization": f"Basic {token}"},
        )  # fmt: skip
        return connection.getresponse().status
    finally:
        connection.close()


def database_answers() -> bool:
    import psycopg

    uri = os.environ["MLFLOW_BACKEND_STORE_URI"].replace("+psycopg", "", 1)
    try:
        with psycopg.connect(uri, connect_timeout=2) as connection:
            return connection.execute("SELECT 1").fetchone() is not None
    except psycopg.Error:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    given = parser.parse_args()
    try:
        code = status(given.host, given.port)
    except OSError as error:
        raise SystemExit(f"no answer: {error}") from None
    if code != 200 and not (code == 401 and database_answers()):
        raise SystemExit(f"HTTP {code}")


if __name__ == "__main__":
    main()
