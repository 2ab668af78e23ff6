"""A real Slurm of one node that is thrown away again: Debian's packages, without systemd, as root or not."""

from __future__ import annotations

import os
import pwd
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd", "munged")
PATIENCE = 60.0
"""Seconds after which a test gives up on Slurm."""


def wait_until(
    condition: Callable[[], object], what: str, patience: float = PATIENCE, state: Callable[[], str] = str
) -> None:
    """Wait until ``condition`` holds; say ``state`` where it does not."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {patience:.0f} s\n{state()}"
        time.sleep(0.1)


class Cluster:
    """Slurm with a partition ``ci`` and a partition ``hi`` that preempts it.

    Parameters
    ----------
    folder
        Empty folder for all that it keeps; its path must be short, since a socket lies in it.
    largest_array
        Its ``MaxArraySize``.
    """

    def __init__(self, folder: Path, largest_array: int) -> None:
        self.folder, self.largest_array = folder, largest_array
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs."""
        self.folder.chmod(0o755)
        munge = self.folder / "munge"
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._config())
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null,/dev/zero\n")
        # it is not used, but without it slurmd looks for cgroups, which a container may lack
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", *(f"--{option}={munge / name}" for option, name in files.items()))
        self._daemon("slurmctld")
        self._daemon("slurmd")
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T").split()[:1] == ["idle"], "the node comes up")

    def stop(self) -> None:
        """Cancel what is left and end the daemons."""
        try:
            self.clear()
        finally:
            for path in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
                if (file := self.folder / path).exists():
                    _end(int(file.read_text()))

    def clear(self) -> None:
        """Cancel every job and wait for their end."""
        self.ask("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        self.wait_for_end()

    def ask(self, *words: str) -> str:
        """Return what one of Slurm's commands prints."""
        environment = os.environ | self.environment
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE).stdout.strip()

    def queue(self) -> dict[str, str]:
        """Return the state of every job, by its id."""
        lines = self.ask("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def state(self) -> str:
        """Return what Slurm says of its jobs, and how its logs end."""
        return f"{self.ask('scontrol', 'show', 'job')}\n{self._logs()}"

    def wait_for_end(self, patience: float = 5 * PATIENCE) -> None:
        """Wait until the queue is empty."""
        wait_until(lambda: not self.queue(), "all jobs end", patience, self.state)

    def begin_at_once(self) -> None:
        """Let what was queued again begin without the two minutes that Slurm waits."""
        for job in self.queue():
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def _daemon(self, *words: str) -> None:
        done = subprocess.run(
            words, env=os.environ | self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, f"{words[0]} does not start: {done.stderr}\n{self._logs()}"

    def _logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.folder.glob("*.log"))

    def _config(self) -> str:
        host, user = socket.gethostname().partition(".")[0], pwd.getpwuid(os.getuid()).pw_name
        ports = [_free_port() for _ in range(2)]
        settings = {
            "ClusterName": "ci",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": user,
            "SlurmdUser": user,
            "SlurmctldPort": ports[0],
            "SlurmdPort": ports[1],
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder / 'munge' / 'sock'}",
            "CredType": "cred/munge",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd.pid",
            "SlurmctldLogFile": self.folder / "slurmctld.log",
            "SlurmdLogFile": self.folder / "slurmd.log",
            "MailProg": "/bin/true",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "GresTypes": "gpu",
            "MaxArraySize": self.largest_array,
            "FirstJobId": random.randrange(100_000, 900_000),
            "SchedulerParameters": "sched_interval=1,bf_interval=1",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
            "KillWait": 2,
            "ReturnToService": 2,
            "SlurmdParameters": "config_overrides",  # the two processors are there, however many the machine has
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines += [
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 Gres=gpu:2 State=UNKNOWN",
            f"PartitionName=ci Nodes={host} Default=YES PriorityTier=1 GraceTime=30",
            f"PartitionName=hi Nodes={host} PriorityTier=2 PreemptMode=OFF",
        ]
        return "\n".join(lines) + "\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _end(process: int) -> None:
    """End a daemon, by force where it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(process, number)
            for _ in range(100):
                time.sleep(0.1)
                os.kill(process, 0)
        except ProcessLookupError:
            return
