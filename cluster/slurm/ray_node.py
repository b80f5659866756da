"""Ray on one node: started as a child of the task, watched, and ended with everything that it started, ours only."""

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

from cluster.site import Site
from cluster.slurm.rendezvous import ClusterError

PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
UP = "Ray runtime started"
FIRST_PORT, LAST_PORT = 20_000, 32_000  # below what Linux gives to outgoing connections
TRIES = 8
END_S = 10.0


def ports_of(job: str, node: int = 0) -> list[int]:
    """Ports to try for a node of ``job``, derived from its id, so that jobs on one machine seldom meet."""
    number = int("".join(filter(str.isdigit, job)) or "0") + 101 * node
    span = LAST_PORT - FIRST_PORT
    return [FIRST_PORT + (number * 7 + attempt * 1009) % span for attempt in range(TRIES)]


def free_ports(address: str, candidates: list[int], count: int) -> list[int]:
    """The first ``count`` of ``candidates`` that nobody listens on; raises ClusterError where there are fewer."""
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
    """One ``ray start --block``, head or not.

    Args:
        address: of this node.
        site: where it runs.
        token: file that holds the cluster's token.
        log: file for what Ray says.
    """

    def __init__(self, address: str, site: Site, token: Path, log: Path) -> None:
        self.address = address
        self.site = site
        self.log = log
        self._token = token
        self._process: subprocess.Popen[bytes] | None = None

    def environment(self) -> dict[str, str]:
        """What processes need that use this Ray."""
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token), "RAY_USAGE_STATS_ENABLED": "0"}
        return {**os.environ, **self.site.network, **own}

    def start_head(self, port: int, client_port: int, agent_port: int, temporary: Path) -> None:
        """Begin to start the head, without a dashboard; Ray's client server cannot be left out, so it gets a port."""
        temporary.mkdir(parents=True, exist_ok=True, mode=0o700)
        ports = ["--port", str(port), "--ray-client-server-port", str(client_port)]
        self._start(["--head", *ports, "--include-dashboard=false", "--temp-dir", str(temporary)], agent_port)

    def start_worker(self, head: str, agent_port: int) -> None:
        """Begin to join the head at ``head``, host:port."""
        self._start(["--address", head], agent_port)

    def _start(self, arguments: list[str], agent_port: int) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, "--block"]
        command += [
            "--dashboard-agent-listen-port",
            str(agent_port),
            "--node-ip-address",
            self.address,
            "--num-cpus",
            str(self.site.cpus_per_node),
        ]
        command += ["--num-gpus", str(self.site.gpus_per_node)] if self.site.gpus_per_node else []
        command += ["--disable-usage-stats", "--object-store-memory", str(256 << 20)]
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
        """True once Ray runs here, else None; raises ClusterError with Ray's last words where it ended."""
        if UP in self._said():
            return True
        if self._process is not None and self._process.poll() is not None:
            raise ClusterError(f"ray start ended with {self._process.returncode}: {self._last_words()}; see {self.log}")
        return None

    def has_ended(self) -> bool:
        """Whether it is not running any more."""
        return self._process is not None and self._process.poll() is not None

    def _said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._said().splitlines() if line.strip()]
        return lines[-1][:200] if lines else "it said nothing"

    def end(self) -> None:
        """End Ray's processes of this node: those that descend from the one started here."""
        if self._process is None:
            return
        family = _descendants(self._process.pid)
        self._process.send_signal(signal.SIGTERM)  # on which it stops what it started
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        deadline = time.monotonic() + 2
        while any(process.is_running() for process in family) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def die_with_parent() -> None:
    """In a child before its program: end when the task does, however that ends, and let Slurm's warning pass by."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # Slurm sends its warning to every process of a job; what does not ignore it, such as a raylet, would die of it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.children(recursive=True)
    return []
