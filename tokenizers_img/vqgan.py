"""VQGAN f16-16384: the detokenizer of DALL-E mini, ids of a 16 x 16 grid -> 256 x 256 pixels.

Paper: "Taming Transformers for High-Resolution Image Synthesis" (arXiv 2012.09841). Weights: ``detoker.pt`` of
``kuprel/min-dalle``, the decoder half of the VQGAN that dalle-mini was trained on. The convolutions are diffusers'
`Decoder`; the published names are turned into its names when a file is read.

Letters in shape comments: B batch, N = h*w tokens (row-major), C code width.
"""

from pathlib import Path

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder
from einops import rearrange
from torch import Tensor, nn

from tokenizers_img.checkpoint import load_strict, read_state_dict, to_diffusers
from tokenizers_img.mapped import unfilled


class VQGANDetokenizer(ModelMixin, ConfigMixin):
    """Ids -> pixels; the published file has no encoder.

    Args:
        n_embed, embed_dim: number and width C of the codes (not normalised).
        channels: of the decoder, from the full resolution down to the token grid; attention stands at the last.
        layers_per_block: residual blocks at each resolution, less one.
    """

    @register_to_config
    def __init__(
        self,
        n_embed: int = 16384,
        embed_dim: int = 256,
        channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
    ):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        self.decoder = Decoder(
            in_channels=embed_dim,
            out_channels=3,
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * (len(channels) - 1)),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
        )

    @classmethod
    def from_original(cls, path: str | Path) -> "VQGANDetokenizer":
        """Load ``detoker.pt`` of min-dalle as released."""
        model = unfilled(cls)
        return load_strict(model, to_diffusers(read_state_dict(path), len(model.config.channels)), source=path)

    def decode(self, ids: Tensor) -> Tensor:
        """Ids [B, N] of a square grid -> pixels [B, 3, H, W], about [0, 1] and not clipped."""
        side = int(ids.shape[1] ** 0.5)
        if side * side != ids.shape[1]:
            raise ValueError(f"got {ids.shape[1]} tokens for an image: expected a square number")
        codes = rearrange(self.embedding(ids), "b (h w) c -> b c h w", h=side)
        return self.decoder(self.post_quant_conv(codes))
