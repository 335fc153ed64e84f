"""Bring the tracker's database up to date, or wait until somebody has.

    python mlflow_prepare.py migrate    tables of tracker and passwords, both users
    python mlflow_prepare.py wait       for a server: its settings, then the schema it needs

Everything comes from the environment. Passwords in the database become those of the Secrets, so changing
one is: change the Secret, run `migrate` again.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 900.0
MIGRATIONS = (
    ("store/db_migrations", "alembic_version"),
    ("server/auth/db/migrations", "alembic_version_auth"),
)  # folder in MLflow's package, table with the revision that is there


def write_settings() -> None:
    """MLflow's server reads the database of passwords from a file only."""
    path = Path(os.environ["MLFLOW_AUTH_CONFIG_PATH"])
    uri = os.environ["MLFLOW_BACKEND_STORE_URI"].replace("%", "%%")
    path.write_text(
        "[mlflow]\n"
        f"default_permission = {os.environ['EFFDET_DEFAULT_PERMISSION']}\n"
        f"database_uri = {uri}\n"
        f"auth_cache_ttl_seconds = {os.environ['EFFDET_AUTH_CACHE_SECONDS']}\n"
    )
    path.chmod(0o600)


def migrate() -> None:
    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    _reach(uri)
    if not _schemas_are_current(uri)[0]:
        from mlflow.db import (
            upgrade,
        )  # `mlflow db upgrade`, without the password among its arguments

        assert upgrade.callback is not None
        upgrade.callback(uri)
    store = _users(uri)
    _ensure(
        store, os.environ["MLFLOW_AUTH_ADMIN_USERNAME"], os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"],
        is_admin=True,
    )  # fmt: skip
    _ensure(
        store, os.environ["EFFDET_TRAINING_USERNAME"], os.environ["EFFDET_TRAINING_PASSWORD"],
        is_admin=False,
    )  # fmt: skip
    print("the database is up to date", flush=True)


def wait(patience_s: float = PATIENCE_S) -> None:
    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    end = time.monotonic() + patience_s
    while not _ready(uri):
        if time.monotonic() > end:
            raise SystemExit("the database was not migrated: look at the Job mlflow-migrate")
        time.sleep(2)
    print("the database is up to date", flush=True)


def _reach(uri: str, patience_s: float = PATIENCE_S) -> None:
    """Wait for a server that answers: this Job starts beside Postgres."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    end = time.monotonic() + patience_s
    while True:
        try:
            engine.connect().close()
            return
        except sqlalchemy.exc.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(2)


def _schemas_are_current(uri: str) -> tuple[bool, bool]:
    """Of the tracker and of its passwords."""
    import sqlalchemy
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    # Found without importing it, which takes seconds.
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    found = []
    with sqlalchemy.create_engine(uri).connect() as connection:
        for folder, table in MIGRATIONS:
            wanted = ScriptDirectory(str(package / folder)).get_current_head()
            context = MigrationContext.configure(connection, opts={"version_table": table})
            found.append(context.get_current_revision() == wanted)
    return found[0], found[1]


def _ready(uri: str) -> bool:
    import sqlalchemy

    try:
        if not all(_schemas_are_current(uri)):
            return False
        with sqlalchemy.create_engine(uri).connect() as connection:
            admin = {"name": os.environ["MLFLOW_AUTH_ADMIN_USERNAME"]}
            query = sqlalchemy.text("SELECT 1 FROM users WHERE username = :name")
            return connection.execute(query, admin).first() is not None
    except sqlalchemy.exc.SQLAlchemyError:  # not there yet
        return False


def _users(uri: str) -> Any:
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store: Any = SqlAlchemyStore()
    store.init_db(uri)  # brings its tables up to date
    return store


def _ensure(store: Any, name: str, password: str, *, is_admin: bool) -> None:
    if not store.has_user(name):
        store.create_user(name, password, is_admin=is_admin)
    elif not store.authenticate_user(name, password):
        store.update_user(name, password=password)


def main() -> None:
    task = {"migrate": migrate, "wait": wait}[sys.argv[1]]
    write_settings()
    task()


if __name__ == "__main__":
    main()
