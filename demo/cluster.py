"""``make cluster-demo``: several image services on etcd and S3 behind a load balancer, and one process of each kind killed at work.

Everything is on loopback, from Debian's packages. Status 0 only if every step happened; nothing stays behind but the caches in ``.cache/``.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo import daemons, guest
from demo.cluster_job import GIVE_UP_S, Job
from demo.errors import DemoError
from demo.narrator import Narrator, mib
from demo.performance import perform
from demo.servers.balancer import Balancer, balancer
from demo.servers.etcd import EtcdNode, etcd_cluster
from demo.servers.processes import ServerProcess, wait_until
from demo.servers.replicas import Cluster, replicas, store_flags
from demo.servers.s3 import BUCKET, make_bucket
from demo.servers.swift import swift_server
from demo.story import Stage, act, expect, prepare
from rpc.client import AgentClient, ImageServiceClient

LEADER_TIMEOUT_S = 60.0
"""An election takes two seconds; the rest is for a busy machine."""


@dataclass
class Fleet:
    """Everything that runs."""

    stage: Stage
    cluster: Cluster
    balancer: Balancer
    agent_url: str


@dataclass(frozen=True)
class Victim:
    """A process that is killed, and how it comes back."""

    what: str
    why: str
    process: ServerProcess
    wait_ready: Callable[[], None]
    is_the_only_one: bool
    """Then the job waits for it, and it is started again as soon as the job has noticed."""


def tell(narrator: Narrator, directory: Path) -> None:
    """Run the whole story in ``directory``; DemoError if anything is not as it should be."""
    stage = prepare(narrator, directory)
    with contextlib.ExitStack() as servers:
        fleet = _start(stage, servers)
        act(stage)
        for number, find in enumerate((_etcd, _service, _storage, _balancer), 1):
            _kill(fleet, find(fleet), number)
        _stop(fleet, servers)


# -- starting --------------------------------------------------------------------------------------------------------------


def _start(stage: Stage, servers: contextlib.ExitStack) -> Fleet:
    place, step = stage.directory, stage.narrator.step
    with step(
        "Start etcd", "Three nodes keep the records: any one of them may be lost. Real etcd, of Debian's package."
    ) as say:
        etcd = servers.enter_context(etcd_cluster(_directory(place, "etcd")))
        leader = wait_until(etcd.leader, "a leader", timeout_s=LEADER_TIMEOUT_S)
        say(f"{', '.join(etcd.endpoints)}; {leader.name if leader else ''} leads")
    with step(
        "Start an S3 server", "OpenStack Swift with its S3 API keeps the images: five processes, one bucket."
    ) as say:
        s3 = servers.enter_context(swift_server(_directory(place, "swift")))
        make_bucket(s3, BUCKET)
        say(f"{s3.endpoint}, bucket {BUCKET}")
    with step("Start two image services", "Replicas: they know each other only through etcd and S3.") as say:
        running = servers.enter_context(replicas(place, store_flags(etcd, s3)))
        say(" and ".join(replica.url for replica in running))
    with step("Start a load balancer", "haproxy asks each service whether it is ready, and takes them in turn.") as say:
        front = servers.enter_context(balancer(place, [replica.port for replica in running]))
        say(front.url)
    with step("Start the agent", "The hypervisor's daemon knows only the balancer's address.") as say:
        agent = servers.enter_context(daemons.agent(place / "agent", front.port, log=place / "agent.log"))
        stage.service = servers.enter_context(ImageServiceClient(front.url))
        stage.agent = servers.enter_context(AgentClient(agent.url))
        say(agent.url)
    return Fleet(stage, Cluster(etcd, s3, running), front, agent.url)


def _directory(place: Path, name: str) -> Path:
    made = place / name
    made.mkdir()
    return made


# -- killing ---------------------------------------------------------------------------------------------------------------


def _etcd(fleet: Fleet) -> Victim:
    def leader() -> EtcdNode | None:
        return fleet.cluster.etcd.leader()

    node = wait_until(leader, "a leader", timeout_s=LEADER_TIMEOUT_S)
    if node is None:
        raise DemoError("etcd has no leader")
    why = "kill -9 of the node that leads. The other two elect a new leader; it stays down until the job is done."
    return Victim(f"etcd's {node.name}", why, node.process, fleet.cluster.etcd.wait_healthy, is_the_only_one=False)


def _service(fleet: Fleet) -> Victim:
    replica = fleet.cluster.replicas[0]
    why = "kill -9 of one of the two services, and its disk is wiped. The other goes on with what it was at."

    def ready() -> None:
        replica.wait_ready()
        fleet.balancer.wait_ready()

    return Victim(replica.name, why, replica.process, ready, is_the_only_one=False)


def _storage(fleet: Fleet) -> Victim:
    s3 = fleet.cluster.s3
    why = "kill -9 of the process that has the bytes. There is only one, so the job waits; parts already stored count."
    return Victim("the S3 server's object server", why, s3.processes["object"], s3.wait_ready, is_the_only_one=True)


def _balancer(fleet: Fleet) -> Victim:
    why = "kill -9 of the only way in. It is started again, as its service manager would; the job goes on where it was."
    front = fleet.balancer
    return Victim("the load balancer", why, front.process, front.wait_ready, is_the_only_one=True)


def _kill(fleet: Fleet, victim: Victim, number: int) -> None:
    """Kill a process in the middle of a job, and see the job through."""
    stage = fleet.stage
    disk = stage.directory / f"job-{number}.raw"
    shutil.copyfile(stage.image, disk)
    guest.write_marker(disk, f"job {number} of {stage.token}")  # every job has an image of its own
    job = Job(f"job-{number}", disk, fleet.balancer.url, fleet.agent_url)
    with stage.narrator.step(f"Kill {victim.what} during a job", victim.why) as say, _started(job) as ended:
        wait_until(lambda: job.is_half_sent.is_set() or ended.done(), "the job to get going", timeout_s=GIVE_UP_S)
        victim.process.kill()
        expect(not ended.done(), "the job was over before the kill")
        say(f"killed when {mib(job.sent_bytes)} of {mib(disk.stat().st_size)} were sent")
        if victim.is_the_only_one:
            wait_until(lambda: job.tries_again > 0 or ended.done(), "the job to notice", timeout_s=GIVE_UP_S)
            expect(not ended.done(), "the job did not need what was killed")
        else:
            ended.result(GIVE_UP_S)
            say("the job is done without it")
        _revive(fleet, victim)
        say(f"{victim.what} is back")
        ended.result(GIVE_UP_S)
        say(
            f"image {job.image_id}: uploaded, pulled, cloned, the same byte for byte, deleted; calls made again: {job.tries_again}"
        )
    disk.unlink()


def _revive(fleet: Fleet, victim: Victim) -> None:
    for replica in fleet.cluster.replicas:
        if replica.process is victim.process:
            replica.wipe()
    victim.process.start()
    victim.wait_ready()


@contextmanager
def _started(job: Job) -> Iterator[Future[None]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(job.run)


# -- ending ----------------------------------------------------------------------------------------------------------------


def _stop(fleet: Fleet, servers: contextlib.ExitStack) -> None:
    why = "SIGTERM for the services, which end in order; then everything else."
    with fleet.stage.narrator.step("Stop everything", why) as say:
        expect(not fleet.stage.service.list_images(), "an image is left")
        for replica in fleet.cluster.replicas:
            expect(replica.process.stop() == 0, f"{replica.name} did not end as it should: {replica.process.log()}")
        servers.close()
        everything = [node.process for node in fleet.cluster.etcd.nodes] + list(fleet.cluster.s3.processes.values())
        everything += [fleet.balancer.process, *(replica.process for replica in fleet.cluster.replicas)]
        expect(not any(process.is_running for process in everything), "a process is left")
        say(f"{len(everything) + 1} processes have ended; {fleet.stage.directory} will be removed")


if __name__ == "__main__":
    sys.exit(perform("make cluster-demo", tell))
