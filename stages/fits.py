"""What a network has to fit: the model that it stands on, and the size of the pictures."""

from __future__ import annotations

from typing import Any

from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.unet import UNetConfig


def told_text(network: UNetConfig, base: Model) -> UNetConfig:
    """The network with the text towers' widths where its own are left out."""
    widths = {
        "context_dims": network.context_dims or base.text.widths,
        "pooled_dim": network.pooled_dim or base.text.embed_dim,
    }
    return network.model_copy(update=widths)


def check_size(size: int, multiple: int, why: str, name: str = "data.size") -> None:
    """Refuse (UserError) a picture size that the networks can't halve as often as they do."""
    if size % multiple:
        fitting = max(size // multiple, 1) * multiple
        raise UserError(f"{name}: {size} is not a multiple of {multiple} ({why}); use {fitting}, for one")


def check_fit(base: Model, network: UNetConfig, size: int) -> None:
    """Refuse (UserError) a network that does not fit the autoencoder and the text towers of `base`, or the size."""
    autoencoder = base.autoencoder
    wanted = autoencoder.config.latent_channels
    _check_equal(base, "channels", network.channels, wanted, "autoencoder's latent_channels")
    check_text(base, network)
    why = f"autoencoder's factor {autoencoder.factor} x the network's {network.divisor}"
    check_size(size, autoencoder.factor * network.divisor, why)


def check_text(base: Model, network: UNetConfig) -> None:
    """Refuse (UserError) a network that does not fit the text towers of `base`."""
    text = base.text
    _check_equal(base, "context_dims", list(network.context_dims), list(text.widths), "text towers' width")
    _check_equal(base, "pooled_dim", network.pooled_dim, text.embed_dim, "text tower's embed_dim")


def _check_equal(base: Model, name: str, given: Any, wanted: Any, whose: str) -> None:
    if given != wanted:
        raise UserError(f"network.{name}: {given} does not fit the model {base.folder}; its {whose} asks {wanted}")
