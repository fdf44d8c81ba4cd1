"""The life of an image: every move that is allowed, and every one that is not."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from image_service.lifecycle import (
    COMMENT_MAX_CHARS,
    SOURCE_MAX_CHARS,
    UNKNOWN_SIZE,
    Details,
    Expected,
    Image,
    ImageStatus,
    ImageType,
    new_fetch,
    new_upload,
    set_downloading,
    set_failed,
    set_finished,
    set_pending,
    update_size,
)
from imaging.digests import Digest
from imaging.errors import ConflictError, InvalidArgumentError

START = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2026, 1, 2, tzinfo=UTC)
DIGEST = Digest.of(b"content")

MOVES: dict[str, Callable[[Image], Image]] = {
    "set_pending": set_pending,
    "set_downloading": lambda image: set_downloading(image, 10, now=START),
    "update_size": lambda image: update_size(image, 5),
    "set_finished": lambda image: set_finished(image, DIGEST, 7, now=LATER),
    "set_failed": lambda image: set_failed(image, "why", now=LATER),
}

ALLOWED = {
    ("pending", "set_downloading"): "downloading",
    ("pending", "set_finished"): "complete",
    ("pending", "set_failed"): "error",
    ("downloading", "set_downloading"): "downloading",
    ("downloading", "update_size"): "downloading",
    ("downloading", "set_finished"): "complete",
    ("downloading", "set_failed"): "error",
    ("error", "set_pending"): "pending",
}


def _image(status: str) -> Image:
    return Image(id="i", type=ImageType.KVM, source="http://x/", status=ImageStatus(status))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("status", [one.value for one in ImageStatus])
def test_move_is_allowed_exactly_where_the_picture_shows_it(status: str, move: str) -> None:
    outcome = ALLOWED.get((status, move))
    if outcome is None:
        with pytest.raises(ConflictError, match="image i is"):
            MOVES[move](_image(status))
    else:
        assert MOVES[move](_image(status)).status == outcome


def test_fetch_from_pending_to_complete_fills_the_record() -> None:
    image = new_fetch("i", "http://x/", ImageType.KVM, Details("c"))
    assert (image.size_bytes, image.expected_size_bytes, image.download_start) == (0, UNKNOWN_SIZE, None)
    image = set_downloading(image, 7, now=START, validator='"tag"')
    assert (image.expected_size_bytes, image.download_start, image.validator) == (7, START, '"tag"')
    assert set_downloading(image, 7, now=LATER).download_start == START
    image = set_finished(update_size(image, 5), DIGEST, 7, now=LATER)
    assert (image.size_bytes, image.expected_size_bytes, image.download_end) == (7, 7, LATER)
    assert (image.blob, image.validator, image.comment) == (DIGEST, "", "c")


def test_length_below_zero_is_unknown() -> None:
    assert set_downloading(_image("pending"), -5, now=START).expected_size_bytes == UNKNOWN_SIZE


def test_pending_after_an_error_keeps_only_what_was_asked_for() -> None:
    asked = new_fetch("i", "http://x/", ImageType.CONTAINER, Details("c"), Expected(DIGEST))
    failed = set_failed(set_downloading(asked, 7, now=START, validator='"t"'), "why " * 1000, now=LATER)
    assert (failed.size_bytes, failed.validator, failed.download_end) == (0, "", LATER)
    assert len(failed.error) == 1024
    assert set_pending(failed) == asked


@pytest.mark.parametrize(
    "make",
    [
        lambda: new_fetch("i", "h" * (SOURCE_MAX_CHARS + 1), ImageType.KVM),
        lambda: new_fetch("i", "http://x/", ImageType.KVM, Details("c" * (COMMENT_MAX_CHARS + 1))),
        lambda: new_upload("i", ImageType.KVM, Details("c" * (COMMENT_MAX_CHARS + 1)), now=START),
        lambda: ImageType.parse("KVM", "invalid type"),
        lambda: ImageType.parse(None, "invalid type"),
    ],
)
def test_record_that_is_too_large_or_of_no_type_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgumentError):
        make()
