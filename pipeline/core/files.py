"""Files that appear whole or not at all, and checks of output folders."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.core.errors import OutputError

CHUNK_BYTES = 1 << 20


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn a full disk and missing permissions into an OutputError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"no space left while writing {path}; free some, or give another output folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise OutputError(
                f"cannot write {path} ({error.strerror}); give a folder that you have write access to"
            ) from error
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success sync it and rename it to ``path``, on failure remove it.

    Raises:
        OutputError: if the disk is full or the folder cannot be written.
    """
    # A process id alone is not unique: several machines may write to one shared folder.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # already renamed, or its disk is gone
            temporary.unlink()


def write_atomic(path: Path, content: bytes | str) -> Path:
    """Write ``content`` so that ``path`` holds either the old bytes or the new ones."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write ``content`` as indented JSON, atomically."""
    return write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_text(path: Path, limit: int | None = None) -> str:
    """Text of a regular file, UTF-8 with or without a byte order mark.

    Raises:
        OSError: also if it is a pipe or a device, which could block or never end, or larger than ``limit`` bytes.
        UnicodeDecodeError: a ValueError.
    """
    check_regular(path)
    size = path.stat().st_size
    if limit is not None and size > limit:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than {limit}", str(path))
    return path.read_text(encoding="utf-8-sig")


def check_regular(path: Path) -> None:
    """Raise OSError if ``path`` exists and is no regular file."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def shown(path: Path | str) -> str:
    """A path for messages: absolute, with what it is relative to."""
    if "://" in str(path) or Path(path).is_absolute():
        return str(path)
    return f"{Path(path).absolute()} ({path} in {Path.cwd()})"


def stale_temp_files(folder: Path, name: str = "*") -> list[Path]:
    """Temporary files of ``name`` that killed writers left in ``folder``."""
    return list(folder.glob(f".{name}.*.tmp"))


def sync_file(path: Path) -> None:
    """Flush a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, such as a rename, to disk."""
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
    """Hex SHA-256 of a JSON-serialisable value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def ensure_owned_dir(path: Path, marker: str, kind: str, also: tuple[str, ...] = ()) -> None:
    """Create the folder ``path`` for one ``kind`` of content, which always includes an entry named ``marker``.

    Args:
        path: folder to create, or one that is empty or was created for the same kind.
        marker: file or folder that tells the kind.
        kind: what the folder is for, in error messages.
        also: entries that may exist before ``marker`` does.

    Raises:
        OutputError: if the folder already holds something else, or cannot be written.
    """
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        others = [name for name in os.listdir(path) if not name.startswith(".")]
    if set(others) - set(also) and marker not in others:
        raise OutputError(
            f"{path} already holds something that is no {kind} (such as {others[0]!r}); give another folder"
        )
