"""What the driver sends is what the zfs program sends, bytes and holds alike, and the zfs program goes on where it broke off."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from agent_image.drivers.base import SendFlags
from agent_image.drivers.zfs import ZfsDriver
from agent_image.drivers.zfs.hidden import MARK
from imaging.names import DatasetName, SnapshotName
from imaging.sendstream.package import PackagedDataset, packaged_datasets
from imaging.sendstream.records import HEADER_BYTES, RecordType, payload_size
from tests.acceptance.daemons import Agent, start_agent
from tests.contracts.storage_driver_tools import MIB, make_volume, noise, stream_of, take, write
from tests.integration.zfs_pool import PROGRAM_TIMEOUT_S, lab_driver, new_place, run
from tests.waiting import wait_until

pytestmark = pytest.mark.backend("zfs")

FLAGS = {
    "": SendFlags(),
    "-c": SendFlags(compressed=True),
    "-L": SendFlags(large_blocks=True),
    "-e": SendFlags(embedded=True),
    "-Lec": SendFlags(compressed=True, large_blocks=True, embedded=True),
    "-w": SendFlags(raw=True),
}
DATA_BYTES = 2 * MIB
LARGE_BLOCK_BYTES = 256 << 10
FIRST_PIECE_BYTES = 64 << 10


@pytest.fixture(scope="module")
def driver() -> Iterator[ZfsDriver]:
    with lab_driver() as driver:
        yield driver


@pytest.fixture
def place(driver: ZfsDriver) -> Iterator[DatasetName]:
    with new_place(driver, "send") as name:
        run("zfs", "set", "compression=lz4", name)
        yield name


@pytest.fixture
def history(driver: ZfsDriver, place: DatasetName) -> tuple[SnapshotName, SnapshotName]:
    """A volume with two snapshots and a bookmark of the first: data that compresses, data that does not, a tiny block, large blocks."""
    volume = place / "v"
    driver.create_volume(volume, 16 * MIB, thin=True, volblocksize_bytes=LARGE_BLOCK_BYTES)
    for number in range(2):
        write(driver, volume, number * 4 * MIB, noise(number, DATA_BYTES) + b"text " * 50_000 + bytes(MIB) + b"tiny")
        take(driver, volume @ f"s{number}")
    driver.bookmark(volume @ "s0", "b0")
    return volume @ "s0", volume @ "s1"


def zfs_send(*words: object) -> bytes:
    command = ["zfs", "send", *(str(word) for word in words if word)]
    return subprocess.run(command, capture_output=True, check=True, timeout=PROGRAM_TIMEOUT_S).stdout


def zfs_receive(target: SnapshotName, stream: bytes, *options: str, check: bool = True) -> None:
    command = ["zfs", "receive", *options, str(target)]
    done = subprocess.run(command, input=stream, capture_output=True, check=False, timeout=PROGRAM_TIMEOUT_S)
    assert not check or done.returncode == 0, done.stderr
    assert check or done.returncode != 0


def received(driver: ZfsDriver, name: SnapshotName) -> str:
    """The digest of what the zfs program received, once the driver knows of it."""
    wait_until(
        lambda: name.dataset in {info.name for info in driver.list(name.dataset.parent or name.dataset)}, str(name)
    )
    wait_until(lambda: name in {info.name for info in driver.list_snapshots(name.dataset)}, str(name))
    return digest(driver, name)


def digest(driver: ZfsDriver, name: SnapshotName) -> str:
    with driver.open_snapshot(name) as fd, os.fdopen(os.dup(fd), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_of(name: DatasetName) -> str:
    return run("zfs", "get", "-H", "-o", "value", "receive_resume_token", name).strip()


# -- the same bytes as the zfs program ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", FLAGS)
@pytest.mark.parametrize("base", [None, "s0", "#b0"])
def test_stream_is_the_one_of_the_zfs_program(
    driver: ZfsDriver, history: tuple[SnapshotName, SnapshotName], base: str | None, words: str
) -> None:
    sent = history[1]
    source = () if base is None else ("-i", f"{sent.dataset}{base}" if base.startswith("#") else history[0])
    assert stream_of(driver, sent, base=base, flags=FLAGS[words]) == zfs_send(words, *source, sent)


def test_increment_from_a_bookmark_whose_snapshot_is_gone_is_the_same(
    driver: ZfsDriver, history: tuple[SnapshotName, SnapshotName]
) -> None:
    before = stream_of(driver, history[1], base="#b0")
    driver.destroy_snapshot(history[0])
    assert stream_of(driver, history[1], base="#b0") == before


def test_encrypted_volume_is_sent_raw_as_it_is_and_plain_without(
    driver: ZfsDriver, place: DatasetName, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_text("a phrase to pass\n")
    secret = (
        "-o",
        "encryption=on",
        "-o",
        "keyformat=passphrase",
        "-o",
        f"keylocation=file://{key}",
        "-o",
        "pbkdf2iters=100000",
    )
    run("zfs", "create", "-s", "-V", "4M", *secret, place / "e")
    wait_until(lambda: len(driver.list(place)) == 2, "the encrypted volume")
    write(driver, place / "e", 0, b"in the clear" * 1000)
    name = take(driver, (place / "e") @ "s").name
    plain, raw = stream_of(driver, name), stream_of(driver, name, flags=FLAGS["-w"])
    assert raw == zfs_send("-w", name)
    assert b"in the clear" in plain
    assert b"in the clear" not in raw


# -- packages with properties --------------------------------------------------------------------------------------------------


def listed(package: bytes) -> PackagedDataset:
    size = payload_size(RecordType.BEGIN, package)
    (dataset,) = packaged_datasets(package[HEADER_BYTES : HEADER_BYTES + size])
    return dataset


@pytest.mark.parametrize("base", [None, "s0"])
def test_package_carries_the_properties_and_the_stream(driver: ZfsDriver, place: DatasetName, base: str | None) -> None:
    volume = place / "v"
    driver.create_volume(volume, 4 * MIB, properties={"test:a": "x y", "test:b": "é"})
    run("zfs", "set", "compression=zstd", "readonly=on", volume)
    sent = [take(driver, volume @ name).name for name in ("s0", "s1")][bool(base)]
    wait_until(lambda: driver.get(volume).properties.get("readonly") == "on", "the property")
    source = () if base is None else ("-i", volume @ "s0")
    package, theirs = (
        stream_of(driver, sent, base=base, flags=SendFlags(properties=True)),
        zfs_send("-p", *source, sent),
    )
    ours, wanted = listed(package), listed(theirs)
    assert (ours.name, ours.snapshots) == (wanted.name, {sent.snapshot: driver.get_snapshot(sent).guid})
    assert ours.properties == {name: wanted.properties[name] for name in ours.properties}
    assert set(ours.properties) == {"test:a", "test:b", "compression", "readonly", "refreservation"}
    if base:
        zfs_receive((place / "w") @ "s0", stream_of(driver, volume @ "s0"))
    zfs_receive((place / "w") @ sent.snapshot, package)
    names = "test:a,test:b,compression,readonly"
    shown = run("zfs", "get", "-Hp", "-o", "property,value,source", names, place / "w").splitlines()
    assert sorted(shown) == sorted(
        ["test:a\tx y\treceived", "test:b\té\treceived", "compression\tzstd\treceived", "readonly\ton\treceived"]
    )
    assert received(driver, (place / "w") @ sent.snapshot) == digest(driver, sent)


# -- going on ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "words"), [(None, ""), (None, "-w"), ("s0", "-Lec"), ("#b0", ""), ("#b0", "-Lec")])
def test_receiver_that_kept_a_part_gets_the_rest_by_its_token(
    driver: ZfsDriver, place: DatasetName, history: tuple[SnapshotName, SnapshotName], base: str | None, words: str
) -> None:
    target, sent = (place / "w") @ "s1", history[1]
    if base:
        zfs_receive((place / "w") @ "s0", stream_of(driver, history[0], flags=FLAGS[words]), "-u")
    if base == "#b0":
        driver.destroy_snapshot(history[0])
    stream = stream_of(driver, sent, base=base, flags=FLAGS[words])
    zfs_receive(target, stream[: len(stream) // 3], "-s", "-F", check=False)
    rest = send_rest(driver, sent, token_of(target.dataset))
    zfs_receive(target, rest[: len(rest) // 2], "-s", check=False)  # breaks once more
    token = token_of(target.dataset)
    last = send_rest(driver, sent, token)
    assert len(last) < len(rest) < len(stream)
    assert last == zfs_send("-t", token)
    zfs_receive(target, last, "-s")
    assert received(driver, target) == digest(driver, sent)


def test_receiver_that_lacks_only_the_end_gets_it(
    driver: ZfsDriver, place: DatasetName, history: tuple[SnapshotName, SnapshotName]
) -> None:
    target, stream = (place / "w") @ "s1", stream_of(driver, history[1])
    zfs_receive(target, stream[: len(stream) - HEADER_BYTES], "-s", check=False)
    token = token_of(target.dataset)
    assert send_rest(driver, history[1], token) == zfs_send("-t", token)
    zfs_receive(target, send_rest(driver, history[1], token), "-s")
    assert received(driver, target) == digest(driver, history[1])


def send_rest(driver: ZfsDriver, name: SnapshotName, token: str) -> bytes:
    with tempfile.TemporaryFile() as target:
        driver.send(name, target.fileno(), resume_token=token)
        target.seek(0)
        return target.read()


def test_partial_state_of_a_receive_of_ours_is_removed_at_start(driver: ZfsDriver, place: DatasetName) -> None:
    """Ours never keep any; should another version have done so, under our name and mark, it goes."""
    make_volume(driver, place / "v")
    write(driver, place / "v", 0, noise(1, DATA_BYTES))
    stream = stream_of(driver, take(driver, (place / "v") @ "s").name)
    identity = "0123456789abcdef"
    left = place / f".mistify-receive-{identity}"
    driver.close()
    zfs_receive(left @ "s", stream[: len(stream) // 2], "-s", "-o", f"{MARK}={identity}", check=False)
    assert token_of(left) != "-"
    driver.open()
    assert str(left) not in run("zfs", "list", "-H", "-o", "name", "-r", place).split()


# -- holds -------------------------------------------------------------------------------------------------------------------

SENDER = """
import sys
import tempfile
from agent_image.drivers.zfs import ZfsDriver
from imaging.names import SnapshotName
name = SnapshotName.parse(sys.argv[1])
driver = ZfsDriver(name.dataset.pool)
driver.open()
driver.send(name, 1, base="s0")
"""


def test_snapshots_are_held_while_sent_and_let_go_when_the_sender_is_killed(
    driver: ZfsDriver, history: tuple[SnapshotName, SnapshotName]
) -> None:
    driver.close()  # the pool belongs to the sender now
    command = [sys.executable, "-c", SENDER, str(history[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as sender:
        assert sender.stdout is not None
        assert sender.stdout.read(1)  # under way, and the pipe takes no more
        for name in history:
            assert "mistify.send:" in run("zfs", "holds", "-H", name)
            assert subprocess.run(["zfs", "destroy", str(name)], capture_output=True, check=False).returncode
        sender.kill()
    wait_until(lambda: not run("zfs", "holds", "-H", *history).strip(), "the holds to go")
    driver.open()
    assert driver.destroy_snapshot(history[0]) == [history[0]]


# -- over the wire -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def agent(driver: ZfsDriver, history: tuple[SnapshotName, SnapshotName], tmp_path: Path) -> Iterator[Agent]:
    """An agent on the pool, while the driver of the tests has let go of it."""
    driver.close()
    with start_agent(tmp_path / "state", driver="zfs", zpool=str(driver.pool)) as agent:
        yield agent
    driver.open()


def bytes_read(agent: Agent) -> int:
    """What the agent's process has read by read(2) and its like: not what the kernel moved between descriptors."""
    return int(Path(f"/proc/{agent.pid}/io").read_text().split("rchar: ")[1].split()[0])


def download(agent: Agent, name: SnapshotName, **parameters: str) -> bytes:
    query = {"id": str(name), **parameters}
    response = requests.get(f"{agent.url}/snapshots/download", params=query, timeout=PROGRAM_TIMEOUT_S)
    assert response.status_code == 200, response.text
    return response.content


def test_download_moves_from_the_kernels_pipe_to_the_socket_without_being_read(
    agent: Agent, history: tuple[SnapshotName, SnapshotName]
) -> None:
    download(agent, history[0])  # imports and the like are done
    before = bytes_read(agent)
    stream = download(agent, history[1])
    assert stream == zfs_send(history[1])
    assert bytes_read(agent) - before < len(stream) // 4, "the first piece and the request"
    assert len(stream) > 8 * FIRST_PIECE_BYTES


def test_download_with_parameters_is_what_the_zfs_program_sends(
    agent: Agent, place: DatasetName, history: tuple[SnapshotName, SnapshotName]
) -> None:
    flags = {"compressed": "true", "large_blocks": "true", "embedded": "true"}
    assert download(agent, history[1], **flags) == zfs_send("-Lec", history[1])
    assert download(agent, history[1], **{"from": "#b0"}) == zfs_send("-i", f"{place}/v#b0", history[1])
    stream = download(agent, history[1], **{"from": "@s0"})
    zfs_receive((place / "w") @ "s0", download(agent, history[0]))
    zfs_receive((place / "w") @ "s1", stream[: len(stream) // 2], "-s", "-F", check=False)
    token = token_of(place / "w")
    zfs_receive((place / "w") @ "s1", download(agent, history[1], resume_token=token), "-s")
    for name in ("v", "w"):
        run("zfs", "clone", f"{place}/{name}@s1", f"{place}/{name}-clone")
    devices = [device_of(agent, place / f"{name}-clone") for name in ("v", "w")]
    assert devices[0].read_bytes() == devices[1].read_bytes()


def device_of(agent: Agent, volume: DatasetName) -> Path:
    """The device, once the agent noticed that somebody made the volume."""
    wait_until(lambda: agent.raw_call("GetVolume", {"id": str(volume)})["error"] is None, str(volume))
    return Path(agent.call("GetVolume", id=str(volume))["volumes"][0]["device"])
