"""Nothing here runs where the manifests cannot be rendered."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from helpers import ROOT

CRD_VARIABLE = "KUBERAY_CRDS"


@pytest.fixture(scope="session")
def crds() -> Path:
    """Folder of KubeRay's CRDs: named by the environment, or beside the repository."""
    named = os.environ.get(CRD_VARIABLE)
    folder = Path(named) if named else ROOT.parent / "shared" / "data" / "kuberay_crds"
    if not (folder / "rayjobs.yaml").exists():
        pytest.skip(f"KubeRay's CRDs are not there: name their folder by {CRD_VARIABLE}")
    return folder


@pytest.fixture
def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
