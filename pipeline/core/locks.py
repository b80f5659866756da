"""Exclusive locks between processes, released by the system when their process dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from pipeline.core.errors import NoLocksError
from pipeline.core.files import output_errors


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path``; yields False if another process holds it and ``wait`` is False.

    The holder may remove the file.

    Raises:
        NoLocksError: on a file system without locks. Lock files without ``flock`` would outlive a killed process.
        OutputError: if the folder cannot be written.
    """
    lock = FileLock(path, poll_interval=0.1)
    held = _acquire(lock, path, wait)
    try:
        yield held
    finally:
        lock.release()


@contextmanager
def checked_lock(check: Callable[[], object], lock: AbstractContextManager[object]) -> Iterator[None]:
    """Check a folder, lock it, and check it again: another process may have changed it in between.

    ``check`` raises if the folder cannot be used. Checking first leaves a folder that holds something else untouched.
    """
    check()
    with lock:
        check()
        yield


def _acquire(lock: FileLock, path: Path, wait: bool) -> bool:
    try:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as error:
        raise NoLocksError(_no_locks(path, error)) from error
    if isinstance(lock, SoftFileLock):  # filelock's own replacement where flock is missing
        lock.release()
        raise NoLocksError(_no_locks(path, "no flock"))
    return True


def _no_locks(path: Path, reason: object) -> str:
    return (
        f"{path.parent} is on a file system without locks ({reason}), so processes cannot share it; give a folder on "
        "another file system"
    )
