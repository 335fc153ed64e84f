"""An S3 server for jobs, with a proxy in front that fails on demand."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from helpers.faulty import FaultyProxy
from moto.server import ThreadedMotoServer


@dataclass(frozen=True)
class Storage:
    """proxy: what jobs talk to. client: talks to the server itself."""

    proxy: FaultyProxy
    client: Any
    bucket: str

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.proxy.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "planted-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def keys(self, part: str = "") -> list[str]:
        """Of all objects whose key has `part`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        found = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return [key for key in found if part in key]

    def steps(self) -> list[int]:
        """Committed checkpoints."""
        return sorted(int(key.split("step_")[1].split("/")[0]) for key in self.keys("/meta.json"))


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def storage(s3_endpoint: str) -> Iterator[Storage]:
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="key",
        aws_secret_access_key="planted-secret", region_name="us-east-1",
    )  # fmt: skip
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    client.create_bucket(Bucket=bucket)
    with FaultyProxy(s3_endpoint, seed=7) as proxy:
        yield Storage(proxy, client, bucket)
