"""The reference: a page for each folder, from the docstrings of what its modules make public."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("model", "orchestrator")


def modules(package: str) -> list[str]:
    """Dotted names of all that has something public."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py" and public(ast.parse(path.read_text())):
            found.append(name)
    return found


def public(tree: ast.Module) -> list[tuple[str, str]]:
    """(directive of autodoc, name) of each public class and function, in the order of the file."""
    kinds = {ast.ClassDef: "autoclass", ast.FunctionDef: "autofunction"}
    return [
        (kinds[type(node)], node.name)
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]


def type_variables() -> list[str]:
    """Dotted names of them: they stand in signatures, and have no entry that could be linked."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.Assign) and "TypeVar(" in ast.unparse(node.value):
                    found += [f"{module}.{ast.unparse(target)}" for target in node.targets]
    return found


def pages() -> dict[str, str]:
    """Name of the page -> reStructuredText: one for each folder, its modules one after another."""
    folders: dict[str, list[str]] = {}
    for package in PACKAGES:
        for name in modules(package):
            folders.setdefault(name.rpartition(".")[0], []).append(name)
    found = {folder: _folder_page(folder, names) for folder, names in sorted(folders.items())}
    entries = "\n".join(f"   {folder}" for folder in found)
    found["index"] = (
        f"{_title('Reference', '=')}\nWhat the packages make public, from their docstrings. "
        f"The walls between them are in :doc:`/architecture`.\n\n.. toctree::\n   :maxdepth: 2\n\n{entries}\n"
    )
    return found


def _folder_page(folder: str, names: list[str]) -> str:
    return "\n".join([_title(folder, "="), *(_module(name) for name in names)])


def _module(name: str) -> str:
    path = ROOT / (name.replace(".", "/") + ".py")
    parts = [_title(name, "-"), f".. automodule:: {name}\n   :no-members:\n"]
    tree = ast.parse(path.read_text())
    fields = {node.name: _fields(node) for node in tree.body if isinstance(node, ast.ClassDef)}
    for directive, thing in public(tree):
        options = ""
        if directive == "autoclass":
            options = "   :members:\n   :undoc-members:\n"
            if fields[thing]:
                options += f"   :exclude-members: {', '.join(fields[thing])}\n"
        parts.append(f".. {directive}:: {name}.{thing}\n{options}")
    return "\n".join(parts)


def _fields(node: ast.ClassDef) -> list[str]:
    """Those without a text of their own: the signature and the class's docstring have them already."""
    found = []
    for one, following in zip(node.body, [*node.body[1:], None], strict=True):
        told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not told:
            found.append(one.target.id)
    return found


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"
