"""Checkpoints that a kill can't spoil: written beside, listed in a manifest, then renamed; the newest sound one counts.

checkpoints/step-00000100/ holds engine/ (each rank's fragments of weights, moments and EMA), state.json,
manifest.json, memory.safetensors (what the task learned besides weights, if anything), adversary/ (a second engine's
files, if the task has one), and ema.safetensors, raw.safetensors and model.yaml, by which it opens as a Model.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from videodiff.errors import LostError, UserError, disk_error
from videodiff.model import Model, numbered
from videodiff.model_folder import export
from videodiff.training.distributed import barrier, from_first, raise_from_first, rank, world

MANIFEST = "manifest.json"
READ_PAUSES = (2.0, 10.0)  # seconds before a checkpoint that the disk would not give is read again


class Checkpoints:
    """The folder `checkpoints/` of a run. Its methods are collective, but for `exist` and `last_step`."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_average_every: int = 0,
        token: str = "",
        may_publish: Callable[[], None] = lambda: None,
    ) -> None:
        """token: whose unfinished checkpoint it is. may_publish: raises when this process must not finish one."""
        self.folder, self.keep_last, self.keep_average_every = folder, keep_last, keep_average_every
        self.token, self.may_publish = token, may_publish

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; None when there is none. Broken ones are named in a warning.

        Raises UserError when there are checkpoints but none is sound: starting anew would hide the loss. Raises
        LostError when the disk does not give one: to go on from an older one would throw it away.
        """
        chosen, problem = self._choose() if rank() == 0 else (None, None)
        raise_from_first(problem)
        name = from_first(chosen)
        return self.folder / name if name is not None else None

    def write(
        self,
        step: int,
        fill: Callable[[Path], None],
        num_bytes: int,
        verify: Callable[[Path], str | None] = lambda folder: None,
    ) -> Path:
        """Make the checkpoint of `step`: `fill(folder)` writes its files, all ranks into one folder; `verify(folder)`
        then looks on rank 0 whether they are all there and returns what is wrong.

        Raises UserError when the disk has not the `num_bytes` that it will take, or a file can't be written, LostError
        when the disk fails for another reason; finished checkpoints stay as they are.
        """
        final = self.folder / f"step-{step:08d}"
        draft = final.with_name(f"{final.name}.{self.token}.tmp")
        raise_from_first(self._start(draft, num_bytes) if rank() == 0 else None)
        try:
            fill(draft)
        # No collective here: the other ranks may stand in one; they fail when this process is gone. A RuntimeError is
        # a peer that is gone, not the disk.
        except (OSError, SafetensorError) as error:
            if world() == 1:  # else others may be writing into it, and would tell of a folder that is gone
                shutil.rmtree(draft, ignore_errors=True)
            raise self._failed(step, error) from error
        barrier()
        problem: str | UserError | None = None
        if rank() == 0 and (problem := verify(draft)) is not None:
            shutil.rmtree(draft, ignore_errors=True)
        elif rank() == 0:
            problem = self._finish(draft, final, step)
        raise_from_first(problem)
        if rank() == 0:
            self._prune(final)
        return final

    def exist(self) -> bool:
        """Whether there is any checkpoint, sound or not. Not collective: what this process sees."""
        return bool(self._found())

    def last_step(self) -> int:
        """The step of the newest one, sound or not; 0 when there is none. Not collective."""
        return max(numbered(self.folder), default=0)

    def _found(self) -> list[Path]:
        return list(numbered(self.folder).values())

    def _choose(self) -> tuple[str | None, str | UserError | None]:
        found = self._found()[::-1]
        for path in found:
            try:
                reason = _patiently(fault, path)
            except OSError as error:
                return None, LostError(
                    f"{path}: can't be read now ({error.strerror or error}); the same command tries again; if the disk "
                    "never gives it, move this checkpoint away to go on from the one before"
                )
            if reason is None:
                return path.name, None
            warnings.warn(f"{path}: skipped, {reason}", stacklevel=2)
        if found:
            names = ", ".join(path.name for path in found)
            return None, f"{self.folder}: no checkpoint is sound ({names}); restore one, or name a new run.dir"
        return None, None

    def _start(self, draft: Path, num_bytes: int) -> str | UserError | None:
        self.may_publish()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self.folder.glob("step-*.tmp"), *self.folder.glob(".average-*.tmp")):
                shutil.rmtree(leftover, ignore_errors=True)  # an attempt that was replaced may still write into its own
            free = shutil.disk_usage(self.folder).free
            if free < num_bytes:
                return (
                    f"{self.folder}: a checkpoint takes about {_megabytes(num_bytes)}, the disk has "
                    f"{_megabytes(free)} free; make room or lower run.keep_last, then give the same command again"
                )
            draft.mkdir()
        except OSError as error:
            message = f"{self.folder}: can't be written ({error.strerror or error}); check run.dir and its disk"
            return disk_error(error, message)
        return None

    def _finish(self, draft: Path, final: Path, step: int) -> UserError | None:
        try:
            seal(draft)
            self.may_publish()
            if final.exists():  # broken, or it would have been resumed from
                shutil.rmtree(final)
            draft.rename(final)
            _sync(self.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            return self._failed(step, error)
        return None

    def _prune(self, final: Path) -> None:
        """Keep the last ones. What can't be removed (a network disk on which another reads it) is for the next time."""
        found = self._found()
        # The run went on from below the later ones because they are broken: they must not outlive sound ones.
        last = found.index(final) + 1
        for old in found[:last][: -self.keep_last]:
            if self.keep_average_every and int(old.name[5:]) % self.keep_average_every == 0:
                self._keep_average(old)
        self.may_publish()
        for useless in [*found[last:], *found[:last][: -self.keep_last]]:
            shutil.rmtree(useless, ignore_errors=True)

    def _keep_average(self, checkpoint: Path) -> None:
        """A model of the averaged weights alone, beside the checkpoints; a warning where there can be none."""
        target = checkpoint.with_name(f"average-{checkpoint.name[5:]}")
        try:
            if not target.exists():
                export(Model.load(checkpoint), target)
        except (UserError, OSError, SafetensorError) as error:  # the run has just been saved: no reason to end it
            warnings.warn(f"{target}: not kept: {' '.join(str(error).split())}", stacklevel=2)

    def _failed(self, step: int, error: OSError | SafetensorError) -> UserError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        sound = self._found()
        last = f"{sound[-1].name} is untouched" if sound else "there is none before it"
        message = (
            f"{self.folder}: the checkpoint of step {step} could not be written ({reason}); {last}; "
            "make room or name another run.dir, then give the same command again"
        )
        return disk_error(error, message) if isinstance(error, OSError) else UserError(message)


def seal(folder: Path) -> None:
    """Write the manifest, size and sha256 of each file, and see everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for path in files:
        _sync(path)
        entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"files": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _sync(path)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint according to its manifest; None when it is sound.

    Raises OSError when the disk does not answer: nothing is known then.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            path = folder / name
            try:
                as_written = path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"]
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return f"{name} is missing"
            if not as_written:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} can't be read ({error})"
    return None


def _patiently(look: Callable[[Path], str | None], path: Path) -> str | None:
    """`look(path)`, again after a while when the disk does not answer."""
    for pause in READ_PAUSES:
        with contextlib.suppress(OSError):
            return look(path)
        time.sleep(pause)
    return look(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
