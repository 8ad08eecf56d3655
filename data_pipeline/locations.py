"""Where shards lie: a text becomes local paths and URLs, and a URL a local file. The only importer of fsspec.

Only http, https and s3 are fetched, each file whole, into a cache on this machine that has a limit; whatever else looks
like a scheme, `pipe:` above all, is refused. Nothing that a location says is ever handed to a shell.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from videodiff.errors import UserError

REMOTE = ("http", "https", "s3")
CACHE = "VIDEODIFF_CACHE"  # the environment's name for the folder of fetched files
LIMIT = "VIDEODIFF_CACHE_GIB"  # and for their size, beyond which the least recently used ones go
_LIMIT_GIB = 100.0
_FETCHED = re.compile(r"[0-9a-f]{24}-")  # how names in the cache begin; nothing else is ever deleted
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
Result = TypeVar("Result")


def expand(location: str) -> list[str]:
    """The local paths and URLs that ``location`` names, its {000..012} ranges written out, ``file:`` taken off.

    Raises UserError for a scheme that is not opened.
    """
    import braceexpand  # webdataset's own dependency for the same patterns

    try:
        texts = list(braceexpand.braceexpand(location)) if location else []
    except ValueError as error:  # of its own class
        raise UserError(f"data.shards={location!r}: {error}; close every brace") from None
    return [_allowed(text, location) for text in texts]


def is_remote(text: str) -> bool:
    """Whether it is a URL that is opened, not a path."""
    scheme = _SCHEME.match(text)
    return scheme is not None and scheme[1].lower() in REMOTE


def beside(text: str, name: str) -> str:
    """The path or URL of the file ``name`` in the same folder."""
    if not is_remote(text):
        return str(Path(text).parent / name)
    parts = urlsplit(text)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/" + name))


def file_name(text: str) -> str:
    """The last part of a path or of a URL's path."""
    return urlsplit(text).path.rpartition("/")[2] if is_remote(text) else Path(text).name


def glob(url: str) -> list[str]:
    """The URLs that a pattern with * in its last part names, in a fixed order: http needs a listing at its folder."""
    files = _system(url)
    found = _attempt(url, lambda: files.glob(url))
    return sorted(files.unstrip_protocol(name) for name in found)


def read(url: str) -> bytes:
    """The bytes of a small remote file, such as an index: fetched anew each time. UserError where there is none."""
    files = _system(url)
    content: bytes = _attempt(url, lambda: files.cat_file(url))
    return content


def cached_path(url: str, version: str) -> Path:
    """Where the file of a URL lies, or will, on this machine; another ``version`` of it lies elsewhere."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videodiff"
    name = hashlib.sha256(f"{url}\0{version}".encode()).hexdigest()[:24]
    return Path(os.environ.get(CACHE) or default) / f"{name}-{file_name(url)[-80:]}"


def version_of(url: str) -> str:
    """What the server says that changes when the file does: its size, and a tag or date where there is one."""
    files = _system(url)
    files.invalidate_cache()
    told = _attempt(url, lambda: files.info(url))
    return " ".join(
        f"{name}={told[name]}" for name in ("size", "ETag", "Last-Modified", "LastModified") if told.get(name)
    )


@contextlib.contextmanager
def opened(url: str, path: Path, digest: str | None = None) -> Iterator[BinaryIO]:
    """The file of a URL at ``path``, fetched unless it is there. While it is open it stays in the cache."""
    file = None
    while file is None:
        fetch(url, path, digest)
        with contextlib.suppress(FileNotFoundError):  # it had to go just now
            file = open(path, "rb")  # noqa: SIM115
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        now = time.time_ns()  # finer than the file system's own clock
        with contextlib.suppress(OSError):  # it is gone, or another user's
            os.utime(path, ns=(now, now))
        yield file


def fetch(url: str, path: Path, digest: str | None = None) -> None:
    """Fetch a URL to ``path`` unless it is there: whole or not at all, by one of the processes that ask for it.

    What was used least recently makes room for it. Raises UserError where it can't be fetched in several attempts, or
    its sha256 is not ``digest``.
    """
    if path.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.is_file():
                _download(url, path, digest)
                _make_room(path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot keep fetched shards ({error.strerror or error}); make room, or set {CACHE} to "
            "another folder"
        ) from None


def _download(url: str, path: Path, digest: str | None) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    files = _system(url)
    try:
        _attempt(url, lambda: files.get_file(url, str(temporary)))
        if digest is not None:
            with open(temporary, "rb") as file:
                found = sha256(file)
            if found != digest:
                raise UserError(f"{url}: not the shard that its index names (sha256 differs); write or copy it again")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(new: Path) -> None:
    """Delete fetched files, the least recently used first, until the limit is kept; never ``new`` or an open one."""
    told = os.environ.get(LIMIT) or str(_LIMIT_GIB)
    try:
        left = float(told) * 2**30
    except ValueError:
        raise UserError(f"{LIMIT}={told}: not a number; say how many GiB fetched shards may take") from None
    found = []
    for path in new.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            if _FETCHED.match(path.name):
                found.append((path.stat(), path))
    left -= sum(status.st_size for status, _ in found)
    for status, path in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
        if left >= 0:
            return
        if path != new and _removed(path):
            left += status.st_size


def _removed(path: Path) -> bool:
    """Delete a file unless a process has it open."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except (BlockingIOError, PermissionError):  # or another user's
        return False
    return True


def sha256(file: Any) -> str:
    """Hex sha256 of what is left to read of a binary file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _allowed(text: str, location: str) -> str:
    scheme = _SCHEME.match(text)
    if scheme is None or is_remote(text):
        return text
    if scheme[1].lower() == "file":
        return re.sub(r"^file:(//)?", "", text, flags=re.IGNORECASE)
    raise UserError(
        f"data.shards={location!r}: {scheme[1]}: is not opened, shards are local files or {', '.join(REMOTE)} URLs; "
        "copy them to a disk"
    )


def _system(url: str) -> Any:
    import fsspec

    scheme = url.partition(":")[0].lower()
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UserError(f"{url}: {error}; install what it needs with pip install 'videodiff[remote]'") from None


def _attempt(url: str, call: Callable[[], Result], attempts: int = 3) -> Result:
    """Try again after a second, and after two more, unless the file is not there."""
    try:
        return call()
    except FileNotFoundError:
        raise UserError(f"{url}: there is no such file; check the URL") from None
    except Exception as error:  # each protocol's library raises errors of its own
        if attempts == 1:
            problem = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(f"{url}: cannot be fetched ({problem}); check the URL, rights and network") from None
    time.sleep(4 - attempts)
    return _attempt(url, call, attempts - 1)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """The other processes of this machine that ask for the same file wait here."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
