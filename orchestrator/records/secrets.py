"""Keeps secrets out of what is recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY")
NO_SECRET = re.compile(r"(_PATH|_FILE|_MODE)$")
IN_URL = re.compile(r"(\w://)[^/\s]*@")
# A database's password may hold slashes.
IN_DATABASE_URL = re.compile(r"((?:postgres\w*|mysql|mariadb|mssql|oracle)(?:\+\w+)?://)\S*@")
IN_QUERY = re.compile(r"([?&][\w-]*(?:sig|signature|token|key|credential|password)=)[^&\s]+", re.I)
LEAST_CHARS = 8  # shorter values are words that occur elsewhere


def without_secret(uri: str) -> str:
    """scheme://user:password@host -> scheme://host"""
    return IN_QUERY.sub(rf"\1{HIDDEN}", IN_URL.sub(r"\1", IN_DATABASE_URL.sub(r"\1", uri)))


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Values of secret environment variables and secrets in URLs are replaced by ***."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= LEAST_CHARS and SECRET.search(name.upper()) and not NO_SECRET.search(name):
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", HIDDEN, text)
    text = IN_DATABASE_URL.sub(rf"\1{HIDDEN}@", text)
    return IN_QUERY.sub(rf"\1{HIDDEN}", IN_URL.sub(rf"\1{HIDDEN}@", text))


def redact_all(value: Any) -> Any:
    """The same for every text in a tree of lists and dicts, before it is encoded."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_all(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(item) for item in value]
    return value
