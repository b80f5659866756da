"""Ray on one node: a child process of the task, stopped together with everything that it started."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.errors import ClusterError
from cluster.site import Site

PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
STARTED = "Ray runtime started"
FIRST_PORT, LAST_PORT = 20_000, 32_000  # below the range from which Linux takes ports of outgoing connections
CANDIDATES = 8
OBJECT_STORE_BYTES = 256 << 20
STOP_TIMEOUT_S = 10.0
KILL_AFTER_S = 2.0


def candidate_ports(job: str, node: int = 0) -> list[int]:
    """Ports to try for a node of ``job``, derived from its id so that jobs on one machine rarely collide."""
    number = int("".join(filter(str.isdigit, job)) or "0") + 101 * node
    span = LAST_PORT - FIRST_PORT
    return [FIRST_PORT + (number * 7 + attempt * 1009) % span for attempt in range(CANDIDATES)]


def free_ports(address: str, candidates: list[int], count: int) -> list[int]:
    """Return the first ``count`` of ``candidates`` on which nobody listens. Raises ClusterError if there are fewer."""
    free = [port for port in candidates if _is_free(address, port)]
    if len(free) >= count:
        return free[:count]
    raise ClusterError(f"ports {candidates} of {address} are all taken; end what holds them, or submit again")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


class RayNode:
    """One ``ray start --block``, as head or worker.

    Args:
        address: of this node.
        site: with its CPUs, GPUs and network.
        token: file with the cluster's token.
        log: file for Ray's output.
    """

    def __init__(self, address: str, site: Site, token: Path, log: Path) -> None:
        self.address = address
        self.site = site
        self.log = log
        self._token = token
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """Environment of processes that use this Ray cluster."""
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token), "RAY_USAGE_STATS_ENABLED": "0"}
        return {**os.environ, **self.site.network, **ray}

    def start_head(self, port: int, client_port: int, agent_port: int, temporary: Path) -> None:
        """Start the head without a dashboard. Ray's client server cannot be disabled, so it gets a port too."""
        temporary.mkdir(parents=True, exist_ok=True, mode=0o700)
        ports = ["--port", str(port), "--ray-client-server-port", str(client_port)]
        self._start(["--head", *ports, "--include-dashboard=false", "--temp-dir", str(temporary)], agent_port)

    def start_worker(self, head: str, agent_port: int) -> None:
        """Start a worker that joins the head at ``head``, host:port."""
        self._start(["--address", head], agent_port)

    def _start(self, arguments: list[str], agent_port: int) -> None:
        options = {
            "dashboard-agent-listen-port": agent_port,
            "node-ip-address": self.address,
            "num-cpus": self.site.cpus_per_node,
            "object-store-memory": OBJECT_STORE_BYTES,
            **({"num-gpus": self.site.gpus_per_node} if self.site.gpus_per_node else {}),
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--block", "--disable-usage-stats"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=self.environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,  # safe: this process has one thread
            )

    def is_up(self) -> bool | None:
        """True once Ray runs on this node, else None. Raises ClusterError with the end of its log if it exited."""
        if STARTED in self._output():
            return True
        if self._process is not None and self._process.poll() is not None:
            raise ClusterError(f"ray start ended with {self._process.returncode}: {self._last_line()}; see {self.log}")
        return None

    def has_ended(self) -> bool:
        """Whether Ray was started and has exited."""
        return self._process is not None and self._process.poll() is not None

    def _output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _last_line(self) -> str:
        lines = [line.strip() for line in self._output().splitlines() if line.strip()]
        return lines[-1][:200] if lines else "its log is empty"

    def stop(self) -> None:
        """Stop Ray's processes on this node: the one started here and its descendants."""
        if self._process is None:
            return
        descendants = _descendants(self._process.pid)
        self._process.send_signal(signal.SIGTERM)  # upon which Ray stops what it started
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        deadline = time.monotonic() + KILL_AFTER_S
        while any(process.is_running() for process in descendants) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def die_with_parent() -> None:
    """Before a child's program starts: tie its life to the task's, and ignore Slurm's warning signal.

    Slurm sends the warning to every process of a job; a raylet, for example, would die of it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []
