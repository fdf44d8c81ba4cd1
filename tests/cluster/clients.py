"""Clients of several replicas that upload, upload in parts, have images fetched, read, derive and delete, and note everything they saw."""

from __future__ import annotations

import base64
import gzip
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import requests

from tests.acceptance.daemons import Daemon
from tests.acceptance.image_service_calls import sha256
from tests.cluster.history import NEVER, History, Kind, Operation, Seen
from tests.fakes.source_server import Source, SourceServer
from tests.waiting import PATIENCE

CALL_TIMEOUT_S = 120.0 * PATIENCE
"""A call through several blows ends after the time-outs of what is behind it; one that takes longer is stuck, and noted as such."""

KEY_OPERATIONS_MAX = 30
"""Then a shared source is left alone: checking is exponential in what overlaps."""

SHARED = 4
"""Sources several clients use at the same time."""

SMALL_MAX_BYTES = 150_000
LARGE_BYTES = 11 << 20
"""More than two parts in S3."""

TUS = {"Tus-Resumable": "1.0.0"}
PART = "application/offset+octet-stream"


class Unanswered(Exception):  # noqa: N818 - no error: it is what happens here
    """The call got no answer that says what happened."""


@dataclass
class World:
    """What all clients share."""

    replicas: Sequence[Daemon]
    sources: SourceServer
    history: History = field(default_factory=History)
    contents: dict[str, str] = field(default_factory=dict)
    """The digest each key's image must have."""
    known: list[tuple[str, str]] = field(default_factory=list)
    """(key, id) of records somebody saw."""
    complete: list[tuple[str, str]] = field(default_factory=list)
    """Those of them that somebody saw complete."""
    shared: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: dict[str, int] = field(default_factory=dict)
    stuck: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        """One more."""
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def know(self, key: str, image_id: str, seen: Seen) -> None:
        """A record was seen."""
        with self.lock:
            if (key, image_id) not in self.known:
                self.known.append((key, image_id))
            if seen is Seen.COMPLETE and (key, image_id) not in self.complete:
                self.complete.append((key, image_id))


def _seen(status: str) -> Seen:
    return Seen.COMPLETE if status == "complete" else Seen.UNFINISHED


class Client:
    """Works until told to stop. ``failures`` says what must never be."""

    def __init__(self, world: World, number: int, seed: int, stop: threading.Event) -> None:
        self.world = world
        self.failures: list[str] = []
        self.parts: list[tuple[str, bytes, float]] = []
        """Uploads in parts that were not acknowledged as whole."""
        self._number = number
        self._chance = random.Random(seed * 1000 + number)
        self._stop = stop
        self._made = 0
        self.thread = threading.Thread(target=self._run, name=f"client {number}")

    def _run(self) -> None:
        actions: list[Callable[[], None]] = [
            *(self._put, self._tus, self._tus, self._fetch, self._fetch_shared, self._fetch_shared),
            *(self._read, self._read, self._download, self._derive, self._delete, self._delete),
        ]
        while not self._stop.is_set():
            try:
                self._chance.choice(actions)()
            except Unanswered as err:
                self.world.count(f"unanswered: {err}")
                self._stop.wait(0.1)
            except AssertionError as err:
                self.failures.append(f"client {self._number}: {err}")

    # -- calls -------------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, expected: Sequence[int], **arguments: object) -> requests.Response:
        """One call of a random replica. Unanswered unless the answer says what happened."""
        replica = self._chance.choice(self.world.replicas)
        try:
            answer = requests.request(method, replica.url + path, timeout=CALL_TIMEOUT_S, **arguments)  # type: ignore[arg-type]
        except requests.Timeout as err:
            self.world.stuck.append(f"{method} {path} at {replica.url}: {err}")
            raise Unanswered("time-out") from err
        except requests.RequestException as err:
            raise Unanswered(type(err).__name__) from err
        if answer.status_code >= 500 and answer.status_code != 507:
            assert answer.status_code == 503, f"{method} {path}: {answer.status_code} {answer.text}"
            raise Unanswered(f"{method} 503")
        assert answer.status_code in expected, f"{method} {path}: {answer.status_code} {answer.text[:500]}"
        return answer

    def _noted(self, key: str, kind: Kind, image_id: str, act: Callable[[], tuple[str, Seen]]) -> tuple[str, Seen]:
        """Do one operation and note it, whatever comes of it."""
        begun = History.now()
        try:
            found, seen = act()
        except Unanswered:
            if kind is not Kind.READ:
                self.world.history.add(key, Operation(kind, begun, NEVER, image_id))
            raise
        self.world.history.add(key, Operation(kind, begun, History.now(), found, seen))
        self.world.count(kind.value)
        return found, seen

    # -- what clients do ---------------------------------------------------------------------------------------------

    def _content(self) -> bytes:
        if self._chance.random() < 0.02:
            return self._chance.randbytes(1 << 20) * (LARGE_BYTES >> 20)
        return self._chance.randbytes(self._chance.randrange(512, SMALL_MAX_BYTES))

    def _new_key(self, kind: str) -> str:
        self._made += 1
        return f"/{kind}/{self._number}/{self._made}"

    def _put(self) -> None:
        content, begun = self._content(), History.now()
        record = self.call("PUT", "/images", [200], data=content, headers={"X-Image-Type": "kvm"}).json()
        assert record["digest"] == sha256(content)
        self._uploaded(record["id"], content, begun)

    def _uploaded(self, image_id: str, content: bytes, begun: float) -> None:
        """An acknowledged upload is complete from now on."""
        key = f"upload {image_id}"
        self.world.contents[key] = sha256(content)
        created = Operation(Kind.CREATE, begun, History.now(), image_id, Seen.COMPLETE)
        self.world.history.add(key, created)
        self.world.know(key, image_id, Seen.COMPLETE)
        self.world.count("uploaded")

    def _tus(self) -> None:
        """Go on with an upload in parts, or begin one."""
        if not self.parts or self._chance.random() < 0.2:
            content, begun = self._content(), History.now()
            digest = base64.b64encode(sha256(content).encode()).decode()
            headers = TUS | {"Upload-Length": str(len(content)), "Upload-Metadata": f"type a3Zt,digest {digest}"}
            path = self.call("POST", "/uploads", [201], headers=headers).headers["Location"]
            self.parts.append((path, content, begun))
        while not self._stop.is_set() and not self.next_part(*self.parts[0]):
            continue

    def next_part(self, path: str, content: bytes, begun: float) -> bool:
        """One part; whether the upload was acknowledged as whole."""
        state = self.call("HEAD", path, [200, 423], headers=TUS)
        if state.status_code == 423:
            raise Unanswered("HEAD 423")
        offset = int(state.headers["Upload-Offset"])
        if offset < len(content):
            end = offset + self._chance.randrange(max(1, len(content) // 3), len(content) + 1)
            headers = TUS | {"Upload-Offset": str(offset), "Content-Type": PART}
            answer = self.call("PATCH", path, [204, 409, 423], data=content[offset:end], headers=headers)
            if answer.status_code != 204:  # the part before has not noticed yet that we are gone
                raise Unanswered(f"PATCH {answer.status_code}")
            offset = int(answer.headers["Upload-Offset"])
        if offset < len(content):
            return False
        self._uploaded(path.rpartition("/")[2], content, begun)
        self.parts.remove((path, content, begun))
        return True

    def _fetch(self) -> None:
        key, content = self._new_key("own"), self._content()
        self._ask(key, content)

    def _fetch_shared(self) -> None:
        with self.world.lock:
            self.world.shared = [
                key for key in self.world.shared if self.world.history.length(key) < KEY_OPERATIONS_MAX
            ]
            while len(self.world.shared) < SHARED:
                self.world.shared.append(self._new_key("shared"))
            key = self._chance.choice(self.world.shared)
        self._ask(key, f"shared {key}".encode() * 3000)

    def _ask(self, key: str, content: bytes) -> None:
        """Have a source fetched. Its own server is honest, so its image is the content, or not there yet."""
        self.world.contents[key] = sha256(content)
        url = self.world.sources.add(key, Source(content))
        body = {"source": url, "type": "kvm"}

        def act() -> tuple[str, Seen]:
            record = self.call("POST", "/images", [202], json=body).json()
            self._check(key, record)
            return record["id"], _seen(record["status"])

        self.world.know(key, *self._noted(key, Kind.CREATE, "", act))

    def _check(self, key: str, record: Mapping[str, str]) -> None:
        assert record["status"] != "error", f"{key}: {record}"
        if record["status"] == "complete":
            assert record["digest"] == self.world.contents[key], f"{key}: {record}"

    def _some(self) -> tuple[str, str]:
        """A record, rather a young one: those are the ones something happens to."""
        with self.world.lock:
            known = self.world.known[-60:]
        if not known:
            raise Unanswered("nothing known")
        key, image_id = self._chance.choice(known)
        if self.world.history.length(key) >= KEY_OPERATIONS_MAX:
            raise Unanswered("key is full")
        return key, image_id

    def _read(self) -> None:
        self.read(*self._some())

    def read(self, key: str, image_id: str) -> Seen:
        """GET the record."""

        def act() -> tuple[str, Seen]:
            answer = self.call("GET", f"/images/{image_id}", [200, 404])
            if answer.status_code == 404:
                return image_id, Seen.ABSENT
            self._check(key, answer.json())
            return image_id, _seen(answer.json()["status"])

        seen = self._noted(key, Kind.READ, image_id, act)[1]
        self.world.know(key, image_id, seen)
        return seen

    def _some_complete(self) -> tuple[str, str]:
        with self.world.lock:
            complete = self.world.complete[-20:]
        if not complete:
            raise Unanswered("nothing complete")
        return self._chance.choice(complete)

    def _download(self) -> None:
        key, image_id = self._some_complete()
        answer = self.call("GET", f"/images/{image_id}/download", [200, 404])
        if answer.status_code == 200:
            assert sha256(answer.content) == self.world.contents[key], f"{key}: other bytes"
            self.world.count("downloaded")

    def _derive(self) -> None:
        self.derive(*self._some_complete())

    def derive(self, key: str, image_id: str) -> bool:
        """GET the image packed; it is made now if nobody asked before. Whether it is there."""
        answer = self.call("GET", f"/images/{image_id}/download?compression=gzip", [200, 404])
        if answer.status_code == 200:
            assert sha256(gzip.decompress(answer.content)) == self.world.contents[key], f"{key}: derived other bytes"
            self.world.count("derived")
        return answer.status_code == 200

    def _delete(self) -> None:
        key, image_id = self._some()

        def act() -> tuple[str, Seen]:
            answer = self.call("DELETE", f"/images/{image_id}", [200, 404])
            return image_id, Seen.ABSENT if answer.status_code == 404 else Seen.NOTHING

        self._noted(key, Kind.DELETE, image_id, act)
