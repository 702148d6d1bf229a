"""FlexTok: a picture as a sequence of ordered tokens, any prefix of which a flow makes a picture of.

Paper: "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length" (arXiv 2502.13967). Weights:
``EPFL-VILAB/flextok_*`` on the hub (research licence), whose layout this file has. The network works on the latents of a
VAE, `diffusers.AutoencoderKL`.

Letters in shape comments: B batch, C channels of a latent, h w its sides, P = (h / patch) (w / patch) patches, N register
tokens, k of them that are kept, Q numbers of a code, D width, S times.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn

from tokenizers_img.quantize import FSQ

FREQUENCIES = 128  # of the time's embedding
SIZES = {"d12": 768, "d18": 1152, "d28": 1792}  # depth -> width, as published


def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.wq, self.wk, self.wv, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, n, D], mask [1, 1, n, n] bool."""
        query, key, value = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.wq, self.wk, self.wv))
        scale = 8 / self.head_dim
        return self.proj(dispatch_attention_fn(norm(query), norm(key), value, attn_mask=mask, scale=scale).flatten(2))


class GatedMLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        hidden = int(2 / 3 * int(4 * dim))
        self.fc1, self.fc3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """A layer of the encoder."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.attn, self.mlp = Attention(dim, head_dim), GatedMLP(dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(norm(x), mask)
        return x + self.mlp(norm(x))


class ModulatedBlock(Block):
    """A layer of the decoder: time shifts, scales and gates patches and registers, each in their own way.

    Args:
        rank: of the matrix that makes these of the time; None for a full one, as published.
    """

    def __init__(self, dim: int, head_dim: int, rank: int | None):
        super().__init__(dim, head_dim)
        into = [nn.Linear(dim, 12 * dim)] if rank is None else [nn.Linear(dim, rank), nn.Linear(rank, 12 * dim)]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), *into)

    def modulation(self, time: Tensor) -> Tensor:
        """Embedded times [S, D] -> [S, 2, 6, D]: for patches and for registers two gates, then shift and scale, twice."""
        return self.adaLN_modulation(time).unflatten(-1, (2, 6, -1))

    def forward(self, x: Tensor, modulation: Tensor, patches: int) -> Tensor:
        """x [B, P + N, D], of which the first are `patches`; modulation [S, 2, 6, D], where S is 1 or B."""
        rest = x.shape[1] - patches
        both = torch.cat(
            [
                part[:, :, None].expand(-1, -1, n, -1)
                for part, n in zip(modulation.unbind(1), (patches, rest), strict=True)
            ],
            dim=2,
        )  # [S, 6, P + N, D]
        gate1, gate2, shift1, scale1, shift2, scale2 = both.unbind(1)
        x = x + gate1 * self.attn(norm(x) * (1 + scale1) + shift1, None)
        return x + gate2 * self.mlp(norm(x) * (1 + scale2) + shift2)


class Transformer(nn.Module):
    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class PatchEmbedding(nn.Module):
    """Latents [B, C, h, w] -> patches [B, h / patch, w / patch, D]."""

    def __init__(self, channels: int, patch: int, dim: int):
        super().__init__()
        self.patch, self.patch_proj = patch, nn.Linear(channels * patch**2, dim)

    def forward(self, latents: Tensor) -> Tensor:
        return self.patch_proj(rearrange(latents, "b c (y p) (x q) -> b y x (p q c)", p=self.patch, q=self.patch))


class Positions(nn.Module):
    """A table `posembs` that is added: [1, D, sides] of patches, [1, 1, D, N] of registers."""

    def __init__(self, table: Tensor, learned: bool):
        super().__init__()
        if learned:
            self.posembs = nn.Parameter(table)
        else:
            self.register_buffer("posembs", table)


class Registers(nn.Module):
    def __init__(self, count: int, dim: int):
        super().__init__()
        self.registers = nn.Parameter(0.02 * torch.randn(count, dim))


class Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class MaskToken(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dropout_mask_token = nn.Parameter(0.02 * torch.randn(dim))


class NullToken(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.nullcond = nn.Parameter(0.02 * torch.randn(dim))


class TimeEmbedding(nn.Module):
    """Times in [0, 1], [S] -> [S, D]."""

    def __init__(self, dim: int, max_timestep: float):
        super().__init__()
        self.max_timestep = max_timestep
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        places = torch.arange(FREQUENCIES, dtype=torch.float32, device=times.device) / FREQUENCIES
        angles = times.float()[:, None] * (1000 / self.max_timestep) * 256.0**-places
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class PatchHead(nn.Module):
    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.proj = nn.Linear(dim, outputs)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, P, D], modulation [S, 2 D] -> [B, P, outputs]."""
        shift, scale = modulation[:, None].chunk(2, dim=-1)
        return self.proj(norm(x) * (1 + scale) + shift)


def sincos(dim: int, side: int) -> Tensor:
    """[1, dim, side, side]: sines and cosines of the row, then of the column."""
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1).float().T  # [dim / 2, side]
    rows = waves[:, :, None].expand(-1, -1, side)
    return torch.cat([rows, rows.transpose(1, 2)])[None]


class FlexTok(ModelMixin, ConfigMixin):
    """Latents <-> N tokens; the way back is a flow.

    Args:
        levels: of the lattice of codes, see `FSQ`.
        registers: N.
        encoder_dim, encoder_depth, encoder_head_dim, decoder_dim, decoder_depth, decoder_head_dim: sizes.
        channels: C.
        patch: side of a patch.
        grid: patches on a side at most.
        max_timestep: scales the times before they are embedded.
        single_null: the absent condition is one token instead of N.
        rank: see `ModulatedBlock`.
    """

    @register_to_config
    def __init__(
        self,
        levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
        registers: int = 256,
        encoder_dim: int = 768,
        encoder_depth: int = 12,
        encoder_head_dim: int = 64,
        decoder_dim: int = 768,
        decoder_depth: int = 12,
        decoder_head_dim: int = 64,
        channels: int = 16,
        patch: int = 2,
        grid: int = 16,
        max_timestep: float = 1000.0,
        single_null: bool = False,
        rank: int | None = None,
    ):
        super().__init__()
        self.fsq = FSQ(tuple(levels))
        encoder = {
            "enc_patch_emb": PatchEmbedding(channels, patch, encoder_dim),
            "enc_posemb_module": Positions(sincos(encoder_dim, grid), learned=False),
            "enc_register_module": Registers(registers, encoder_dim),
            "enc_transformer": Transformer([Block(encoder_dim, encoder_head_dim) for _ in range(encoder_depth)]),
            "enc_to_latents": Projection(encoder_dim, len(levels)),
        }
        dim = decoder_dim
        decoder = {
            "dec_from_latents": Projection(len(levels), dim),
            "dec_registers_posemb_module": Positions(0.02 * torch.randn(1, 1, dim, registers), learned=True),
            "dec_nested_dropout": MaskToken(dim),
            "dec_latent_dropout": NullToken(dim),
            "dec_noise_patch_emb": PatchEmbedding(channels, patch, dim),
            "dec_patches_posemb_module": Positions(sincos(dim, grid), learned=False),
            "dec_time_embedder": TimeEmbedding(dim, max_timestep),
            "dec_transformer": Transformer([ModulatedBlock(dim, decoder_head_dim, rank) for _ in range(decoder_depth)]),
            "dec_to_patches": PatchHead(dim, channels * patch**2),
        }
        self.encoder = nn.ModuleDict({"module_dict": nn.ModuleDict(encoder)})
        self.decoder = nn.ModuleDict({"module_dict": nn.ModuleDict(decoder)})

    def encode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> numbers [B, N, Q] float32, to be quantized.

        Raises:
            ValueError: the sides are no multiples of the patch, or larger than the table of positions.
        """
        parts = self.encoder["module_dict"]
        patches = self._placed(parts["enc_patch_emb"], parts["enc_posemb_module"], latents).flatten(1, 2)
        registers = parts["enc_register_module"].registers.expand(len(latents), -1, -1)
        x, p = torch.cat([patches, registers.to(patches.dtype)], dim=1), patches.shape[1]
        order = torch.arange(x.shape[1], device=x.device).clamp(min=p - 1)  # patches all stand at the same place
        mask = (order <= order[:, None])[None, None]
        for block in parts["enc_transformer"].blocks:
            x = block(x, mask)
        return parts["enc_to_latents"](norm(x[:, p:])).float()

    def _placed(self, embedding: PatchEmbedding, positions: Positions, latents: Tensor) -> Tensor:
        height, width = latents.shape[2:]
        most = positions.posembs.shape[2] * embedding.patch, positions.posembs.shape[3] * embedding.patch
        if height % embedding.patch or width % embedding.patch or height > most[0] or width > most[1]:
            raise ValueError(
                f"latents are {height} x {width}: expected multiples of {embedding.patch}, at most {most[0]} x {most[1]}"
            )
        patches = embedding(latents)
        table = positions.posembs[0, :, : patches.shape[1], : patches.shape[2]].permute(1, 2, 0)
        return patches + table.to(patches.dtype)

    def read(self, codes: Tensor, keep: Tensor | None = None) -> Tensor:
        """Codes [B, N, Q] -> what the decoder sees of them [B, N, D]: of each picture the first `keep` [B], all by default."""
        parts = self.decoder["module_dict"]
        x = parts["dec_from_latents"](codes.to(self.dtype))
        x = x + parts["dec_registers_posemb_module"].posembs[0, 0].T.to(x.dtype)
        if keep is None:
            return x
        visible = torch.arange(x.shape[1], device=x.device) < keep[:, None]
        return torch.where(visible[..., None], x, parts["dec_nested_dropout"].dropout_mask_token.to(x.dtype))

    def null(self, batch: int) -> Tensor:
        """What the decoder sees without a condition, [B, N or 1, D]."""
        token = self.decoder["module_dict"]["dec_latent_dropout"].nullcond
        return token.expand(batch, 1 if self.config.single_null else self.config.registers, -1)

    def modulations(self, times: Tensor) -> tuple[list[Tensor], Tensor]:
        """Times [S] in [0, 1] -> all that depends on them alone: of each layer [S, 2, 6, D], of the head [S, 2 D]."""
        parts = self.decoder["module_dict"]
        embedded = parts["dec_time_embedder"](times)
        layers = [block.modulation(embedded) for block in parts["dec_transformer"].blocks]
        return layers, parts["dec_to_patches"].adaLN_modulation(embedded)

    def velocity(
        self, x: Tensor, registers: Tensor, modulations: tuple[list[Tensor], Tensor], features_of: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The velocity (noise minus latents) of noisy latents.

        Args:
            x: [B, C, h, w].
            registers: from `read` or `null`.
            modulations: of `modulations`, with S = 1 or B.
            features_of: number of a layer.

        Returns:
            [B, C, h, w] float32, and the patches [B, P, D] after that layer.
        """
        parts, (layers, last) = self.decoder["module_dict"], modulations
        embedding = parts["dec_noise_patch_emb"]
        patches = self._placed(embedding, parts["dec_patches_posemb_module"], x.to(self.dtype))
        rows, columns = patches.shape[1:3]
        count, features = rows * columns, None
        states = torch.cat([patches.flatten(1, 2), registers.to(patches.dtype)], dim=1)
        for index, (block, modulation) in enumerate(zip(parts["dec_transformer"].blocks, layers, strict=True)):
            states = block(states, modulation, count)
            features = states[:, :count] if index == features_of else features
        out, p = parts["dec_to_patches"](states[:, :count], last), embedding.patch
        output = rearrange(out, "b (y x) (p q c) -> b c (y p) (x q)", y=rows, x=columns, p=p, q=p)
        return output.float(), features

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        keep: Tensor,
        dropped: Tensor,
        features_of: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """In training.

        Args:
            latents, noise: [B, C, h, w].
            times: [B] in [0, 1].
            keep: [B], so many tokens are seen.
            dropped: [B] bool, none is.
            features_of: see `velocity`.

        Returns:
            As `velocity`, at (1 - time) latents + time noise.
        """
        spread = times[:, None, None, None]
        registers = self.read(self.fsq.quantize(self.encode(latents)), keep)
        registers = torch.where(dropped[:, None, None], self.null(len(latents)).to(registers.dtype), registers)
        noisy = (1 - spread) * latents + spread * noise
        return self.velocity(noisy, registers, self.modulations(times), features_of)
