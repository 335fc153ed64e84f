from __future__ import annotations

import pytest

from orchestrator.records.secrets import redact, without_secret


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


def test_short_values_are_left_alone() -> None:
    assert redact("a token of yes", {"A_TOKEN": "yes"}) == "a token of yes"


@pytest.mark.parametrize("user", ["user:pass@", "user:p@ss@", "token@"])
def test_passwords_in_urls_are_hidden(user: str) -> None:
    assert redact(f"see http://{user}host/x now", {}) == "see http://***@host/x now"
    assert without_secret(f"http://{user}host/x") == "http://host/x"


def test_urls_without_a_password_and_mail_addresses_stay() -> None:
    text = "http://host:5000/a?b=c written by somebody@example.org"
    assert redact(text, {}) == text
