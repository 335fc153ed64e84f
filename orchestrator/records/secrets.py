"""Keeps secrets out of what is recorded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY")
NO_SECRET = re.compile(r"(_PATH|_FILE|_MODE)$")
IN_URL = re.compile(r"(\w://)[^/\s]*@")
LEAST_CHARS = 6  # shorter values occur by chance


def without_secret(uri: str) -> str:
    """scheme://user:password@host -> scheme://host"""
    return IN_URL.sub(r"\1", uri)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Values of secret environment variables and passwords in URLs are replaced by ***."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= LEAST_CHARS and SECRET.search(name.upper()) and not NO_SECRET.search(name):
            text = text.replace(value, HIDDEN)
    return IN_URL.sub(rf"\1{HIDDEN}@", text)
