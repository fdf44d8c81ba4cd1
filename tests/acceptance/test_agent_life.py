"""agent-wire sections 2, 6 and 7: flags, environment, files, upgrades, restarts, signals."""

from __future__ import annotations

import gzip
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from demo.servers.processes import free_port
from tests.acceptance.daemons import ROOT, RpcFailureError, clean_environment, new_agent, start_agent, write_disk
from tests.fakes.agent_world import MIB, disk
from tests.fakes.image_server import FakeImageServer
from tests.integration.zfs_pool import there
from tests.waiting import wait_until

RUN_TIMEOUT_S = 60

PULL_MEMORY_MAX_KIB = 150 * 1024
"""What the agent promises, with four pulls at once."""


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The agent as a command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "agent_image", *arguments],
        env=clean_environment(env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )


def test_help_shows_the_four_flags_of_old_and_their_defaults() -> None:
    text = " ".join(run("--help").stdout.split())
    for flag, default in (
        ("-p, --port", "19999"),
        ("-z, --zpool", "mistify"),
        ("-l, --log-level", "warning"),
        ("-i, --image-service", "image.services.lochness.local"),
    ):
        assert flag in text
        assert default in text
    for flag in ("--driver", "--state-dir", "--fetchers", "--max-pending", "--config", "--token-file", "--insecure"):
        assert flag in text
    assert "MISTIFY_" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--zpool", "../x"], "pool"),
        (["--driver", "btrfs"], "btrfs"),
        (["-l", "loud"], "loud"),
        (["--port", "70000"], "70000"),
        (["--image-service", "ftp://x"], "image service"),
        (["--fetchers", "0"], "fetchers"),
        (["--config", "/nonexistent/config.toml"], "config.toml"),
        (["--bind", "0.0.0.0"], "--token-file"),
    ],
)
def test_wrong_flag_is_refused_with_a_reason(tmp_path: Path, arguments: Sequence[str], words: str) -> None:
    ended = run("--state-dir", str(tmp_path / "state"), "--port", str(free_port()), *arguments)
    assert ended.returncode != 0
    assert words in ended.stderr


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical", "fatal"])
def test_log_level_of_old_is_taken(tmp_path: Path, level: str) -> None:
    with start_agent(tmp_path / "state", log_level=level) as agent:
        assert agent.call("ListImages") == {"images": []}


def test_without_flags_it_starts_on_the_file_driver_and_says_so(tmp_path: Path) -> None:
    """Only the port is given, because 19999 may be taken here, and a home to keep the machine clean."""
    agent = new_agent(tmp_path / "unused")
    agent.command = [sys.executable, "-m", "agent_image", "--port", str(agent.port)]
    agent.env = clean_environment({"STATE_DIRECTORY": str(tmp_path / "var"), "HOME": str(tmp_path)})
    if Path("/dev/zfs").exists():
        agent.command += ["--driver", "file"]
    agent.start()
    try:
        assert "file driver" in agent.log()
        assert agent.call("CreateVolume", id="v", size=1)["volumes"][0]["id"] == "mistify/v"
    finally:
        assert agent.stop() == 0
    assert (tmp_path / "var").is_dir()


def test_settings_come_from_flag_then_environment_then_file(
    tmp_path: Path, driver: str, make_pool: Callable[[str], str]
) -> None:
    for name in ("fromfile", "fromenv", "fromflag"):
        make_pool(name)
    config = tmp_path / "agent.toml"
    config.write_text('zpool = "fromfile"\nmax-pending = 3\nlog-level = "info"\n')
    with start_agent(tmp_path / "a", driver=driver, config=config, log_level=None) as agent:
        assert agent.call("CreateVolume", id="v", size=1)["volumes"][0]["id"] == "fromfile/v"
    env = {"MISTIFY_ZPOOL": "fromenv"}
    with start_agent(tmp_path / "b", driver=driver, config=config, env=env) as agent:
        assert agent.call("CreateVolume", id="v", size=1)["volumes"][0]["id"] == "fromenv/v"
    with start_agent(tmp_path / "c", driver=driver, config=config, env=env, zpool="fromflag") as agent:
        assert agent.call("CreateVolume", id="v", size=1)["volumes"][0]["id"] == "fromflag/v"


def test_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text("zpol = 'x'\n")
    ended = run("--config", str(config))
    assert ended.returncode != 0
    assert "zpol" in ended.stderr


def test_token_is_wanted_if_one_is_set(tmp_path: Path, driver: str, own_pool: str) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    agent = new_agent(tmp_path / "state", driver=driver, zpool=own_pool, token_file=token)
    agent.start(wait=False)
    try:
        wait_until(
            lambda: agent.process is not None and _status(agent.url + "/healthz") == 200, "the agent to be healthy"
        )
        body = json.dumps({"method": "ImageStore.ListImages", "params": [], "id": 1})
        headers = {"Content-Type": "application/json"}
        url = f"{agent.url}/_mistify_RPC_"
        assert requests.post(url, body, headers=headers, timeout=30).status_code == 401
        wrong = headers | {"Authorization": "Bearer wrong"}
        assert requests.post(url, body, headers=wrong, timeout=30).status_code == 401
        right = headers | {"Authorization": "Bearer s3cret"}
        assert requests.post(url, body, headers=right, timeout=30).status_code == 200
    finally:
        agent.stop()


def _status(url: str) -> int:
    try:
        return requests.get(url, timeout=5).status_code
    except requests.RequestException:
        return 0


def test_second_agent_on_the_same_state_is_refused(tmp_path: Path) -> None:
    with start_agent(tmp_path / "state"):
        ended = run("--state-dir", str(tmp_path / "state"), "--driver", "file", "--port", str(free_port()))
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1


def test_sigterm_parks_the_fetch_and_the_next_start_finishes_it(tmp_path: Path, driver: str, own_pool: str) -> None:
    with FakeImageServer() as server:
        server.serve("img", disk(1), hang_after=100_000)
        with start_agent(tmp_path / "state", image_service=server.address, driver=driver, zpool=own_pool) as agent:
            answers: list[Any] = []

            def ask() -> None:
                try:
                    answers.append(agent.call("RequestImage", id="img", type="kvm"))
                except RpcFailureError as err:
                    answers.append(err.text)

            caller = threading.Thread(target=ask)
            caller.start()
            wait_until(lambda: server.requests[server.path_of("img")], "the fetch to begin")
            assert agent.stop() == 0
            caller.join(60)
            assert "stopping" in str(answers)
            server.serve("img", disk(1))
            agent.start()
            wait_until(lambda: agent.raw_call("GetImage", {"id": "img"})["error"] is None, "the image to be complete")
            assert agent.call("GetImage", id="img")["images"][0]["type"] == "kvm"


def test_restart_keeps_images_volumes_snapshots_and_clones(tmp_path: Path, driver: str, own_pool: str) -> None:
    with FakeImageServer() as server:
        server.serve("img", disk(2))
        with start_agent(tmp_path / "state", image_service=server.address, driver=driver, zpool=own_pool) as agent:
            agent.call("RequestImage", id="img")
            agent.call("CloneImage", id="img", dest=f"{own_pool}/c")
            agent.call("CreateVolume", id="v", size=1)
            agent.call("CreateSnapshot", id="v", dest="s")
            questions = ("ListImages", "ListVolumes", "ListSnapshots")
            before = [agent.call(method) for method in questions]
            agent.restart()
            assert [agent.call(method) for method in questions] == before


def test_deleted_image_goes_with_its_last_clone_also_after_a_restart(
    tmp_path: Path, driver: str, own_pool: str
) -> None:
    """What is kept aside for the clone is no caller's business: neither shown, nor in the way of a new image of that name."""
    with FakeImageServer() as server:
        server.serve("img", body := disk(4))
        with start_agent(tmp_path / "state", image_service=server.address, driver=driver, zpool=own_pool) as agent:
            agent.call("RequestImage", id="img")
            agent.call("CloneImage", id="img", dest=f"{own_pool}/c")
            agent.call("DeleteImage", id="img")
            agent.restart()
            assert agent.error("GetImage", id="img") == "not found"
            assert [one["id"] for one in agent.call("ListVolumes")["volumes"]] == [f"{own_pool}/c"]
            assert agent.call("ListSnapshots") == {"snapshots": []}
            agent.call("RequestImage", id="img")
            assert Path(agent.call("GetVolume", id="c")["volumes"][0]["device"]).read_bytes() == body
            agent.call("DeleteDataset", id="c")
            agent.call("DeleteImage", id="img")
            if driver == "zfs":
                assert there(own_pool) == [f"{own_pool}{rest}" for rest in ("", "/guests", "/images")]


def test_table_of_the_original_is_taken_over_once(
    tmp_path: Path, driver: str, own_pool: str, old_table_directory: Path
) -> None:
    """An image whose dataset carries no mark of ours, described only by the old table."""
    state_dir, pool = tmp_path / "state", own_pool
    with start_agent(state_dir, driver=driver, zpool=pool) as agent:
        volume = agent.call("CreateVolume", id="images/old", size=2)["volumes"][0]
        write_disk(volume["device"], b"old content")
        agent.call("CreateSnapshot", id="images/old", dest="first")
        assert agent.call("ListImages") == {"images": []}
    old = {
        "id": "old",
        "type": "kvm",
        "volume": f"{pool}/images/old",
        "snapshot": f"{pool}/images/old@first",
        "size": 2,
    }
    gone = {**old, "id": "gone", "volume": f"{pool}/images/gone", "snapshot": f"{pool}/images/gone@s"}
    rows = [(one["id"], "images", json.dumps(one)) for one in (old, gone)]
    rows += [("bad", "images", "{"), ("evil", "images", json.dumps(old | {"id": "../x"})), ("k", "other", "{}")]
    with closing(sqlite3.connect(old_table_directory / ".images.db")) as table:
        table.execute(
            "CREATE TABLE 'mistify-agent-image' (key TEXT, bucket TEXT, value BLOB, PRIMARY KEY (key, bucket))"
        )
        table.executemany("INSERT INTO 'mistify-agent-image' VALUES (?, ?, ?)", rows)
        table.commit()
    with start_agent(state_dir, driver=driver, zpool=pool) as agent:
        images = agent.call("ListImages")["images"]
        assert [(one["id"], one["type"], one["size"], one["status"]) for one in images] == [
            ("old", "kvm", 2, "complete")
        ]
        clone = agent.call("CloneImage", id="old", dest=f"{pool}/c")["volumes"][0]
        assert Path(clone["device"]).read_bytes().startswith(b"old content")
        agent.call("DeleteImage", id="old")
        agent.restart()
        assert agent.call("ListImages") == {"images": []}


def test_leftovers_of_a_killed_agent_are_cleaned_at_start(tmp_path: Path, driver: str, own_pool: str) -> None:
    with FakeImageServer() as server:
        server.serve("img", disk(3, 4 * MIB), hang_after=3 * MIB)
        agent = new_agent(tmp_path / "state", image_service=server.address, driver=driver, zpool=own_pool)
        agent.start()
        agent.call("RequestImage", id="img", wait=False)
        wait_until(
            lambda: agent.call("GetImage", id="img", pending=True)["images"][0]["progress"]["received_bytes"] > 2 * MIB,
            "most of the image to arrive",
        )
        agent.kill()
        agent.start()
        try:
            agent.call("DeleteImage", id="img")
            files = [path for path in (tmp_path / "state").rglob("*") if path.is_file() and path.stat().st_size > MIB]
            assert not files
            if driver == "zfs":
                assert there(own_pool) == [f"{own_pool}{rest}" for rest in ("", "/guests", "/images")]
        finally:
            agent.stop()


def test_metrics_show_fetches_bytes_queue_and_driver(tmp_path: Path, driver: str, own_pool: str) -> None:
    with FakeImageServer() as server:
        server.serve("img", disk(4))
        with start_agent(tmp_path / "state", image_service=server.address, driver=driver, zpool=own_pool) as agent:
            agent.call("RequestImage", id="img")
            agent.error("RequestImage", id="absent")
            assert agent.metric("mistify_fetches_total", outcome="ok") == 1
            assert agent.metric("mistify_fetches_total", outcome="not_found") == 1
            assert agent.metric("mistify_fetched_bytes_total") == MIB
            assert agent.metric("mistify_images") == 1
            text = requests.get(f"{agent.url}/metrics", timeout=30).text
            assert "mistify_jobs_pending" in text
            assert re.search(r'mistify_driver_seconds_count\{operation="\w+"\} \d', text)


def test_pull_of_a_large_image_stays_within_its_memory(tmp_path: Path, driver: str, own_pool: str) -> None:
    """Four packed images of 128 MiB at once: what the stages hold is bounded, whatever the size."""
    body = gzip.compress(os.urandom(16 * MIB) * 8, 1)
    with FakeImageServer() as server:
        for number in range(4):
            server.serve(f"big{number}", body, piece_bytes=1 << 20)
        with start_agent(
            tmp_path / "state", image_service=server.address, driver=driver, zpool=own_pool, fetchers=4
        ) as agent:
            for number in range(4):
                agent.call("RequestImage", id=f"big{number}", wait=False)
            for number in range(4):
                agent.call("RequestImage", id=f"big{number}")
            status = Path(f"/proc/{agent.pid}/status").read_text()
            peak_kib = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
            assert peak_kib < PULL_MEMORY_MAX_KIB, f"{peak_kib} KiB"
