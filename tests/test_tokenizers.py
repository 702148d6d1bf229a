"""Every shipped image tokenizer is an `ImageTokenizer`."""

import pytest
import torch

import argen
from argen.hub.cards import all_cards
from tokenizers_img.base import ImageTokenizer

SHIPPED = [card.id for card in all_cards().values() if card.kind == "tokenizer" and card.ships]


@pytest.mark.parametrize("name", SHIPPED)
@torch.no_grad()
def test_a_shipped_tokenizer_keeps_the_protocol(name):
    tokenizer = argen.load(name)
    assert isinstance(tokenizer, ImageTokenizer)
    size, config = tokenizer.config.image_size, tokenizer.config
    tokens = tokenizer.encode(torch.full((2, 3, size, size), 0.5))
    assert ("n_embed" in config) != ("latent_channels" in config)
    if "n_embed" in config:
        assert tokens.ndim == 2
        assert tokens.dtype == torch.int64
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < config.n_embed
    else:
        assert tokens.shape[:2] == (2, config.latent_channels)
    assert tokenizer.decode(tokens[:1]).shape[:2] == (1, 3)
