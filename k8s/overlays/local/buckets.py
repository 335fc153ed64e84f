"""Make buckets, as soon as the S3 server answers: python buckets.py NAME..."""

from __future__ import annotations

import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

PATIENCE_S = 300.0
THERE = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")


def make(names: list[str], patience_s: float = PATIENCE_S) -> None:
    """Endpoint and credentials come from the environment. What is there is left alone."""
    client = boto3.client("s3")
    end = time.monotonic() + patience_s
    for name in names:
        while True:
            try:
                client.create_bucket(Bucket=name)
                break
            except ClientError as error:
                if error.response["Error"]["Code"] in THERE:
                    break
                problem: Exception = error
            except BotoCoreError as error:
                problem = error
            if time.monotonic() > end:
                raise problem
            time.sleep(2)
        print(f"{name}: there", flush=True)


if __name__ == "__main__":
    make(sys.argv[1:])
