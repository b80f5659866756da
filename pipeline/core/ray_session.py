"""Connection to a Ray cluster: an existing one, or a local one on loopback."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graphkd.errors import UserError
from pipeline.core.errors import LostWorkersError

OBJECT_STORE_BYTES = 256 << 20  # nothing large passes through Ray's object store
LOOPBACK = "127.0.0.1"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0"}


@contextmanager
def ray_session(workers: int) -> Iterator[None]:
    """Use the Ray cluster that is connected already or that RAY_ADDRESS names, else start a local one on loopback.

    Args:
        workers: CPUs that a local cluster offers at least.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        # By default Ray binds the driver to this machine's outer address. A cluster on loopback, such as 127.0.0.2,
        # does not listen there.
        own: dict[str, Any] = {"_node_ip_address": address.rpartition(":")[0]} if address.startswith("127.") else {}
        ray.init(**common, **own)
    else:
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address=LOOPBACK,
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()


def to_user_error(error: BaseException, task: str) -> UserError:
    """Return the UserError that a worker raised, else a LostWorkersError with Ray's reason why ``task`` failed."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError) and not hasattr(cause, "traceback_str"):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return LostWorkersError(f"{task} failed on Ray: {lines[-1][:300]}; see Ray's logs")
