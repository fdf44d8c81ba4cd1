"""Logs are fields: an event, and what it is about. Written off the loop, as lines for people or as JSON for machines.

A module logs as usual and passes what varies in ``extra``: ``log.info("image recorded", extra={"image_id": ...})``.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the HTTP request that is being answered; empty outside of one."""

RECORDS_PENDING_MAX = 10_000
"""Records waiting for the writer, about 10 MB: a reader of stderr that stalls must not stop the daemon or eat its memory."""

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "fatal": logging.CRITICAL,
}
"""The names the command line knows; ``critical`` and ``fatal`` are one level here."""

Style = Literal["text", "json"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a record is about: the keys of its ``extra``, and the request it belongs to."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and value not in ("", None)}


def _chain(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)) if record.exc_info and record.exc_info[1] else ""


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """``time LEVEL logger: event key=value ...``, the chain of an exception below it."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as a line (and its traceback)."""
        fields = "".join(f" {key}={_shown(value)}" for key, value in fields_of(record).items())
        line = f"{_time(record)} {record.levelname} {record.name}: {_one_line(record.getMessage())}{fields}"
        chain = _chain(record)
        return f"{line}\n{chain.rstrip()}" if chain else line


def _shown(value: Any) -> str:
    text = str(value)
    return text if text and all(char.isprintable() and char not in ' "=' for char in text) else json.dumps(text)


def _one_line(text: str) -> str:
    """Foreign text must not look like a record of its own."""
    return text if text.isprintable() else json.dumps(text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as a JSON object."""
        entry = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        chain = _chain(record)
        return json.dumps({**fields_of(record), **entry, **({"exception": chain} if chain else {})}, default=str)


class _Handler(logging.handlers.QueueHandler):
    """Hands records over as they are (the writer formats them) and drops the newest when the writer is stuck."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Note the request while we still are in its context."""
        request_id = REQUEST_ID.get()
        if request_id and not hasattr(record, "request_id"):
            record.request_id = request_id
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put without waiting; a full queue loses the record, and the daemon goes on."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


def configure_logging(level: str, *, style: Style = "text", stream: TextIO | None = None) -> Callable[[], None]:
    """Send everything from ``level`` up to ``stream`` (stderr) by a thread of its own; the returned call writes out and stops it."""
    records: queue.Queue[logging.LogRecord] = queue.Queue(RECORDS_PENDING_MAX)
    writer = logging.StreamHandler(stream or sys.stderr)
    writer.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    listener = logging.handlers.QueueListener(records, writer)
    handler = _Handler(records)
    root = logging.getLogger()
    root.addHandler(handler)
    previous = root.level
    root.setLevel(LEVELS[level])
    listener.start()

    def stop() -> None:
        root.removeHandler(handler)
        root.setLevel(previous)
        listener.stop()

    return stop
