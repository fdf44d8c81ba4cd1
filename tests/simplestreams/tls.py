"""HTTPS on loopback in front of any HTTP server: what a reverse proxy does in production."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

CONNECT_TIMEOUT_S = 30.0


class Front(NamedTuple):
    url: str
    certificate: Path


def make_certificate(directory: Path) -> tuple[Path, Path]:
    certificate, private = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(private), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, private


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _serve(connection: socket.socket, context: ssl.SSLContext, port: int) -> None:
    """One client. One that does not speak TLS (Incus tries that first) is dropped at once."""
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        with (
            context.wrap_socket(connection, server_side=True) as client,
            socket.create_connection(("127.0.0.1", port), timeout=CONNECT_TIMEOUT_S) as server,
        ):
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join(CONNECT_TIMEOUT_S)
    except (OSError, ssl.SSLError):
        connection.close()


@contextmanager
def tls_front(port: int, directory: Path) -> Iterator[Front]:
    """Forward HTTPS on a free port to ``port``."""
    certificate, private = make_certificate(directory)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=_serve, args=(connection, context, port), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield Front(f"https://localhost:{listener.getsockname()[1]}", certificate)
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(CONNECT_TIMEOUT_S)
