"""Sessions of the samplers: those of the decoders with cross-attention, which share one, and of LlamaGen.

Letters in shape comments: B images, n tokens of a forward pass, m keys, T text tokens, D width, H heads, K codes, R cache
rows (2B under guidance: with the prompt, then without).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from argen.models.kv_cache import KeyValueCache
from argen.models.llamagen import LlamaGen, ahead_scores


def decoding(
    network: Any, decode: Callable[..., Any], layers: int, capacity: int, before: int = 1
) -> tuple[Callable[..., Any], KeyValueCache]:
    """The pass that a session calls, `decode` or, where it fits, what was compiled of it (`argen.models.compiled`), and a cache for it."""
    if network.compiled is None or not network.compiled.fits():
        return decode, KeyValueCache(layers, capacity, before)
    return network.compiled, network.compiled.cache(layers, capacity, before)


KeysValues = list[tuple[Tensor, Tensor]]  # of each layer's cross-attention, each [R, T, H, D/H]


class CrossAttentionDecoder(Protocol):
    """A causal decoder that reads its prompt through cross-attention, as `DecoderSession` drives it."""

    length: int  # cells of a picture
    depth: int  # layers
    compiled: Any  # `argen.models.compiled.CompiledStep` of `decode`, or None

    def project_text(self, encoded: Tensor) -> KeysValues: ...

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        text_keys_values: KeysValues,
        text_mask: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor: ...


class DecoderSession:
    """`samplers.steps.Session` of a `CrossAttentionDecoder`, bound to the prompts of B images.

    Args:
        encoded, text_mask: [R, T, D] and [R, T] bool (true: a token). Under guidance R = 2B: the prompts of all
            pictures, then the empty prompt as often; else R = B.
    """

    def __init__(self, decoder: CrossAttentionDecoder, encoded: Tensor, text_mask: Tensor, guided: bool):
        self.decoder, self.length, self.guided = decoder, decoder.length, guided
        self.columns = int(decoder.length**0.5)
        self.text_mask = text_mask
        self.text_keys_values = decoder.project_text(encoded)
        self.decode, self.cache = decoding(decoder, decoder.decode, decoder.depth, decoder.length)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `samplers.steps.Session.forward`."""
        visible = self.cache.visible(positions, mask, seen, self.guided, tokens.device)
        positions = positions.to(tokens.device, non_blocking=True)
        if self.guided:
            tokens = torch.cat([tokens, tokens])
            positions = torch.cat([positions, positions]) if positions.ndim == 2 else positions
        logits = self.decode(tokens, positions, visible, self.text_keys_values, self.text_mask, cache=self.cache)
        return logits.chunk(2) if self.guided else (logits, None)

    def keep(self, nodes: Tensor) -> None:
        """See `samplers.steps.Session.keep`."""
        self.cache.keep(torch.cat([nodes, nodes]) if self.guided and nodes.ndim == 2 else nodes)


def known_ahead(grid: Tensor, guided: bool) -> Tensor | None:
    """Cells of [B, N] ids that are known behind the first that is not (-1): [R, N] bool, or None where there are none."""
    undecided = grid < 0
    known = ~undecided & (undecided.long().cumsum(dim=1) > 0)
    if not known.any():
        return None
    return torch.cat([known, known]) if guided else known


class LlamaGenSession:
    """`samplers.steps.Session` of a `LlamaGen`, bound to the conditions of B images.

    Args:
        embedded, mask: as `LlamaGen.condition` takes them. Under guidance R = 2B: all conditions, then "none" as often.
        control: [J, R, N, D] of every cell of the picture, which then has N cells; without it as many as the grid.
        columns: cells of a row; as many as the grid has, by default.
        drafter: `argen.models.drafter.Drafter` of this model, for the samplers that draft.
        codebook: [K, C], of the picture tokenizer, for those that relax.
        grid: [B, N] ids of an image that is completed, -1 where a cell is to be written: a model that `looks_ahead` sees those behind
            the first of these.

    Attributes:
        prefix: [R, T, D], hidden states of the condition.
        hidden: [R, n, D], those of the last forward pass, as a drafter reads them.
    """

    def __init__(
        self,
        model: LlamaGen,
        embedded: Tensor,
        mask: Tensor,
        guided: bool,
        control: Tensor | None = None,
        columns: int | None = None,
        drafter=None,
        codebook: Tensor | None = None,
        grid: Tensor | None = None,
    ):
        self.model, self.guided, self.control = model, guided, control
        self.drafter, self.codebook = drafter, codebook
        self.columns = columns or model.config.grid
        self.length = model.length if control is None else control.shape[2]
        first = None if control is None else control[:, :, :1]
        self.prefix, self.scores, prefixes = model.condition(embedded, mask, first)
        self.known = known_ahead(grid, guided) if grid is not None and model.config.looks_ahead else None
        if self.known is not None:
            tokens = (torch.cat([grid, grid]) if guided else grid).clamp(min=0)
            prefixes = model.look_ahead(tokens, self.known, self.scores, prefixes)
        before = prefixes[0][0].shape[1]  # slots of the condition, and of cells ahead
        self.decode, self.cache = decoding(model, model.step, model.depth, before + self.length, before)
        self.cache.place(torch.arange(-before, 0), None, guided, embedded.device)
        for index, prefix in enumerate(prefixes):
            self.cache.append(index, *prefix)

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `samplers.steps.Session.forward`; the condition, which is cached already, stands for the start token."""
        parts = []
        if int(positions.min()) < 0:
            parts = [(self.prefix[:, -1:], self.model.output(self.prefix[:, -1:]).float())]
            tokens, positions, mask = tokens[:, 1:], positions[..., 1:], None if mask is None else mask[..., 1:, 1:]
        if tokens.shape[1]:
            visible = self.cache.visible(positions, mask, seen, self.guided, tokens.device)[..., self.cache.before :]
            positions = positions.to(tokens.device, non_blocking=True)
            if self.guided:
                tokens = torch.cat([tokens, tokens])
                positions = torch.cat([positions, positions]) if positions.ndim == 2 else positions
            control = self._ahead(positions)
            scores = self.scores if self.known is None else ahead_scores(self.scores, self.known, positions)
            parts.append(self.decode(tokens, positions, visible, scores, None, control, cache=self.cache))
        self.hidden, logits = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return logits.chunk(2) if self.guided else (logits, None)

    def _ahead(self, positions: Tensor) -> Tensor | None:
        """The control of the cells after `positions`: [J, R, n, D]."""
        if self.control is None:
            return None
        cells = (positions + 1).clamp(max=self.length - 1)
        if cells.ndim == 1:
            return self.control[:, :, cells]
        return self.control[:, torch.arange(len(cells), device=cells.device)[:, None], cells]

    def keep(self, nodes: Tensor) -> None:
        """See `samplers.steps.Session.keep`."""
        self.cache.keep(torch.cat([nodes, nodes]) if self.guided and nodes.ndim == 2 else nodes)
