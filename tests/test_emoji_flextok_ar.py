"""The shipped generator of ordered tokens: its weights do what weights.md says of them."""

import pytest
import torch

import argen
from argen.eval.judge import evaluate, read_prompts


@pytest.fixture(scope="module")
def shipped():
    pipe = argen.load("argen/emoji-flextok-ar")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


@pytest.mark.parametrize(("tokens", "least"), [(64, 0.35), (8, 0.15)])
def test_the_judge_recognises_the_prompts(shipped, tokens, least):
    truths = [truth for truth in read_prompts() if truth.kind == "single"][:16]
    kwargs = {"generator": generators(16), "output_type": "np", "num_tokens": tokens}
    images = shipped([truth.prompt for truth in truths], **kwargs).images
    scores = evaluate(argen.load("argen/emoji-judge"), list((255 * images).round().astype("uint8")), truths)
    assert scores["single: identity"]["value"] >= least  # of 666 names; chance is 0.0075


def test_an_image_of_few_tokens_is_the_beginning_of_one_of_many(shipped):
    kwargs = {"prompt": ["a pizza", "class:flags"], "output_type": "latent"}
    few, many = (shipped(**kwargs, generator=generators(2), num_tokens=count).tokens for count in (8, 32))
    assert few.shape == (2, 8)
    assert torch.equal(few, many[:, :8])


def test_a_search_finds_what_fits_better_than_draws(shipped):
    prompt = "a pizza, noto style"
    drawn = shipped(prompt, 8, generator=generators(8), num_tokens=16)
    *_, result = shipped.search(prompt, 2, 8, 16, torch.Generator().manual_seed(0))
    assert result.scores[0] > sum(shipped.rank(prompt, drawn.images)) / 8
