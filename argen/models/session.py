"""The session of samplers that the decoders with cross-attention share.

Letters in shape comments: B images, n tokens of a forward pass, m keys, T text tokens, D width, H heads, K codes, R cache
rows (2B under guidance: with the prompt, then without).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from argen.models.kv_cache import KeyValueCache


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
