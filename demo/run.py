"""``make run``: both daemons in the foreground, until Ctrl-C. Their state stays in ``.cache/run``, so that a second run finds it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from threading import Event

from demo import daemons
from demo.errors import DemoError

AGENT_PORT = 19999
SERVICE_PORT = 20000
STATE = Path(".cache/run")
WATCH_INTERVAL_S = 1.0

_TO_TRY = f"""
Both daemons are running. Try, in another terminal:

  # put a disk into the image service
  curl -sS -T /path/to/disk.raw -H 'X-Image-Type: kvm' http://127.0.0.1:{SERVICE_PORT}/images
  # what the image service has
  curl -sS http://127.0.0.1:{SERVICE_PORT}/images
  # let the agent pull it: put the id from above for ID
  curl -sS -H 'Content-Type: application/json' http://127.0.0.1:{AGENT_PORT}/_mistify_RPC_ \\
       -d '{{"method": "ImageStore.RequestImage", "params": [{{"id": "ID"}}], "id": 1}}'

Ctrl-C stops both.
"""


def main() -> int:
    """Run both daemons until a signal comes or one of them ends."""
    asked_to_stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked_to_stop.set())
    STATE.mkdir(parents=True, exist_ok=True)
    try:
        with (
            daemons.image_service(STATE.resolve() / "image-service", SERVICE_PORT) as service,
            daemons.agent(STATE.resolve() / "agent", service.port, AGENT_PORT) as agent,
        ):
            print(_TO_TRY, flush=True)
            while not asked_to_stop.wait(WATCH_INTERVAL_S):
                daemons.check_alive(service, agent)
    except DemoError as err:
        print(f"make run: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
