"""Who vouches for a document: clearsigned and detached OpenPGP signatures, checked by gpgv and made by gpg.

Rules.

* Only what gpgv hands out after it has verified it is ever parsed, never the armour around it: text before, after or between
  signatures does not exist for us.
* A document has exactly one good signature by a key of the keyring. Bad, unknown, expired and revoked ones are BadDataError.
* gpg's own keyrings and settings play no part: every call has a home directory of its own.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from imaging.errors import BadDataError, InvalidArgumentError, UnavailableError, UnsupportedError
from imaging.files import os_errors

GPG_TIMEOUT_S = 60.0
"""Verifying 100 MB takes a second; making a signature with a slow hardware key takes a few."""

GPG_FILE_TIMEOUT_S = 3600.0
"""For a file of 256 GiB at 100 MB/s."""

LINE_MAX_BYTES = 19_990
"""gpg cuts longer lines of a clearsigned text (MAX_LINELEN is 19995) and calls the signature good all the same."""

NO_SIGNATURE = "no PGP signature embedded in plain text data"
BEGIN_SIGNED = b"-----BEGIN PGP SIGNED MESSAGE-----"

_ARMOUR = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\s*?\n(?:[^\n:]+: [^\n]*\n)*\s*\n(.*?)-----END PGP PUBLIC KEY BLOCK-----",
    re.DOTALL,
)
_REFUSALS = {
    "BADSIG": "openpgp: invalid signature: hash tag doesn't match",
    "ERRSIG": "openpgp: signature made by unknown entity",
    "EXPSIG": "openpgp: signature expired",
    "EXPKEYSIG": "openpgp: key expired",
    "REVKEYSIG": "openpgp: key revoked",
}


@dataclass(frozen=True, slots=True)
class Verified:
    """What a good signature covers, and whose it is."""

    text: bytes
    fingerprint: str


def binary_keyring(keyring: bytes) -> bytes:
    """Public keys as gpgv wants them, from binary or armoured ones; InvalidArgumentError if they are neither."""
    if b"-----BEGIN PGP" not in keyring:
        if not keyring or not keyring[0] & 0x80:
            raise InvalidArgumentError("failed to parse public key: not an OpenPGP keyring")
        return keyring
    blocks = _ARMOUR.findall(keyring.replace(b"\r\n", b"\n"))
    if not blocks:
        raise InvalidArgumentError("failed to parse public key: no complete armoured block")
    try:
        return b"".join(_dearmour(block) for block in blocks)
    except binascii.Error as err:
        raise InvalidArgumentError("failed to parse public key: the armour is damaged") from err


def _dearmour(body: bytes) -> bytes:
    """The bytes of an armoured block; its checksum line (``=`` and four letters) is not part of them."""
    lines = [line.strip() for line in body.splitlines()]
    return base64.b64decode(b"".join(line for line in lines if line and not line.startswith(b"=")), validate=True)


class Verifier:
    """Checks signatures against one keyring. Threads may share it."""

    def __init__(self, keyring: bytes, *, timeout_s: float = GPG_TIMEOUT_S) -> None:
        self._keyring = binary_keyring(keyring)
        self._timeout_s = timeout_s

    @classmethod
    def from_file(cls, path: Path) -> Verifier:
        """With the keys of a file, binary or armoured."""
        with os_errors(f"cannot read keyring {path}"):
            return cls(path.read_bytes())

    def verify_clearsigned(self, document: bytes) -> Verified:
        """The text under the signature; BadDataError."""
        if BEGIN_SIGNED not in document:
            raise BadDataError(NO_SIGNATURE)
        if _longest_line(document) > LINE_MAX_BYTES:
            raise BadDataError(f"clearsigned text has a line longer than {LINE_MAX_BYTES} bytes, which gpg would cut")
        return self._run(document, None)

    def verify_detached(self, document: bytes, signature: bytes) -> Verified:
        """The document, if the signature is over it; BadDataError."""
        return Verified(document, self._run(document, signature).fingerprint)

    def verify_detached_file(self, path: Path, signature: bytes) -> str:
        """The fingerprint of the key whose signature is over a file of any size; BadDataError."""
        with tempfile.TemporaryDirectory(prefix="mistify-gpgv-") as home:
            keyring, detached = Path(home, "keys.gpg"), Path(home, "signature")
            keyring.write_bytes(self._keyring)
            detached.write_bytes(signature)
            command = ["gpgv", "--homedir", home, "--keyring", str(keyring), str(detached), str(path.absolute())]
            return _good_signature(run_gpg(command, b"", GPG_FILE_TIMEOUT_S))

    def _run(self, document: bytes, signature: bytes | None) -> Verified:
        with tempfile.TemporaryDirectory(prefix="mistify-gpgv-") as home:
            keyring, output = Path(home, "keys.gpg"), Path(home, "text")
            keyring.write_bytes(self._keyring)
            command = ["gpgv", "--homedir", home, "--keyring", str(keyring)]
            if signature is None:
                command += ["--output", str(output), "-"]
            else:
                Path(home, "signature").write_bytes(signature)
                command += [str(Path(home, "signature")), "-"]
            status = run_gpg(command, document, self._timeout_s)
            fingerprint = _good_signature(status)
            return Verified(output.read_bytes() if signature is None else b"", fingerprint)


def _good_signature(status: Sequence[Sequence[str]]) -> str:
    """The fingerprint of the one good signature gpgv reports; BadDataError for anything else."""
    words = [line[0] for line in status]
    for word, text in _REFUSALS.items():
        if word in words:
            raise BadDataError(text)
    valid = [line for line in status if line[0] == "VALIDSIG"]
    if not valid:
        raise BadDataError(NO_SIGNATURE)
    if len(valid) != 1 or words.count("GOODSIG") != 1 or words.count("PLAINTEXT") > 1:
        raise BadDataError("openpgp: more than one signature")
    return valid[0][1]


def _longest_line(text: bytes) -> int:
    return max(map(len, text.split(b"\n")))


def run_gpg(
    command: Sequence[str], data: bytes, timeout_s: float, *, stdout: list[bytes] | None = None
) -> list[list[str]]:
    """Run gpg or gpgv with ``data`` as its input; its status lines, split into words. Its exit status is for the caller to ignore.

    Status lines come by a pipe of their own, where no text of a document can get to.
    """
    with ExitStack() as stack:
        status = stack.enter_context(tempfile.TemporaryFile())
        pass_fd = status.fileno()
        full = [command[0], "--batch", "--no-tty", "--status-fd", str(pass_fd), *command[1:]]
        if command[0] == "gpgv":
            full = [command[0], "--status-fd", str(pass_fd), *command[1:]]
        try:
            done = subprocess.run(  # noqa: S603 - a fixed program, no shell
                full,
                input=data,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                pass_fds=[pass_fd],
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "HOME": "/nonexistent"},
            )
        except FileNotFoundError as err:
            raise UnsupportedError(f"{command[0]} is needed for signatures; install gnupg") from err
        except subprocess.TimeoutExpired as err:
            raise UnavailableError(f"{command[0]} did not end within {timeout_s:g} s") from err
        if stdout is not None:
            stdout.append(done.stdout)
        status.seek(0)
        lines = status.read().decode("utf-8", "replace").splitlines()
    return [line.split()[1:] for line in lines if line.startswith("[GNUPG:] ")]


class Signer:
    """Signs with one private key. Use as a context manager: leaving it ends gpg's agent and removes its directory."""

    def __init__(self, private_key: bytes, passphrase: str = "", *, timeout_s: float = GPG_TIMEOUT_S) -> None:
        self._passphrase = passphrase
        self._timeout_s = timeout_s
        self._home = tempfile.mkdtemp(prefix="mistify-gpg-")
        try:
            self.fingerprint = self._import(private_key)
        except BaseException:
            self.close()
            raise

    def _import(self, private_key: bytes) -> str:
        imported = self._gpg(["--import"], private_key)
        keys = [line[2] for line in imported if line[0] == "IMPORT_OK" and len(line) > 2]
        if not keys:
            raise InvalidArgumentError("failed to parse private key: gpg imported nothing")
        return keys[0]

    @classmethod
    def from_file(cls, path: Path, passphrase: str = "") -> Signer:
        """With the private key of a file, binary or armoured."""
        with os_errors(f"cannot read private key {path}"):
            return cls(path.read_bytes(), passphrase)

    def clearsign(self, text: bytes) -> bytes:
        """``text`` in a clearsigned document; one newline at its start is dropped, as clients of old do."""
        if _longest_line(text) > LINE_MAX_BYTES:
            raise InvalidArgumentError(f"cannot clearsign a line longer than {LINE_MAX_BYTES} bytes; break it")
        return self._sign(["--clearsign"], text.removeprefix(b"\n"))

    def detach_sign(self, data: bytes) -> bytes:
        """An armoured signature over ``data``."""
        return self._sign(["--armor", "--detach-sign"], data)

    def public_key(self) -> bytes:
        """The armoured public key, for those who verify."""
        out: list[bytes] = []
        self._gpg(["--armor", "--export", self.fingerprint], b"", out)
        return out[0]

    def _sign(self, mode: Sequence[str], data: bytes) -> bytes:
        out: list[bytes] = []
        status = self._gpg(["--local-user", self.fingerprint, "--digest-algo", "SHA512", *mode], data, out)
        if not any(line[0] == "SIG_CREATED" for line in status):
            raise InvalidArgumentError("cannot sign: gpg refused the key or its passphrase")
        return out[0]

    def _gpg(self, arguments: Sequence[str], data: bytes, out: list[bytes] | None = None) -> list[list[str]]:
        secret = Path(self._home, "passphrase")
        secret.touch(0o600)
        secret.write_text(self._passphrase + "\n")
        common = ["gpg", "--homedir", self._home, "--pinentry-mode", "loopback", "--passphrase-file", str(secret)]
        return run_gpg([*common, *arguments], data, self._timeout_s, stdout=out)

    def close(self) -> None:
        """End the agent gpg started, and remove the key; idempotent."""
        if not Path(self._home).is_dir():
            return
        try:
            subprocess.run(  # noqa: S603 - a fixed program, no shell
                ["gpgconf", "--homedir", self._home, "--kill", "all"],  # noqa: S607
                timeout=self._timeout_s,
                check=False,
                capture_output=True,
            )
        except (OSError, subprocess.TimeoutExpired) as err:
            raise UnavailableError("cannot end gpg's agent") from err
        finally:
            shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> Signer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
