"""What every part of an image store works with: its directory, locks, temporary files and index, open."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from image_service.imagestore.index import Index
from image_service.imagestore.infos import AciInfos
from image_service.imagestore.layout import Layout
from image_service.imagestore.locks import KeyLocks, acquire, open_directory
from image_service.imagestore.spool import IMPORT_LIMITS, TemporaryFiles
from imaging.compression import DecompressionLimits
from imaging.files import os_errors

MANIFEST_MODE = 0o660

LEAVE_TIMEOUT_S = 60.0
"""How long a migration or a rebuild waits for the other users of the store to leave."""


class StoreParts:
    """An open store directory. Threads and processes share it; ``close`` releases it."""

    def __init__(
        self,
        directory: Path | str,
        *,
        limits: DecompressionLimits = IMPORT_LIMITS,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.layout = Layout(Path(directory))
        self.layout.ensure()
        self.locks = KeyLocks(self.layout.locks)
        self.temporaries = TemporaryFiles(self.layout.temporary)
        self.limits = limits
        self.now_ns = now_ns
        self._directory_fd = open_directory(self.layout.root, exclusive=False)
        try:
            self.index = Index(self.layout.index, self.layout.backups, migrating=self._alone)
            self.infos = AciInfos(self.index)
        except BaseException:
            os.close(self._directory_fd)
            raise
        self._closed = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Change our shared lock on the directory into an exclusive one, and back: every other user has to leave."""
        with os_errors("cannot lock the image store"):
            acquire(self._directory_fd, self.layout.root, exclusive=True, timeout_s=LEAVE_TIMEOUT_S)
        try:
            yield
        finally:
            fcntl.flock(self._directory_fd, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let go of the store; idempotent."""
        if not self._closed:
            self._closed = True
            self.index.close()
            os.close(self._directory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
