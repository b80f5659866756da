"""fsspec's HTTP file system, with bounds: it reads no more than it asked for, and waits for no server that drips."""

from __future__ import annotations

import time
from typing import Any

from fsspec.implementations.http import HTTPFileSystem

MAX_FILE_BYTES = 512 << 20  # of files that are read whole: descriptions and indexes
MIN_BYTES_S = 10_000  # on average, after several timeouts
PATIENCE = 4  # timeouts
CHUNK_BYTES = 1 << 20


class BoundedHTTPFileSystem(HTTPFileSystem):
    """HTTP in bounded memory and time.

    Args:
        timeout: seconds; see ``StorageConfig.timeout_s``.
        options: of :class:`HTTPFileSystem`.
    """

    def __init__(self, timeout: float, **options: Any) -> None:
        super().__init__(**options)
        self.timeout = timeout

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        given = {**self.kwargs, **options}
        limit = MAX_FILE_BYTES if end is None else end - (start or 0)
        if start is not None or end is not None:
            given["headers"] = {**given.get("headers", {}), "Range": await self._process_limits(url, start, end)}
        session = await self.set_session()
        async with session.get(self.encode_url(url), **given) as response:
            self._raise_not_found_for_status(response, url)
            content = await self._read(response, limit)
        if end is None and len(content) > limit:
            raise OSError(f"it is larger than {limit} bytes")
        return content

    async def _read(self, response: Any, limit: int) -> bytes:
        """Up to one byte more than ``limit``, so that a longer answer shows."""
        content, begin = bytearray(), time.monotonic()
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            content += chunk[: limit + 1 - len(content)]
            if len(content) > limit:
                break
            elapsed = time.monotonic() - begin
            if elapsed > PATIENCE * self.timeout and len(content) < MIN_BYTES_S * elapsed:
                raise TimeoutError(f"it sent {len(content)} bytes in {elapsed:.0f} s")
        return bytes(content)
