"""xAR: a picture's latents are written entity by entity, each by a flow that the whole network drives.

Paper: "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388). Weights:
``OliverRen/xAR`` on the hub, whose layout this file has. The released X is a cell of 8 x 8 positions; the others of the
paper are a matter of order (`Entities`).

Letters in shape comments: B images, R rows (2B under guidance), S side of the latent, C its channels, K entities, T
positions of one of them, N of all, n of a forward pass, D width, H heads.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from argen.models.layers import Linear, RMSNorm, check_heads, grid_places, rotary_table, rotate, split_heads
from argen.models.parti import Attention as CrossAttention
from tokenizers_img.attention import DispatchedAttention
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.mapped import unfilled

SIZES = {  # the published widths
    "B": {"dim": 768, "encoder_depth": 8, "decoder_depth": 8, "heads": 12},
    "L": {"dim": 1024, "encoder_depth": 16, "decoder_depth": 16, "heads": 16},
    "H": {"dim": 1280, "encoder_depth": 20, "decoder_depth": 20, "heads": 16},
}
KINDS = ("cell", "subsample", "scale")
FREQUENCIES = 128  # of the time's embedding


@dataclass(frozen=True)
class Entities:
    """How a square latent is cut into the X that are predicted one after the other (section 3 of the paper).

    Args:
        kind: "cell": squares of `size` positions a side; with size 1 the X is a token, with size S the whole image.
            "subsample": every `size`-th position of every `size`-th row. "scale": the latent shrunk to 1, `size`,
            `size`^2 ... S positions a side, of which the last is the picture.
        size: see `kind`.
        side: S.
    """

    kind: str
    size: int
    side: int

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of X {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.kind == "scale" and (self.size < 2 or self.size ** (len(self.sides) - 1) != self.side):
            raise ValueError(f"scales grow by {self.size}: expected 2 or more, of which {self.side} is a power")
        if self.kind != "scale" and (self.size < 1 or self.side % self.size):
            raise ValueError(f"the size of X is {self.size}: expected a divisor of {self.side}")

    @cached_property
    def sides(self) -> list[int]:
        """Sides of the scales."""
        sides = [1]
        while self.size > 1 and sides[-1] < self.side:
            sides.append(sides[-1] * self.size)
        return sides

    @cached_property
    def lengths(self) -> list[int]:
        """Positions T of each of the K entities."""
        if self.kind == "scale":
            return [side * side for side in self.sides]
        cells = (self.side // self.size) ** 2, self.size**2
        return [cells[1]] * cells[0] if self.kind == "cell" else [cells[0]] * cells[1]

    @cached_property
    def order(self) -> Tensor:
        """[S * S], positions of the latent in the order of the sequence (of cells and subsamples)."""
        grid = torch.arange(self.side**2).view(self.side, self.side)
        pattern = "(gh p) (gw q) -> (gh gw p q)" if self.kind == "cell" else "(p gh) (q gw) -> (gh gw p q)"
        sizes = {"p": self.size, "q": self.size} if self.kind == "cell" else {"gh": self.size, "gw": self.size}
        return rearrange(grid, pattern, **sizes)

    @cached_property
    def positions(self) -> Tensor:
        """Row and column [N, 2] of each position of the sequence, in those of the latent."""
        if self.kind != "scale":
            return grid_places(self.side)[self.order]
        return torch.cat([(grid_places(side) + 0.5) * self.side / side - 0.5 for side in self.sides])

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents [B, C, S, S] -> sequence [B, N, C]."""
        if self.kind != "scale":
            return latents.flatten(2).transpose(1, 2)[:, self.order.to(latents.device)]
        scales = [F.interpolate(latents, (side, side), mode="area") for side in self.sides]
        return torch.cat([scale.flatten(2) for scale in scales], dim=2).transpose(1, 2)

    def unpatchify(self, sequence: Tensor) -> Tensor:
        """Sequence [B, N, C] -> latents [B, C, S, S]."""
        if self.kind == "scale":
            latents = sequence[:, -(self.side**2) :]
        else:
            latents = torch.empty_like(sequence)
            latents[:, self.order.to(sequence.device)] = sequence
        return latents.transpose(1, 2).unflatten(2, (self.side, self.side))


class TimeEmbedding(nn.Module):
    """Embedding of timesteps, integers [...] -> [..., D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * FREQUENCIES, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, times: Tensor) -> Tensor:
        rates = 10000.0 ** (-torch.arange(FREQUENCIES, dtype=torch.float32, device=times.device) / FREQUENCIES)
        angles = times[..., None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Attention(DispatchedAttention):
    masked = False  # but in training

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = check_heads(dim, heads), dropout
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor | None, cached: Tensor | None) -> Tensor:
        """x [R, n, D]; `mask` [1, 1, n, n]; `cached` [2, R, m, H, D/H]: what the forward pass sees, whose last n slots are its own."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        query, key = rotate(query, freqs_cis), rotate(key, freqs_cis)
        if cached is not None:
            cached[0, :, -x.shape[1] :], cached[1, :, -x.shape[1] :] = key, value
            key, value = cached
        dropout = self.dropout if self.training else 0.0
        attended = self.attend(query, key, value, mask, dropout)
        return F.dropout(self.proj(attended), self.dropout, self.training)


class GatedMLP(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        hidden = int(dim * 4 * 2 / 3)
        self.fc1_g, self.fc1_x, self.fc2 = Linear(dim, hidden), Linear(dim, hidden), Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1_g(x)) * self.fc1_x(x))))


@dataclass(frozen=True)
class Words:
    """Captions as the blocks attend to them.

    Attributes:
        keys_values: of each block, two [R, T, H, D/H].
        mask: [R, 1, 1, T] bool, true for a word.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: list[int] | slice) -> "Words":
        return Words([(key[rows], value[rows]) for key, value in self.keys_values], self.mask[rows])


class Block(nn.Module):
    """Args:
    captioned: it attends to a caption, too.
    rank: of the matrix that makes the modulation; None for a full one, as published.
    """

    def __init__(self, dim: int, heads: int, dropout: float, captioned: bool, rank: int | None):
        super().__init__()
        self.attn, self.mlp = Attention(dim, heads, dropout), GatedMLP(dim, dropout)
        if captioned:
            self.cross_attn = CrossAttention(dim, heads)
        into = [Linear(dim, 6 * dim)] if rank is None else [Linear(dim, rank), Linear(rank, 6 * dim)]
        self.ada_lin = nn.Sequential(nn.SiLU(), *into)

    def modulation(self, condition: Tensor) -> Tensor:
        """[..., D] -> [6, ..., D]: two gates, two scales, two shifts."""
        return torch.stack(self.ada_lin(condition).chunk(6, dim=-1))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cached: Tensor | None,
        words: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Tensor:
        """x [R, n, D], modulation [6, R, n or 1, D]; `words` are keys, values and mask of `Words`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        x = x + gate1 * self.attn(_norm(x) * (1 + scale1) + shift1, freqs_cis, mask, cached)
        if words is not None:
            x = x + self.cross_attn(_norm(x), *words)
        return x + gate2 * self.mlp(_norm(x) * (1 + scale2) + shift2)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), eps=1e-6).to(x.dtype)


class XAR(ModelMixin, ConfigMixin):
    """Noisy latents, times and a condition -> the velocity (noise minus data) of each position.

    Args:
        dim, encoder_depth, decoder_depth, heads: sizes. Encoder and decoder are two halves of one stack.
        grid: S. Entities are cut from it as `kind` and `size` of `Entities` say.
        channels: C.
        classes: how many there are; the table has one row more, for "none".
        caption_dim: width of a text encoder's states, for a model that attends to captions (as PixArt-alpha, arXiv 2310.00426)
            and knows no classes. The published ones do not.
        rank: see `Block`.
        dropout: in training, on attention weights and on what a layer adds.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 768,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        heads: int = 12,
        grid: int = 16,
        kind: str = "cell",
        size: int = 8,
        channels: int = 16,
        classes: int = 1000,
        caption_dim: int | None = None,
        rank: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.entities = Entities(kind, size, grid)
        length = sum(self.entities.lengths)
        if caption_dim is None:
            self.class_emb = nn.Embedding(classes + 1, dim)
        else:
            self.caption_proj = Linear(caption_dim, dim)

        def blocks(depth: int) -> nn.ModuleList:
            return nn.ModuleList(Block(dim, heads, dropout, caption_dim is not None, rank) for _ in range(depth))

        self.time_embed = TimeEmbedding(dim)
        self.z_proj, self.z_proj_ln = Linear(channels, dim), RMSNorm(dim, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, dim))
        self.encoder_blocks = blocks(encoder_depth)
        self.encoder_norm = RMSNorm(dim, eps=1e-6)
        self.decoder_embed = Linear(dim, dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, dim))
        self.decoder_blocks = blocks(decoder_depth)
        self.decoder_norm = RMSNorm(dim, eps=1e-6)
        self.pred = Linear(dim, channels)
        entity = [index for index, positions in enumerate(self.entities.lengths) for _ in range(positions)]
        self.register_buffer("entity", torch.tensor(entity), persistent=False)  # [N], the entity of each position
        self.register_buffer("freqs_cis", rotary_table(dim // heads, self.entities.positions), persistent=False)
        self.apply(_init)
        for table in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    @classmethod
    def from_original(cls, path: str | Path, size: str) -> "XAR":
        """Load a published file, as ``xAR-B.pth``; `size` is a name in `SIZES`."""
        if size not in SIZES:
            raise ValueError(f"unknown xAR size {size!r}: expected one of {', '.join(SIZES)}")
        return load_strict(unfilled(cls, **SIZES[size]), converted(read_state_dict(path)), source=path)

    @property
    def blocks(self) -> list[Block]:
        return [*self.encoder_blocks, *self.decoder_blocks]

    def condition(self, cond: Tensor | Words, dropped: Tensor | None = None) -> Tensor:
        """Class ids [R] -> [R, D], "none" where `dropped` [R] is true. Captions add nothing to the times: zeros."""
        if isinstance(cond, Words):
            return self.pred.weight.new_zeros(len(cond), self.config.dim)
        embeds = self.class_emb(cond)
        return (
            embeds
            if dropped is None
            else torch.where(dropped[:, None], self.class_emb.weight[-1].to(embeds.dtype), embeds)
        )

    def read(self, states: Tensor, mask: Tensor) -> Words:
        """States of captions [R, T, caption_dim], mask [R, T] bool, true for a word."""
        encoded = self.caption_proj(states)
        return Words([block.cross_attn.keys_values(encoded) for block in self.blocks], mask[:, None, None])

    def modulations(self, condition: Tensor, times: Tensor) -> list[Tensor]:
        """Condition [..., D] and times in thousandths [...] -> of each block [6, ..., D]."""
        both = self.time_embed(times) + condition
        return [block.modulation(both) for block in self.blocks]

    def _spread(self, modulation: Tensor) -> Tensor:
        """Modulations of entities [6, B, K, D] -> of their positions [6, B, N, D]."""
        length, *others = set(self.entities.lengths)
        if others:
            return modulation[:, :, self.entity]
        return modulation[:, :, :, None].expand(-1, -1, -1, length, -1).flatten(2, 3)  # trains faster than the index

    def velocity(
        self,
        x: Tensor,
        where: slice,
        modulations: list[Tensor],
        mask: Tensor | None = None,
        cache: Tensor | None = None,
        words: Words | None = None,
    ) -> Tensor:
        """Velocities [R, n, C] of the positions `where` of the sequence.

        Args:
            x: [R, n, C].
            modulations: of each block [6, R, n or 1, D].
            mask: [1, 1, n, n] bool, what each position sees; all of them by default.
            cache: [layers, 2, R, N, H, D/H], filled up to the forward pass, which writes its own part.
            words: of R captions.
        """
        freqs_cis = self.freqs_cis[None, where, None]
        x = self.z_proj_ln(self.z_proj(x) + self.encoder_pos_embed_learned[:, where])
        for index, block in enumerate(self.blocks):
            if index == len(self.encoder_blocks):
                x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, where]
            cached = None if cache is None else cache[index, ..., : where.stop, :, :]
            caption = None if words is None else (*words.keys_values[index], words.mask)
            x = block(x, modulations[index], freqs_cis, mask, cached, caption)
        return self.pred(self.decoder_norm(x))

    def forward(
        self, x: Tensor, times: Tensor, cond: Tensor, dropped: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """All entities at once, each of which sees itself and those before, with their noise.

        Args:
            x: [B, N, C], each entity at a time of its own.
            times: [B, K] in [0, 1].
            cond, dropped: classes, see `condition`; or states of captions, where `mask` belongs to them: see `read`.

        Returns:
            [B, N, C].
        """
        words = None if mask is None else self.read(cond, mask)
        condition = self.condition(cond if words is None else words, dropped)[:, None]
        modulations = [self._spread(part) for part in self.modulations(condition, timesteps_of(times))]
        visible = (self.entity[None] <= self.entity[:, None])[None, None]
        return self.velocity(x, slice(0, len(self.entity)), modulations, visible, words=words)


def timesteps_of(times: Tensor) -> Tensor:
    """Times in [0, 1] -> integers; the product is float32's, as published, so that 0.04 is 40."""
    return (times.float() * 1000).long()


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without the tables that are computed anew."""
    return {key: value for key, value in state.items() if key != "mask" and ".rope." not in key}


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class XARSession:
    """An `XAR` bound to the conditions of B images, and what it has seen of them.

    Args:
        condition: class ids [B]; or captions, with (`guided`) as many empty ones after them.
        times: those at which the network will be asked, in [0, 1]; what depends on them alone is computed here, once for all
            entities.
        guided: with an unguided half.
    """

    def __init__(self, model: XAR, cond: Tensor | Words, times: list[float], guided: bool):
        self.model, self.guided = model, guided
        self.words = cond if isinstance(cond, Words) else None
        condition = model.condition(cond)
        if guided and self.words is None:
            uncond = model.condition(cond, torch.ones(len(cond), dtype=torch.bool, device=cond.device))
            condition = torch.cat([condition, uncond])
        steps = timesteps_of(torch.tensor(sorted({*times, 0.0})))
        self.steps = {int(step): index for index, step in enumerate(steps)}
        rows, self.rows = condition.unique(dim=0, return_inverse=True)  # images with the same condition share theirs
        self.modulations = model.modulations(rows, steps.to(rows.device)[:, None].expand(-1, len(rows)))
        blocks, heads = len(self.modulations), model.config.heads
        shape = blocks, 2, len(condition), len(model.entity), heads, model.config.dim // heads
        self.cache = torch.zeros(shape, dtype=condition.dtype, device=condition.device)
        self.bounds = [0, *accumulate(model.entities.lengths)]

    def velocity(self, entity: int, x: Tensor, time: float, guided: bool) -> tuple[Tensor, Tensor | None]:
        """Velocities of an entity [B, T, C] whose forerunners are finished, with the condition and (`guided`) without."""
        rows = len(self.rows) if guided or not self.guided else len(x)
        x = torch.cat([x, x]) if guided else x
        step = self.steps[int(timesteps_of(torch.tensor(time)))]
        modulations = [part[:, step, self.rows[:rows], None] for part in self.modulations]
        where = slice(self.bounds[entity], self.bounds[entity + 1])
        words, cache = None if self.words is None else self.words[:rows], self.cache[:, :, :rows]
        velocity = self.model.velocity(x.to(self.cache.dtype), where, modulations, cache=cache, words=words).float()
        return tuple(velocity.chunk(2)) if guided else (velocity, None)

    def finish(self, entity: int, x: Tensor) -> None:
        """Keep the finished entity [B, T, C] for those that follow."""
        self.velocity(entity, x, 0.0, self.guided)
