"""The folder of a run: made or found again, held by one process, and bound to the configuration it began with."""

import contextlib
import errno
import fcntl
import os
import platform
from pathlib import Path

import torch

from videodiff import config as configs
from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.training.checkpoint import Checkpoints

CHECKPOINTS = "checkpoints"
MACHINES = "machines.txt"


def open_folder(folder: Path, config: Config, held: contextlib.ExitStack) -> str | None:
    """Make the run's folder, or compare the configuration with that of its checkpoints. Returns the problem.

    `held` keeps the folder locked until it is closed, or this process is gone.
    """
    path = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _lock(folder / ".lock", held):
            return f"run.dir={folder}: another process trains in it; wait for its end or stop it, or name a new run.dir"
        # Without a checkpoint there is nothing to go on with: the start failed, and this may be the command mended.
        if path.is_file() and Checkpoints(folder / CHECKPOINTS, 1).exist():
            changes = configs.differences(configs.load(type(config), path), config)
            if forbidden := [str(change) for change in changes if not change.operational]:
                return (
                    f"{path}: this run began with another configuration ({'; '.join(forbidden)}); "
                    "take the values back, or name a new run.dir"
                )
            for change in changes:
                print(f"{folder}: goes on with {change}", flush=True)
        configs.save(config, path)
        record_machine(folder)
    except UserError as error:
        return str(error)
    except OSError as error:
        return cannot_write(folder, error)
    return None


def cannot_write(folder: Path, error: OSError) -> str:
    """The line that tells a user so."""
    return f"run.dir={folder}: can't be written ({error.strerror or error}); name another folder"


def record_machine(folder: Path) -> None:
    """A line in `machines.txt` of the run for each machine that it ran on, in the order of first use."""
    path = folder / MACHINES
    known = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if (here := machine()) not in known:
        path.write_text("\n".join([*known, here]) + "\n", encoding="utf-8")


def machine() -> str:
    """What computes here: the GPU's name, or the processor's and the number of its cores; and PyTorch's version."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{os.cpu_count()} CPU cores ({_processor()})"
    return f"{name}, PyTorch {torch.__version__}"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lock(path: Path, held: contextlib.ExitStack) -> bool:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    held.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a cluster's disk may come without locks
            raise
    return True
