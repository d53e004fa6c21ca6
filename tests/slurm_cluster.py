"""A SLURM cluster of two nodes on this machine: real daemons of this user, on free ports of the loopback interface."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

NODES = ("node1", "node2")
CPUS = 2  # of each node, as SLURM is told
GRACE = 20  # seconds from the signal to the end of a preempted job
PATIENCE = 240.0  # seconds
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# Without munge only this machine may talk to the daemons; a requeued job waits for cred_expire, 5 s at least.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
SlurmdTimeout=10
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""


def installed() -> bool:
    return all(shutil.which(daemon, path=SBIN) for daemon in ("slurmctld", "slurmd", "sbatch"))


class Cluster:
    """tracking: `linuxproc` signals all descendants of a task; `pgid`, like the cgroups of real clusters, the task."""

    def __init__(self, directory: Path, tracking: str = "linuxproc") -> None:
        self.directory = directory
        host = socket.gethostname().partition(".")[0]
        first, *others = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=1000"
            for name, port in zip(NODES, others, strict=True)
        )
        values = {"host": host, "port": first, "user": getpass.getuser(), "directory": directory, "nodes": nodes}
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (directory / name).mkdir(parents=True)
        self._configuration = directory / "slurm.conf"
        self._configuration.write_text(CONFIGURATION.format(**values, tracking=tracking, grace=GRACE))
        self.environment = os.environ | {"SLURM_CONF": str(self._configuration), "PATH": SBIN}
        self._daemons = {"slurmctld": self._start("slurmctld", "-D", "-c")}
        for node in NODES:
            self.start(node)
        wait(
            lambda: self("sinfo", "--noheader", "--Node", "--format=%T", "-p", "main").split() == ["idle"] * 2, "nodes"
        )

    def start(self, node: str) -> None:
        """The daemon of a node."""
        self._daemons[node] = self._start("slurmd", "-D", "-N", node)

    def kill(self, node: str) -> None:
        """The node dies: its daemon and everything that it has started."""
        mine = {"SLURM_CONF": str(self._configuration), "SLURMD_NODENAME": node}
        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has just ended
                if mine.items() <= process.environ().items():
                    found |= {process, *(parent for parent in process.parents() if parent.name() == "slurmstepd")}
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def __call__(self, *command: str, check: bool = True, **environment: object) -> str:
        """What a command of SLURM prints."""
        variables = self.environment | {name: str(value) for name, value in environment.items()}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        (line,) = self("scontrol", "--oneliner", "show", "job", number).splitlines()
        return dict(word.partition("=")[::2] for word in line.split(" ") if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def ended(self, number: str) -> bool:
        return self.state(number) in ENDED

    def end(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job after its end."""
        wait(lambda: self.ended(number), f"the end of job {number}", pause=0.5)
        return self.job(number)

    def close(self) -> None:
        """Ends all jobs and daemons."""
        self("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full", check=False)
        self("scancel", "--user", getpass.getuser(), check=False)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.directory / "daemons.log").open("ab") as log:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def wait(until: Callable[[], Any], what: str, pause: float = 0.1) -> Any:
    """The first true answer."""
    limit = time.monotonic() + PATIENCE
    while not (found := until()):
        if time.monotonic() > limit:
            raise TimeoutError(f"{what}: nothing within {PATIENCE:.0f} s")
        time.sleep(pause)
    return found


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
