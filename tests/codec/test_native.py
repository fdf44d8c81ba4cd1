"""The C extension: whatever it is given, it does what numpy does, and refuses what does not fit its buffers."""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.errors import MistifyError
from imaging.sendstream import backend
from imaging.sendstream.checksum import Fletcher4
from imaging.sendstream.reader import Frame, StreamReader, WriteRun
from imaging.sendstream.records import Write, pack
from imaging.sendstream.rules import Limits
from imaging.sendstream.validator import Policy, StreamValidator
from imaging.sendstream.volume import StreamHeader, apply_stream, make_stream_from
from imaging.sendstream.writer import StreamWriter
from tests.codec import samples

MASK = (1 << 64) - 1
states = st.tuples(*[st.integers(0, MASK)] * 4)
ZERO = (0, 0, 0, 0)
WHOLE = [name for name in samples.names() if samples.manifest()[name].get("bytes", 1 << 30) < 1 << 20]


@contextmanager
def numpy_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "native", None)
        yield


def native() -> backend.Native:
    assert backend.native is not None, "MISTIFY_CODEC leaves out what is to be tested"
    return backend.native


def places(*values: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def write(offset: int, size: int, **more: Any) -> Write:
    plain = Write(1, 23, offset, size, 100, 2, 0, 0, bytes(32), 0, 0, bytes(8), bytes(12), bytes(16))
    return plain._replace(**more)


# -- equal to numpy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [15, 16, 17, 1 << 17, (1 << 17) + 1])
@pytest.mark.parametrize("rest_bytes", [0, 4, 28, 31])
@pytest.mark.parametrize("fill", ["random", "ones"])
def test_sums_side_by_side_equal_numpy_where_they_begin_and_where_they_are_folded(
    rounds: int, rest_bytes: int, fill: str
) -> None:
    """A round is 32 bytes; fewer than 16 are summed word by word, and 2**17 are folded together. Ones are the largest words there are."""
    size = rounds * 32 + rest_bytes
    data = random.Random(size).randbytes(size) if fill == "random" else b"\xff" * size
    state = (MASK, MASK - 1, 1 << 63, 12345)
    fast = Fletcher4(state)
    fast.update(memoryview(b"x" + data)[1:])
    with numpy_only():
        slow = Fletcher4(state)
        slow.update(data)
    assert fast.state == slow.state


@given(states, st.binary(max_size=3000), st.integers(0, 7), st.data())
def test_trace_of_any_bytes_at_any_address_equals_numpy(
    state: tuple[int, int, int, int], data: bytes, shift: int, drawn: st.DataObject
) -> None:
    wanted = sorted(drawn.draw(st.lists(st.integers(0, len(data) // 4), max_size=8)))
    view = memoryview(bytes(shift) + data)[shift:]
    with numpy_only():
        slow = Fletcher4(state)
        expected = slow.trace(data, [4 * place for place in wanted]).tolist()
    fast = Fletcher4(state)
    assert fast.trace(view, [4 * place for place in wanted]).tolist() == expected
    assert fast.state == slow.state


@given(st.lists(st.integers(0, 64).map(lambda n: n * 8), max_size=12), st.randoms(use_true_random=False))
def test_records_sealed_equal_numpy(sizes: list[int], rng: random.Random) -> None:
    pairs = [(write(8 * n, size), rng.randbytes(size)) for n, size in enumerate(sizes)]
    with numpy_only():
        slow = StreamWriter()
        expected = [slow.records(pairs), slow.end(1)]
    fast = StreamWriter()
    assert [fast.records(pairs), fast.end(1)] == expected


@settings(max_examples=50)
@given(st.sampled_from([512, 4096, 16384]), st.integers(1, 200_000), st.randoms(use_true_random=False))
def test_streams_made_equal_numpy(block_bytes: int, size: int, rng: random.Random) -> None:
    image = b"".join(rng.choice([bytes(700), rng.randbytes(700), bytes(699) + b"x"]) for _ in range(size // 700 + 1))
    header = StreamHeader(9, "a/b@c", block_bytes, 5)
    with numpy_only():
        expected = list(make_stream_from(io.BytesIO(image), header))
    assert list(make_stream_from(io.BytesIO(image), header)) == expected


def outcome(data: bytes, cuts: list[int]) -> tuple[object, ...]:
    """Everything that can be seen of a stream fed in these pieces: frames, what passes, the summary, or the error."""
    reader, validator, frames, passed = StreamReader(), StreamValidator(policy=Policy(opaque=True)), [], []
    try:
        for low, high in pairwise([0, *sorted(cuts), len(data)]):
            frames += samples.plain(reader.feed(data[low:high]))
            passed.append(validator.feed(data[low:high]))
        reader.finish()
        passed.append(validator.finish())
    except MistifyError as err:
        return frames, passed, type(err), err.message
    return frames, passed, validator.summaries


@settings(max_examples=150)
@given(st.sampled_from(WHOLE), st.data())
def test_any_stream_damaged_or_not_in_any_split_ends_alike(name: str, data: st.DataObject) -> None:
    stream = bytearray(samples.load(name))
    for _ in range(data.draw(st.integers(0, 2))):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    del stream[len(stream) - data.draw(st.sampled_from([0, 0, 0, 1, 312])) :]
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=6))
    with numpy_only():
        expected = outcome(bytes(stream), cuts)
    assert outcome(bytes(stream), cuts) == expected


@settings(max_examples=150)
@given(st.data())
def test_unsealed_header_of_any_bytes_ends_alike(data: st.DataObject) -> None:
    """Without checksums every field reaches the code that looks at it: sizes, offsets and types out of all bounds."""
    found = samples.frames(samples.load("gen-full-8k"))[:9]
    stream = bytearray(b"".join(bytes(frame.header) + bytes(frame.payload) for frame in found))
    starts = [frame.offset for frame in found[1:]]
    for start in starts:
        stream[start + 280 : start + 312] = bytes(32)
    start = data.draw(st.sampled_from(starts))
    at = data.draw(st.integers(0, 100))
    stream[start + at : start + at + 8] = data.draw(
        st.one_of(st.binary(min_size=8, max_size=8), st.integers(0, MASK).map(lambda n: n.to_bytes(8, "little")))
    )
    with numpy_only():
        expected = outcome(bytes(stream), [])
    assert outcome(bytes(stream), []) == expected


# -- runs ------------------------------------------------------------------------------------------------------------------


def runs(sizes: list[tuple[int, int]], **more: int) -> list[tuple[int, int]]:
    """Start and length of each run in records at these offsets and of these sizes."""
    data = StreamWriter().records([(write(offset, size, **more), b"x" * size) for offset, size in sizes])
    _, end, found = native().walk(ZERO, data, 0)
    assert end == len(data)
    return [(start, count) for start, count, _ in found]


def test_walk_joins_blocks_that_stand_side_by_side() -> None:
    assert runs([(0, 512), (512, 512), (1024, 512)]) == [(0, 3)]
    assert runs([(0, 512), (1024, 512)]) == [(0, 1), (824, 1)]
    assert runs([(0, 512), (512, 1024)]) == [(0, 1), (824, 1)]
    assert runs([(0, 512), (0, 512)]) == [(0, 1), (824, 1)]
    assert runs([(0, 512), (512, 512)], compression=15, compressed_bytes=512) == [(0, 1), (824, 1)]
    assert runs([(MASK - 511, 512), (0, 512)]) == [(0, 1), (824, 1)], "an offset that wraps around is not the next"


def test_walk_reports_a_bounded_number_of_runs_and_goes_on() -> None:
    data = StreamWriter().records([(write(2 * n * 512, 512), bytes(512)) for n in range(3000)])
    state, end, total = ZERO, 0, 0
    while end < len(data):
        state, end, found = native().walk(state, data, end)
        assert 0 < len(found) <= 1024
        total += len(found)
    assert total == 3000
    assert list(state) == Fletcher4().trace(data, [len(data)]).tolist()[0]


def test_reader_hands_out_runs_that_cover_the_same_frames() -> None:
    image = random.Random(3).randbytes(1 << 20)
    stream = b"".join(make_stream_from(io.BytesIO(image), StreamHeader(9, "a/b@c", 8192, 5), size_bytes=1 << 20))
    checked = StreamReader().feed_runs(stream)
    assert [item.blocks for item in checked if isinstance(item, WriteRun)] == [127]
    flat: list[Frame] = []
    for item in checked:
        flat += item.frames() if isinstance(item, WriteRun) else [item]
    assert samples.plain(flat) == samples.plain(samples.frames(stream))


def test_limit_inside_a_run_names_the_record_that_breaks_it() -> None:
    image = random.Random(4).randbytes(1 << 20)
    stream = b"".join(make_stream_from(io.BytesIO(image), StreamHeader(9, "a/b@c", 8192, 5)))
    with numpy_only(), pytest.raises(MistifyError) as expected, samples.scratch() as fd:
        apply_stream(io.BytesIO(stream), fd, limits=Limits(volume_size_max_bytes=100_000))
    with pytest.raises(MistifyError) as found, samples.scratch() as fd:
        apply_stream(io.BytesIO(stream), fd, limits=Limits(volume_size_max_bytes=100_000))
    assert found.value.message == expected.value.message
    assert "record 14 (WRITE)" in found.value.message


# -- bounds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [[8, 4], [-4], [2], [16], [1 << 40], [-(1 << 63)], [(1 << 63) - 4]])
def test_positions_that_do_not_fit_are_refused(wanted: list[int]) -> None:
    with pytest.raises(ValueError, match="positions"):
        native().trace(ZERO, bytes(12), places(*wanted))


@pytest.mark.parametrize("starts", [[1], [-8], [8], [0, 8], [624 - 308], [(1 << 63) - 1]])
def test_records_that_do_not_fit_are_not_sealed(starts: list[int]) -> None:
    data = bytearray(312)
    with pytest.raises(ValueError, match="positions"):
        native().seal(ZERO, data, places(*starts))
    assert data == bytes(312)


@pytest.mark.parametrize(
    ("header", "rows", "block"), [(279, 8, 4), (280, 9, 4), (280, 8, 0), (280, 8, -4), (280, 6, 2)]
)
def test_blocks_that_do_not_fit_are_not_sealed(header: int, rows: int, block: int) -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        native().seal_writes(ZERO, bytes(header), bytes(rows), block)


@pytest.mark.parametrize(("stride", "skip"), [(0, 0), (-1, 0), (5, 0), (4, 5), (4, -1)])
def test_blocks_that_do_not_fit_are_not_looked_at(stride: int, skip: int) -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        native().zero_blocks(bytes(8), stride, skip)


@pytest.mark.parametrize("start", [-1, 9, 1 << 60])
def test_walk_from_outside_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        native().walk(ZERO, bytes(8), start)


@given(st.binary(max_size=1500), st.integers(0, 1500), states)
def test_walk_over_garbage_takes_nothing_or_stays_inside(
    data: bytes, start: int, state: tuple[int, int, int, int]
) -> None:
    start = min(start, len(data))
    _, end, found = native().walk(state, data, start)
    assert start <= end <= len(data)
    assert sum(count * stride for _, count, stride in found) == end - start


def test_walk_stops_before_a_payload_that_is_not_all_there() -> None:
    data = StreamWriter().records([(write(0, 512), bytes(512)), (write(512, 512), bytes(512))])
    for size in range(len(data)):
        _, end, found = native().walk(ZERO, data[:size], 0)
        assert (end, len(found)) == ((824, 1) if size >= 824 else (0, 0))
    huge = bytearray(pack(write(0, MASK)) + bytes(32))
    assert native().walk(ZERO, huge, 0)[1] == 0


@given(st.lists(st.sampled_from([0, 0, 0, 1, 255]), max_size=300), st.integers(1, 40))
def test_zero_blocks_equals_looking(values: list[int], block: int) -> None:
    data = bytes(values[: len(values) // block * block])
    expected = bytes(not any(data[at : at + block]) for at in range(0, len(data), block))
    assert native().zero_blocks(data, block, 0) == expected


def test_other_threads_run_meanwhile() -> None:
    """The interpreter lock is free during long passes: two threads sum the same bytes and agree."""
    data = random.Random(8).randbytes(1 << 20)
    expected = native().trace(ZERO, data, places())
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(native().trace(ZERO, data, places()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]


@pytest.mark.parametrize("variable", ["numpy", ""])
def test_environment_can_leave_the_extension_out(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.ENVIRONMENT, variable)
    assert (backend._load() is None) == (variable == "numpy")


def test_extension_of_another_revision_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backend, "_REVISION", -1)
    assert backend._load() is None
    assert "another source" in caplog.text


def test_missing_extension_leaves_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backend, "_MODULE", "imaging.sendstream.not_built")
    assert backend._load() is None
