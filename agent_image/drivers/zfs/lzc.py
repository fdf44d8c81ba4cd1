"""libzfs_core with our names and errors: one method per operation, text in, errors of imaging.errors out.

Every call blocks in the kernel until its transaction group is on disk, and releases the interpreter lock meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_image.drivers.zfs import binding
from agent_image.drivers.zfs.descriptors import open_on
from agent_image.drivers.zfs.errors import Failure, Operation, translate
from agent_image.drivers.zfs.ownership import ZFS_DEVICE
from imaging.errors import BadDataError, MistifyError, NotFoundError, UnavailableError

Values = Mapping[str, int | str]

PROGRAM_INSTRUCTIONS_MAX = 100_000_000
"""ZFS's own upper limit for a channel program; ours need a few hundred per dataset."""
PROGRAM_MEMORY_MAX_BYTES = 64 << 20
"""256 datasets with properties of the largest size (8 KiB each, a few per dataset) fit."""
POOLS = Path("/proc/spl/kstat/zfs")
"""A directory for each pool the kernel has."""
GUID_MASK = (1 << 64) - 1
"""Channel programs know signed numbers only."""


def encode(values: Values) -> dict[bytes, int | bytes]:
    """Properties as pyzfs wants them: numbers stay numbers, text becomes bytes."""
    return {name.encode(): value if isinstance(value, int) else value.encode() for name, value in values.items()}


def failure_of(err: Exception) -> Failure:
    """What a pyzfs exception says. Several failures: the first, they are of one kind in practice.

    Only number and class are read: pyzfs swaps name and message in the exception for numbers it does not know.
    """
    first = next(iter(getattr(err, "errors", None) or ()), err)
    return Failure(int(getattr(first, "errno", 0) or 0), type(first).__name__)


def _by_text(found: Mapping[bytes | str, Any]) -> dict[str, Any]:
    """Entries by name; pyzfs gives names now as bytes, now as text."""
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}


_first_call = threading.Lock()
_known_fds: dict[int, frozenset[int]] = {}
"""By the identity of the library: it opens /dev/zfs at the first call of the process, and never again."""


def _library_fds(library: Any, pool: bytes) -> frozenset[int]:
    with _first_call:
        if id(library) not in _known_fds:
            before = open_on(ZFS_DEVICE)
            library.lzc_exists(pool)
            _known_fds[id(library)] = open_on(ZFS_DEVICE) - before
        return _known_fds[id(library)]


class Lzc:
    """The calls the driver makes on one pool."""

    def __init__(self, pool: str) -> None:
        self._library: Any = binding.load()
        self._zfs_error: type[Exception] = binding.exceptions().ZFSError
        self._pool = pool.encode()
        self.library_fds = _library_fds(self._library, self._pool)
        """Descriptors libzfs_core itself works with."""

    @contextlib.contextmanager
    def _translated(self, operation: Operation, name: str, other: str = "") -> Iterator[None]:
        try:
            yield
        except self._zfs_error as err:
            raise self._seen_from_outside(translate(operation, failure_of(err), name, other), name) from err

    def _seen_from_outside(self, error: MistifyError, name: str) -> MistifyError:
        """ZFS says ENOENT for a dataset of a pool that was exported: that is another thing to a caller."""
        if isinstance(error, NotFoundError) and not self.is_imported():
            return UnavailableError(f"the pool of {name} is not imported")
        return error

    def exists(self, name: str) -> bool:
        """Whether a dataset or snapshot of that name is there; False also if the pool is not, or is suspended."""
        return bool(self._library.lzc_exists(name.encode()))

    def is_imported(self) -> bool:
        """Whether the kernel has the pool, be it suspended."""
        name = self._pool.decode()
        return self.exists(name) or (POOLS / name).is_dir()

    def create(self, name: str, *, volume: bool, properties: Values) -> None:
        """Create a filesystem or volume."""
        with self._translated(Operation.CREATE, name):
            self._library.lzc_create(name.encode(), "zvol" if volume else "zfs", encode(properties))

    def clone(self, name: str, origin: str, properties: Values) -> None:
        """Create ``name`` as a clone of the snapshot ``origin``."""
        with self._translated(Operation.CLONE, name, origin):
            self._library.lzc_clone(name.encode(), origin.encode(), encode(properties))

    def snapshot(self, names: Sequence[str]) -> None:
        """Take all snapshots at one instant, or none."""
        with self._translated(Operation.SNAPSHOT, names[0]):
            self._library.lzc_snapshot([name.encode() for name in names])

    def destroy(self, name: str) -> None:
        """Destroy a dataset without children and snapshots."""
        with self._translated(Operation.DESTROY, name):
            self._library.lzc_destroy(name.encode())

    def destroy_snapshots(self, names: Sequence[str], *, defer: bool = False) -> None:
        """Destroy all these snapshots, or none."""
        with self._translated(Operation.DESTROY_SNAPSHOTS, names[0]):
            self._library.lzc_destroy_snaps([name.encode() for name in names], defer)

    def rollback(self, name: str, snapshot: str) -> None:
        """Make the dataset what its newest snapshot, which must be ``snapshot``, is."""
        with self._translated(Operation.ROLLBACK, name, snapshot):
            self._library.lzc_rollback_to(name.encode(), snapshot.encode())

    def rename(self, name: str, target: str) -> None:
        """Rename a dataset with all below."""
        with self._translated(Operation.RENAME, name, target):
            self._library.lzc_rename(name.encode(), target.encode())

    def promote(self, name: str) -> None:
        """Swap a clone with its origin."""
        with self._translated(Operation.PROMOTE, name):
            self._library.lzc_promote(name.encode())

    def hold(self, name: str, tag: str, cleanup_fd: int | None = None) -> None:
        """Hold a snapshot until released, or until ``cleanup_fd`` (an open /dev/zfs) is closed, be it by a crash."""
        with self._translated(Operation.HOLD, name, tag):
            missing = self._library.lzc_hold({name.encode(): tag.encode()}, cleanup_fd)
        if missing:
            raise self._seen_from_outside(NotFoundError(f"{name} not found"), name)

    def release(self, name: str, tag: str) -> None:
        """Release a hold."""
        with self._translated(Operation.RELEASE, name, tag):
            missing = self._library.lzc_release({name.encode(): [tag.encode()]})
        if missing:
            raise self._seen_from_outside(NotFoundError(f"{name} is not held with tag {tag}"), name)

    def holds(self, name: str) -> list[str]:
        """Tags that hold the snapshot, sorted."""
        with self._translated(Operation.LIST_HOLDS, name):
            return sorted(tag.decode() for tag in self._library.lzc_get_holds(name.encode()))

    def bookmark(self, bookmark: str, snapshot: str) -> None:
        """Make ``dataset#bookmark``."""
        with self._translated(Operation.BOOKMARK, bookmark, snapshot):
            self._library.lzc_bookmark({bookmark.encode(): snapshot.encode()})

    def bookmarks(self, name: str) -> dict[str, int]:
        """The dataset's bookmarks (the part after ``#``) with the createtxg of what they remember."""
        with self._translated(Operation.READ, name):
            found = self._library.lzc_get_bookmarks(name.encode(), [b"createtxg"])
        return {mark: values[b"createtxg"][b"value"] for mark, values in _by_text(found).items()}

    def destroy_bookmarks(self, names: Sequence[str]) -> None:
        """Destroy bookmarks; those that are gone already do not matter."""
        with self._translated(Operation.DESTROY, names[0]):
            self._library.lzc_destroy_bookmarks([name.encode() for name in names])

    def bookmark_guids(self, name: str) -> dict[str, int]:
        """The dataset's bookmarks (the part after ``#``) with the guid of what they remember."""
        with self._translated(Operation.READ, name):
            found = self._library.lzc_get_bookmarks(name.encode(), [b"guid"])
        return {mark: values[b"guid"][b"value"] & GUID_MASK for mark, values in _by_text(found).items()}

    def send(
        self, name: str, base: str | None, fd: int, flags: Sequence[str], *, resume: tuple[int, int] | None = None
    ) -> None:
        """Write a stream to a blocking descriptor; with ``resume`` (object, offset) only what comes from there on."""
        source = base.encode() if base else None
        with self._translated(Operation.SEND, name, base or ""):
            if resume is None:
                self._library.lzc_send(name.encode(), source, fd, list(flags))
            else:
                self._library.lzc_send_resume(name.encode(), source, fd, list(flags), *resume)

    def check_send(self, name: str, base: str | None, flags: Sequence[str]) -> None:
        """Raise what a send would raise before its first byte."""
        with self._translated(Operation.SEND, name, base or ""):
            self._library.lzc_send_space(name.encode(), base.encode() if base else None, list(flags))

    def receive(self, name: str, fd: int, *, origin: str | None, properties: Values) -> None:
        """Receive the stream read from ``fd``; sets ``properties`` on a dataset it creates."""
        with self._translated(Operation.RECEIVE, name):
            begin = self._first_record(name, fd)
            self._library.lzc_receive_with_cmdprops(
                name.encode(), fd, begin, origin=origin.encode() if origin else None, cmdprops=encode(properties)
            )

    def _first_record(self, name: str, fd: int) -> Any:
        """BadDataError if the stream ends before it; pyzfs says ValueError then."""
        try:
            return self._library.receive_header(fd)[1]
        except ValueError as err:
            raise BadDataError(f"the stream for {name} ends within its first record") from err

    def program(self, text: str, names: Sequence[str], *, sync: bool = False) -> dict[bytes, Any]:
        """Run a channel program over ``names``; what it returned."""
        run = self._library.lzc_channel_program if sync else self._library.lzc_channel_program_nosync
        with self._translated(Operation.SET if sync else Operation.READ, names[0]):
            result = run(
                self._pool,
                text.encode(),
                instrlimit=PROGRAM_INSTRUCTIONS_MAX,
                memlimit=PROGRAM_MEMORY_MAX_BYTES,
                params=[name.encode() for name in names],
            )
        return dict(result or {})
