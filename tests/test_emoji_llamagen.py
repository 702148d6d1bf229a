"""The shipped LlamaGen: its weights do what weights.md says of them."""

import pytest
import torch

import argen
from argen.eval.judge import evaluate, read_prompts


@pytest.fixture(scope="module")
def shipped():
    pipe = argen.load("argen/emoji-llamagen")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_judge_recognises_the_prompts(shipped):
    judge = argen.load("argen/emoji-judge")
    truths = [truth for truth in read_prompts() if truth.kind == "single"][:16]
    generators = [torch.Generator().manual_seed(index) for index in range(len(truths))]
    images = shipped([truth.prompt for truth in truths], generator=generators, output_type="np").images
    scores = evaluate(judge, list((255 * images).round().astype("uint8")), truths)
    assert scores["single: identity"]["value"] >= 0.5  # of 666 names; chance is 0.0075


def test_a_group_is_drawn_as_a_class(shipped):
    generators = [torch.Generator().manual_seed(index) for index in range(8)]
    food = shipped("class:food-drink", 8, generator=generators, output_type="latent").tokens
    flags = shipped("class:flags", 8, generator=generators, output_type="latent").tokens
    assert len(food.unique(dim=0)) == 8
    assert (food != flags).float().mean() > 0.5
    with pytest.raises(ValueError, match="no class is named 'fod-drink': did you mean food-drink"):
        shipped("class:fod-drink")


def test_fewer_forward_passes_match_sequential_images(shipped):
    kwargs = {"prompt": ["a red apple", "two green pears"], "output_type": "latent"}
    generators = lambda: [torch.Generator().manual_seed(index) for index in range(2)]  # noqa: E731
    sequential = shipped(**kwargs, generator=generators(), sampler="sequential")
    fewer = shipped(**kwargs, generator=generators(), sampler="jacobi")
    assert torch.equal(sequential.tokens, fewer.tokens)
    assert fewer.forward_passes <= sequential.forward_passes / 2
