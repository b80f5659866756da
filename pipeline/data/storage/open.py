"""Choosing the store for a location."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.storage.base import StorageConfig, Store
from pipeline.data.storage.local import LocalStore
from pipeline.data.storage.remote import RemoteStore
from pipeline.data.storage.shard_cache import CachedStore


def open_store(location: str | Path, config: StorageConfig | None = None) -> Store:
    """Open the store of a folder or URL.

    Raises:
        ConfigError: for a protocol that is unknown or whose package is not installed.
    """
    config = config or StorageConfig()
    text = str(location)
    protocol = text.partition("://")[0] if "://" in text else ""
    if protocol in ("", "file"):
        return LocalStore(Path(text.removeprefix("file://")))
    remote = RemoteStore(text, protocol, config)
    if config.cache is None:
        return remote
    return CachedStore(remote, config.cache, int(config.cache_gb * 1e9))
