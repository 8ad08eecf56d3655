"""What a sample costs a network, counted on the meta device: operations, and what autograd keeps for the backward pass.

Operations are multiply-adds of linear layers, convolutions and attention, two each; a backward pass takes once that for
the input and once for the weights that train.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videodiff.batch import Condition
from videodiff.networks.layers import Attention, FrameAttention, SpaceTimeConv
from videodiff.networks.unet import Block, UNet, UNetConfig

TOKENS = 77  # of a text, where nothing says


@dataclass(frozen=True)
class Work:
    """Of one sample's forward and backward pass: operations of each, and bytes that autograd keeps in between."""

    forward: float
    backward: float
    kept: float


def count(network: UNet, frames: int, height: int, width: int, dtype: torch.dtype) -> Work:
    """The work of one sample: latents [1,C,frames,height,width] through a network on the meta device."""
    forward = backward = 0.0

    def linear(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal forward, backward
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        weight = module.weight
        operations = 2.0 * output.numel() * math.prod(weight.shape[1:])
        forward += operations
        backward += operations * (int(inputs[0].requires_grad) + int(weight.requires_grad))

    def attention(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal forward, backward
        if isinstance(module, FrameAttention):
            operations = 4.0 * output.numel() * inputs[0].shape[1]
        else:
            keys = inputs[1] if len(inputs) > 1 and inputs[1] is not None else inputs[0]
            operations = 4.0 * output.numel() * keys.shape[1]
        forward += operations
        backward += 2 * operations if output.requires_grad else 0.0

    handles = []
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_hook(linear))
        elif isinstance(module, Attention):
            handles.append(module.register_forward_hook(attention))
    network = network.to(dtype)  # first: parameters get other storages
    kept: dict[int, tuple[Tensor, int]] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    def kept_bytes() -> float:
        return float(sum(size for _, size in kept.values()))

    x = torch.empty(1, network.config.channels, frames, height, width, dtype=dtype, device="meta")
    inputs = (x, torch.empty(1, device="meta"), _condition(network.config, x))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = network(*inputs)
    for handle in handles:
        handle.remove()
    total = kept_bytes()
    if network.checkpointing:  # the blocks' inputs so far; in the backward pass one block at a time is whole
        kept.clear()
        before: list[float] = []
        largest = 0.0

        def leave(module: nn.Module, given: Any, result: Any) -> None:
            nonlocal largest
            largest = max(largest, kept_bytes() - before.pop())

        hooks: list[Any] = []
        for block in (module for module in network.modules() if isinstance(module, (Block, SpaceTimeConv))):
            hooks.append(block.register_forward_pre_hook(lambda *_: before.append(kept_bytes())))
            hooks.append(block.register_forward_hook(leave))
        network.checkpointing = False
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = network(*inputs)
        network.checkpointing = True
        for handle in hooks:
            handle.remove()
        total += largest
    del out
    return Work(forward, backward, total)


def _condition(config: UNetConfig, x: Tensor) -> Condition:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=x.dtype, device=x.device)

    known = (empty(*x.shape), empty(1, 1, *x.shape[2:])) if config.known_channels else (None, None)
    return Condition(
        text=tuple(empty(1, TOKENS, width) for width in config.context_dims),
        text_mask=tuple(torch.empty(1, TOKENS, dtype=torch.bool, device=x.device) for _ in config.context_dims),
        pooled=empty(1, config.pooled_dim) if config.pooled_dim else None,
        known=known[0],
        known_mask=known[1],
        fps=torch.empty(1, device=x.device),
    )
