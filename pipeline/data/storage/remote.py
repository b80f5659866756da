"""Datasets on remote storage through fsspec: http, https, s3, gs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from graphkd.errors import ConfigError
from pipeline.data.storage.base import CHUNK_BYTES, ByteRange, FileInfo, StorageConfig, is_transient, read_error

log = logging.getLogger(__name__)
Value = TypeVar("Value")

PROTOCOLS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
"""Protocol -> package that it needs."""


class RemoteStore:
    """A folder behind fsspec. Reads are retried with exponential backoff and full jitter."""

    def __init__(self, location: str, protocol: str, config: StorageConfig) -> None:
        self.location = location.rstrip("/")
        self.config = config
        if protocol not in PROTOCOLS:
            known = ", ".join(["file", *PROTOCOLS])
            raise ConfigError(f"{location} has the protocol {protocol!r}; datasets are read from folders, or {known}")
        self._protocol = protocol
        self._filesystem: Any = None

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        return self._retry(lambda: self._fs().cat_file(self._url(name)), lambda: name)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Read ranges of files concurrently, retrying those that failed."""
        if not ranges:
            return []
        found: dict[ByteRange, bytes] = {}
        failed = ranges[0]

        def fetch() -> None:
            nonlocal failed
            missing = [part for part in dict.fromkeys(ranges) if part not in found]
            failure: BaseException | None = None
            for part, answer in zip(missing, self._answers(missing), strict=True):
                if isinstance(answer, bytes) and len(answer) == part.size:
                    found[part] = answer
                    continue
                failed, failure = part, answer if isinstance(answer, BaseException) else _wrong_size(part, answer)
            if failure is not None:
                raise failure

        self._retry(fetch, lambda: failed.name)
        return [found[part] for part in ranges]

    def _answers(self, parts: Sequence[ByteRange]) -> list[bytes | BaseException]:
        answers: list[bytes | BaseException] = self._fs().cat_ranges(
            [self._url(part.name) for part in parts],
            [part.start for part in parts],
            [part.start + part.size for part in parts],
            on_error="return",
        )
        return answers

    def chunks(self, name: str) -> Iterator[bytes]:
        """Read a whole file in chunks, each retried on its own."""
        size = self._retry(lambda: int(self._fs().size(self._url(name))), lambda: name)
        for start in range(0, size, CHUNK_BYTES):
            yield self.read_ranges([ByteRange(name=name, start=start, size=min(CHUNK_BYTES, size - start))])[0]

    def register(self, files: Mapping[str, FileInfo]) -> None:
        """Nothing to prepare."""

    def discard_copy(self, name: str) -> bool:
        """There are no copies."""
        return False

    def _url(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _retry(self, attempt: Callable[[], Value], name: Callable[[], str]) -> Value:
        from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_after_attempt, wait_random_exponential

        retrying = Retrying(
            stop=stop_after_attempt(self.config.attempts),
            wait=wait_random_exponential(multiplier=0.2, max=10),
            retry=retry_if_exception(is_transient),
            before_sleep=before_sleep_log(log, logging.INFO),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except ConfigError:
            raise
        except Exception as error:
            raise read_error(self._url(name()), error, self.config.attempts) from error

    def _fs(self) -> Any:
        # Created at first use: every loader worker needs its own event loop.
        if self._filesystem is None:
            self._filesystem = _filesystem(self._protocol, self.config.timeout_s)
        return self._filesystem


def _wrong_size(part: ByteRange, answer: bytes) -> OSError:
    return OSError(
        f"asked for {part.size} bytes from {part.start}, got {len(answer)}; does the server support byte ranges?"
    )


def _filesystem(protocol: str, timeout: float) -> Any:
    import fsspec

    try:
        if protocol in ("http", "https"):
            from pipeline.data.storage.http import BoundedHTTPFileSystem

            return BoundedHTTPFileSystem(timeout, **_options(protocol, timeout))
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
    if protocol == "s3":  # few retries of its own: ours cover every failure
        return {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}}
    return {"requests_timeout": timeout}
