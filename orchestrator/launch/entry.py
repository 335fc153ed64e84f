"""What all jobs share: one line for a user's mistake, one json line for a machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

from orchestrator.errors import UserError

Config = TypeVar("Config")


class WithJson(Protocol):
    @property
    def json(self) -> bool: ...


Options = TypeVar("Options", bound=WithJson)

USER_ERROR, INTERRUPTED = 2, 130


class Result(Protocol):
    """Exit code and what --json prints; an empty report (of a rank that follows) is not printed."""

    @property
    def code(self) -> int: ...

    @property
    def report(self) -> dict[str, object]: ...


def run_job(
    parse: Callable[[], tuple[Config, Options]], run: Callable[[Config, Options], Result]
) -> int:
    """Exit code: 0 done, 1 failed, 2 a mistake in what was asked (one line says which)."""
    wants_json = "--json" in sys.argv
    try:
        config, options = parse()
        result = run(config, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if wants_json:
            print(json.dumps({"status": "refused", "error": str(error)}))
        return USER_ERROR
    except KeyboardInterrupt:  # once more, or before there was anything to save
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
    sys.stdout.flush()
    if options.json and result.report:
        print(json.dumps(result.report), flush=True)
    return result.code
