"""Where a run's code came from and what it ran on."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "timm", "ray", "mlflow", "numpy")
COMMIT, IMAGE = "EFFDET_COMMIT", "EFFDET_IMAGE"
LONGEST_DIFF = 1_000_000  # characters
# Files that are made to hold secrets; their changes are nobody's business.
PRIVATE = (":(exclude,icase)*.env*", ":(exclude,icase)*.pem", ":(exclude,icase)*secret*")


@dataclass(frozen=True)
class Provenance:
    """tags; packages: name==version lines; diff: of what is not committed, "" where nothing is."""

    tags: dict[str, str]
    packages: str
    diff: str


def provenance(root: Path) -> Provenance:
    """Of the code in `root`, this Python and this machine.

    An image without a repository says what it holds in EFFDET_COMMIT, and its own name in EFFDET_IMAGE.
    """
    tags = {
        "python": platform.python_version(),
        "mlflow.source.name": "jobs/" + Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
    }
    for package in PACKAGES:
        try:
            tags[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    here = _git(root, "rev-parse", "HEAD").strip()
    commit, diff = here or os.environ.get(COMMIT, ""), ""
    if commit:
        tags["mlflow.source.git.commit"] = commit
    if here:
        shown = ("--no-ext-diff", "--no-color", "--binary")
        diff = _git(root, "diff", *shown, "HEAD", "--", ".", *PRIVATE)[:LONGEST_DIFF]
        tags["git.dirty"] = str(bool(_git(root, "status", "--porcelain").strip())).lower()
    if IMAGE in os.environ:
        tags["image"] = os.environ[IMAGE]
    packages = sorted(f"{found.name}=={found.version}" for found in distributions())
    return Provenance(tags, "\n".join(dict.fromkeys(packages)) + "\n", diff)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command, empty where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10,
            errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
