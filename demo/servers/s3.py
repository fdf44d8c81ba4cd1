"""Buckets of the S3 server on loopback."""

from __future__ import annotations

from contextlib import closing

import boto3
import botocore.config
from botocore.exceptions import BotoCoreError, ClientError

from demo.servers.processes import wait_until
from demo.servers.swift import ACCESS_KEY, REGION, SECRET_KEY, SwiftServer
from imaging.blobs.s3_bucket import S3Settings

BUCKET = "images"

MAKE_TIMEOUT_S = 60.0
"""It takes a moment; the rest is for a busy machine."""


def s3_settings(server: SwiftServer, *, prefix: str = "", bucket: str = BUCKET) -> S3Settings:
    """How to reach it."""
    return S3Settings(
        bucket=bucket,
        endpoint=server.endpoint,
        region=REGION,
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        prefix=prefix,
    )


def make_bucket(server: SwiftServer, name: str) -> None:
    """Make an empty bucket, as its operator would. Swift says that it is ready a moment before its storage servers are."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=botocore.config.Config(s3={"addressing_style": "path"}),
    )

    def made() -> bool:
        try:
            client.create_bucket(Bucket=name)
        except (BotoCoreError, ClientError):
            return False
        return True

    with closing(client):
        wait_until(made, f"a bucket {name} to be made", timeout_s=MAKE_TIMEOUT_S)
