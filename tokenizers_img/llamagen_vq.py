"""LlamaGen's VQ tokenizer: a convolutional VQGAN whose codes are compared on the unit sphere.

Paper: arXiv 2406.06525, section 2.1. Weights: ``vq_ds16_c2i.pt``, ``vq_ds8_c2i.pt`` and ``vq_ds16_t2i.pt`` of
github.com/FoundationVision/LlamaGen (MIT). The network is `diffusers.VQModel`: this file converts the published names, and
normalises the codebook once, after which the plain nearest neighbour is the published one.

Letters in shape comments: B batch, H W pixels, h w token grid, N = h*w tokens (row-major), C code width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import VQModel
from diffusers.configuration_utils import FrozenDict
from einops import rearrange
from torch import Tensor, nn

from tokenizers_img.checkpoint import load_strict, read_state_dict, to_diffusers
from tokenizers_img.mapped import unfilled
from tokenizers_img.quantize import by_cosine, check_ids

MULTIPLIERS = {16: (1, 1, 2, 2, 4), 8: (1, 2, 2, 4)}  # down-sampling -> widths of the levels, in base widths
UNUSED, CODES = "quantize.codebook_used", "quantize.embedding.weight"


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their published names -> under those of `diffusers.VQModel`, the codebook normalised."""
    renamed = to_diffusers({key: value for key, value in state.items() if key != UNUSED}, levels=0)
    return renamed | ({CODES: F.normalize(renamed[CODES].float(), dim=-1)} if CODES in renamed else {})


def network(
    multipliers: tuple[int, ...],
    width: int = 128,
    latent_channels: int = 256,
    codes: int = 16384,
    code_width: int = 8,
    layers: int = 2,
) -> VQModel:
    """The published network, or one of other sizes."""
    levels = len(multipliers)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        block_out_channels=tuple(width * m for m in multipliers),
        layers_per_block=layers,
        latent_channels=latent_channels,
        num_vq_embeddings=codes,
        vq_embed_dim=code_width,
        norm_num_groups=32,
        lookup_from_codebook=True,
    )


class LlamaGenVQ(nn.Module):
    """Pixels <-> ids, of any size that the down-sampling divides.

    Args:
        vq: the network, its codebook normalised.
        image_size: side of the images it was trained at, in pixels.
    """

    def __init__(self, vq: VQModel, image_size: int = 256):
        super().__init__()
        self.vq = vq
        self.stride = 2 ** (len(vq.config.block_out_channels) - 1)
        self.config = FrozenDict(image_size=image_size, n_embed=vq.config.num_vq_embeddings)

    @classmethod
    def from_original(cls, path: str | Path, stride: int = 16) -> "LlamaGenVQ":
        """Load a published file; `stride` is 16 (``vq_ds16_*``) or 8 (``vq_ds8_*``)."""
        if stride not in MULTIPLIERS:
            raise ValueError(f"unknown stride {stride}: expected {' or '.join(map(str, MULTIPLIERS))}")
        return cls(load_strict(unfilled(network, MULTIPLIERS[stride]), converted(read_state_dict(path)), source=path))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "LlamaGenVQ":
        """Load a file of any size and name, also of one's own training; all sizes are read from its tensors.

        Raises:
            ValueError: it is no VQ tokenizer of LlamaGen.
        """
        state = read_state_dict(path)
        if CODES not in state or "encoder.conv_in.weight" not in state:
            raise ValueError(f"{path} holds no VQ tokenizer of LlamaGen: expected encoder, decoder and quantize")
        widths, level = [], 0
        while (weight := state.get(f"encoder.conv_blocks.{level}.res.0.conv1.weight")) is not None:
            widths.append(weight.shape[0])
            level += 1
        base, (codes, code_width) = state["encoder.conv_in.weight"].shape[0], state[CODES].shape
        latent = state["quant_conv.weight"].shape[1] if "quant_conv.weight" in state else code_width
        sizes = {"width": base, "latent_channels": latent, "codes": codes, "code_width": code_width}
        vq = unfilled(network, tuple(width // base for width in widths), **sizes)
        return cls(load_strict(vq, converted(state), source=path))

    @property
    def device(self) -> torch.device:
        return self.vq.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vq.dtype

    @property
    def codebook(self) -> Tensor:
        """Unit codes [K, C]."""
        return self.vq.quantize.embedding.weight

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> ids [B, N] int64.

        Raises:
            ValueError: a side is no multiple of the stride.
        """
        z = F.normalize(self.encode_vectors(pixels).float(), dim=-1)
        return (z @ self.vq.quantize.embedding.weight.float().T).argmax(dim=-1)

    def encode_vectors(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> what is quantized, [B, N, C]; errors as in `encode`."""
        if pixels.shape[2] % self.stride or pixels.shape[3] % self.stride:
            raise ValueError(f"images are {list(pixels.shape[2:])}: expected multiples of {self.stride}")
        return rearrange(self.vq.encode(2 * pixels - 1).latents, "b c h w -> b (h w) c")

    def decode(self, ids: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Ids [B, N] -> pixels [B, 3, H, W], about [0, 1] and not clipped; `shape` is (h, w), square by default.

        Raises:
            ValueError: too few or too many ids, or one outside the codebook.
        """
        height, width = shape or (int(ids.shape[1] ** 0.5),) * 2
        for row in ids:
            check_ids(row, self.config.n_embed, height * width, height * width)
        size = (len(ids), height, width, self.vq.config.vq_embed_dim)
        return (self.vq.decode(ids.flatten(), force_not_quantize=True, shape=size).sample + 1) / 2

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, 3, H, W] in [0, 1] -> (reconstruction, quantizer loss, ids [B, N]), for training: the codebook need not be normalised."""
        codes, loss, ids = by_cosine(self.encode_vectors(pixels), self.vq.quantize.embedding.weight)
        latents = rearrange(codes, "b (h w) c -> b c h w", h=pixels.shape[2] // self.stride)
        decoded = self.vq.decoder(self.vq.post_quant_conv(latents.to(self.dtype)))
        return (decoded + 1) / 2, loss, ids
