"""Streams that broke off: what their token asks a driver to send again. The same for every driver."""

from __future__ import annotations

from agent_image.drivers.base import SendFlags, SnapshotInfo
from imaging.errors import BadDataError, ConflictError, InvalidArgumentError
from imaging.sendstream.records import BLOCK_SMALL_MAX_BYTES, DATA_OBJECT, PROPERTIES_OBJECT, Feature
from imaging.sendstream.resume import ResumeToken


def token_for(text: str, sent: SnapshotInfo, *, base: str | None, flags: SendFlags) -> ResumeToken:
    """The token, if it is of this snapshot. Base and flags are the token's: InvalidArgumentError if others are given too."""
    if base is not None or flags != SendFlags():
        raise InvalidArgumentError(
            "a resume token says itself what its stream builds on and with which flags it was sent"
        )
    try:
        token = ResumeToken.parse(text)
    except BadDataError as err:
        raise InvalidArgumentError(err.message) from err
    if token.toguid != sent.guid:
        raise ConflictError(
            f"the resume token is of a snapshot with guid {token.toguid}, but {sent.name} has {sent.guid}"
        )
    return token


def check_place(token: ResumeToken, sent: SnapshotInfo, block_bytes: int) -> None:
    """InvalidArgumentError unless the token goes on at a block of the volume, at its end, or in its properties."""
    if token.object == PROPERTIES_OBJECT and token.offset == 0:
        return
    block_bytes = min(block_bytes, BLOCK_SMALL_MAX_BYTES)  # larger ones may have come in pieces
    is_block = token.offset <= (sent.volsize_bytes or 0) and token.offset % block_bytes == 0
    if token.object != DATA_OBJECT or not is_block:
        raise InvalidArgumentError(
            f"the resume token goes on at {token.object}:{token.offset}, where {sent.name} has no block"
        )


def flags_of(token: ResumeToken) -> SendFlags:
    """The flags the stream that broke off was sent with."""
    return SendFlags(
        compressed=bool(token.features & Feature.COMPRESSED),
        large_blocks=bool(token.features & Feature.LARGE_BLOCKS),
        embedded=bool(token.features & Feature.EMBED_DATA),
        raw=bool(token.features & Feature.RAW),
    )
