"""The EAGLE drafter: one layer that guesses the target's next hidden state from the last one and the token that followed.

Papers: EAGLE (arXiv 2401.15077); LANTERN (arXiv 2410.03355), whose drafters for LlamaGen this file loads
(``jadohu/llamagen_drafter``, ``jadohu/llamagen2_drafter``; no licence is stated).

As in `argen.models.llamagen` the condition has no rotation, so it is kept as one cache slot.

Letters in shape comments: R rows (2B under guidance: with the condition, then without), T condition positions, n picture
tokens of a forward pass, D width, H heads, K codes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from argen.models.kv_cache import KeyValueCache
from argen.models.layers import Linear, causal_mask, check_heads, grid_places, rotary_table, rotate, split_heads
from argen.models.session import LlamaGenSession
from samplers.trees import of_images
from tokenizers_img.attention import DispatchedAttention
from tokenizers_img.checkpoint import load_strict, read_state_dict


class Attention(DispatchedAttention):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = check_heads(dim, heads)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, Linear(dim, dim, bias=False))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(dim, hidden, bias=False)
        self.up_proj = Linear(dim, hidden, bias=False)
        self.down_proj = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Without a norm before its attention."""

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(dim, heads), FeedForward(dim, hidden)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=1e-6)

    def slot(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value [R, 1, H, D/H] of condition positions [R, T - 1, D] as a whole."""
        value = split_heads(self.self_attn.v_proj(prefix).mean(dim=1, keepdim=True), self.self_attn.heads)
        return torch.zeros_like(value), value

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, stored) -> Tensor:
        """x [R, n, D]; `stored` takes keys and values [R, n, H, D/H] and gives all that the mask [R or 1, 1, n, m] is for."""
        part = self.self_attn
        query, key, value = (split_heads(project(x), part.heads) for project in (part.q_proj, part.k_proj, part.v_proj))
        key, value = stored(rotate(key, freqs_cis), value)
        attended = part.attend(rotate(query, freqs_cis), key, value, mask)
        x = x + part.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(ModelMixin, ConfigMixin):
    """Hidden states of the target and the tokens that followed -> guesses of its next hidden states.

    Args:
        n_embed: K, the picture tokenizer's vocabulary.
        grid: side of the square token grid.
        dim, heads: of the target.
        hidden: width of the feed-forward layer.
    """

    @register_to_config
    def __init__(self, n_embed: int, grid: int, dim: int, heads: int, hidden: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(n_embed, dim)
        self.fc = Linear(2 * dim, dim)
        self.layers = nn.ModuleList([Layer(dim, heads, hidden)])
        self.length = grid * grid
        self.register_buffer("freqs_cis", rotary_table(dim // heads, grid_places(grid)), persistent=False)

    @classmethod
    def from_original(cls, path: str | Path, grid: int, heads: int = 20) -> "Drafter":
        """Load a published ``pytorch_model.bin``: grid 16 and 20 heads for llamagen_drafter, 32 and 20 for llamagen2_drafter."""
        state = read_state_dict(path)
        (codes, dim), hidden = state["embed_tokens.weight"].shape, len(state["layers.0.mlp.up_proj.weight"])
        return load_strict(cls(codes, grid, dim, heads, hidden), state, source=path)

    def begin(self, target: LlamaGenSession) -> "DraftSession":
        """Draft for the pictures of a session."""
        return DraftSession(self, target)

    def join(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states [R, n, D] and the tokens [R, n] that followed them -> what the layer reads."""
        return self.fc(torch.cat([self.embed_tokens(tokens), hidden], dim=-1))

    def prefix(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, T, D] of the condition, all but the last of which count, with token 0 -> what the layer reads."""
        hidden = hidden[:, :-1]
        return self.join(hidden, torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device))

    def angles(self, cells: Tensor) -> Tensor:
        """Rotation of tokens at `cells` [n] or [R, n]; those behind the picture count as its last."""
        cells = cells.clamp(max=self.length - 1)
        return self.freqs_cis[cells if cells.ndim == 2 else cells[None]][:, :, None]

    def forward(self, condition: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Teacher forcing: hidden states of the condition [R, T, D]; those [R, n, D] that predicted tokens [R, n] -> guesses
        [R, n, D] of the hidden states that predict the tokens after them."""
        layer, n = self.layers[0], tokens.shape[1]
        slot, mask = layer.slot(self.prefix(condition)), causal_mask(n, n, tokens.device)
        freqs_cis = self.angles(torch.arange(n, device=tokens.device))

        def stored(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat([slot[0], key], dim=1), torch.cat([slot[1], value], dim=1)

        return layer(
            self.join(hidden, tokens), freqs_cis, self._mask(mask, condition.shape[1] - 1, hidden.dtype), stored
        )

    @staticmethod
    def _mask(visible: Tensor, weight: int, dtype: torch.dtype) -> Tensor:
        """[.., n, m] bool of picture tokens -> additive, with the condition's slot before it, that stands for `weight` keys."""
        mask = torch.zeros(visible.shape, device=visible.device).masked_fill(~visible, -torch.inf)
        return F.pad(mask, (1, 0), value=float(torch.tensor(float(weight)).log())).to(dtype)


class DraftSession:
    """`samplers.trees.Drafting` of a `Drafter`, bound to the pictures of a target's session.

    Args:
        target: fresh, or at its first token.
    """

    def __init__(self, drafter: Drafter, target: LlamaGenSession):
        if drafter.config.dim != target.model.config.dim or drafter.config.n_embed != target.model.config.n_embed:
            drafter_sizes, target_sizes = ((part.config.dim, part.config.n_embed) for part in (drafter, target.model))
            raise ValueError(
                f"the drafter is {drafter_sizes[0]} wide with {drafter_sizes[1]} codes, the generator "
                f"{target_sizes[0]} with {target_sizes[1]}: expected a drafter that was trained for this generator"
            )
        self.drafter, self.target, self.guided = drafter, target, target.guided
        self.weight = target.prefix.shape[1] - 1
        self.cache = KeyValueCache(1, drafter.length)
        self.cache.place(torch.tensor([-1]), None, self.guided, target.prefix.device)
        self.cache.append(0, *drafter.layers[0].slot(drafter.prefix(target.prefix)))

    def read(self, tokens: Tensor, cells: Tensor, nodes: Tensor, ahead: Tensor) -> Tensor:
        """See `samplers.trees.Drafting.read`."""
        led = of_images(self.target.hidden, nodes)
        guesses = self._forward(tokens, cells, led, self.cache.place(cells, None, self.guided, tokens.device))
        return of_images(guesses, ahead[:, None] - 1)

    def guess(self, tokens: Tensor, cells: Tensor, hidden: Tensor, tree: Tensor, root: Tensor) -> Tensor:
        """See `samplers.trees.Drafting.guess`."""
        return self._forward(tokens, cells, hidden, self.cache.place(cells, tree, self.guided, tokens.device, root))

    def _forward(self, tokens: Tensor, cells: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
        cells = cells.to(tokens.device)
        if self.guided:
            tokens, cells = torch.cat([tokens, tokens]), torch.cat([cells, cells])
        mask = self.drafter._mask(visible[..., 1:], self.weight, hidden.dtype)
        freqs_cis, joined = self.drafter.angles(cells), self.drafter.join(hidden, tokens)
        return self.drafter.layers[0](joined, freqs_cis, mask, lambda key, value: self.cache.append(0, key, value))

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `samplers.trees.Drafting.logits`."""
        logits = self.target.model.output(hidden).float()
        return logits.chunk(2) if self.guided else (logits, None)

    def observe(self, tokens: Tensor, logits: Tensor, probs: Tensor) -> None:
        """See `samplers.trees.Drafting.observe`: this drafter was trained before."""
