"""Weights in files that the user names: read as data alone, or run as TorchScript where their sha256 is stated.

`key` names the part of the configuration in errors, all of which are UserError.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from videodiff.errors import UserError
from videodiff.parts import sha256

NAMED = 3  # names of weights that an error lists


def checked_sha256(key: str, path: Path, stated: str | None) -> str:
    """The sha256 of a file. UserError where there is none, or where it is not the stated one."""
    if not path.is_file():
        raise UserError(f"{key}.path: {path} is no file; name a local one, nothing is downloaded")
    found = sha256(path)
    if stated is not None and found != stated.lower():
        raise UserError(
            f"{key}.sha256: {path} has sha256 {found[:12]}..., not {stated[:12]}...; name the right file, or state its "
            "sha256 if you trust it"
        )
    return found


def is_script(path: Path) -> bool:
    """Whether a file is TorchScript: of torch's two kinds of archives only that one has a table of constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def load_script(key: str, path: Path, stated: str | None, device: torch.device) -> Any:
    """A TorchScript module in eval mode. It runs code, so the file must have been stated (`checked_sha256`)."""
    if stated is None:
        raise UserError(
            f"{key}.sha256: missing; {path} is TorchScript, which runs code: state the sha256 of the file you trust"
        )
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["it is damaged"])[0]
        raise UserError(f"{key}.path: {path} is no TorchScript that torch can load ({reason}); copy it again") from None


def read_state(key: str, path: Path) -> dict[str, Tensor]:
    """Weights by name, in float32. Only data are read: weights_only refuses a pickle that would run code."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        return {name: value.float() for name, value in state.items()}
    except Exception as error:  # torch raises what its unpickler meets: UnpicklingError, RuntimeError, EOFError, ...
        # Not torch's own words: they advise to unpickle whatever is in there.
        raise UserError(
            f"{key}.path: {path} holds no named weights that can be read ({type(error).__name__}); give .safetensors "
            "or what torch.save wrote of a state_dict"
        ) from None


def fill(
    network: nn.Module,
    state: dict[str, Tensor],
    where: str,
    path: Path,
    what: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Give a network, which may lie on the meta device, its weights, and freeze it.

    names: a weight's name here -> in `state`, where they differ. UserError with the first names that do not fit;
    `where` is what told of the file, `what` the network in words.
    """
    told = {name: name if names is None else names[name] for name in network.state_dict()}
    shapes = {told[name]: list(value.shape) for name, value in network.state_dict().items()}
    problems = [f"{name} is missing" for name in shapes if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in shapes]
    problems += [
        f"{name} is {list(state[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in state and list(state[name].shape) != shape
    ]
    if problems:
        more = "" if len(problems) <= NAMED else f", and {len(problems) - NAMED} more"
        raise UserError(
            f"{where}: {path} does not hold the weights of {what}: {', '.join(problems[:NAMED])}{more}; take the "
            "file that belongs to it"
        )
    network.load_state_dict({name: state[there] for name, there in told.items()}, assign=True)
    network.requires_grad_(False).eval()
