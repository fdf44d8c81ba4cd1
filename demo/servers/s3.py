"""Buckets of the S3 server on loopback."""

from __future__ import annotations

import boto3
import botocore.config

from demo.servers.swift import ACCESS_KEY, REGION, SECRET_KEY, SwiftServer
from imaging.blobs.s3_bucket import S3Settings

BUCKET = "images"


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
    """An empty bucket, made as its operator would."""
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=botocore.config.Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=name)
    client.close()
