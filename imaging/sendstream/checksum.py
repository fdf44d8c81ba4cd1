"""Fletcher-4 over little-endian 32-bit words: four 64-bit accumulators.

Everything a stream consists of is fed in stream order, so a reader needs no per-record calls: :meth:`Fletcher4.trace` runs
over a large piece once and reports the state at each position asked for. An encoder has to feed each checksum back into the
next. It traces the piece with zeros in the places of the checksums, and because the function is linear it can add what the
checksums contribute in plain integers: :func:`advance`, :func:`feed_seal`, :func:`add`.

Without the C extension (:mod:`imaging.sendstream.backend`) this works on arrays of 64-bit integers, whose additions wrap as the
format wants.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from imaging.sendstream import backend

State: TypeAlias = tuple[int, int, int, int]
Buffer: TypeAlias = bytes | bytearray | memoryview

ZERO_STATE: State = (0, 0, 0, 0)
BATCH_WORDS = 32768
"""Words a pass works on: its 64-bit sums (256 KiB) then stay in a core's second-level cache."""
_MASK = (1 << 64) - 1
_STATE = struct.Struct("<4Q")


def pack_state(state: State) -> bytes:
    """The 32 bytes that stand for a state in a stream."""
    return _STATE.pack(*state)


def unpack_state(data: Buffer, offset: int = 0) -> State:
    """The state those 32 bytes stand for."""
    return _STATE.unpack_from(data, offset)


class Fletcher4:
    """A running checksum. Pieces are whole words; 1 to 3 bytes at the end of a piece are ignored, as the format says."""

    def __init__(self, state: State = ZERO_STATE) -> None:
        self.state = state
        """The accumulators now."""
        self._native = backend.native
        self._sums = np.empty(0 if self._native else BATCH_WORDS + 1, np.uint64)

    def reset(self) -> None:
        """Start anew."""
        self.state = ZERO_STATE

    def add(self, extra: State) -> None:
        """Account for words that were fed as zeros; ``extra`` is the state they alone would have led to."""
        self.state = add(self.state, extra)

    def update(self, data: Buffer) -> None:
        """Feed a piece."""
        self.trace(data, ())

    def trace(self, data: Buffer, positions: Sequence[int]) -> npt.NDArray[np.uint64]:
        """Feed a piece; a row of four accumulators for the state after each of ``positions`` bytes of it.

        Positions ascend and are multiples of four, from 0 to the length of the piece.
        """
        if self._native is not None:
            self.state, states = self._native.trace(self.state, data, np.asarray(positions, np.int64))
            return np.frombuffer(states, "<u8").reshape(-1, 4)
        words = np.frombuffer(data, "<u4", len(data) // 4)
        wanted = np.asarray(positions, np.int64) >> 2
        found = np.empty((4, len(wanted)), np.uint64)
        cuts = range(0, len(words), BATCH_WORDS)
        bounds = np.searchsorted(wanted, [*cuts, len(words) + 1]) if len(wanted) else [0] * (len(cuts) + 1)
        for number, start in enumerate(cuts):
            low, high = bounds[number], bounds[number + 1]
            self._batch(words[start : start + BATCH_WORDS], wanted[low:high] - start, found[:, low:high])
        if not len(words):
            found[:] = np.array(self.state, np.uint64)[:, None]
        return found.T

    def _batch(
        self, words: npt.NDArray[np.uint32], wanted: npt.NDArray[np.int64], found: npt.NDArray[np.uint64]
    ) -> None:
        """One pass: element i of each nested sum is the accumulator after i words."""
        sums = self._sums[: len(words) + 1]
        sums[1:] = words
        state = []
        for order in range(4):
            sums[0] = self.state[order]
            np.cumsum(sums, out=sums)
            state.append(int(sums[-1]))
            if len(wanted):
                found[order] = sums[wanted]
        self.state = (state[0], state[1], state[2], state[3])


def weights(words: int) -> tuple[int, int, int]:
    """What :func:`advance` multiplies old accumulators with when ``words`` words are fed."""
    return words, words * (words + 1) // 2, words * (words + 1) * (words + 2) // 6


def advance(state: State, factors: tuple[int, int, int]) -> State:
    """The state after feeding as many zero words as the :func:`weights` are for."""
    a, b, c, d = state
    n, t2, t3 = factors
    return a, (b + n * a) & _MASK, (c + n * b + t2 * a) & _MASK, (d + n * c + t2 * b + t3 * a) & _MASK


def add(one: State, other: State) -> State:
    """The sum of two states: Fletcher-4 is linear in the words fed."""
    return (
        (one[0] + other[0]) & _MASK,
        (one[1] + other[1]) & _MASK,
        (one[2] + other[2]) & _MASK,
        (one[3] + other[3]) & _MASK,
    )


_STATE_WORDS = struct.Struct("<8I")
_EIGHT = weights(8)


def feed_seal(state: State, seal: bytes) -> State:
    """The state after feeding the 32 bytes of a record's checksum."""
    w0, w1, w2, w3, w4, w5, w6, w7 = _STATE_WORDS.unpack(seal)
    fed = (
        w0 + w1 + w2 + w3 + w4 + w5 + w6 + w7,
        8 * w0 + 7 * w1 + 6 * w2 + 5 * w3 + 4 * w4 + 3 * w5 + 2 * w6 + w7,
        36 * w0 + 28 * w1 + 21 * w2 + 15 * w3 + 10 * w4 + 6 * w5 + 3 * w6 + w7,
        120 * w0 + 84 * w1 + 56 * w2 + 35 * w3 + 20 * w4 + 10 * w5 + 4 * w6 + w7,
    )
    return add(advance(state, _EIGHT), fed)


def digest(data: Buffer, state: State = ZERO_STATE) -> State:
    """The state after one piece."""
    running = Fletcher4(state)
    running.update(data)
    return running.state
