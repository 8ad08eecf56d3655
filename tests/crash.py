"""Kills a rank at a file operation of a save, again and again: what is left must go on as if nothing had happened.

python crash.py FOLDER RANK:OPERATION ... prints a line of JSON for each; `count` in place of the points prints how many
operations a save has on either rank. One process imports everything, and forks the ranks of each trial.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tiny_training import run_tiny, tiny

from videodiff.training import fragments, lease, status, watch
from videodiff.training.checkpoint import Checkpoints

STEPS, SAVE_EVERY, SAVE = 6, 2, 4  # the save of step 4 is the one that is hit; that of step 2 must not be lost
AUDITED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


class Operations:
    """Counts the file operations under a folder while one save is written, and dies at one of them."""

    def __init__(self, folder: Path, deadly: int | None) -> None:
        self.folder, self.deadly, self.count, self.active = str(folder), deadly, 0, False
        sys.addaudithook(self._audit)
        for module, name in ((os, "fsync"),):
            setattr(module, name, self._before(getattr(module, name)))
        for module in (fragments, safetensors.torch, sys.modules["tiny_training"]):
            module.save_file = self._torn(module.save_file)  # type: ignore[attr-defined]
        write = Checkpoints.write

        def watched(checkpoints: Checkpoints, step: int, *rest: Any) -> Path:
            self.active = step == SAVE
            try:
                return write(checkpoints, step, *rest)
            finally:
                self.active = False

        Checkpoints.write = watched  # type: ignore[method-assign]

    def _operation(self) -> None:
        if self.active:
            self.count += 1
            if self.count == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in AUDITED and str(arguments[0]).startswith(self.folder):
            self._operation()

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **named: Any) -> Any:
            self._operation()
            return function(*given, **named)

        return counted

    def _torn(self, save: Callable[..., None]) -> Callable[..., None]:
        """Before, in the middle, with half of the file on the disk, and after."""

        def counted(tensors: Any, path: Any, *rest: Any) -> None:
            self._operation()
            save(tensors, path, *rest)
            if self.active and self.count + 1 == self.deadly:
                os.truncate(path, Path(path).stat().st_size // 2)
            self._operation()
            self._operation()

        return counted


def ranks(folder: Path, port: int, kill: tuple[int, int] | None) -> list[int]:
    """Two ranks of the run, forked; their exit statuses. On both, the number of operations goes into a file."""
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                with open(folder.with_name(f"{folder.name}-{rank}.log"), "ab") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                operations = Operations(folder, kill[1] if kill is not None and kill[0] == rank else None)
                run_tiny(
                    tiny(folder, run__steps=STEPS, run__save_every=SAVE_EVERY, run__keep_last=2, engine__zero_stage=2)
                )
                folder.with_name(f"{folder.name}-{rank}.count").write_text(str(operations.count))
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def final(folder: Path) -> dict[str, torch.Tensor]:
    state = fragments.Fragments(folder / "checkpoints" / f"step-{STEPS:08d}" / "engine")
    return {"/".join(key): state.read(*key, 0, state.size(*key)) for key in state.contents}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def kill(root: Path, rank: int, operation: int) -> tuple[Path, list[int]]:
    """The folder of a run whose rank died at an operation of the save, and the ranks' exit statuses.

    A lease's beat is an operation too and comes when it comes: where a save had fewer of them than that which was
    counted, the rank dies at an earlier one.
    """
    for earlier in range(5):
        folder = root / f"{rank}-{operation}-{earlier}"
        killed = ranks(folder, free_port(), (rank, operation - earlier))
        if killed[rank]:
            break
    return folder, killed


def main(root: Path, points: list[str]) -> None:
    straight = root / "straight"
    assert ranks(straight, free_port(), None) == [0, 0]
    if points == ["count"]:
        print(json.dumps([int((root / f"straight-{rank}.count").read_text()) for rank in range(2)]))
        return
    wanted = final(straight)
    for point in points:
        folder, killed = kill(root, *map(int, point.split(":")))
        asked = status.verdict(folder, STEPS, 9)[0].name
        sound = sorted(path.name for path in (folder / "checkpoints").glob("step-*[0-9]"))
        resumed = ranks(folder, free_port(), None)
        state = final(folder) if resumed == [0, 0] else {}
        equal = state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
        left = [path.name for path in (folder / "checkpoints").iterdir() if path.name.endswith(".tmp")]
        complete = status.verdict(folder, STEPS, 9)[0] is status.Verdict.COMPLETE
        found = {"point": point, "killed": killed, "verdict": asked, "left": sound, "resumed": resumed}
        print(json.dumps({**found, "equal": equal, "leftovers": left, "complete": complete}), flush=True)


if __name__ == "__main__":
    watch.BEAT_SECONDS = lease.BEAT_SECONDS = 0.2
    main(Path(sys.argv[1]), sys.argv[2:])
