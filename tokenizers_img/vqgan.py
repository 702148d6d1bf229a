"""VQGAN f16-16384: the detokenizer of DALL-E mini, ids of a 16 x 16 grid -> 256 x 256 pixels.

Paper: "Taming Transformers for High-Resolution Image Synthesis" (arXiv 2012.09841). Weights: ``detoker.pt`` of
``kuprel/min-dalle``, the decoder half of the VQGAN that dalle-mini was trained on. The convolutions are diffusers'
`Decoder`; the published names are turned into its names when a file is read.

Letters in shape comments: B batch, N = h*w tokens (row-major), C code width.
"""

import re
from pathlib import Path

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder
from einops import rearrange
from torch import Tensor, nn

from tokenizers_img.checkpoint import load_strict, read_state_dict

_RENAME = (  # taming's names -> diffusers' names
    (r"\bmid\.block_1\.", "mid_block.resnets.0."),
    (r"\bmid\.block_2\.", "mid_block.resnets.1."),
    (r"\bmid\.attn_1\.", "mid_block.attentions.0."),
    (r"\bup\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"\bup\.(\d+)\.attn\.", r"up_blocks.\1.attentions."),
    (r"\bup\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bnin_shortcut\.", "conv_shortcut."),
    (r"\bnorm_out\.", "conv_norm_out."),
    (r"(attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(attentions\.\d+\.)([qkv])\.", r"\1to_\2."),
    (r"(attentions\.\d+\.)proj_out\.", r"\1to_out.0."),
)


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
        model = cls()
        return load_strict(model, model.convert(read_state_dict(path)), source=path)

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in the published layout -> this module's: other names, 1x1 convolutions as linear layers."""
        last = len(self.config.channels) - 1
        converted = {}
        for key, value in state.items():
            for pattern, name in _RENAME:
                key = re.sub(pattern, name, key)
            key = re.sub(r"up_blocks\.(\d+)", lambda level: f"up_blocks.{last - int(level[1])}", key)
            linear = ".attentions." in key and value.ndim == 4
            converted[key] = value[:, :, 0, 0] if linear else value
        return converted

    def decode(self, ids: Tensor) -> Tensor:
        """Ids [B, N] of a square grid -> pixels [B, 3, H, W], about [0, 1] and not clipped."""
        side = int(ids.shape[1] ** 0.5)
        if side * side != ids.shape[1]:
            raise ValueError(f"got {ids.shape[1]} tokens for a picture: expected a square number")
        codes = rearrange(self.embedding(ids), "b (h w) c -> b c h w", h=side)
        return self.decoder(self.post_quant_conv(codes))
