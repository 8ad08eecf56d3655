"""Which networks judge pictures and clips by features, told by `kind`. Nothing is ever downloaded."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from videodiff.config import Config, operational
from videodiff.networks.features.extractor import Takes
from videodiff.networks.features.inception import Variant

SHA256 = "^[0-9a-fA-F]{64}$"


class _Features(Config):
    """What all kinds share."""

    batch: int = operational(16, ge=1, description="pictures or clips at a time; a matter of memory, not of the result")


class _FileFeatures(_Features):
    """Those of a local file; a stated sha256 must be the file's."""

    path: str
    sha256: str | None = Field(None, pattern=SHA256)


class BundledFeatures(_Features):
    """The text-image tower of the model's own text stage, which saw film strips of clips: for worlds that no public
    network knows. A picture is shown as a still clip, four times the same. Gives vectors of captions too."""

    kind: Literal["bundled"] = "bundled"
    takes: Takes = "clips"


class OpenClipFeatures(_FileFeatures):
    """A public CLIP for pictures and captions (Radford et al. 2021): open_clip's name of the architecture, and its
    weights."""

    kind: Literal["open_clip"] = "open_clip"
    name: str


class InceptionFeatures(_FileFeatures):
    """Inception v3 for pictures, of the Fréchet Inception distance (Heusel et al. 2017) or of torchvision.

    path: weights by torchvision's names, such as pt_inception-2015-12-05-6726825d.pth; or TorchScript called as
    f(pictures, return_features=True), such as inception-2015-12-05.pt, which needs `sha256`. variant: None tells it
    by the number of classes.
    """

    kind: Literal["inception"] = "inception"
    variant: Variant | None = None


class I3DFeatures(_FileFeatures):
    """I3D for clips, of the Fréchet video distance (Unterthiner et al. 2018): TorchScript.

    call: "stylegan_v" is how i3d_torchscript.pt is called (Skorokhodov et al. 2022), with uint8 that it resizes itself;
    "plain" is any that takes [n,3,T,224,224] in [-1,1].
    """

    kind: Literal["i3d"] = "i3d"
    sha256: str = Field(pattern=SHA256)
    call: Literal["stylegan_v", "plain"] = "stylegan_v"
    frames: int = Field(16, ge=1, description="length of the clips; distances of other lengths can't be compared")


class VideoMAEFeatures(_FileFeatures):
    """VideoMAE for clips, which looks at motion where I3D looks at content (Ge et al. 2024). path: a folder in
    transformers' format; sha256: of its weights' file."""

    kind: Literal["videomae"] = "videomae"


class TorchScriptFeatures(_FileFeatures):
    """Any other network: TorchScript called as f([n,3,S,S]) or f([n,3,T,S,S]) -> [n,D].

    size: S; None gives frames as they are. range: its values of black and white. frames: a clip's length, None for any.
    classes: what it gives are K classes' logits or probabilities, which make an inception score: a C3D trained on
    UCF-101, for one.
    """

    kind: Literal["torchscript"] = "torchscript"
    sha256: str = Field(pattern=SHA256)
    name: str = Field("TorchScript", description="for people, named beside each figure")
    takes: Takes
    size: int | None = Field(ge=1)
    range: tuple[float, float]
    frames: int | None = Field(None, ge=1)
    classes: Literal["logits", "probabilities"] | None = None

    @model_validator(mode="after")
    def _check(self) -> TorchScriptFeatures:
        if self.range[0] >= self.range[1]:
            raise ValueError(f"range {list(self.range)}: the value of black comes first and is the smaller one")
        if self.takes == "pictures" and self.frames is not None:
            raise ValueError(f"frames is {self.frames}, but takes is pictures, which have none; leave it out")
        return self


FeatureConfig: TypeAlias = Annotated[
    BundledFeatures | OpenClipFeatures | InceptionFeatures | I3DFeatures | VideoMAEFeatures | TorchScriptFeatures,
    Field(discriminator="kind"),
]
