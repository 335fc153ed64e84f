"""User errors of the orchestration; see `model.errors.UserError` for the contract."""

from __future__ import annotations

from model.errors import CheckpointError, ConfigError, DataError, DivergedError, UserError, nearest


class StorageError(UserError):
    """A place that cannot be read or written."""


class TrackingError(UserError):
    """A tracking server or database that does not answer as it should."""


class ClusterError(UserError):
    """A Ray cluster that is not there or lacks what was asked for."""


class GaveUpError(Exception):
    """A training that failed more often than it may. cause: the last failure."""

    def __init__(self, failures: int, cause: BaseException) -> None:
        self.failures, self.cause = failures, cause
        super().__init__(f"gave up after {failures} failure(s)")


__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "GaveUpError",
    "StorageError",
    "TrackingError",
    "UserError",
    "nearest",
]
