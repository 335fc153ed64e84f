from __future__ import annotations

import pytest

from orchestrator.records.secrets import redact, redact_all, without_secret


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("AWS_SECRET_ACCESS_KEY", True), ("AWS_ACCESS_KEY_ID", True), ("HF_TOKEN", True),
        ("MLFLOW_TRACKING_PASSWORD", True), ("my_password", True), ("WANDB_API_KEY", True),
        ("RAY_AUTH_MODE", False), ("RAY_AUTH_TOKEN_PATH", False), ("HOME", False),
    ],
)  # fmt: skip
def test_values_of_secret_variables_are_hidden(name: str, hidden: bool) -> None:
    text = redact("before planted-value after", {name: "planted-value"})
    assert text == ("before *** after" if hidden else "before planted-value after")


def test_short_values_and_parts_of_words_are_left_alone() -> None:
    assert redact("a token of yes", {"A_TOKEN": "yes"}) == "a token of yes"
    assert redact("s3://checkpoints/1", {"A_TOKEN": "checkpoin"}) == "s3://checkpoints/1"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("postgresql://mlflow:ab/cd+e@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("mysql+pymysql://u:a/b@c@db/x", "mysql+pymysql://***@db/x"),
        ("https://b/x?X-Amz-Signature=abc&y=1", "https://b/x?X-Amz-Signature=***&y=1"),
        ("https://b/x?y=1&sig=abc", "https://b/x?y=1&sig=***"),
        ("sqlite:////data/a@b/m.db", "sqlite:////data/a@b/m.db"),
    ],
)
def test_secrets_of_databases_and_queries_are_hidden(text: str, clean: str) -> None:
    assert redact(text, {}) == clean
    assert without_secret(text) == clean.replace("***@", "")


def test_trees_are_redacted_before_they_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", 'with "quotes"')
    tree = {"a": ['use with "quotes"!', 1], "b": {"c": None}}
    assert redact_all(tree) == {"a": ["use ***!", 1], "b": {"c": None}}


@pytest.mark.parametrize("user", ["user:pass@", "user:p@ss@", "token@"])
def test_passwords_in_urls_are_hidden(user: str) -> None:
    assert redact(f"see http://{user}host/x now", {}) == "see http://***@host/x now"
    assert without_secret(f"http://{user}host/x") == "http://host/x"


def test_urls_without_a_password_and_mail_addresses_stay() -> None:
    text = "http://host:5000/a?b=c written by somebody@example.org"
    assert redact(text, {}) == text
