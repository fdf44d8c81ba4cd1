"""The OpenAPI document tells the truth: made from the routes, and held against a running service by schemathesis."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.daemons import Daemon, start_image_service
from tests.acceptance.image_service_calls import call, upload

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
FUZZING_S = 30
"""How long schemathesis may make up requests, after those it makes of every parameter's boundaries."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with start_image_service(tmp_path_factory.mktemp("openapi") / "state", log_level="warning") as daemon:
        yield daemon


def test_document_has_every_route_with_a_summary_and_a_name_of_its_own(service: Daemon) -> None:
    document = call(service, "GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    operations = [one for methods in document["paths"].values() for one in methods.values()]
    assert {"/images", "/images/{id}", "/images/{id}/download", "/blobs/{digest}", "/uploads/{id}"} <= set(
        document["paths"]
    )
    assert {"get", "post", "put"} <= set(document["paths"]["/images"])
    assert [one for one in operations if not one["summary"] or "default" not in one["responses"]] == []
    names = [one["operationId"] for one in operations]
    assert len(set(names)) == len(names)
    record = document["components"]["schemas"]["ImageRecord"]["properties"]
    assert {"digest", "format", "virtual_size", "labels", "name", "version", "origin", "same_as"} <= set(record)


@pytest.mark.slow
def test_service_answers_as_the_document_says(service: Daemon, tmp_path: Path) -> None:
    upload(service, b"something to find")
    program = Path(sys.executable).with_name("schemathesis")
    command = [
        str(program), "run", f"{service.url}/openapi.json", "--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing",
        "--max-examples", "5", "--max-time", str(FUZZING_S), "--request-timeout", "30", "--no-shrink", "--no-color",
        "--continue-on-failure", "--warnings", "off", "--generation-database", "none",
        "--exclude-method", "PATCH",  # it can't make bodies of that media type
    ]  # fmt: skip
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert service.is_ready(), service.log()[-4000:]


def test_page_is_whole_and_locked_in(service: Daemon) -> None:
    response = call(service, "GET", "/")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = response.text
    assert "http://" not in text
    assert "https://" not in text
    assert " src=" not in text
