"""A real Slurm of two nodes on this machine, everything of it in one folder, on loopback, ended by process id."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
NODES = ("node1", "node2")
CONFIG = """\
ClusterName=here
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a job that was queued again waits before it may start
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/slurmd.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=10 GraceTime=60
PartitionName=high Nodes=node1,node2 MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can run here, or None; installs the packages where GRAPHKD_INSTALL_SLURM is 1."""
    if os.geteuid() != 0:
        return "needs root, to be several nodes on one machine"
    if all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return None
    if os.environ.get("GRAPHKD_INSTALL_SLURM") != "1" or not shutil.which("apt-get"):
        return "Slurm is not installed; GRAPHKD_INSTALL_SLURM=1 installs Debian's packages"
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:  # so that the packages start nothing
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"apt-get {command[0]} failed: {done.stderr.strip()[-200:]}"
    finally:
        if made:
            policy.unlink()
    return None


class SlurmHere:
    """Starts on :meth:`start`, and ends on :meth:`stop` whatever of it still runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        self._name_nodes()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        self._run(
            [
                "munged",
                "--force",
                f"--key-file={key}",
                f"--socket={files['socket']}",
                f"--pid-file={files['pid']}",
                f"--log-file={files['log']}",
                f"--seed-file={files['seed']}",
            ]
        )
        first_job = int(time.time()) % 60_000_000  # never the id of an earlier cluster's job
        config = CONFIG.format(folder=self.folder, host=socket.gethostname(), ports=free_ports(3), first_job=first_job)
        (self.folder / "slurm.conf").write_text(config)
        self._run(["slurmctld"])
        self._until(lambda: self.quietly("scontrol", "ping"), "slurmctld")
        for node in NODES:
            self.start_node(node)
        self.rest()

    def rest(self) -> None:
        """Wait until both nodes are there and idle."""
        self._until(lambda: self.output("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * 2, "nodes")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd under its own host name."""
        self._run(["unshare", "--uts", "sh", "-c", f"hostname {node} && exec slurmd -N {node}"])

    def kill_node(self, node: str) -> None:
        """Kill a node: its slurmd and every process of jobs on it."""
        pid = int((self.folder / f"slurmd.{node}.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        for process in _processes_with(f"SLURMD_NODENAME={node}"):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        self.quietly("scancel", "--state=PENDING", "--user=root")
        self.quietly("scancel", "--state=RUNNING", "--user=root")
        self._until(lambda: not self.output("squeue", "-h").strip(), "the end of jobs", fail=False)
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munge"):
            with suppress(OSError, ValueError):
                pid = int((self.folder / f"{name}.pid").read_text())
                os.kill(pid, signal.SIGTERM)
                self._until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), name, fail=False)  # type: ignore[misc]

    def output(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def quietly(self, *command: str) -> bool:
        """Whether a command of Slurm succeeds."""
        done = subprocess.run(command, env=self.environment, capture_output=True, check=False)
        return done.returncode == 0

    def state(self, job: str) -> str:
        """State of a job."""
        return self.output("squeue", "-h", "--states=all", "-o", "%T", "-j", job).strip()

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def _name_nodes(self) -> None:
        hosts = Path("/etc/hosts")
        known = hosts.read_text().split()
        for node in NODES:
            if node not in known:
                with hosts.open("a") as file:
                    file.write(f"127.0.0.1 {node}\n")

    def _until(self, ready: Callable[[], bool], what: str, seconds: float = 40, fail: bool = True) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                assert not fail, f"{what} did not come; see {self.folder}"
                return
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _processes_with(variable: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found
