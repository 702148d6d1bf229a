"""A generator without training: neighbours have like colours, and the prompt says towards which one they tend."""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from argen.pipelines.base import Defaults, TokenPipeline
from argen.request import Control
from argen_mosaic.tokenizer import Mosaic

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1), "black": (0, 0, 0)}


class Bigram(ModelMixin, ConfigMixin):
    """Logits of the next token from the last one."""

    @register_to_config
    def __init__(self, n_embed: int = 64, sharpness: float = 6.0):
        super().__init__()
        self.table = torch.nn.Embedding(n_embed + 1, n_embed)  # the last row stands for the start token

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, n], `START` (-1) among them, -> logits [B, n, K]."""
        return self.table(tokens % (self.config.n_embed + 1))


class BigramSession:
    """`samplers.steps.Session` of a `Bigram`; there is nothing to cache, since one token is all that it reads.

    Args:
        biases: [B, K], what the prompts add to the logits.
    """

    def __init__(self, network: Bigram, biases: Tensor, guided: bool, columns: int):
        self.network, self.biases, self.guided = network, biases, guided
        self.columns, self.length = columns, columns**2

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, seen: Tensor | None = None):
        """See `samplers.steps.Session.forward`."""
        logits = self.network(tokens)
        return logits + self.biases[:, None], logits if self.guided else None

    def keep(self, nodes: Tensor) -> None:
        """See `samplers.steps.Session.keep`."""


class MosaicPipeline(TokenPipeline):
    """Args:
    transformer: the generator.
    image_tokenizer: turns its tokens into pixels.
    """

    official = Defaults(guidance_scale=1.5)

    def __init__(self, transformer: Bigram, image_tokenizer: Mosaic):
        super().__init__()
        self.register_modules(transformer=transformer, image_tokenizer=image_tokenizer)

    @property
    def length(self) -> int:
        return self.image_tokenizer.grid**2

    def start(
        self, prompts: list[str], guided: bool, shape: tuple[int, int], controls: list[Control] | None = None
    ) -> BigramSession:
        """See `TokenPipeline.start`."""
        palette = self.image_tokenizer.palette
        biases = palette.new_zeros(len(prompts), len(palette))
        for row, prompt in zip(biases, prompts, strict=True):
            for colour in filter(COLOURS.get, prompt.split()):
                row -= 4 * distances(palette, colour)
        return BigramSession(self.transformer, biases, guided, shape[1])

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """See `TokenPipeline.decode_tokens`."""
        return self.image_tokenizer.decode(tokens.flatten(1))


def distances(palette: Tensor, colour: str) -> Tensor:
    """Of every colour of a palette [K, 3] to one by its name, [K]."""
    return (palette - palette.new_tensor(COLOURS[colour])).norm(dim=1)


def read_bigram(folder: Path) -> MosaicPipeline:
    """The generator that a card names; its table is computed instead of learned."""
    network, tokenizer = Bigram(), Mosaic()
    apart = torch.cdist(tokenizer.palette, tokenizer.palette)
    table = torch.cat([-network.config.sharpness * apart, torch.zeros(1, len(apart))])
    network.load_state_dict({"table.weight": table})
    return MosaicPipeline(network.eval(), tokenizer)


def read_trained(folder: Path) -> MosaicPipeline:
    """The generator in a folder that the recipe "mosaic" has written."""
    return MosaicPipeline(Bigram.from_pretrained(folder), Mosaic())
