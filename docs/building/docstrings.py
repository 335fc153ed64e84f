"""Docstrings here are plain English; Sphinx wants reStructuredText. From the one to the other."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

SECTION = re.compile(r"^(Raises|Attributes|Args|Returns|Yields)(?: \(.*\))?(:| )\s*(.*)$")
ENTRY = re.compile(r"^(\w[\w.]*(?:, \w+)*)(?:: (.*))?$")
CODE = re.compile(r"(`[^`]+`)")
MARKUP = re.compile(r"([\\*_|`])")
LOOKS_LIKE_MARKUP = re.compile(r"^(?:[-+*:.>=#]|\w+[.)] )")


def explained(docstring: str, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """(prose, name -> what is said of it) of one paragraph that has `name: text` or `a, b: text`.

    A name counts at the start of a line or of a sentence; its text goes on to the next one.
    """
    listed = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not listed:
        return _one_line(docstring), {}
    label = re.compile(rf"(?:^|(?<=[.;)] ))((?:{listed})(?:, (?:{listed}))*): ", re.MULTILINE)
    found = list(label.finditer(docstring))
    prose = docstring[: found[0].start()] if found else docstring
    said: dict[str, str] = {}
    ends = [*(match.start() for match in found[1:]), len(docstring)]
    for match, end in zip(found, ends, strict=False):  # no name, no end
        text = _one_line(docstring[match.end() : end]).rstrip(";")
        for name in match[1].split(", "):
            said[name] = text
    return _one_line(prose).rstrip(";"), said


def fields_explained(cls: type[Any]) -> dict[str, str]:
    """Field of a dataclass -> what its docstring, or that of a class it extends, says of it."""
    names = [field.name for field in dataclasses.fields(cls)]
    said: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if dataclasses.is_dataclass(one) and one.__doc__:
            for paragraph in inspect.cleandoc(one.__doc__).split("\n\n"):
                said |= explained(paragraph, names)[1]
    return said


def to_rst(docstring: Sequence[str], names: Iterable[str]) -> list[str]:
    """Lines of reStructuredText that show what the lines of a docstring say; names: of parameters
    and fields, of which a list is made.
    """
    names = list(names)
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(docstring).strip("\n")):
        if paragraph.strip():
            lines += [*_paragraph(paragraph, names), ""]
    return lines


def _paragraph(text: str, names: list[str]) -> list[str]:
    first, _, rest = text.partition("\n")
    section = SECTION.match(first)
    if section and (section[2] == ":" or section[1] == "Raises"):
        return [f"**{section[1]}**", "", *_entries(section[3], rest)]
    if all(line.startswith("    ") for line in text.splitlines()):
        return ["::", "", *(f"    {line}" for line in text.splitlines())]
    if all(line.startswith(("- ", "  ")) for line in text.splitlines()):
        return [f"- {escape(_one_line(item))}" for item in re.split(r"^- ", text, flags=re.M)[1:]]
    prose, said = explained(text, names)
    lines = [_safe(prose), ""] if prose else []
    for name, meaning in said.items():
        lines += [f"``{name}``", f"    {_safe(meaning) or '…'}"]
    return lines


def _entries(beside: str, below: str) -> list[str]:
    """`Name: text` of a section, each with its own meaning, or one sentence."""
    lines: list[str] = []
    if beside:
        head, colon, text = beside.partition(": ")
        lines += [f"``{head}``", f"    {_safe(text)}"] if colon else [_safe(beside)]
    entry = ""
    for line in [*inspect.cleandoc(below).splitlines(), ""] if below else []:
        if line and line[0].isspace():
            entry += " " + line.strip()
            continue
        if entry:
            lines += _entry(entry)
        entry = line
    return lines


def _entry(text: str) -> list[str]:
    match = ENTRY.match(text)
    if match is None:
        return ["", _safe(text), ""]
    if not match[2]:
        return ["", f"``{match[1]}``", ""]
    return [f"``{match[1]}``", f"    {_safe(match[2])}"]


def escape(text: str) -> str:
    """Nothing in it is markup but `code`."""
    # A backslash and a space show nothing; without them code ends only before a space or a full stop.
    return "".join(
        rf"\ ``{part[1:-1]}``\ " if CODE.fullmatch(part) else MARKUP.sub(r"\\\1", part)
        for part in CODE.split(text)
    ).strip("\\ ")


def _safe(text: str) -> str:
    shown = escape(text)
    # They also keep the first word from being a list's mark.
    return rf"\ {shown}" if LOOKS_LIKE_MARKUP.match(shown) else shown


def _one_line(text: str) -> str:
    return " ".join(text.split())


def names_of(thing: object) -> list[str]:
    """Parameters of a function, fields and parameters of a class."""
    names: list[str] = []
    if dataclasses.is_dataclass(thing):
        names += [field.name for field in dataclasses.fields(thing)]
    if inspect.isclass(thing):
        names += list(getattr(thing, "__annotations__", {}))
    if callable(thing):
        with suppress(TypeError, ValueError):  # of something built in
            names += list(inspect.signature(thing).parameters)
    return list(dict.fromkeys(names))


def on_docstring(
    app: object, kind: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """For autodoc's event: replaces the lines in their place."""
    lines[:] = to_rst(lines, names_of(thing))
