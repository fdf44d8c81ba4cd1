"""What every engine refuses before it looks at its data, so that all engines refuse the same."""

from __future__ import annotations

from collections.abc import Sequence

from imaging.errors import InvalidArgumentError
from imaging.kv.base import KEY_MAX_BYTES, OPERATIONS_MAX, VALUE_MAX_BYTES, Compare, Operation, Put


def encode_text(text: str, what: str) -> bytes:
    """UTF-8 of a key, prefix or marker; lone surrogates have none and raise InvalidArgumentError."""
    try:
        return text.encode()
    except UnicodeEncodeError as err:
        raise InvalidArgumentError(f"{what} is not valid text: {text[:80]!r}") from err


def check_key(key: str) -> None:
    """InvalidArgumentError unless the key is one."""
    encoded = encode_text(key, "key")
    if not encoded or b"\0" in encoded or len(encoded) > KEY_MAX_BYTES:
        raise InvalidArgumentError(f"key must have 1 to {KEY_MAX_BYTES} bytes and no NUL: {key[:80]!r}")


def check_limit(limit: int | None) -> None:
    """InvalidArgumentError for a negative limit."""
    if limit is not None and limit < 0:
        raise InvalidArgumentError(f"limit must not be negative: {limit}")


def check_transaction(operations: Sequence[Operation], compares: Sequence[Compare]) -> None:
    """InvalidArgumentError unless every engine could apply it: bounded, valid keys and values, no key changed twice."""
    if len(operations) > OPERATIONS_MAX or len(compares) > OPERATIONS_MAX:
        raise InvalidArgumentError(f"a transaction has at most {OPERATIONS_MAX} operations and as many compares")
    for compare in compares:
        check_key(compare.key)
    seen: set[str] = set()
    for operation in operations:
        _check_operation(operation)
        if operation.key in seen:
            raise InvalidArgumentError(f"one transaction changes a key twice: {operation.key[:80]!r}")
        seen.add(operation.key)


def _check_operation(operation: Operation) -> None:
    check_key(operation.key)
    if isinstance(operation, Put):
        if not isinstance(operation.value, bytes):
            raise InvalidArgumentError(f"the value of {operation.key[:80]!r} is not bytes")
        if len(operation.value) > VALUE_MAX_BYTES:
            raise InvalidArgumentError(f"the value of {operation.key[:80]!r} is larger than {VALUE_MAX_BYTES} bytes")


def successor(prefix: str) -> str | None:
    """The least string greater than everything that starts with ``prefix`` (None: there is none)."""
    for end in range(len(prefix), 0, -1):
        point = ord(prefix[end - 1])
        if point < 0x10FFFF:
            following = 0xE000 if point == 0xD7FF else point + 1  # surrogates are no characters
            return prefix[: end - 1] + chr(following)
    return None
