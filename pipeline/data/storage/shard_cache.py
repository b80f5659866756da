"""Local copies of remote shards: a folder of bounded size that any number of processes share and that survives crashes.

A copy gets its name only when it is whole and its size and SHA-256 are those that its dataset states, so whatever is
found under a final name can be used. While a shard is still being copied, in the background, its samples are read
from afar. The copies used longest ago make room for new ones.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from graphkd.errors import UserError
from pipeline.core.errors import DataError
from pipeline.core.files import atomic_path, fingerprint, locked, stale_temp_files
from pipeline.data.storage.base import ByteRange, FileInfo
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.remote import RemoteStore

log = logging.getLogger(__name__)

COPIERS = 2  # shards copied side by side by one process; reads of samples should still get through


class CachedStore:
    """A remote store whose large files are kept in ``folder``, at most ``limit`` bytes of them."""

    def __init__(self, remote: RemoteStore, folder: Path, limit: int) -> None:
        self.remote = remote
        self.location = remote.location
        self.root = folder
        self.limit = limit
        self._expected: dict[str, FileInfo] = {}
        self._copies: dict[str, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._guard = threading.Lock()
        self.register({})

    def read(self, name: str) -> bytes:
        """A whole file, never from the cache: descriptions and indexes are small and must be current."""
        return self.remote.read(name)

    def register(self, files: Mapping[str, FileInfo]) -> None:
        """Keep copies of these, apart from those of whatever lay at the same location before."""
        self._expected = dict(files)
        content = [self.location, sorted((name, facts.sha256) for name, facts in files.items())]
        self.folder = self.root / fingerprint(content)[:16]
        self._local = LocalStore(self.folder)

    def read_ranges(self, wanted: Sequence[ByteRange]) -> list[bytes]:
        """Parts of files: from copies where they are there, the rest from afar while copies are made."""
        here = [self._ready(part.name) for part in wanted]
        far = iter(self.remote.read_ranges([part for part, ready in zip(wanted, here, strict=True) if not ready]))
        return [self._near(part) if ready else next(far) for part, ready in zip(wanted, here, strict=True)]

    def close(self) -> None:
        """Wait for copies that are being made."""
        for copy in list(self._copies.values()):
            copy.exception()

    def _near(self, part: ByteRange) -> bytes:
        try:
            return self._local.read_ranges([part])[0]
        except DataError:  # another process made room in the meantime
            return self.remote.read_ranges([part])[0]

    def _ready(self, name: str) -> bool:
        path = self.folder / name
        try:
            os.utime(path)  # says that it is in use
        except OSError:
            self._start(name)
            return False
        return True

    def _start(self, name: str) -> None:
        with self._guard:
            if name in self._copies or name not in self._expected or self._expected[name].bytes > self.limit:
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(COPIERS, thread_name_prefix="copy-shard")
            self._copies[name] = self._pool.submit(self._copy, name)

    def _copy(self, name: str) -> None:
        """Copy one shard unless another process does; failing costs speed, not the run."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A lock dies with its process, so a crash leaves nothing that blocks the next one.
            with locked(self.folder / f".{name}.lock", wait=False) as alone:
                if not alone:
                    return
                for path in stale_temp_files(self.folder, name):
                    path.unlink(missing_ok=True)
                if not (self.folder / name).exists():
                    self._download(name)
        except (UserError, OSError) as error:
            log.warning("no local copy of %s/%s: %s", self.location, name, error)
        finally:
            with self._guard:
                self._copies.pop(name, None)

    def _download(self, name: str) -> None:
        size, digest = self._expected[name]
        seen, hashed = 0, sha256()
        with atomic_path(self.folder / name) as temporary:
            self._make_room(size, temporary)
            with temporary.open("r+b") as file:
                for chunk in self.remote.chunks(name):
                    file.write(chunk)
                    hashed.update(chunk)
                    seen += len(chunk)
            if (seen, hashed.hexdigest()) != (size, digest):
                raise DataError(
                    f"{self.location}/{name} has other bytes than its description says ({seen} of {size}, SHA-256 "
                    f"{hashed.hexdigest()[:12]}); copy the dataset again"
                )

    def _make_room(self, size: int, temporary: Path) -> None:
        """Remove copies until ``size`` bytes fit, and claim them by a file of that length, which others count."""
        with locked(self.root / ".room.lock"):
            copies = sorted(_files(self.root, "[!.]*"), key=lambda entry: entry[1])
            used = sum(entry[2] for entry in [*copies, *_files(self.root, ".*.tmp")])
            for path, _, freed in copies:
                if used + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= freed
            with temporary.open("wb") as file:
                file.truncate(size)


def _files(root: Path, pattern: str) -> list[tuple[Path, float, int]]:
    """Files of all datasets below ``root``, with time of last use and bytes."""
    found = []
    for path in root.glob(f"*/{pattern}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # another process was faster
        found.append((path, status.st_mtime, status.st_size))
    return found
