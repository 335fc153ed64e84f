from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from orchestrator.errors import StorageError
from orchestrator.storage.filesystems import check_writable, open_place

WHERE = "checkpoint.uri"


def refusal(uri: str) -> str:
    with pytest.raises(StorageError) as caught:
        check_writable(open_place(uri, WHERE), WHERE)
    assert caught.value.where == WHERE
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_local_folder_is_made_and_left_empty(tmp_path: Path, scheme: str) -> None:
    folder = tmp_path / "not" / "there"
    place = open_place(f"{scheme}{folder}", WHERE)
    check_writable(place, WHERE)
    assert place.local == folder
    assert list(folder.iterdir()) == []


def test_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_place("here", WHERE).local == tmp_path / "here"


def test_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"got {tmp_path / 'file' / 'x'} (" in refusal(str(tmp_path / "file" / "x"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal(str(tmp_path))


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(StorageError, match=r"^checkpoint\.uri: .*got carrier-pigeon://x"):
        open_place("carrier-pigeon://x", WHERE)


@pytest.mark.parametrize("folder", ["", "/a/b", "/a/b/"])
def test_bucket_is_writable_and_left_empty(bucket: str, folder: str, s3_client: Any) -> None:
    place = open_place(f"s3://{bucket}{folder}", WHERE)
    check_writable(place, WHERE)
    assert place.local is None
    assert s3_client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_joined_name_lies_inside(bucket: str) -> None:
    inside = open_place(f"s3://{bucket}/a/", WHERE).join("b")
    assert inside.uri == f"s3://{bucket}/a/b"
    assert inside.path == f"{bucket}/a/b"


def test_missing_bucket_is_named(s3: str) -> None:
    message = refusal("s3://no-such-bucket/x")
    assert "s3://no-such-bucket/x" in message
    assert "bucket does not exist" in message
    assert s3 in message


@pytest.mark.integration
def test_unreachable_endpoint_is_named_soon(
    s3: str, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = f"http://127.0.0.1:{closed_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    S3FileSystem.clear_instance_cache()  # instances remember their endpoint
    try:
        began = time.monotonic()
        message = refusal("s3://bucket/x")
        assert time.monotonic() - began < 20
    finally:
        S3FileSystem.clear_instance_cache()
    assert "s3://bucket/x" in message
    assert f"check that the bucket exists at {endpoint}" in message
