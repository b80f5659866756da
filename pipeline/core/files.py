"""Files that appear whole or not at all, and folders that hold what one expects."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.core.errors import NoLocksError, OutputError

CHUNK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it there, on failure remove it.

    Raises OutputError where the disk is full or the folder cannot be written.
    """
    # Not the process id alone: several machines may write to one folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _output_error(path, error) from error
    finally:
        with suppress(OSError):  # not even there, or on a disk that has gone
            temporary.unlink()


def _output_error(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no space left while writing {path}; free some, or give another output folder")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
        return OutputError(f"cannot write {path} ({error.strerror}); give a folder that you may write to")
    return error


def write_atomic(path: Path, content: bytes | str) -> Path:
    """Write ``content`` so that ``path`` holds the old bytes or the new ones, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def append_line(path: Path, text: str) -> None:
    """Append ``text`` as a line of its own, also after one that a kill cut off.

    Raises OutputError where the disk is full or the file cannot be written.
    """
    try:
        with path.open("ab+") as file:
            if file.tell() and not _ends_in_newline(file):
                text = "\n" + text
            file.write(text.encode() + b"\n")
    except OSError as error:
        raise _output_error(path, error) from error


def _ends_in_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def write_json(path: Path, content: Any) -> Path:
    """Write ``content`` as indented JSON, atomically."""
    return write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file ``path``, or yield False where another process does and ``wait`` is False.

    A lock dies with its process, so a killed one blocks nobody. The holder may remove the file. Raises OutputError on
    a file system without locks, where a library would fall back to files that outlive their process.
    """
    descriptor = _lock(path, wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path, wait: bool) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _output_error(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        os.close(descriptor)
        raise NoLocksError(
            f"{path.parent} is on a file system without locks ({error.strerror}), so processes cannot share it; give a "
            "folder on another"
        ) from error
    if _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)  # its holder removed it while this process waited
    return _lock(path, wait)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def stale_temp_files(folder: Path, name: str = "*") -> list[Path]:
    """What killed writers of ``name`` left in ``folder``."""
    return list(folder.glob(f".{name}.*.tmp"))


def sync_file(path: Path) -> None:
    """Force the bytes of ``path`` to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force the names in folder ``path`` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(content: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def ensure_owned_dir(path: Path, marker: str, what: str, also: tuple[str, ...] = ()) -> None:
    """Make folder ``path`` for one ``what``, which always holds a file or folder named ``marker``.

    Others in ``also`` may be there before it.

    Raises OutputError where the folder already holds something else.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(path) if not name.startswith(".")]
    except OSError as error:
        raise _output_error(path, error) from error
    if set(others) - set(also) and marker not in others:
        raise OutputError(
            f"{path} already holds something that is no {what} (such as {others[0]!r}); give another folder"
        )
