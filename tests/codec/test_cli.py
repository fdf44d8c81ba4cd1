"""``mistify-image stream``, in process and as a real program."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner, Result

from image_service.cli import cli
from tests.codec import samples
from tests.waiting import wait_until

PROGRAM = [sys.executable, "-c", "from image_service.cli import main; main()"]


def environment() -> dict[str, str]:
    """For a program that runs elsewhere: it finds the source all the same."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def run(*args: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, ["stream", *map(str, args)], input=stdin)


def succeed(*args: object, stdin: bytes | None = None) -> str:
    result = run(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(*args: object, stdin: bytes | None = None) -> str:
    """One line on standard error, nothing on standard output, exit status 1."""
    result = run(*args, stdin=stdin)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def sample(name: str) -> Path:
    return samples.directory() / str(samples.manifest()[name]["file"])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(name="raw")
def _raw(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(samples.raw_image())
    return path


@pytest.mark.parametrize(
    "name", ["plain-full-s1", "zstd-ec", "plain-I-s1-s3-package", "plain-redacted", "enc-w-raw", "fs-R-package"]
)
def test_verify_sound_stream_succeeds(name: str) -> None:
    assert succeed("verify", sample(name)).startswith("ok: mistify/")


@pytest.mark.parametrize("name", [name for name in samples.names(expect="error") if "inc_blk16" not in name])
def test_verify_damaged_or_dangerous_stream_fails_with_one_line(name: str) -> None:
    assert fail("verify", sample(name))


def test_verify_reads_standard_input() -> None:
    assert "full" in succeed("verify", "-", stdin=samples.load("gen-empty"))
    assert "truncated" in fail("verify", "-", stdin=samples.load("gen-empty")[:-1])
    assert "empty" in fail("verify", "-", stdin=b"")


def test_verify_increment_against_its_volume(tmp_path: Path) -> None:
    succeed("apply", sample("odd-minimal"), tmp_path / "v")
    assert succeed("verify", sample("odd-inc_min"), "--onto", tmp_path / "v")
    assert "differs from the base" in fail("verify", sample("bad-inc_blk16"), "--onto", tmp_path / "v")
    assert "needs a volume" in fail("verify", sample("plain-inc-s1-s2"), "--onto", tmp_path / "nothing")


def test_verify_missing_file_says_so(tmp_path: Path) -> None:
    assert "No such file" in fail("verify", tmp_path / "missing")
    assert "not a ZFS send stream" in fail("verify", "-", stdin=bytes(1000))


def test_info_tells_what_a_stream_holds() -> None:
    told = json.loads(succeed("info", sample("plain-inc-s1-s2"), "--json"))
    (stream,) = told["streams"]
    assert (stream["name"], stream["kind"], stream["guid"]) == ("mistify/plain@s2", "volume", "446543199311072499")
    assert (stream["fromguid"], stream["volsize"], stream["volblocksize"]) == ("3487082587457790019", 20971520, 8192)
    assert stream["applicable"] is True
    opaque = json.loads(succeed("info", sample("fs-R-package"), "--json"))
    assert opaque["package"] is True
    assert {stream["kind"] for stream in opaque["streams"]} == {"filesystem"}
    assert "cannot be applied: it is redacted" in succeed("info", sample("plain-redacted"))


@pytest.mark.parametrize(
    "name", ["plain-inc-s2-s3-shrink", "lz4-inc-ec", "gen-inc-8k-shrink", "b512-p", "clone-inc-s1-c1"]
)
def test_apply_chain_prints_the_stated_result(tmp_path: Path, name: str) -> None:
    entry, volume = samples.manifest()[name], tmp_path / "v"
    told = {}
    for link in [*entry["base"], name]:
        told = json.loads(succeed("apply", sample(link), volume, "--json"))
    assert told == entry["result"]
    assert digest(volume) == entry["result"]["sha256"]
    assert {path.name for path in tmp_path.iterdir()} == {"v", "v.stream.json"}


@pytest.mark.parametrize("name", [*samples.names(expect="error"), *samples.names(expect="verify ok")])
def test_apply_bad_stream_fails_and_leaves_the_volume_as_it_was(tmp_path: Path, name: str) -> None:
    volume = tmp_path / "v"
    bases = samples.manifest()[name].get("base") or []
    for link in bases:
        succeed("apply", sample(link), volume)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert fail("apply", sample(name), volume)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_apply_after_a_failed_apply_goes_on(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    succeed("apply", sample("plain-full-s1"), volume)
    fail("apply", "-", volume, stdin=samples.load("plain-inc-s1-s2")[:-1])
    told = json.loads(succeed("apply", sample("plain-inc-s1-s2"), volume, "--json"))
    assert told == samples.manifest()["plain-inc-s1-s2"]["result"]


def test_apply_increment_onto_a_changed_volume_is_refused(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    succeed("apply", sample("plain-full-s1"), volume)
    with volume.open("r+b") as file:
        file.write(b"a guest wrote here")
    assert "changed after the last stream" in fail("apply", sample("plain-inc-s1-s2"), volume)


def test_apply_increment_onto_a_touched_but_equal_volume_succeeds(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    succeed("apply", sample("plain-full-s1"), volume)
    volume.write_bytes(volume.read_bytes())
    assert succeed("apply", sample("plain-inc-s1-s2"), volume)


def test_apply_increment_twice_names_the_guid_it_wants(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    succeed("apply", sample("plain-full-s1"), volume)
    succeed("apply", sample("plain-inc-s1-s2"), volume)
    assert "3487082587457790019" in fail("apply", sample("plain-inc-s1-s2"), volume)


def test_apply_full_stream_onto_something_needs_force(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    volume.write_bytes(b"precious")
    told = fail("apply", sample("gen-empty"), volume)
    assert "no stream made what is there" in told
    assert "--force" in told
    assert volume.read_bytes() == b"precious"
    succeed("apply", sample("gen-empty"), volume, "--force")
    assert volume.stat().st_size == 8 << 20


def test_apply_onto_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for volume in (tmp_path, tmp_path / "pipe", ".", "..", "/", tmp_path / ".."):
        assert "neither a file nor a block device" in fail("apply", sample("gen-empty"), volume, "--force")
    assert (tmp_path / "pipe").is_fifo()


def test_apply_full_stream_onto_an_empty_file_succeeds(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    volume.touch()
    assert succeed("apply", sample("gen-empty"), volume)


def test_apply_through_a_link_keeps_link_and_mode(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch(mode=0o600)
    (tmp_path / "v").symlink_to("elsewhere")
    for name in ("plain-full-s1", "plain-inc-s1-s2"):
        succeed("apply", sample(name), tmp_path / "v")
    assert (tmp_path / "v").is_symlink()
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "v.stream.json").exists()


def test_apply_while_another_is_at_it_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """Real processes: the first waits in the middle of its stream for bytes that come late."""
    volume, data = tmp_path / "v", samples.load("plain-inc-s1-s2")
    succeed("apply", sample("plain-full-s1"), volume)
    args = [*PROGRAM, "stream", "apply", "-", str(volume), "--json"]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdin.write(data[:-1])
        first.stdin.flush()
        wait_until((tmp_path / ".v.lock").exists, "the first apply holds the volume")
        assert "another process is applying a stream" in fail("apply", sample("plain-inc-s1-s2"), volume)
        (tmp_path / "w").symlink_to(volume)
        assert "another process" in fail("apply", sample("plain-full-s1"), tmp_path / "w", "--force")
        first.stdin.write(data[-1:])
        first.stdin.close()
        assert json.loads(first.stdout.read()) == samples.manifest()["plain-inc-s1-s2"]["result"]
        assert first.wait(timeout=60) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"v", "v.stream.json", "w"}
    assert succeed("apply", sample("plain-inc-s2-s3-shrink"), volume)


def test_apply_finds_a_lock_file_nobody_holds_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / ".v.lock").touch()  # what a killed apply leaves
    assert succeed("apply", sample("gen-empty"), tmp_path / "v")
    assert not (tmp_path / ".v.lock").exists()


def test_apply_finds_the_state_when_publishing_was_cut_off(tmp_path: Path) -> None:
    """A crash between the record and the rename leaves two states to choose from; the content decides."""
    volume, sidecar = tmp_path / "v", tmp_path / "v.stream.json"
    succeed("apply", sample("plain-full-s1"), volume)
    first, old = json.loads(sidecar.read_text())["current"], volume.read_bytes()
    succeed("apply", sample("plain-inc-s1-s2"), volume)
    second = json.loads(sidecar.read_text())["current"]
    sidecar.write_text(json.dumps({"format": 1, "current": first, "pending": second}))
    assert succeed("apply", sample("plain-inc-s2-s3-shrink"), volume)
    volume.write_bytes(old)
    sidecar.write_text(json.dumps({"format": 1, "current": first, "pending": second}))
    assert succeed("apply", sample("plain-inc-s1-s2"), volume)
    volume.unlink()
    sidecar.write_text(json.dumps({"format": 1, "current": None, "pending": first}))
    assert succeed("apply", sample("plain-full-s1"), volume)


def test_apply_left_incomplete_is_refused(tmp_path: Path) -> None:
    volume = tmp_path / "v"
    succeed("apply", sample("plain-full-s1"), volume)
    (tmp_path / "v.stream.json").write_text(json.dumps({"format": 1, "current": None}))
    assert "left incomplete" in fail("apply", sample("plain-inc-s1-s2"), volume)
    (tmp_path / "v.stream.json").write_text("nonsense")
    assert "JSON" in fail("apply", sample("plain-inc-s1-s2"), volume)


def test_make_is_deterministic_and_increments_fit(tmp_path: Path, raw: Path) -> None:
    newer = tmp_path / "b.raw"
    newer.write_bytes(samples.raw_image()[: 5 << 20] + b"changed" * 1000)
    for name in ("one", "two"):
        succeed("make", raw, "-o", tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    made = json.loads(succeed("make", newer, "--from", raw, "-o", tmp_path / "inc", "--json"))
    first = json.loads(succeed("apply", tmp_path / "one", tmp_path / "v", "--json"))
    second = json.loads(succeed("apply", tmp_path / "inc", tmp_path / "v", "--json"))
    assert first["sha256"] == digest(raw)
    assert (made["fromguid"], made["guid"]) == (first["guid"], second["guid"])
    succeed("make", newer, "-o", tmp_path / "whole")
    whole = json.loads(succeed("apply", tmp_path / "whole", tmp_path / "w", "--json"))
    assert whole == second
    assert (tmp_path / "v").read_bytes().rstrip(b"\0") == newer.read_bytes().rstrip(b"\0")


def test_make_with_everything_stated_equals_the_received_stream(tmp_path: Path, raw: Path) -> None:
    out = tmp_path / "s"
    succeed(
        "make",
        raw,
        "-o",
        out,
        "--volblocksize",
        "8K",
        "--name",
        "host/img@base",
        "--creation",
        1700000000,
        "--guid",
        5001,
    )
    assert out.read_bytes() == samples.load("gen-full-8k")


@pytest.mark.parametrize("outer", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("inner", ["none", "lz4", "zstd", "gzip"])
def test_make_compressed_is_applied_alike(tmp_path: Path, raw: Path, outer: str, inner: str) -> None:
    succeed("make", raw, "-o", tmp_path / "s", "--compress", outer, "--block-compression", inner)
    told = json.loads(succeed("apply", tmp_path / "s", tmp_path / "v", "--json"))
    assert (told["sha256"], told["volblocksize"]) == (digest(raw), 16384)


def test_make_into_a_pipe_writes_to_it(tmp_path: Path, raw: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    args = [*PROGRAM, "stream", "make", str(raw), "-o", str(pipe)]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as program:
        data = pipe.read_bytes()
        assert program.wait(timeout=60) == 0
    assert pipe.is_fifo()
    succeed("verify", "-", stdin=data)


def test_make_for_a_reader_that_goes_away_is_quiet(tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.write(b"x" * (4 << 20))
    with subprocess.Popen(
        [*PROGRAM, "stream", "make", str(big), "-o", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert len(program.stdout.read(10)) == 10
        program.stdout.close()
        assert program.stderr.read() == b""
        assert program.wait(timeout=60) == 1


def test_make_of_what_cannot_be_made_fails_and_leaves_nothing(tmp_path: Path, raw: Path) -> None:
    (tmp_path / "empty").touch()
    assert "0 bytes" in fail("make", tmp_path / "empty", "-o", tmp_path / "s")
    assert "block size" in fail("make", raw, "-o", tmp_path / "s", "--volblocksize", 3000)
    assert "snapshot name" in fail("make", raw, "-o", tmp_path / "s", "--name", "nothing")
    assert "No such file" in fail("make", tmp_path / "missing", "-o", tmp_path / "s")
    assert "--from" in fail("make", raw, "-o", tmp_path / "s", "--from-guid", 5)
    assert not (tmp_path / "s").exists()


def test_make_never_replaces_an_image_by_its_stream(tmp_path: Path, raw: Path) -> None:
    before, link = digest(raw), tmp_path / "link"
    link.symlink_to(raw)
    for output in (raw, link):
        assert "would replace the image" in fail("make", raw, "-o", output)
        assert "would replace the image" in fail("make", sample("gen-empty"), "--from", raw, "-o", output)
    assert digest(raw) == before


@pytest.mark.parametrize(
    ("args", "closed"), [(["verify", "-"], 0), (["apply", "-", "v"], 0), (["make", "a.raw", "-o", "-"], 1)]
)
def test_program_with_a_closed_standard_stream_says_so(tmp_path: Path, raw: Path, args: list[str], closed: int) -> None:
    assert raw.parent == tmp_path
    redirect = {0: "<&-", 1: ">&-"}[closed]
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *PROGRAM, "stream", *args]
    result = subprocess.run(command, stderr=subprocess.PIPE, cwd=tmp_path, env=environment(), timeout=60, check=False)
    assert (result.returncode, result.stderr.count(b"\n")) == (1, 1), result.stderr
    assert b"is closed" in result.stderr


def test_apply_of_a_compressed_stream_that_is_damaged_fails(tmp_path: Path) -> None:
    packed = zstandard.ZstdCompressor().compress(samples.load("gen-full-8k"))
    assert "cut off" in fail("apply", "-", tmp_path / "v", stdin=packed[:-5])
    assert not list(tmp_path.iterdir())


def test_program_pipes_a_stream_through(tmp_path: Path, raw: Path) -> None:
    """Real processes: make | apply, then a broken stream with its exit status and one line."""
    made = subprocess.run([*PROGRAM, "stream", "make", raw, "-o", "-"], capture_output=True, timeout=60, check=True)
    args = [*PROGRAM, "stream", "apply", "-", str(tmp_path / "v"), "--json"]
    told = subprocess.run(args, input=made.stdout, capture_output=True, timeout=60, check=True)
    assert json.loads(told.stdout)["sha256"] == digest(raw)
    args = [*PROGRAM, "stream", "verify", "-"]
    bad = subprocess.run(args, input=made.stdout[:-1], capture_output=True, timeout=60, check=False)
    assert (bad.returncode, bad.stdout, bad.stderr.count(b"\n")) == (1, b"", 1)
    assert b"truncated" in bad.stderr


def test_program_shows_usage_and_no_traceback_for_nonsense() -> None:
    for args in (["nosuch"], ["stream", "nosuch"], ["stream", "make"]):
        result = subprocess.run([*PROGRAM, *args], capture_output=True, timeout=60, check=False)
        assert result.returncode == 2
        assert b"Traceback" not in result.stderr
