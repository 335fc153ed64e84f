"""A page for each job: what its --help prints."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = "92"  # what fits beside the site's menu


def jobs() -> list[Path]:
    """The scripts a user starts."""
    scripts = (ROOT / "jobs").glob("*.py")
    return sorted(path for path in scripts if path.stem != "bootstrap")


def help_text(script: Path) -> str:
    """What `python jobs/NAME.py --help` prints, without a process: the imports are those of the others."""
    out = io.StringIO()
    before, argv, columns = list(sys.path), sys.argv, os.environ.get("COLUMNS")
    sys.path.insert(0, str(script.parent))
    sys.argv, os.environ["COLUMNS"] = [str(script), "--help"], COLUMNS
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.path[:], sys.argv = before, argv
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return out.getvalue().strip()


def summary(script: Path) -> str:
    """First line of its docstring."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").splitlines()[0]


def pages() -> dict[str, str]:
    """Name of the page -> Markdown. index lists the others."""
    scripts = jobs()
    found = {
        path.stem: f"# jobs/{path.name}\n\n```text\n{help_text(path)}\n```\n" for path in scripts
    }
    rows = "\n".join(f"| [](./{path.stem}.md) | {summary(path)} |" for path in scripts)
    listed = "\n".join(path.stem for path in scripts)
    found["index"] = (
        "# Commands\n\nWhat `python jobs/NAME.py --help` prints. Every job ends with exit code 0 when "
        "it is done, 1 when it failed, 2 after a mistake in what was asked (one line says which: "
        "[](../../troubleshooting.md)), 130 after Ctrl-C. `--json` makes its last line one json object.\n\n"
        f"| job | |\n|---|---|\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"
    )
    return found
