"""ViT-VQGAN: a Vision Transformer auto-encoder with a factorised, l2-normalised codebook.

Paper: "Vector-quantized Image Modeling with Improved VQGAN" (arXiv 2110.04627), the tokenizer of Parti. Google released
no weights; the published ones are those of github.com/thuanz123/enhancing-transformers, whose layout this file has.

Letters in shape comments: B batch, H W pixels, h w token grid, N = h*w tokens (row-major), D width, C code width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from tokenizers_img.attention import DispatchedAttention
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.mapped import unfilled
from tokenizers_img.quantize import VectorQuantizer, check_ids

SIZES = {  # the published configurations: width, depth, heads and MLP width of both halves
    "small": {"dim": 512, "depth": 8, "heads": 8, "mlp_dim": 2048, "dim_head": 64},
    "base": {"dim": 768, "depth": 12, "heads": 12, "mlp_dim": 3072, "dim_head": 64},
}


def sincos_positions(dim: int, height: int, width: int) -> Tensor:
    """Fixed 2-d positions [1, h*w, D]: the first half of D holds the column, the second the row."""
    omega = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[None].float()


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class Attention(DispatchedAttention):
    masked = False

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.to_qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.heads)
        return self.to_out(self.attend(query, key, value))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden_dim), nn.Tanh(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Layer(nn.ModuleList):
    def __init__(self, dim: int, heads: int, dim_head: int, mlp_dim: int):
        super().__init__([PreNorm(dim, Attention(dim, heads, dim_head)), PreNorm(dim, FeedForward(dim, mlp_dim))])

    def forward(self, x: Tensor) -> Tensor:
        attention, feed_forward = self
        x = x + attention(x)
        return x + feed_forward(x)


class Transformer(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, dim_head: int, mlp_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(dim, heads, dim_head, mlp_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; without norms, and the identity at the start of training."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class ConvStem(nn.Sequential):
    """Pixels [B, 3, H, W] -> [B, D, h, w] by strided convolutions, instead of one patch convolution."""

    def __init__(self, channels: list[int], dim: int):
        layers: list[nn.Module] = []
        for before, after in zip([3, *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), ResidualBlock(after)]
        super().__init__(*layers, nn.SiLU(), nn.Conv2d(channels[-1], dim, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(2 * pixels - 1)


class ConvHead(nn.Sequential):
    """[B, D, h, w] -> pixels [B, 3, H, W] by pixel shuffles and convolutions, instead of one transposed convolution.

    `channels` are those of `ConvStem`: the first shuffle goes straight to the resolution of ``channels[1]``.
    """

    def __init__(self, channels: list[int], dim: int):
        first = 2 ** (len(channels) - 2)
        layers: list[nn.Module] = [nn.Conv2d(dim, channels[1] * first**2, 1), nn.PixelShuffle(first)]
        layers += [ResidualBlock(channels[1]), ResidualBlock(channels[1])]
        layers += [
            nn.Conv2d(channels[1], channels[0] * 4, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(channels[0]),
        ]
        layers += [nn.SiLU(), nn.Conv2d(channels[0], 12, 3, padding=1), nn.PixelShuffle(2)]
        super().__init__(*layers)


class PyramidHead(nn.Sequential):
    """[B, D, h, w] -> pixels [B, 3, H, W] by pixel shuffles and convolutions, most of the work where the resolution is low.

    Args:
        channels: those at 1/2, 1/4, ... of the picture's resolution; the first shuffle goes straight to the last of these.
        dim: D.
        first: what the first shuffle enlarges by, so that H = h * first * 2 ** len(channels).
    """

    def __init__(self, channels: list[int], dim: int, first: int):
        layers: list[nn.Module] = [nn.Conv2d(dim, channels[-1] * first**2, 1), nn.PixelShuffle(first)]
        for before, after in zip(channels[::-1], [*channels[-2::-1], 3], strict=True):
            layers += [ResidualBlock(before), ResidualBlock(before), nn.SiLU()]
            layers += [nn.Conv2d(before, 4 * after, 3, padding=1), nn.PixelShuffle(2)]
        super().__init__(*layers)


def _init(module: nn.Module) -> None:
    """Xavier for matrices as published; convolutions keep the variance, the second of a residual block starts at 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=(module.weight[0].numel()) ** -0.5)
    elif isinstance(module, ResidualBlock):
        nn.init.zeros_(module.conv2.weight)
        if module.conv2.bias is not None:
            nn.init.zeros_(module.conv2.bias)


class ViTEncoder(nn.Module):
    def __init__(self, grid: int, patch_size: int, conv: list[int] | None, dim: int, **transformer: int):
        super().__init__()
        self.en_pos_embedding = nn.Parameter(sincos_positions(dim, grid, grid), requires_grad=False)
        stem = ConvStem(conv, dim) if conv else nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.to_patch_embedding = nn.Sequential(stem)
        self.transformer = Transformer(dim, **transformer)

    def forward(self, pixels: Tensor) -> Tensor:
        x = rearrange(self.to_patch_embedding(pixels), "b d h w -> b (h w) d")
        return self.transformer(x + self.en_pos_embedding)


class ViTDecoder(nn.Module):
    def __init__(
        self,
        grid: int,
        patch_size: int,
        conv: list[int] | None,
        dim: int,
        pyramid: list[int] | None = None,
        **transformer: int,
    ):
        super().__init__()
        self.grid = grid
        self.transformer = Transformer(dim, **transformer)
        self.de_pos_embedding = nn.Parameter(sincos_positions(dim, grid, grid), requires_grad=False)
        if pyramid:
            head: nn.Module = PyramidHead(pyramid, dim, patch_size // 2 ** len(pyramid))
        else:
            head = ConvHead(conv, dim) if conv else nn.ConvTranspose2d(dim, 3, patch_size, stride=patch_size)
        self.to_pixel = nn.Sequential(nn.Identity(), head)  # published at index 1; a reshape stands at 0 there

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformer(x + self.de_pos_embedding)
        return self.to_pixel(rearrange(x, "b (h w) d -> b d h w", h=self.grid))


class ViTVQGAN(ModelMixin, ConfigMixin):
    """The image tokenizer of Parti: pixels <-> a square grid of ids.

    Args:
        image_size: side of the square pictures, in pixels.
        patch_size: side of the square that one token stands for, in pixels.
        encoder_size, decoder_size: dim, depth, heads, dim_head, mlp_dim of each Transformer (`SIZES` has the published ones).
        embed_dim, n_embed: width and number of the codes.
        conv_channels: None for the published linear patches; else the channels of the convolutions that stand in
            their place at 1/2, 1/4, ... of the resolution, down to ``1/patch_size``.
        encoder_scale: the encoder sees pictures that are smaller by this factor, and the channels are those of its resolutions.
        pyramid: channels of the `PyramidHead` that stands in the decoder; None for a head after `conv_channels`.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int,
        patch_size: int,
        encoder_size: dict[str, int],
        decoder_size: dict[str, int],
        embed_dim: int = 32,
        n_embed: int = 8192,
        conv_channels: list[int] | None = None,
        encoder_scale: int = 1,
        pyramid: list[int] | None = None,
    ):
        super().__init__()
        self.grid, self.stride = image_size // patch_size, patch_size
        self.encoder = ViTEncoder(self.grid, patch_size // encoder_scale, conv_channels, **encoder_size)
        self.decoder = ViTDecoder(self.grid, patch_size, conv_channels, pyramid=pyramid, **decoder_size)
        self.quantizer = VectorQuantizer(embed_dim, n_embed)
        self.pre_quant = nn.Linear(encoder_size["dim"], embed_dim)
        self.post_quant = nn.Linear(embed_dim, decoder_size["dim"])
        self.apply(_init)
        nn.init.normal_(self.post_quant.weight)  # unit codes arrive as large as the positions that they join

    @classmethod
    def from_original(cls, path: str | Path, size: str = "base") -> "ViTVQGAN":
        """Load a checkpoint of enhancing-transformers as released (256 x 256, patches of 8, 8192 codes).

        Args:
            path: the Lightning ``.ckpt`` file; its ``loss.*`` entries are left out.
            size: "small" or "base".
        """
        if size not in SIZES:
            raise ValueError(f"unknown ViT-VQGAN size {size!r}: expected one of {', '.join(SIZES)}")
        model = unfilled(cls, image_size=256, patch_size=8, encoder_size=SIZES[size], decoder_size=SIZES[size])
        state = {key: value for key, value in read_state_dict(path).items() if not key.startswith("loss.")}
        return load_strict(model, state, source=path)

    @property
    def codebook(self) -> Tensor:
        """Unit codes [K, C]."""
        return F.normalize(self.quantizer.embedding.weight, dim=-1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> ids [B, N] int64.

        Raises:
            ValueError: they are of another size than the network's.
        """
        return self.quantizer(self.encode_vectors(pixels))[2]

    def encode_vectors(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> what is quantized, [B, N, C]; errors as in `encode`."""
        side = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, side, side):
            raise ValueError(f"images are {list(pixels.shape[1:])}: expected [3, {side}, {side}]")
        scale = self.config.encoder_scale
        return self.pre_quant(self.encoder(F.avg_pool2d(pixels, scale) if scale > 1 else pixels))

    def decode(self, ids: Tensor) -> Tensor:
        """Ids [B, N] -> pixels [B, 3, H, W], about [0, 1] and not clipped.

        Raises:
            ValueError: too few or too many ids, or one outside the codebook.
        """
        for row in ids:
            check_ids(row, self.config.n_embed, self.grid**2, self.grid**2)
        return self.decode_codes(self.quantizer.decode(ids))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Unit codes [B, N, C] -> pixels [B, 3, H, W]."""
        return self.decoder(self.post_quant(codes.to(self.post_quant.weight.dtype)))

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, 3, H, W] in [0, 1] -> (reconstruction, quantizer loss, ids [B, N]).

        Args:
            noise: [B, N, C], for the start of a training: where it is not zero throughout, a picture skips the
                quantizer and is decoded from its unit vectors with this noise added. Noise of the size of the
                quantization error makes the encoder spread over the sphere before the codebook settles.
        """
        z = self.encode_vectors(pixels)
        codes, loss, ids = self.quantizer(z)
        if noise is not None:
            skips = (noise != 0).flatten(1).any(dim=1)[:, None, None]
            codes = torch.where(skips, F.normalize(F.normalize(z.float(), dim=-1) + noise, dim=-1), codes)
        return self.decode_codes(codes), loss, ids
