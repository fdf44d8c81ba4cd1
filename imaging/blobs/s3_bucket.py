"""One bucket of an S3 service: the few calls the blob store needs, their time-outs and their errors. The only module that touches boto3.

Every call is repeated by botocore a bounded number of times; all of them may be: each writes a name of its own, or the same bytes
again.
"""

from __future__ import annotations

import base64
import datetime as dt
import email.utils
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import botocore.config
import botocore.exceptions

from imaging.errors import (
    BusyError,
    ConflictError,
    InternalError,
    InvalidArgumentError,
    MistifyError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    TooLargeError,
    UnavailableError,
    UnsupportedError,
)

CONNECT_TIMEOUT_S = 3.0
"""Within a data centre a connection takes milliseconds."""

READ_TIMEOUT_S = 30.0
"""Silence on one request. A server-side copy of the largest part says nothing until it is done."""

ATTEMPTS_MAX = 3
"""Tries of one request, with botocore's growing pauses between them."""

CONNECTIONS_MAX = 64
"""Connections kept: as many as threads that may call at once."""

CLOCK_TOLERANCE_S = 2.0
"""The service tells whole seconds; smaller differences between its clock and ours are not corrected."""

PAGE_KEYS = 1000
"""The most a service gives in one listing."""


@dataclass(frozen=True, slots=True)
class S3Settings:
    """Where a bucket is and how to speak to the service. Without keys, botocore's usual sources are used."""

    bucket: str
    endpoint: str | None = None
    region: str = "us-east-1"
    access_key: str | None = None
    secret_key: str | None = None
    prefix: str = ""
    ca_file: str | None = None
    path_style: bool = True
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S
    attempts_max: int = ATTEMPTS_MAX


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object as a listing or a head tells it; the key is without the store's prefix."""

    key: str
    size_bytes: int
    modified_s: float
    etag: str


_BY_CODE: dict[str, type[MistifyError]] = {
    "NoSuchKey": NotFoundError,
    "NoSuchUpload": NotFoundError,
    "NoSuchBucket": UnavailableError,
    "AccessDenied": NotPermittedError,
    "InvalidAccessKeyId": NotPermittedError,
    "SignatureDoesNotMatch": NotPermittedError,
    "PreconditionFailed": ConflictError,
    "OperationAborted": BusyError,
    "InvalidRange": InvalidArgumentError,
    "EntityTooLarge": TooLargeError,
    "QuotaExceeded": NoSpaceError,
    "XMinioStorageFull": NoSpaceError,
    "NotImplemented": UnsupportedError,
    "BadDigest": UnavailableError,
    "RequestTimeout": UnavailableError,
    "RequestTimeTooSkewed": UnavailableError,
    "SlowDown": UnavailableError,
}

_BY_STATUS: dict[int, type[MistifyError]] = {
    401: NotPermittedError,
    403: NotPermittedError,
    404: NotFoundError,
    408: UnavailableError,
    409: BusyError,
    412: ConflictError,
    413: TooLargeError,
    429: UnavailableError,
    501: UnsupportedError,
    507: NoSpaceError,
}


def from_client_error(err: botocore.exceptions.ClientError, what: str) -> MistifyError:
    """Translate an error answer; a code nobody knows is judged by its status, and an unknown status is our own fault."""
    code = str(err.response.get("Error", {}).get("Code", ""))
    status = int(err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status)
    if kind is None:
        kind = UnavailableError if status >= 500 else InternalError
    return kind(what if kind is not NoSpaceError else f"{what}: no space left in the object store")


@contextmanager
def s3_errors(what: str) -> Iterator[None]:
    """The one border between botocore and the rest."""
    try:
        yield
    except botocore.exceptions.ClientError as err:
        raise from_client_error(err, what) from err
    except (
        botocore.exceptions.HTTPClientError,
        botocore.exceptions.ConnectionError,
        botocore.exceptions.IncompleteReadError,  # the body was cut off; it is no ConnectionError of theirs
    ) as err:
        raise UnavailableError(what) from err
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.CredentialRetrievalError) as err:
        raise NotPermittedError(f"{what}: no credentials") from err
    except (botocore.exceptions.BotoCoreError, ValueError) as err:
        raise InternalError(what) from err


def _client(settings: S3Settings) -> Any:
    config = botocore.config.Config(
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        retries={"total_max_attempts": settings.attempts_max, "mode": "standard"},
        max_pool_connections=CONNECTIONS_MAX,
        signature_version="s3v4",
        s3={"addressing_style": "path" if settings.path_style else "virtual"},
        # Newer checksum headers are refused by services that do not know them; we send Content-MD5, which all know.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    with s3_errors("cannot set up the object store's client"):
        # A session of its own: boto3's default one is not safe to share between threads.
        return boto3.session.Session().client(
            "s3",
            endpoint_url=settings.endpoint,
            region_name=settings.region,
            aws_access_key_id=settings.access_key,
            aws_secret_access_key=settings.secret_key,
            verify=settings.ca_file,
            config=config,
        )


def _md5(data: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")


class S3Bucket:
    """Objects below one prefix. Threads may share it."""

    def __init__(self, settings: S3Settings) -> None:
        self._client = _client(settings)
        self._bucket = settings.bucket
        self._prefix = settings.prefix
        self._skew_s = 0.0

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    # -- time ------------------------------------------------------------------------------------------------------------

    def now_s(self) -> float:
        """The time by the service's clock, which also stamps the objects."""
        return time.time() + self._skew_s

    def sync_clock(self) -> None:
        """Ask the service, if only for the time."""
        with s3_errors("cannot ask the object store"):
            self._note_date(self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1))

    def _note_date(self, answer: Mapping[str, Any]) -> None:
        text = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        stamp = email.utils.parsedate_to_datetime(text).timestamp() if text else time.time()
        skew = stamp - time.time()
        self._skew_s = skew if abs(skew) > CLOCK_TOLERANCE_S else 0.0

    # -- objects ---------------------------------------------------------------------------------------------------------

    def _at(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def put(self, key: str, data: bytes | bytearray) -> str:
        """Store an object, its bytes checked by the service on arrival; its ETag."""
        with s3_errors(f"cannot store {key}"):
            answer = self._client.put_object(**self._at(key), Body=bytes(data), ContentMD5=_md5(data))
        self._note_date(answer)
        return str(answer["ETag"])

    def head(self, key: str) -> StoredObject:
        """What the service knows of an object; NotFoundError."""
        with s3_errors(f"cannot look up {key}"):
            answer = self._client.head_object(**self._at(key))
        self._note_date(answer)
        return StoredObject(key, int(answer["ContentLength"]), _seconds(answer["LastModified"]), str(answer["ETag"]))

    def read(self, key: str, *, etag: str | None = None) -> bytes:
        """A small object whole; NotFoundError, ConflictError if it is not that version."""
        with s3_errors(f"cannot read {key}"):
            return bytes(self._get(key, 0, etag).read())

    def stream(self, key: str, *, offset_bytes: int, etag: str | None = None) -> Any:
        """An object's bytes from an offset below its size, as botocore's stream; errors while reading are the reader's."""
        with s3_errors(f"cannot read {key}"):
            return self._get(key, offset_bytes, etag)

    def _get(self, key: str, offset_bytes: int, etag: str | None) -> Any:
        options = {"Range": f"bytes={offset_bytes}-"} if offset_bytes else {}
        if etag is not None:
            options["IfMatch"] = etag
        return self._client.get_object(**self._at(key), **options)["Body"]

    def delete(self, key: str) -> None:
        """Remove an object; absent is fine."""
        with s3_errors(f"cannot remove {key}"):
            self._client.delete_object(**self._at(key))

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Objects whose key starts with ``prefix``, in key order, page by page."""
        options: dict[str, Any] = {}
        while True:
            with s3_errors(f"cannot list {prefix}"):
                answer = self._client.list_objects_v2(
                    Bucket=self._bucket, Prefix=self._prefix + prefix, MaxKeys=PAGE_KEYS, **options
                )
            self._note_date(answer)
            for row in answer.get("Contents", []):
                key = row["Key"][len(self._prefix) :]
                yield StoredObject(key, int(row["Size"]), _seconds(row["LastModified"]), str(row["ETag"]))
            if not answer.get("IsTruncated"):
                return
            options = {"ContinuationToken": answer["NextContinuationToken"]}

    def presigned_url(self, key: str, *, expires_s: int) -> str:
        """An address from which anybody may read the object for a while."""
        with s3_errors(f"cannot sign an address of {key}"):
            return str(self._client.generate_presigned_url("get_object", Params=self._at(key), ExpiresIn=expires_s))

    # -- copies inside the service ---------------------------------------------------------------------------------------

    def _source(self, source: str, etag: str) -> dict[str, Any]:
        return {"CopySource": self._at(source), "CopySourceIfMatch": etag}

    def copy(self, source: str, target: str, *, etag: str) -> None:
        """Copy a whole object of up to 5 GiB; ConflictError if the source is not that version."""
        with s3_errors(f"cannot copy {source} to {target}"):
            self._client.copy_object(**self._at(target), **self._source(source, etag))

    def begin_upload(self, key: str) -> str:
        """Begin a multipart upload; its id."""
        with s3_errors(f"cannot begin the upload of {key}"):
            return str(self._client.create_multipart_upload(**self._at(key))["UploadId"])

    def copy_part(self, key: str, upload: str, number: int, source: str, *, etag: str, span: str | None = None) -> str:
        """Make a stored object (or a span of it, ``bytes=first-last``) one part of an upload; the part's ETag."""
        options = self._at(key) | self._source(source, etag) | ({"CopySourceRange": span} if span else {})
        with s3_errors(f"cannot add {source} to {key}"):
            answer = self._client.upload_part_copy(UploadId=upload, PartNumber=number, **options)
        return str(answer["CopyPartResult"]["ETag"])

    def complete_upload(self, key: str, upload: str, etags: Sequence[str]) -> None:
        """Make the parts an object; NotFoundError if the upload is not known (any more)."""
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        with s3_errors(f"cannot complete the upload of {key}"):
            self._client.complete_multipart_upload(**self._at(key), UploadId=upload, MultipartUpload={"Parts": parts})

    def abort_upload(self, key: str, upload: str) -> None:
        """Forget an upload; NotFoundError if it is not known."""
        with s3_errors(f"cannot abort the upload of {key}"):
            self._client.abort_multipart_upload(**self._at(key), UploadId=upload)

    def uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """Key, id and begin of the uploads under way or left behind."""
        options: dict[str, Any] = {}
        while True:
            with s3_errors("cannot list the uploads"):
                answer = self._client.list_multipart_uploads(
                    Bucket=self._bucket, Prefix=self._prefix + prefix, **options
                )
            for row in answer.get("Uploads", []):
                yield row["Key"][len(self._prefix) :], str(row["UploadId"]), _seconds(row["Initiated"])
            if not answer.get("IsTruncated"):
                return
            options = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def _seconds(stamp: dt.datetime) -> float:
    return stamp.timestamp()
