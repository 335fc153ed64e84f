"""The commands that the documents show, and how a test tries each."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from helpers import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "k8s" / "README.md")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"jobs/(\w+)\.py")


@dataclass(frozen=True)
class Command:
    """text: one line of a shell, continuations joined, without its comment."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def script(self) -> str | None:
        """Name of the job that it starts."""
        found = [match[1] for word in self.words if (match := SCRIPT.fullmatch(word))]
        return found[0] if found else None

    @property
    def arguments(self) -> list[str]:
        """Of that job."""
        words = self.words
        return words[words.index(f"jobs/{self.script}.py") + 1 :]

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def commands() -> list[Command]:
    """Of all pages, each once a page."""
    found: dict[Command, None] = {}
    for path in PAGES:
        page = path.relative_to(ROOT).as_posix()
        for block in BLOCK.findall(path.read_text()):
            for line in shell_lines(block):
                found[Command(page, line)] = None
    return list(found)


def shell_lines(block: str) -> Iterator[str]:
    """Whole commands: a line goes on after a backslash, and while a quote is open."""
    waiting = ""
    for line in block.replace("\\\n", " ").splitlines():
        waiting = f"{waiting}\n{line}" if waiting else line
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # a quote is open
            continue
        if words:
            yield _without_comment(waiting).strip()
        waiting = ""
    assert not waiting, f"a quote is never closed: {waiting}"


def _without_comment(line: str) -> str:
    """What a shell would run; a # within quotes is no comment."""
    for match in re.finditer(r"(?:^|\s)#", line):
        try:
            shlex.split(line[: match.start()])
        except ValueError:
            continue
        return line[: match.start()]
    return line


def parse_only(
    script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any]:
    """What the real script's own parser makes of the arguments; nothing is run."""
    from orchestrator.launch import entry

    seen: list[tuple[Any, Any]] = []

    def parse_and_stop(parse: Callable[[], tuple[Any, Any]], run: object) -> int:
        seen.append(parse())
        return 0

    path = ROOT / "jobs" / f"{script}.py"
    monkeypatch.setattr(entry, "run_job", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        exec(_without_running(path), {"__name__": "__main__", "__doc__": "of the job"})
    assert ended.value.code == 0
    (parsed,) = seen
    return parsed


def _without_running(path: Path) -> CodeType:
    """The script, but that what it would run is not imported: that takes seconds and is never called."""
    tree = ast.parse(path.read_text(), str(path))
    for place, node in enumerate(tree.body):
        if isinstance(node, ast.ImportFrom) and node.module != "orchestrator.launch.entry":
            names = [alias.asname or alias.name for alias in node.names]
            if all(name.startswith("run_") for name in names):
                tree.body[place] = ast.parse(" = ".join([*names, "None"])).body[0]
    return compile(tree, str(path), "exec")


def stand_in(folder: Path) -> Path:
    """A folder to type the commands in: what a clone has, and nothing that they write."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("jobs", "model", "orchestrator", "k8s", "docs", "Makefile", ".rayignore"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    winner = folder / "runs" / "sweeps" / "smoke" / "winner.yaml"
    winner.parent.mkdir(parents=True)
    winner.write_text((ROOT / "jobs" / "configs" / "shapes.yaml").read_text())
    return folder
