"""Both daemons on free loopback ports, as the tests start them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rpc.client import AgentClient, ImageServiceClient
from rpc.messages import ImageRecord, ImageRequest
from tests.acceptance.daemons import Agent, Daemon, start_agent, start_image_service


@dataclass(frozen=True, slots=True)
class Stack:
    """A running service and agent, and a client for each."""

    service: Daemon
    agent: Agent
    images: ImageServiceClient
    rpc: AgentClient

    def upload(self, path: Path) -> ImageRecord:
        """Upload a file as an image."""
        with path.open("rb") as file:
            return self.images.upload_image(file, image_type="kvm")

    def pull(self, image_id: str) -> None:
        """Have the agent pull an image; returns when it is complete."""
        self.rpc.request_image(ImageRequest(id=image_id))


@contextmanager
def running(workdir: Path) -> Iterator[Stack]:
    """Start both on the embedded drivers."""
    with (
        start_image_service(workdir / "service", log_level="warning") as service,
        start_agent(workdir / "agent", image_service=f"127.0.0.1:{service.port}", log_level="warning") as agent,
        ImageServiceClient(service.url) as images,
        AgentClient(agent.url) as rpc,
    ):
        yield Stack(service, agent, images, rpc)
