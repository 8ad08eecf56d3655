"""An image network that is told a picture in place of a text: what trains an ImagePrompt."""

from __future__ import annotations

from torch import Tensor, nn

from videodiff.batch import Condition
from videodiff.networks.image_prompt import ImagePrompt, prompted
from videodiff.networks.unet import UNet


class PromptedUNet(nn.Module):
    """Answers as UNet on images [B,C,1,H,W]; the condition's known frame [B,C,1,H,W] is the picture that it is told."""

    def __init__(self, base: UNet, prompt: ImagePrompt) -> None:
        super().__init__()
        self.base, self.prompt = base, prompt
        self.config = base.config

    @property
    def checkpointing(self) -> bool:
        """As UNet's."""
        return self.base.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.base.checkpointing = value

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        if condition.known is None:
            raise ValueError("the condition has no known frame; give the picture that takes the place of the text")
        return self.base(x, time, prompted(self.prompt, condition, x.dtype))
