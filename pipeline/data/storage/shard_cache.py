"""Local copies of remote shards in a folder of bounded size, shared by any number of processes.

A copy gets its name once it is complete and its size and SHA-256 match the dataset's, so whatever has a final name can
be used. While a shard is being copied in the background, its samples are read remotely. The least recently used copies
make room for new ones.
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
from pipeline.core.files import atomic_path, fingerprint, stale_temp_files
from pipeline.core.locks import file_lock
from pipeline.data.storage.base import ByteRange, FileInfo
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.remote import RemoteStore

log = logging.getLogger(__name__)

CONCURRENT_COPIES = 2  # per process; leaves bandwidth for reads of samples


class CachedStore:
    """A remote store whose large files are kept in ``folder``, up to ``limit`` bytes in total."""

    def __init__(self, remote: RemoteStore, folder: Path, limit: int) -> None:
        self.remote = remote
        self.location = remote.location
        self.root = folder
        self.limit = limit
        self._registered: dict[str, FileInfo] = {}
        self._copies: dict[str, Future[None]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._guard = threading.Lock()
        self.register({})

    def read(self, name: str) -> bytes:
        """Read a whole file remotely: descriptions and indexes are small and must be current."""
        return self.remote.read(name)

    def register(self, files: Mapping[str, FileInfo]) -> None:
        """Keep copies of these files, apart from copies of other content at the same location."""
        self._registered = dict(files)
        content = [self.location, sorted((name, info.sha256) for name, info in files.items())]
        self.folder = self.root / fingerprint(content)[:16]
        self._local = LocalStore(self.folder)
        self._local.register(files)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read ranges from local copies, and remotely while copies are being made."""
        copied = [self._has_copy(part.name) for part in ranges]
        remote = iter(self.remote.read_ranges([part for part, local in zip(ranges, copied, strict=True) if not local]))
        return [self._read_copy(part) if local else next(remote) for part, local in zip(ranges, copied, strict=True)]

    def discard_copy(self, name: str) -> bool:
        """Remove the local copy of a shard, so that it is read remotely and copied again."""
        path = self.folder / name
        if path.exists():
            log.warning("the local copy %s is damaged; it is removed and copied again", path)
            path.unlink(missing_ok=True)
            self._local = LocalStore(self.folder)  # forgets the open file
            self._local.register(self._registered)
        return True  # also for other pages that were read together with the one that showed it

    def close(self) -> None:
        """Wait for copies in progress."""
        for copy in list(self._copies.values()):
            copy.exception()

    def _read_copy(self, part: ByteRange) -> bytes:
        try:
            return self._local.read_ranges([part])[0]
        except DataError:  # another process removed it to make room, or it was cut short
            self.discard_copy(part.name)
            return self.remote.read_ranges([part])[0]

    def _has_copy(self, name: str) -> bool:
        path = self.folder / name
        try:
            os.utime(path)  # marks it as recently used
        except OSError:
            self._start_copy(name)
            return False
        return True

    def _start_copy(self, name: str) -> None:
        with self._guard:
            if name in self._copies or name not in self._registered or self._registered[name].bytes > self.limit:
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(CONCURRENT_COPIES, thread_name_prefix="copy-shard")
            self._copies[name] = self._pool.submit(self._copy, name)

    def _copy(self, name: str) -> None:
        """Copy one shard unless another process is doing so. A failure only costs speed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / f".{name}.lock", wait=False) as held:
                if not held:
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
        size, digest = self._registered[name]
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
                    f"{self.location}/{name} has other bytes than its dataset describes ({seen} of {size}, SHA-256 "
                    f"{hashed.hexdigest()[:12]}); copy the dataset again"
                )

    def _make_room(self, size: int, temporary: Path) -> None:
        """Remove copies until ``size`` bytes fit, and reserve them by a file of that length, which others count."""
        with file_lock(self.root / ".room.lock"):
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
    """Files of all datasets below ``root``, with time of last use and size in bytes."""
    found = []
    for path in root.glob(f"*/{pattern}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # removed by another process
        found.append((path, status.st_mtime, status.st_size))
    return found
