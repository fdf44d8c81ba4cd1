from __future__ import annotations

import io
import json
import logging

import pytest

from rpc.logs import LEVELS, REQUEST_ID, Style, configure_logging

log = logging.getLogger("tests.rpc_logs")


def written(level: str, style: Style) -> str:
    stream = io.StringIO()
    stop = configure_logging(level, style=style, stream=stream)
    try:
        token = REQUEST_ID.set("req-1")
        log.debug("quiet")
        log.warning("image\nrecorded", extra={"image_id": "a b", "size_bytes": 5})
        log.error("it failed", exc_info=ValueError("the cause"))
        REQUEST_ID.reset(token)
    finally:
        stop()
    return stream.getvalue()


def test_text_line_has_event_fields_request_and_chain() -> None:
    text = written("warning", "text")
    first, second, *chain = text.splitlines()
    assert first.endswith('WARNING tests.rpc_logs: "image\\nrecorded" image_id="a b" size_bytes=5 request_id=req-1')
    assert " ERROR tests.rpc_logs: it failed" in second
    assert chain[-1] == "ValueError: the cause"
    assert "quiet" not in text


def test_json_line_has_event_fields_request_and_chain() -> None:
    first, second = map(json.loads, written("debug", "json").splitlines()[1:])
    assert first | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "tests.rpc_logs",
        "event": "image\nrecorded",
        "image_id": "a b",
        "size_bytes": 5,
        "request_id": "req-1",
    }
    assert "ValueError: the cause" in second["exception"]


@pytest.mark.parametrize(("level", "lines"), [("debug", 3), ("error", 1), ("critical", 0), ("fatal", 0)])
def test_level_decides_what_is_written(level: str, lines: int) -> None:
    assert len(written(level, "json").splitlines()) == lines


def test_levels_are_the_six_of_the_original() -> None:
    assert [*LEVELS] == ["debug", "info", "warning", "error", "critical", "fatal"]


@pytest.mark.parametrize("style", ["text", "json"])
def test_stop_gives_the_root_logger_back(style: Style) -> None:
    before = (logging.getLogger().level, [*logging.getLogger().handlers])
    written("debug", style)
    assert (logging.getLogger().level, [*logging.getLogger().handlers]) == before
