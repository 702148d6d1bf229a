"""A small convolutional picture encoder, of `argen/emoji-seed`: what is in a picture, so few pictures teach convolutions better than a
transformer."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:
    from transformers import CLIPVisionModel


class ResidualBlock(nn.Module):
    """Halves the sides (arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        return self.skip(active) + self.conv2(F.relu(self.norm2(self.conv1(active))))


class ConvEncoder(ModelMixin, ConfigMixin):
    """Pixels [B, 3, S, S] in [-1, 1] -> `last_hidden_state` [B, (S / 32) ** 2, V], as the vision transformers of transformers have it.

    Args:
        image_size: S.
        width: channels of the first layer.
        features: V.
        names: so many concepts can be named by the mean of the features; only training needs it.
    """

    @register_to_config
    def __init__(self, image_size: int = 128, width: int = 40, features: int = 192, names: int | None = None):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False)
        widths = (width, 2 * width, 4 * width, features)
        self.blocks = nn.Sequential(*map(ResidualBlock, widths, widths[1:]))
        self.norm = nn.BatchNorm2d(features)
        self.head = nn.Linear(features, names) if names else None

    def look(self, halves: Tensor) -> Tensor:
        """Pixels of half the sides [B, 3, S / 2, S / 2] -> features [B, (S / 32) ** 2, V]."""
        features = F.relu(self.norm(self.blocks(self.stem(halves))))  # [B, V, S / 32, S / 32]
        return features.flatten(2).transpose(1, 2)

    def forward(self, pixels: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.look(F.avg_pool2d(pixels, 2)))


class TwoEncoders(nn.Module):
    """What a CLIP and small convolutions see of a picture, one after the other.

    Args:
        clip: 128 x 128 pixels, of the width of the convolutions' features.
        conv: pixels of the same size.
    """

    def __init__(self, clip: "CLIPVisionModel", conv: ConvEncoder):
        super().__init__()
        self.clip, self.conv, self.config = clip, conv, clip.config

    def save_pretrained(self, folder: str | Path) -> None:
        """Save both, a folder each."""
        self.clip.save_pretrained(Path(folder) / "clip")
        self.conv.save_pretrained(Path(folder) / "conv")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TwoEncoders":
        """Read what `save_pretrained` wrote."""
        from transformers import CLIPVisionModel

        clip = CLIPVisionModel.from_pretrained(Path(folder) / "clip")
        return cls(clip, ConvEncoder.from_pretrained(Path(folder) / "conv"))

    @property
    def dtype(self) -> torch.dtype:
        return self.conv.dtype

    def forward(self, pixels: Tensor) -> BaseModelOutput:
        both = [network(pixels).last_hidden_state for network in (self.clip, self.conv)]
        return BaseModelOutput(last_hidden_state=torch.cat(both, dim=1))
