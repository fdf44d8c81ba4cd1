"""Fletcher-4 against a slow reference."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.sendstream.checksum import (
    BATCH_WORDS,
    ZERO_STATE,
    Fletcher4,
    State,
    add,
    advance,
    digest,
    feed_seal,
    pack_state,
    weights,
)

MASK = (1 << 64) - 1
states = st.tuples(*[st.integers(0, MASK)] * 4)


def reference(data: bytes, state: State = ZERO_STATE) -> State:
    a, b, c, d = state
    for (word,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4]):
        a = (a + word) & MASK
        b = (b + a) & MASK
        c = (c + b) & MASK
        d = (d + c) & MASK
    return a, b, c, d


def test_known_vectors() -> None:
    assert digest(bytes(range(256))) == (0x20601FDF80, 0x2C59D754A80, 0x2E430F9BFD40, 0x272F2245444C0)
    words = struct.pack("<4I", 1, 2, 3, 0xFFFFFFFF)
    assert digest(words) == (0x100000005, 0x10000000F, 0x10000001E, 0x100000033)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=900), states)
def test_digest_equals_the_reference(data: bytes, state: State) -> None:
    assert digest(data, state) == reference(data, state)


def test_trace_over_several_batches_gives_the_state_at_each_position() -> None:
    data = np.random.default_rng(5).bytes(BATCH_WORDS * 4 * 2 + 4096)
    edge = BATCH_WORDS * 4
    positions = [0, 4, 280, edge - 4, edge, edge + 4, 2 * edge, len(data)]
    running = Fletcher4((1, 2, 3, MASK))
    found = running.trace(data, positions).tolist()
    assert found == [list(reference(data[:position], (1, 2, 3, MASK))) for position in positions]
    assert running.state == reference(data, (1, 2, 3, MASK))


def test_trace_of_nothing_gives_the_state() -> None:
    assert Fletcher4((1, 2, 3, 4)).trace(b"", [0]).tolist() == [[1, 2, 3, 4]]


@given(states, st.integers(0, 500))
def test_advance_feeds_zeros(state: State, words: int) -> None:
    assert advance(state, weights(words)) == reference(bytes(4 * words), state)


@given(states, states)
def test_feed_seal_feeds_32_bytes(state: State, seal: State) -> None:
    assert feed_seal(state, pack_state(seal)) == reference(pack_state(seal), state)


@given(st.binary(min_size=64, max_size=64), st.binary(min_size=64, max_size=64))
def test_checksum_is_linear(one: bytes, other: bytes) -> None:
    words = [struct.unpack("<16I", data) for data in (one, other)]
    mixed = Fletcher4()
    mixed.add(reference(one))
    mixed.add(reference(other))
    assert mixed.state == add(reference(one), reference(other))
    assert mixed.state[0] == sum(words[0]) + sum(words[1])
