"""Connection to a Ray cluster: an existing one, or a local one that only this machine and user can reach."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from graphkd.errors import ConfigError, UserError
from pipeline.core.errors import LostWorkersError, first_line

OBJECT_STORE_BYTES = 256 << 20  # nothing large passes through Ray's object store
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0"}
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Has every process of a local Ray listen on loopback only; read when Ray is imported."""
CONNECT_TIMEOUT_S = 10.0
MAX_TEMP_LENGTH = 40  # Ray's sockets are some 60 characters below it, and Linux allows 107


@contextmanager
def ray_session(workers: int) -> Iterator[None]:
    """Use the Ray cluster that is connected already or that RAY_ADDRESS names, else start a local one on loopback.

    Args:
        workers: CPUs that a local cluster offers at least.
    """
    set_ray_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        _connect(address, common)
    else:
        _start_local(max(workers, os.cpu_count() or 1), common)
    try:
        yield
    finally:
        ray.shutdown()


def set_ray_environment() -> None:
    """Set what Ray reads from the environment. Call before Ray is imported.

    Ray reads its token once, so that one that is already imported keeps what it has.
    """
    token = {} if "ray" in sys.modules else _own_token()
    local = {} if os.environ.get("RAY_ADDRESS") else {**LOOPBACK_ONLY, **token}
    os.environ.update({name: os.environ.get(name, value) for name, value in {**QUIET, **local}.items()})


def _own_token() -> dict[str, str]:
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token_file())}


@lru_cache(maxsize=1)
def _token_file() -> Path:
    """File with the token of local clusters, for this process and its children; Ray's own can be read by others."""
    folder = Path(tempfile.mkdtemp(prefix="graphkd-token-"))  # 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _start_local(cpus: int, common: dict[str, Any]) -> None:
    import ray
    from ray._private import ray_constants  # what LOOPBACK_ONLY sets, if something imported Ray before

    ray_constants.ENABLE_RAY_CLUSTER = False
    temp = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    short: dict[str, Any] = {} if len(temp) <= MAX_TEMP_LENGTH else {"_temp_dir": _short_temp_folder()}
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **short,
            **common,
        )
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"Ray does not start on this machine: {first_line(error)}; see {temp}/ray/session_latest/logs, or give "
            "--engine local"
        ) from error


def _short_temp_folder() -> str:
    folder = Path(f"/tmp/graphkd-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{folder} belongs to someone else; set TMPDIR to a folder with a path of at most 40 characters"
        )
    return str(folder)


def _connect(address: str, common: dict[str, Any]) -> None:
    import ray

    _check_answers(address)
    # By default Ray binds the driver to this machine's outer address. A cluster on loopback, such as 127.0.0.2,
    # does not listen there.
    own: dict[str, Any] = {"_node_ip_address": address.rpartition(":")[0]} if address.startswith("127.") else {}
    try:
        ray.init(**common, **own)
    except (OSError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        if "token" in _texts(error):
            raise ConfigError(
                f"the Ray cluster at RAY_ADDRESS {address} refuses the token; set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its own"
            ) from error
        raise LostWorkersError(
            f"no connection to the Ray cluster at RAY_ADDRESS {address}: {first_line(error)}"
        ) from error


def _texts(error: BaseException | None) -> str:
    """Text of an error and of those that led to it, in lower case."""
    return "" if error is None else f"{error} {_texts(error.__cause__ or error.__context__)}".lower()


def _check_answers(address: str) -> None:
    """Raise LostWorkersError if nobody listens at ``address``, on which Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # such as auto
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise LostWorkersError(
            f"no Ray cluster answers at RAY_ADDRESS {address} ({error}); start it, or unset RAY_ADDRESS to use one of "
            "this machine"
        ) from error


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
