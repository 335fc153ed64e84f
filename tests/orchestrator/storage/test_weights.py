from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.storage.weights import open_initial

Write = Callable[..., Callable[[Path], None]]

pytestmark = pytest.mark.integration  # an S3 server


def test_a_local_path_is_used_as_it_is(tmp_path: Path) -> None:
    with open_initial(str(tmp_path)) as path:
        assert path == tmp_path


def test_a_checkpoint_on_s3_is_copied_whole(
    bucket: str, s3_client: Any, tmp_path: Path, write: Write
) -> None:
    write(7)(tmp_path)
    for file in tmp_path.iterdir():
        s3_client.upload_file(str(file), bucket, f"run/step_00000007/{file.name}")
    with open_initial(f"s3://{bucket}/run/step_00000007") as path:
        assert path.name == "step_00000007"
        assert {f.name: f.read_bytes() for f in path.iterdir()} == {
            f.name: f.read_bytes() for f in tmp_path.iterdir()
        }
    assert not path.exists()


def test_a_file_on_s3(bucket: str, s3_client: Any) -> None:
    s3_client.put_object(Bucket=bucket, Key="weights.pth", Body=b"content")
    with open_initial(f"s3://{bucket}/weights.pth") as path:
        assert (path.name, path.read_bytes()) == ("weights.pth", b"content")


def test_what_is_not_there_is_named(bucket: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=f"s3://{bucket}/gone.pth"),
        open_initial(f"s3://{bucket}/gone.pth"),
    ):
        pass
    with (
        pytest.raises(UserError, match="did you mean 'tf_efficientdet_d0'"),
        open_initial("tf_eficientdet_d0"),
    ):
        pass
