"""Where datasets lie: local folders, or anything that fsspec reaches (http, https, s3, gs), with retries."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from graphkd.errors import ConfigError, DataError

log = logging.getLogger(__name__)
Value = TypeVar("Value")

OPEN_FILES = 256  # per process; a rank reads 64 or so shards side by side
CHUNK_BYTES = 8 << 20
PROTOCOLS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
# What trying again cannot mend.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, ConfigError)


class StorageConfig(BaseModel):
    """How remote datasets are read. Local ones take none of this."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cache: Path | None = None
    """Local folder that keeps copies of remote shards, also over crashes; None reads from afar every time."""
    cache_gb: float = Field(default=100.0, gt=0)
    """Bound of that folder in GB (10^9 bytes); the shards used longest ago go first."""
    attempts: int = Field(default=6, ge=1)
    """Tries of every read before the run fails, with growing random pauses between them."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Seconds without an answer after which a read counts as failed."""


class Range(BaseModel):
    """Some bytes of one file of a dataset."""

    model_config = ConfigDict(frozen=True)

    name: str
    start: int
    size: int


class Store(Protocol):
    """The files of one dataset folder, read-only."""

    location: str
    """What users call it."""

    def read(self, name: str) -> bytes:
        """A whole file; raises DataError where it is missing or cannot be had."""
        ...

    def ranges(self, wanted: Sequence[Range]) -> list[bytes]:
        """Parts of files, in order, each of the size asked for; raises DataError naming one that cannot be had."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file in pieces."""
        ...

    def local(self, name: str) -> Path | None:
        """Where the file lies on this machine, or None."""
        ...


def open_store(location: str | Path, config: StorageConfig | None = None) -> Store:
    """The store of a folder or URL; raises ConfigError for a protocol that is not known or not installed."""
    config = config or StorageConfig()
    text = str(location)
    protocol = text.partition("://")[0] if "://" in text else ""
    if protocol in ("", "file"):
        return LocalStore(Path(text.removeprefix("file://")))
    remote = RemoteStore(text, protocol, config)
    if config.cache is None:
        return remote
    from pipeline.data.shard_cache import CachedStore

    return CachedStore(remote, config.cache, int(config.cache_gb * 1e9))


class LocalStore:
    """A folder of this machine (or mounted on it)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, name: str) -> bytes:
        """A whole file."""
        return b"".join(self.chunks(name))

    def ranges(self, wanted: Sequence[Range]) -> list[bytes]:
        """Parts of files, by ``pread``."""
        return [self._range(part) for part in wanted]

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file in pieces."""
        try:
            with (self.folder / name).open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise _unreadable(f"{self.folder / name}", error) from error

    def local(self, name: str) -> Path | None:
        """Its path."""
        return self.folder / name

    def _range(self, part: Range) -> bytes:
        try:
            content = os.pread(self._file(part.name), part.size, part.start)
        except OSError as error:
            raise _unreadable(f"{self.folder / part.name}", error) from error
        if len(content) != part.size:
            raise DataError(
                f"{self.folder / part.name} ends before byte {part.start + part.size}; it was cut short or replaced: "
                "copy or pack it again, then run `graphkd data verify`"
            )
        return content

    def _file(self, name: str) -> int:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        self._files[name] = descriptor
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class RemoteStore:
    """A folder behind fsspec; every read is tried again after pauses that grow at random (full jitter)."""

    def __init__(self, location: str, protocol: str, config: StorageConfig) -> None:
        self.location = location.rstrip("/")
        self.config = config
        if protocol not in PROTOCOLS:
            known = ", ".join(["file", *PROTOCOLS])
            raise ConfigError(f"{location} has the protocol {protocol!r}; datasets are read from folders, or {known}")
        self._protocol = protocol
        self._filesystem: Any = None

    def read(self, name: str) -> bytes:
        """A whole file."""
        return self._retried(lambda: self._fs().cat_file(self._url(name)), name)

    def ranges(self, wanted: Sequence[Range]) -> list[bytes]:
        """Parts of files, fetched side by side; those that failed are tried again."""
        found: dict[int, bytes] = {}
        first = wanted[0].name if wanted else ""

        def fetch() -> None:
            missing = [place for place in range(len(wanted)) if place not in found]
            parts = [wanted[place] for place in missing]
            answers = self._fs().cat_ranges(
                [self._url(part.name) for part in parts],
                [part.start for part in parts],
                [part.start + part.size for part in parts],
                on_error="return",
            )
            for place, part, answer in zip(missing, parts, answers, strict=True):
                if isinstance(answer, bytes) and len(answer) == part.size:
                    found[place] = answer
                elif isinstance(answer, BaseException):
                    failure: BaseException = answer
                else:
                    failure = OSError(f"{part.size} bytes from {part.start} were asked for, {len(answer)} came")
            if len(found) < len(wanted):
                raise failure

        self._retried(fetch, first)
        return [found[place] for place in range(len(wanted))]

    def chunks(self, name: str) -> Iterator[bytes]:
        """A whole file in pieces, each of which is tried again by itself."""
        size = self._retried(lambda: int(self._fs().size(self._url(name))), name)
        for start in range(0, size, CHUNK_BYTES):
            yield self.ranges([Range(name=name, start=start, size=min(CHUNK_BYTES, size - start))])[0]

    def local(self, name: str) -> Path | None:
        """Not here."""
        return None

    def _url(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _retried(self, attempt: Callable[[], Value], name: str) -> Value:
        from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_after_attempt, wait_random_exponential

        retrying = Retrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            retry=retry_if_exception(_transient),
            before_sleep=before_sleep_log(log, logging.INFO),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except ConfigError:
            raise
        except Exception as error:
            raise _unreadable(self._url(name), error, self.config.attempts) from error

    def _fs(self) -> Any:
        # Made where it is used: a loader worker needs its own event loop.
        if self._filesystem is None:
            self._filesystem = _filesystem(self._protocol, self.config.timeout_s)
        return self._filesystem

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_filesystem": None}


def _filesystem(protocol: str, timeout: float) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol, **_options(protocol, timeout))
    except ImportError as error:
        raise ConfigError(
            f"{protocol} datasets need {PROTOCOLS[protocol]}, which is not installed; pip install 'graphkd[remote]'"
        ) from error


def _options(protocol: str, timeout: float) -> dict[str, Any]:
    if protocol in ("http", "https"):
        import aiohttp

        return {
            "client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)}
        }
    if protocol == "s3":  # its own retries stay low: ours cover all that can go wrong
        return {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}}
    return {"requests_timeout": timeout}


def _transient(error: BaseException) -> bool:
    """Whether trying again may help; answers of the kind 4xx (but 408 and 429) will not change."""
    if isinstance(error, PERMANENT) or not isinstance(error, Exception):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 429))


def _unreadable(where: str, error: BaseException, attempts: int = 1) -> DataError:
    missing = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ENOENT
    reason = "does not exist" if missing else f"cannot be read ({_first_line(error)})"
    tried = f" after {attempts} tries" if attempts > 1 and _transient(error) else ""
    return DataError(f"{where} {reason}{tried}; look at the location, its access rights and the network")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\s+", " ", text)[:160]
