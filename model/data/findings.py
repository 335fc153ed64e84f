"""What was found in a dataset: how bad, how often, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """An error stops a training or makes it worthless; a warning costs accuracy; a note is to know.

    kind: a short name for machines; where: the split or thing it is about; what: without the count;
    examples: up to three.
    """

    severity: Severity
    kind: str
    where: str
    what: str
    count: int
    examples: tuple[str, ...] = ()
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def finding(
    severity: Severity,
    kind: str,
    where: str,
    what: str,
    found: Sequence[str] | int,
    remedy: str,
    examples: Iterable[str] = (),
) -> list[Finding]:
    """A list of one, or none where nothing was found. found: all examples, or their number."""
    if isinstance(found, int):
        count, shown = found, tuple(examples)[:EXAMPLES]
    else:
        count, shown = len(found), tuple(found[:EXAMPLES])
    return [Finding(severity, kind, where, what, count, shown, remedy)] if count else []


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda one: SEVERITIES.index(one.severity))


def has_errors(findings: Iterable[Finding]) -> bool:
    return any(one.severity == "error" for one in findings)
