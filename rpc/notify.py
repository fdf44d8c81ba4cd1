"""sd_notify: telling the service manager how we are, over the datagram socket it names in the environment."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 1.0
"""The manager's socket is local and buffered; a daemon does not wait for it."""

STATUS_MAX_CHARS = 200
"""One line in ``systemctl status``."""


class ServiceManager:
    """The service manager that started us, if one did; without one every call does nothing."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self._watchdog_us = environ.get("WATCHDOG_USEC", "")
        self._watchdog_pid = environ.get("WATCHDOG_PID", "")

    @property
    def is_present(self) -> bool:
        """Whether anybody listens."""
        return self._address.startswith(("/", "@"))

    @property
    def watchdog_interval_s(self) -> float | None:
        """How often to say that we are alive (half of what the manager allows), None if it does not watch us."""
        is_ours = self._watchdog_pid in {"", str(os.getpid())}
        if not (self.is_present and is_ours and self._watchdog_us.isdigit() and int(self._watchdog_us)):
            return None
        return int(self._watchdog_us) / 2_000_000

    def ready(self, status: str) -> None:
        """The daemon serves."""
        self._send(f"READY=1\nSTATUS={_line(status)}\nMAINPID={os.getpid()}")

    def stopping(self, status: str) -> None:
        """The daemon has begun to end."""
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """A line for the operator."""
        self._send(f"STATUS={_line(status)}")

    def alive(self) -> None:
        """The watchdog's ping."""
        self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self.is_present:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
                channel.settimeout(SEND_TIMEOUT_S)
                channel.sendto(message.encode(), address)
        except OSError as err:
            log.warning("cannot notify the service manager", extra={"address": self._address, "error": str(err)})


def _line(status: str) -> str:
    return " ".join(status.split())[:STATUS_MAX_CHARS]
