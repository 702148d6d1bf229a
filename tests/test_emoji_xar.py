"""The shipped xAR: its weights do what weights.md says of them."""

import pytest
import torch

import argen
from argen.eval.judge import evaluate, read_prompts


@pytest.fixture(scope="module")
def shipped():
    pipe = argen.load("argen/emoji-xar")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


def test_the_judge_recognises_the_prompts(shipped):
    truths = [truth for truth in read_prompts() if truth.kind == "single"][:16]
    images = shipped([truth.prompt for truth in truths], generator=generators(16), output_type="np").images
    scores = evaluate(argen.load("argen/emoji-judge"), list((255 * images).round().astype("uint8")), truths)
    assert scores["single: identity"]["value"] >= 0.15  # of 666 names; chance is 0.0075


def test_a_group_is_drawn_as_a_class(shipped):
    food = shipped("class:food-drink", 4, generator=generators(4), output_type="latent").tokens
    flags = shipped("class:flags", 4, generator=generators(4), output_type="latent").tokens
    assert (food - flags).flatten(1).norm(dim=1).min() > 1
    with pytest.raises(ValueError, match="no class is named 'fod-drink': did you mean food-drink"):
        shipped("class:fod-drink")


def test_the_words_decide(shipped):
    """The same noise, and other words: red pixels for "red", blue ones for "blue"."""
    kwargs = {"generator": generators(2), "output_type": "pt"}
    images = shipped(["one red apple on a white background", "one blue apple on a white background"], **kwargs).images
    red, blue = (images[:, 0] - images[:, 2]).mean(dim=(1, 2)).tolist()
    assert red > blue
