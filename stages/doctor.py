"""`videodiff doctor`: what usually goes wrong in the first hour of a run, found in seconds on every machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from videodiff.training import distributed

PACKAGES = (
    "torch",
    "deepspeed",
    "open_clip_torch",
    "webdataset",
    "decord",
    "av",
    "imageio-ffmpeg",
    "safetensors",
    "pydantic",
)
NEEDED = ("torch", "open_clip_torch", "imageio-ffmpeg", "safetensors", "pydantic")
LITTLE_DISK = 20e9  # bytes: a few checkpoints of a small model
SLOW_DISK = 50e6  # bytes a second
WRITTEN = 128 << 20
REDUCED = 16 << 20  # values in float32
SHARED_SECONDS = 10.0  # until another node sees a new file


@dataclass(frozen=True)
class Finding:
    """One line of the report. bad: a run would fail; warning: it would be slow, or lack something."""

    grade: Literal["ok", "warning", "bad"]
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.grade:8} {self.what:12} {self.text}"


def examine(folder: Path) -> Iterator[Finding]:
    """What each machine has, and what all ranks have in common; `folder` is where runs would be kept. Collective.

    Each machine is examined by one of its ranks; rank 0 alone yields what was found.
    """
    host = socket.gethostname()
    first = distributed.rank() == 0 or os.environ.get("LOCAL_RANK", "0") == "0"
    each = distributed.gather_to_first((host, list(_machine(host, folder)) if first else []))
    for name, found in each or []:
        for finding in found:
            where = f"{name}: " if len(each or []) > 1 and finding.what != "machine" else ""
            yield replace(finding, text=where + finding.text)
    yield from _same_everywhere(host)
    yield from _shared(host, folder)
    yield from _ranks(host)


def _machine(host: str, folder: Path) -> Iterator[Finding]:
    yield Finding("ok", "machine", f"{host}, {platform.platform()}, Python {platform.python_version()}")
    yield _packages()
    yield from _torchvision()
    yield from _devices()
    yield _import("decord", "videos are read by PyAV alone, more slowly")
    yield _ffmpeg()
    yield from _disk(folder)


def _same_everywhere(host: str) -> Iterator[Finding]:
    """Whether all ranks run the same software: a run on two versions of it fails late and oddly."""
    versions = {"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    each = distributed.gather_to_first((host, versions))
    for package in versions:
        found = sorted({(told[package] or "none", name) for name, told in each or []})
        if len({version for version, _ in found}) > 1:
            text = ", ".join(f"{version} on {name}" for version, name in found)
            yield Finding("bad", "versions", f"{package} is not the same everywhere: {text}; install one environment")


def _shared(host: str, folder: Path) -> Iterator[Finding]:
    """Whether all ranks see the same folder: parts of a checkpoint that lie on another disk are lost."""
    sign = folder / f".doctor-{distributed.from_first(uuid.uuid4().hex[:8])}"
    if distributed.rank() == 0:
        with contextlib.suppress(OSError):  # said of the machine already
            sign.touch()
    written = distributed.from_first(sign.exists())
    end = time.monotonic() + SHARED_SECONDS
    while written and not sign.exists() and time.monotonic() < end:
        time.sleep(0.1)  # a network disk may take a moment
    blind = distributed.gather_to_first("" if not written or sign.exists() else host)
    if written and distributed.rank() == 0:
        sign.unlink()
    if names := ", ".join(sorted(set(filter(None, blind or [])))):
        yield Finding("bad", "disk", f"{folder}: not the same folder on {names}; name one on a disk that all share")


def _packages() -> Finding:
    versions = {name: _version(name) for name in PACKAGES}
    missing = [name for name, version in versions.items() if not version]
    grade: Literal["ok", "warning", "bad"] = "bad" if set(missing) & set(NEEDED) else "warning" if missing else "ok"
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = f"; not installed: {', '.join(missing)} (pip install 'videodiff[train]')" if missing else ""
    return Finding(grade, "packages", found + absent)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torchvision() -> Iterator[Finding]:
    version = _version("torchvision")
    if not version:
        return
    error = _python("import torchvision")
    if not error:
        yield Finding("ok", "torchvision", version)
    elif torch.version.cuda is None:
        yield Finding("ok", "torchvision", f"{version} was built for CUDA and torch is not: videodiff works around it")
    else:
        yield Finding(
            "bad", "torchvision", f"{version} does not fit torch {torch.__version__} ({error}); reinstall both"
        )


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        cores, threads = os.cpu_count(), torch.get_num_threads()
        why = "" if torch.version.cuda is None else "; torch has CUDA but sees no GPU: check the driver"
        yield Finding("warning" if why else "ok", "device", f"no GPU, {cores} cores, {threads} threads{why}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0]
        text = f"{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, {free / 2**30:.0f} free"
        used = free < 0.9 * properties.total_memory
        bf16 = torch.cuda.is_bf16_supported()
        text += ("" if bf16 else "; no bf16: set engine.precision=fp16") + (
            "; another process is on it" if used else ""
        )
        yield Finding("warning" if used or not bf16 else "ok", "device", text)


def _import(name: str, otherwise: str) -> Finding:
    error = _python(f"import {name}")
    return Finding("warning", name, f"{error}; {otherwise}") if error else Finding("ok", name, "can be imported")


def _ffmpeg() -> Finding:
    error = _python("import imageio_ffmpeg as f; assert f.get_ffmpeg_version()")
    if error:
        return Finding(
            "bad", "ffmpeg", f"{error}; no video can be written: pip install --force-reinstall imageio-ffmpeg"
        )
    return Finding("ok", "ffmpeg", "the one of imageio-ffmpeg runs")


def _disk(folder: Path) -> Iterator[Finding]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        few = free < LITTLE_DISK
        yield Finding("warning" if few else "ok", "disk", f"{folder}: {free / 1e9:.0f} GB free")
        draft = folder / f".doctor-{uuid.uuid4().hex[:8]}"
        try:
            block = os.urandom(1 << 20)
            began = time.perf_counter()
            with open(draft, "wb") as file:
                for _ in range(WRITTEN >> 20):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - began)
        finally:
            draft.unlink(missing_ok=True)
        slow = speed < SLOW_DISK
        yield Finding("warning" if slow else "ok", "disk", f"{folder}: {speed / 1e6:.0f} MB/s written and synced")
    except OSError as error:
        yield Finding("bad", "disk", f"{folder}: can't be written ({error.strerror or error}); name another folder")


def _ranks(host: str) -> Iterator[Finding]:
    """An all-reduce over all ranks: whether they find one another, whether the sum is right, how fast it is."""
    world = distributed.world()
    hosts = distributed.gather_to_first(f"{host} {distributed.device()}")
    values = torch.full((REDUCED,), float(distributed.rank() + 1), device=distributed.device())
    rounds, began = 5, 0.0
    right = True
    for index in range(rounds + 1):
        if index == 1:  # the first one makes the connections
            began = time.perf_counter()
        total = distributed.sum_over_ranks(values)
        right = right and bool((total == world * (world + 1) / 2).all())
    seconds = (time.perf_counter() - began) / rounds
    if hosts is None:
        return
    if world == 1:
        yield Finding("ok", "ranks", "one; start it with torchrun or srun to try an all-reduce between several")
        return
    speed = 2 * (world - 1) / world * REDUCED * 4 / seconds / 1e9
    how = f"{dist.get_backend()}: all-reduce of {REDUCED * 4 >> 20} MiB in {seconds:.3g} s, {speed:.2g} GB/s"
    wrong = "" if right else ", and the sum is wrong"
    yield Finding("ok" if right else "bad", "ranks", f"{world} ({'; '.join(hosts)}), {how}{wrong}")


def _python(code: str) -> str:
    """The last line of a Python process's error; "" when there is none."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    except subprocess.TimeoutExpired:
        return "it hangs"
    return (done.stderr.strip().splitlines() or ["unknown"])[-1] if done.returncode else ""
