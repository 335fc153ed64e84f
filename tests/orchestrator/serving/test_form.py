"""The image is found in a body of any kind, or it is said why not."""

from __future__ import annotations

import pytest

from orchestrator.serving.form import image_in
from orchestrator.serving.messages import Refused

IMAGE = bytes(range(256)) * 20 + b"\r\n--b\r\n--bound"
"""Every byte, and what looks like a boundary."""


def form(*parts: tuple[str, bytes], boundary: str = "bound42") -> tuple[bytes, str]:
    body = b"".join(
        f"--{boundary}\r\nContent-Disposition: form-data; {what}\r\n\r\n".encode() + data + b"\r\n"
        for what, data in parts
    )
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


FILE = ('name="file"; filename="photo.jpg"', IMAGE)


@pytest.mark.parametrize("kind", ["image/jpeg", "IMAGE/PNG", "application/octet-stream"])
def test_a_body_is_the_image(kind: str) -> None:
    assert image_in(IMAGE, kind) == IMAGE


@pytest.mark.parametrize(
    "parts",
    [
        [FILE],
        [('name="score"', b"0.5"), FILE],
        [FILE, ('name="file"; filename="second.jpg"', b"other")],
        [('name="x"; filename="../../etc/passwd"', IMAGE)],
        [('name="x"; filename="a\\"b\x01.jpg"', IMAGE)],
        [("name=\"x\"; filename*=utf-8''%E2%98%83.png", IMAGE)],
    ],
)
def test_the_first_file_of_a_form_is_the_image(parts: list[tuple[str, bytes]]) -> None:
    assert image_in(*form(*parts)) == IMAGE


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "image/jpeg", 400),
        (*form(('name="file"; filename="empty.jpg"', b"")), 400),
        (*form(('name="file"', b"no file, but a field")), 400),
        (form(FILE)[0][:-40], form(FILE)[1], 400),
        (form(FILE)[0], "multipart/form-data", 400),
        (form(FILE)[0], "multipart/form-data; boundary=another", 400),
        (form(FILE)[0], f"multipart/form-data; boundary={'x' * 71}", 400),
        (*form(*[('name="a"', b"1")] * 50, FILE), 400),
        (b"--bound42\r\n" + b"A" * 100_000, "multipart/form-data; boundary=bound42", 400),
        (b"file=1", "application/x-www-form-urlencoded", 415),
        (b"{}", "application/json", 415),
        (IMAGE, "", 415),
        (IMAGE, "text/html; charset=x", 415),
    ],
)
def test_what_holds_no_image_is_refused(body: bytes, kind: str, status: int) -> None:
    with pytest.raises(Refused) as caught:
        image_in(body, kind)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)
