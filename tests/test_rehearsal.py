"""The files of benchmarks/rehearsal.py: they have the published names and shapes, and are what argen reads."""

import sys

import pytest
import torch
from conftest import published_keys

from argen.hub.cards import all_cards
from tokenizers_img.checkpoint import read_state_dict
from tokenizers_img.flextok import checkpoint
from tokenizers_img.llamagen_vq import LlamaGenVQ


@pytest.fixture
def random_weights(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import random_weights

    yield random_weights
    sys.modules.pop("random_weights")


SMALL = {
    "norm.weight": ([30], torch.float32),
    "layer.weight": ([30, 20], torch.float16),
    "layer.bias": ([30], torch.float32),
    "position_ids": ([1, 5], torch.int64),
}


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_random_numbers_are_read_back(random_weights, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        random_weights.write_torch(path, SMALL, "model")
    else:
        random_weights.write_safetensors(path, SMALL)
    state = read_state_dict(path)
    assert {name: (list(value.shape), value.dtype) for name, value in state.items()} == SMALL
    assert 0.01 < state["layer.weight"].float().std() < 0.03
    assert (state["norm.weight"] == 1).all()
    assert (state["layer.bias"] == 0).all()
    assert state["position_ids"].tolist() == [[0, 1, 2, 3, 4]]


def test_a_made_file_is_loaded_as_the_published_one(random_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(random_weights, "fill", lambda *args: None)  # holes take no space on the disk
    random_weights.make("FoundationVision/LlamaGen:vq_ds16_c2i", tmp_path)
    path = next(tmp_path.glob("hub/models--FoundationVision--LlamaGen/snapshots/*/vq_ds16_c2i.pt"))
    keys = {name: list(value.shape) for name, value in read_state_dict(path).items()}
    assert keys == published_keys("llamagen")["vq_ds16_c2i"]
    assert LlamaGenVQ.from_original(path).config.n_embed == 16384


def test_every_published_id_can_be_made(random_weights, tmp_path, monkeypatch):
    written = {}

    def write(path, tensors, *args):
        path.touch()
        written[path.name] = {name: shape for name, (shape, _) in tensors.items()}

    monkeypatch.setattr(random_weights, "write_safetensors", write)
    monkeypatch.setattr(random_weights, "write_torch", write)
    for card in all_cards().values():
        if card.repo is not None:
            random_weights.make(card.id, tmp_path)
    assert written["xAR-H.pth"] == published_keys("xar")["xAR-H"]
    assert written["canny_MR.safetensors"] == published_keys("controlar")["canny_MR"]
    config = checkpoint.read_config(next(tmp_path.glob("hub/*flextok_d18_d28_dfn/snapshots/*")))
    sizes = checkpoint.sizes_of(config)
    assert (sizes["encoder_dim"], sizes["decoder_dim"], sizes["decoder_depth"]) == (1152, 1792, 28)
    with pytest.raises(ValueError, match="argen/emoji-parti ships with argen: choose one of the published ids"):
        random_weights.make("argen/emoji-parti", tmp_path)
