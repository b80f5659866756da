"""The Ray cluster that this process uses: one that is there, or one of its own on loopback."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OBJECT_STORE_BYTES = 256 << 20  # nothing large passes through Ray's object store
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0"}


@contextmanager
def ray_session(workers: int) -> Iterator[None]:
    """Use the Ray cluster that RAY_ADDRESS names or that is connected already; otherwise one of our own on loopback."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
    else:
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()
