"""A real Slurm cluster on one machine, for the tests: root, Linux, Debian's slurm-wlm, munge and iproute2 are enough.

The controller and every node are a host of their own: a network, hostname, mount and process namespace each; the
network between them is a bridge inside the controller's, so that nothing is added to the machine's own. All state lies
in one folder. Every process is a child of this one and ends with it, even when it is killed.
"""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
NETWORK = "10.77.0"
ROOT = Path(__file__).resolve().parents[1]

# What a site's own file would say too, but for the two blocks of short times: faults must be seen in seconds.
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=ctl({network}.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobRequeue=1
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=5
UnkillableStepTimeout=20
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=spot Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
"""

# The first process of a host: takes in orphans, and ends, the whole host with it, when its input is closed.
INIT = """
import os, select
while True:
    if select.select([0], [], [], 0.1)[0] and not os.read(0, 1):
        os._exit(0)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
"""


def missing() -> str:
    """Why there can be no cluster here; "" when there can."""
    if sys.platform != "linux" or os.geteuid():
        return "a cluster of namespaces needs root on Linux"
    absent = [name for name in COMMANDS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm munge iproute2)" if absent else ""


class Lab:
    """A cluster of `nodes` nodes, n1, n2, ...; a context manager."""

    def __init__(self, nodes: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-")) / "c"  # munge wants folders that others may read
        os.chmod(self.root.parent, 0o755)
        self.names = [f"n{i + 1}" for i in range(nodes)]
        self.address = {"ctl": f"{NETWORK}.1", **{n: f"{NETWORK}.{11 + i}" for i, n in enumerate(self.names)}}
        self._hosts: dict[str, subprocess.Popen[str]] = {}
        self._inits: dict[str, int] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Lab":
        if problem := missing():  # who asks for these tests must not hear that all is well
            raise RuntimeError(problem)
        for name in ("etc", "state", "run", "log", *(f"spool/{n}" for n in self.names)):
            (self.root / name).mkdir(parents=True)
        key = self.root / "etc/munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        hosts = "".join(f"{address} {name}\n" for name, address in self.address.items())
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n" + hosts)
        nodes = "\n".join(
            f"NodeName={n} NodeHostname={n} NodeAddr={self.address[n]} CPUs=4 RealMemory=8000" for n in self.names
        )
        text = CONFIGURATION.format(root=self.root, network=NETWORK, nodes=nodes)
        (self.root / "etc/slurm.conf").write_text(text)
        (self.root / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        try:
            for host in ("ctl", *self.names):
                self._host_up(host)
            run = self.root / "run"
            files = [f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"]
            files += [f"--log-file={self.root}/log/munged.log", f"--seed-file={run}/munged.seed"]
            self._daemon("ctl", "munged", ["munged", "-F", *files])
            self.wait(lambda: (run / "munge.sock").exists(), 10)
            self._daemon("ctl", "slurmctld", ["slurmctld", "-D", "-i", "-c"])
            self.wait(lambda: "is UP" in self.run("scontrol", "ping"), 10)
            for name in self.names:
                self._daemon(name, name, ["slurmd", "-D", "-N", name])
            self.wait(lambda: self.states() == dict.fromkeys(self.names, "idle"), 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host, process in self._hosts.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._inits[host], signal.SIGKILL)
            _close(process)
        for daemon in self._daemons.values():
            daemon.wait(10)
        shutil.rmtree(self.root.parent, ignore_errors=True)

    # --- use ------------------------------------------------------------------------------------------------------

    def run(self, *command: str, host: str = "ctl", **variables: str) -> str:
        """What a command prints on a host; CalledProcessError when it fails."""
        known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment = {**known, "SLURM_CONF": str(self.root / "etc/slurm.conf"), **variables}
        done = subprocess.run(self._on(host, command), env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """Node -> idle, alloc, down ..."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of a job: JobState, Restarts, ..."""
        text = self.run("scontrol", "show", "job", "-o", number)
        return dict(pair.split("=", 1) for pair in re.findall(r"(\S+=\S*)", text))

    def wait(self, condition: Callable[[], object], seconds: float) -> None:
        """Until `condition` holds; TimeoutError, RuntimeError when a daemon ends meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for name, process in self._daemons.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with {process.returncode}; see {self.root}/log")
            with contextlib.suppress(RuntimeError):
                if condition():
                    return
            time.sleep(0.1)
        raise TimeoutError

    # --- faults ---------------------------------------------------------------------------------------------------

    def cut(self, name: str) -> None:
        """Pull a node's cable; its processes live on."""
        self._ip("ctl", f"link set p-{name} down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        self._ip("ctl", f"link set p-{name} up")

    def power_off(self, name: str) -> None:
        """Everything on a node is gone at once, and no peer is told."""
        self.cut(name)
        os.kill(self._inits[name], signal.SIGKILL)
        _close(self._hosts.pop(name))
        self._daemons.pop(name).wait()

    def power_on(self, name: str) -> None:
        """Switch it on again."""
        with contextlib.suppress(RuntimeError):
            self._ip("ctl", f"link del p-{name}")
        self._host_up(name)
        self._daemon(name, name, ["slurmd", "-D", "-N", name])

    # --- hosts ----------------------------------------------------------------------------------------------------

    def _host_up(self, name: str) -> None:
        script = (
            f"set -e; hostname {name}; mount --bind {self.root}/etc/hosts /etc/hosts; "
            "mount -t tmpfs -o size=2g tmpfs /dev/shm; ip link set lo up; echo ready; "
            f"exec {sys.executable} -ISc {shlex.quote(INIT)}"
        )
        namespaces = ["--net", "--uts", "--mount", "--ipc", "--pid", "--propagation", "private"]
        process = subprocess.Popen(
            ["unshare", *namespaces, "--fork", "--mount-proc", "--kill-child=KILL", "bash", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        if (line := process.stdout.readline()).strip() != "ready":
            raise RuntimeError(f"host {name}: {line}{process.stdout.read()}")
        self._hosts[name] = process
        self._inits[name] = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        if name == "ctl":
            for command in ("link add br0 type bridge", f"addr add {self.address[name]}/24 dev br0", "link set br0 up"):
                self._ip(name, command)
        else:
            self._ip("ctl", f"link add p-{name} type veth peer name eth0 netns {self._inits[name]}")
            self._ip("ctl", f"link set p-{name} master br0 up")
            self._ip(name, f"addr add {self.address[name]}/24 dev eth0")
            self._ip(name, "link set eth0 up")

    def _ip(self, host: str, arguments: str) -> None:
        command = ["nsenter", "-t", str(self._inits[host]), "-n", "ip", *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ip {arguments}: {done.stderr}")

    def _on(self, host: str, command: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self._inits[host]), "-m", "-u", "-i", "-n", "-p", f"--wd={ROOT}", *command]

    def _daemon(self, host: str, name: str, command: list[str]) -> None:
        paths = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": str(self.root / "etc/slurm.conf")}
        with open(self.root / "log" / f"{name}.stderr", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                self._on(host, command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=paths, cwd="/",
                start_new_session=True,
            )  # fmt: skip


def _close(process: subprocess.Popen[str]) -> None:
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
