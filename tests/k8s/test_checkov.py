"""checkov over every document and every pod, in an environment of its own: its pins undo some of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import environment
from helpers.manifests import distinct, pods

pytestmark = pytest.mark.slow

VERSION = "3.3.30"
EXCEPTIONS = {
    "CKV_K8S_11": "no CPU limits: they throttle trainings and probes; requests share CPUs out fairly",
    "CKV_K8S_15": "pull policy: our tags are never overwritten, and nodes must start without the registry",
    "CKV_K8S_35": "secrets as environment: the S3, MLflow and Postgres clients read nothing else",
    "CKV_K8S_38": "a token is mounted into the heads that have an autoscaler, which needs it",
    "CKV_K8S_40": "users below 10000: 999 and 1000 are those of the images",
    "CKV_K8S_43": "images by digest: a registry's digests are known where the images are built",
    "CKV_K8S_8": "liveness: the operator adds probes to Ray's pods; jobs end by themselves",
    "CKV_K8S_9": "readiness: the same",
}


@pytest.fixture(scope="session")
def checkov(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkov")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    done = subprocess.run([*pip, f"checkov=={VERSION}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"checkov cannot be installed: {done.stderr[-300:]}")
    return folder / "venv" / "bin" / "checkov"


@pytest.fixture(scope="session")
def results(checkov: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pods of custom resources as Pods, since it does not look into those."""
    folder = tmp_path_factory.mktemp("documents")
    # The base's images have no tags; components/image gives them.
    documents = {name: doc for name, doc in distinct().items() if name.startswith("overlays/")}
    for number, doc in enumerate(documents.values()):
        (folder / f"document-{number}.yaml").write_text(yaml.safe_dump(doc))
    rays = [
        pod for pod in pods() if pod.kind.startswith("Ray") and pod.root.startswith("overlays/")
    ]
    for number, pod in enumerate(rays):
        made = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"pod-{number}", "namespace": "efficientdet",
                "labels": pod.labels, "annotations": {"from": pod.name},
            },
            "spec": pod.spec,
        }  # fmt: skip
        (folder / f"pod-{number}.yaml").write_text(yaml.safe_dump(made))
    done = subprocess.run(
        [
            str(checkov), "--directory", str(folder), "--framework", "kubernetes", "--skip-download",
            "--quiet", "--compact", "--output", "json", "--soft-fail",
        ],
        capture_output=True, text=True, timeout=500, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    return dict(found[0] if isinstance(found, list) else found)


def test_checkov_finds_nothing_but_the_exceptions(results: dict[str, Any]) -> None:
    failed: dict[str, set[str]] = {}
    for check in results["results"]["failed_checks"]:
        failed.setdefault(f"{check['check_id']} {check['check_name']}", set()).add(
            check["resource"]
        )
    unknown = {name: found for name, found in failed.items() if name.split()[0] not in EXCEPTIONS}
    assert unknown == {}
    assert results["summary"]["passed"] > 1000


def test_every_exception_is_needed(results: dict[str, Any]) -> None:
    failed = {check["check_id"] for check in results["results"]["failed_checks"]}
    assert set(EXCEPTIONS) - failed == set()
