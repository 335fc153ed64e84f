"""Every one-line error of the program, read from its sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("ConfigError", "DataError", "CheckpointError", "StorageError", "TrackingError", "ClusterError")  # fmt: skip
ANYTHING = "…"


@dataclass(frozen=True)
class Message:
    """parts: where, expected, got and remedy; what is filled in later is an ellipsis."""

    kind: str
    file: str
    parts: tuple[str, str, str, str]

    @property
    def asked(self) -> str:
        """What troubleshooting knows it by."""
        return f"{self.parts[0]}: expected {self.parts[1]}"

    def __str__(self) -> str:
        return f"{self.asked}, got {self.parts[2]}; {self.parts[3]}"


def messages() -> list[Message]:
    """In the order of the files, each once."""
    found: dict[Message, None] = {}
    for package in ("model", "orchestrator"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            constants = _constants(tree)
            for call in ast.walk(tree):
                if isinstance(call, ast.Call) and (kind := _kind(call)) is not None:
                    parts = tuple(_shape(arg, constants) for arg in call.args[:4])
                    parts += ("", "", "", "see --help")[len(parts) :]
                    if len(call.args) >= 3 and re.search(r"\w", parts[0] + parts[1]):
                        where = path.relative_to(ROOT).as_posix()
                        found[Message(kind, where, parts)] = None  # type: ignore[arg-type]
    return list(found)


def page() -> str:
    """Markdown: the messages by the part of the program that says them."""
    lines = [
        "# Every message\n\nAll one-line errors, as the sources have them; … is filled in when it is "
        "said. [](../troubleshooting.md) explains them.\n"
    ]
    for file, found in _by_file(messages()):
        lines.append(f"## {file}\n\n```text")
        lines += [str(message) for message in found]
        lines.append("```\n")
    return "\n".join(lines)


def _by_file(every: list[Message]) -> Iterator[tuple[str, list[Message]]]:
    for file in dict.fromkeys(message.file for message in every):
        yield file, [message for message in every if message.file == file]


def _kind(call: ast.Call) -> str | None:
    name = call.func.id if isinstance(call.func, ast.Name) else None
    return name if name in KINDS else None


def _constants(tree: ast.Module) -> dict[str, str]:
    """Texts that a module gives a name."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def _shape(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    if isinstance(node, ast.JoinedStr):
        shown = "".join(_shape(value, constants) for value in node.values)
        while ANYTHING * 2 in shown:
            shown = shown.replace(ANYTHING * 2, ANYTHING)
        return shown
    if isinstance(node, ast.FormattedValue):
        return _shape(node.value, constants)
    return ANYTHING
