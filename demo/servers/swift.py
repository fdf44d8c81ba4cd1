"""A real S3 server on loopback: OpenStack Swift with its S3 API, from Debian's packages; one node, one copy of everything."""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3

from demo.errors import DemoError
from demo.servers.processes import ServerProcess, ensure_programs, free_port, path_with_sbin, wait_until

START_TIMEOUT_S = 120.0
"""Five Python programs start; the rest is for a busy machine."""

TOOL_TIMEOUT_S = 120
"""Of one call of the ring builder."""

ACCESS_KEY = "test:tester"
SECRET_KEY = "testing"  # noqa: S105 - of a server on loopback that lives for a minute
REGION = "us-east-1"

KINDS = ("account", "container", "object")

_SWIFT_CONF = """
[swift-hash]
swift_hash_path_prefix = loopback
swift_hash_path_suffix = loopback

[storage-policy:0]
name = only
default = yes

[swift-constraints]
max_file_size = 5368709122
"""

_STORAGE_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}
devices = {directory}/devices
mount_check = false
fallocate_reserve = 0
log_address = {directory}/no-syslog
# Patient, as a busy machine needs it; and an object is in its listing before its PUT is answered: nobody runs Swift's updater here.
conn_timeout = 10
container_update_timeout = 60
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

_PROXY_CONF = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {directory}
log_address = {directory}/no-syslog
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats cache s3api tempauth copy slo dlo bulk proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
# A storage server that was down, or slow, is asked again at once: there is no other one.
error_suppression_interval = 1
error_suppression_limit = 1000000
conn_timeout = 10
node_timeout = 30
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache_port}
[filter:s3api]
use = egg:swift#s3api
location = {region}
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:copy]
use = egg:swift#copy
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


@dataclass(slots=True)
class SwiftServer:
    """The running processes, and where the S3 API is."""

    endpoint: str
    directory: Path
    processes: dict[str, ServerProcess]

    @property
    def proxy(self) -> ServerProcess:
        """Return the process clients speak to."""
        return self.processes["proxy"]

    def wait_ready(self) -> None:
        """Wait until the S3 API answers; DemoError if one of the processes has ended."""
        pools = urllib3.PoolManager(retries=False)

        def ready() -> bool:
            for kind, process in self.processes.items():
                if not process.is_running:
                    raise DemoError(f"swift's {kind} server ended: {process.log()}")
            try:
                return pools.request("GET", f"{self.endpoint}/healthcheck", timeout=5.0).status == 200
            except urllib3.exceptions.HTTPError:
                return False

        wait_until(ready, "swift's proxy", timeout_s=START_TIMEOUT_S)
        pools.clear()


def _build_ring(directory: Path, kind: str, port: int) -> None:
    builder = str(directory / f"{kind}.builder")
    for arguments in (
        ["create", "4", "1", "1"],
        ["add", f"r1z1-127.0.0.1:{port}/disk", "1"],
        ["rebalance"],
    ):
        command = ["swift-ring-builder", builder, *arguments]
        subprocess.run(  # noqa: S603 - arguments of our own making
            command,
            check=True,
            capture_output=True,
            timeout=TOOL_TIMEOUT_S,
            env=os.environ | {"PATH": path_with_sbin()},
        )


def _storage(directory: Path, kind: str) -> ServerProcess:
    port = free_port()
    _build_ring(directory, kind, port)
    conf = directory / f"{kind}-server.conf"
    conf.write_text(_STORAGE_CONF.format(port=port, kind=kind, directory=directory, user=getpass.getuser()))
    return _process(directory, kind)


def _process(directory: Path, kind: str) -> ServerProcess:
    launcher = str(Path(__file__).with_name("swift-server"))
    # Isolated: neither this directory nor the tests' environment is on the system Python's path.
    return ServerProcess(
        ["/usr/bin/python3", "-I", launcher, kind, str(directory / f"{kind}-server.conf")], directory / f"{kind}.log"
    )


def _cache(directory: Path, port: int) -> ServerProcess:
    """Swift's login keeps its tokens in memcached."""
    arguments = ["memcached", "-l", "127.0.0.1", "-p", str(port), "-U", "0", "-u", getpass.getuser(), "-m", "64"]
    return ServerProcess(arguments, directory / "cache.log")


@contextmanager
def swift_server(directory: Path) -> Iterator[SwiftServer]:
    """A running server with everything below ``directory``."""
    ensure_programs(
        swift_proxy_server="swift-proxy",
        swift_account_server="swift-account",
        swift_container_server="swift-container",
        swift_object_server="swift-object",
        memcached="memcached",
    )
    (directory / "devices" / "disk").mkdir(parents=True)
    (directory / "swift.conf").write_text(_SWIFT_CONF)
    processes = {kind: _storage(directory, kind) for kind in KINDS}
    port, cache_port = free_port(), free_port()
    processes["cache"] = _cache(directory, cache_port)
    (directory / "proxy-server.conf").write_text(
        _PROXY_CONF.format(
            port=port,
            cache_port=cache_port,
            directory=directory,
            user=getpass.getuser(),
            region=REGION,
            secret=SECRET_KEY,
        )
    )
    processes["proxy"] = _process(directory, "proxy")
    server = SwiftServer(f"http://127.0.0.1:{port}", directory, processes)
    try:
        for process in processes.values():
            process.start()
        server.wait_ready()
        yield server
    finally:
        for process in processes.values():
            process.kill()
