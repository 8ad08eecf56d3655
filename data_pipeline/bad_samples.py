"""Bad data is counted, never hidden: by reason, in a list, and up to a limit."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path

from data_pipeline.decoders import ClipError
from videodiff.errors import UserError


class BadSamples:
    """Counts bad clips by reason, lists them in a file, and stops the run when they become too many.

    ``path`` is the run's list: appended to, and believed, so that a resumed run is the same. The run stops beyond the
    share ``limit`` of bad clips, once there are more than ``floor``.
    """

    def __init__(self, path: Path | None, limit: float, floor: int) -> None:
        self._path, self._limit, self._floor = path, limit, floor
        self._seen = self._bad = 0  # by this rank since it started
        self.counts: Counter[str] = Counter()  # those of the run's former parts included
        self.recorded: dict[int, str] = {}  # number in the run -> key
        written = path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""
        for line in written.split("\n"):
            try:
                entry = json.loads(line)
                number, key, reason = int(entry["number"]), str(entry["key"]), str(entry["reason"])
            except (ValueError, KeyError, TypeError):
                continue  # a line cut by a kill: its clip is judged again
            self.recorded[number] = key
            self.counts[reason] += 1

    def told(self) -> str:
        """How many are bad for which reason, and where they are listed."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        return reasons + (f", listed in {self._path}" if self._path else "")

    def good(self) -> None:
        """Count a clip that is none of them."""
        self._seen += 1

    def take(self, number: int, key: str, shard: Path, error: ClipError | None) -> str:
        """Count a bad clip, list it unless it is listed (error None), return its key. UserError beyond the limit."""
        self._seen += 1
        self._bad += 1
        if error is None:
            key = self.recorded[number]
        else:
            self.recorded[number] = key
            self.counts[error.reason] += 1
            entry = {"number": number, "key": key, "shard": str(shard), "reason": error.reason, "detail": error.detail}
            self._write(json.dumps(entry, ensure_ascii=False) + "\n")
        if self._bad > max(self._floor, self._limit * self._seen):
            raise UserError(
                f"{self._bad} of {self._seen} clips are bad ({self.told()}), "
                f"more than bad_limit={self._limit:g}; the last is {key} in {shard}; mend them or raise the limit"
            )
        return key

    def _write(self, line: str) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode, so that the lines of several ranks do not mix.
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                data = line.encode(errors="backslashreplace")
                if os.write(file, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}); check rights and disk space"
            ) from None
