"""Secrets: a generator makes all that are expected, and none is in git."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from helpers.manifests import (
    K8S,
    distinct,
    expected_secrets,
    find,
    rendered,
    secret_keys,
)


def test_the_generator_makes_every_secret_that_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    script = ["bash", str(K8S / "secrets" / "generate.sh")]
    first, second = (
        subprocess.run(script, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert secret_keys(first) == expected_secrets()
    values = re.findall(r'(?:password|PASSWORD|secret-key): "(.*)"', first)
    assert len(set(values)) == len(values) == 5
    assert all(re.fullmatch(r"[\w-]{40,}", value) for value in values), "they go into URLs"
    assert not set(values) & set(re.findall(r'"(.*)"', second))


def test_no_secret_is_in_a_manifest() -> None:
    assert [name for name, doc in distinct().items() if doc["kind"] == "Secret"] == []
    for path in K8S.rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".yml", ".json"):
            values = re.findall(
                r"(?i)(?:password|secret-key|secret_access_key): (\S+)", path.read_text()
            )
            assert set(values) <= {"CHANGE-ME"}, path


def test_users_have_one_name() -> None:
    example = list(yaml.safe_load_all((K8S / "secrets" / "secrets.example.yaml").read_text()))
    client = next(doc for doc in example if doc["metadata"]["name"] == "mlflow-client")
    settings = find(rendered()["base/platform"], "ConfigMap", "mlflow-config")["data"]
    assert client["stringData"]["MLFLOW_TRACKING_USERNAME"] == settings["EFFDET_TRAINING_USERNAME"]
