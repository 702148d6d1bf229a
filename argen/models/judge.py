"""A small network that names one object and its colour: the judge of the emoji family (`argen eval emoji`).

Letters in shape comments: B images, K names, C colours.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenizers_img.conv_encoder import ResidualBlock

SIZE = 64
NAMES_WEIGHT = 10.0


class Judge(ModelMixin, ConfigMixin):
    """Pictures of one object [B, 3, 64, 64] in [0, 1] -> logits of its name [B, K] and of its colour [B, C].

    Args:
        names, colours: what the logits stand for.
        width: channels of the first layer.
        accuracy: shares of right answers on held-out pictures, measured when it was trained.
        groups: those of emoji, as "food-drink"; features and likely names tell them apart, too (`group_of`).
    """

    @register_to_config
    def __init__(
        self,
        names: list[str],
        colours: list[str],
        width: int = 40,
        accuracy: dict[str, float] | None = None,
        groups: list[str] | None = None,
    ):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False)
        self.blocks = nn.Sequential(*[ResidualBlock(width * 2**i, width * 2 ** (i + 1)) for i in range(3)])
        self.norm = nn.BatchNorm2d(8 * width)
        self.drop = nn.Dropout(0.3)
        self.name = nn.Linear(8 * width, len(names))
        self.colour = nn.Linear(8 * width, len(colours))
        self.group = nn.Linear(8 * width + len(names), len(groups)) if groups else None

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, 64, 64] in [0, 1] -> [B, F]."""
        return F.relu(self.norm(self.blocks(self.stem(2 * pixels - 1)))).mean(dim=(2, 3))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(pixels)
        return self.name(self.drop(x)), self.colour(x)

    @torch.no_grad()
    def answers(self, pixels: Tensor, among: int = 1) -> tuple[list[list[str]], list[str]]:
        """The `among` most probable names, most probable first, and the most probable colour of each of [B, 3, 64, 64]."""
        name, colour = self(pixels.to(self.device, self.dtype))
        names = [[self.config.names[i] for i in row] for row in name.topk(among, dim=1).indices.tolist()]
        return names, [self.config.colours[i] for i in colour.argmax(dim=1).tolist()]

    def hints(self, pixels: Tensor) -> Tensor:
        """Inputs of the group classifier: the features and, weighed up, the probabilities of the names [B, F + K]."""
        x = self.features(pixels)
        return torch.cat([x, NAMES_WEIGHT * self.name(x).softmax(dim=1)], dim=1)

    @torch.no_grad()
    def group_of(self, pixels: Tensor) -> list[str]:
        """The most probable group of each of [B, 3, 64, 64]."""
        logits = self.group(self.hints(pixels.to(self.device, self.dtype)))
        return [self.config.groups[i] for i in logits.argmax(dim=1).tolist()]
