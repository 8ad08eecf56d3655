"""The discriminator's part in the autoencoder stage: what it adds to the autoencoder's loss, and what it learns itself.

Shapes: N frames [N,3,H,W] in [-1,1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from videodiff.networks.autoencoder import Autoencoder
from videodiff.networks.discriminator import (
    DiscriminatorConfig,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from videodiff.training.distributed import sum_over_ranks
from videodiff.training.task import Adversary, LossOutput


class Contest:
    """A discriminator against the decoder of `autoencoder`; the loop gives it an engine of its own (`adversary`)."""

    def __init__(self, config: DiscriminatorConfig, autoencoder: Autoencoder) -> None:
        self.config = config
        self.module = PatchDiscriminator(config)
        self.adversary = Adversary(self.module, config.learning_rate)
        self.last_layer, self.after = autoencoder.decoder[-2], autoencoder.decoder[-1]

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Inside it, the list takes in what enters the decoder's last layer."""
        inputs: list[Tensor] = []
        handle = self.last_layer.register_forward_hook(lambda layer, given, made: inputs.append(given[0].detach()))
        try:
            yield inputs
        finally:
            handle.remove()

    def term(self, pictures: Tensor, error: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What the autoencoder's loss gets, [N], and metrics. Collective over the ranks.

        pictures: reconstructions [N,3,H,W] float32, no output of the engine itself. error: [N], made from them.
        weight: [N], 0 for frames of bad clips. hidden: what entered the decoder's last layer.
        """
        # Through constants in place of its parameters: the discriminator must not learn from the autoencoder's loss.
        constants = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        adversarial = generator_loss(functional_call(self.module, constants, (self._input(pictures),)))
        gradients = [self._last_layer_gradient(losses, weight, pictures, hidden) for losses in (error, adversarial)]
        # Of the means over all ranks' frames: every rank takes the same weight, and one process alone does so too.
        count = torch.stack([gradients[0].new_tensor(float((weight > 0).sum()))])
        total = sum_over_ranks(torch.cat([*gradients, count]))
        reconstruction, pull = (total[:-1] / total[-1].clamp(min=1)).chunk(2)
        adaptive = adaptive_weight(reconstruction, pull)
        metrics = {"adversarial": adversarial.detach().mean(), "adaptive_weight": adaptive}
        return self.config.weight * adaptive * adversarial, metrics

    def against(
        self, frames: Tensor, pictures: Tensor, num_clips: int
    ) -> Callable[[Callable[..., Tensor]], LossOutput]:
        """What the discriminator makes of frames and their reconstructions, for its own engine."""
        both = self._input(torch.cat([frames, pictures.detach()]))

        def losses(engine: Callable[..., Tensor]) -> LossOutput:
            real, made = engine(both).chunk(2)
            per_frame = discriminator_loss(real, made)
            metrics = {"discriminator": per_frame.detach().mean()}
            metrics |= {f"logits_{name}": x.detach().float().mean() for name, x in (("real", real), ("made", made))}
            return LossOutput(per_frame.unflatten(0, (num_clips, -1)).mean(1), metrics)

        return losses

    def _last_layer_gradient(self, losses: Tensor, weight: Tensor, pictures: Tensor, hidden: Tensor) -> Tensor:
        """Of the sum over good frames, by the last layer's weight: float32, flat.

        In two steps, and the second on a copy of the last layer's own graph: a gradient asked for through an output of
        DeepSpeed's engine would count there as a backward pass of the step.
        """
        total = torch.where(weight > 0, losses, 0).sum()
        (by_picture,) = torch.autograd.grad(total, pictures, retain_graph=True)
        with torch.enable_grad():
            made = self.after(self.last_layer(hidden))
        (gradient,) = torch.autograd.grad(made, self.last_layer.weight, by_picture.to(made.dtype))
        return gradient.float().flatten()

    def _input(self, pictures: Tensor) -> Tensor:
        like: nn.Parameter = next(self.module.parameters())
        return pictures.to(like.dtype)
