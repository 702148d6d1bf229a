"""What the page's tab of diffusion tools does, without a browser; on a pipeline of random weights."""

import pytest
import torch
from conftest import tiny_pipeline

from argen.diffusion.rece import matrices_of
from argen.ui.tabs import diffusion

ASKED = {"num_inference_steps": 3, "guidance_scale": 4.0, "generator": 0}


@pytest.fixture
def pipe(golden):
    return tiny_pipeline(golden("tome/sdxl_attribute_binding"))


def test_bind_shows_both_images_and_how_far_it_is(pipe):
    prompt = "a white dog and a black bird"
    assert diffusion.parse_bindings(prompt) == "dog=white\nbird=black"
    updates = list(diffusion.bind(pipe, prompt, "dog=white", "merge", ASKED))
    assert [state for *_, state in updates[:3]] == ["before: 33%", "before: 67%", "before: 100%"]
    before, after, state = updates[-1]
    assert before.tobytes() != after.tobytes()
    assert state.startswith("dog <- white; merged: a dog and a black bird")
    with pytest.raises(ValueError, match="expected a line of OBJECT=WORDS"):
        next(diffusion.bind(pipe, prompt, "dog", "merge", ASKED))


def test_erase_leaves_the_pipeline_as_it_was(pipe):
    weights = {name: weight.clone() for name, weight in matrices_of(pipe.unet).items()}
    *_, (before, after, state) = diffusion.erase(pipe, "somewhere", "teapot, dog", "object", "", "a teapot", ASKED)
    assert before.tobytes() != after.tobytes()
    assert "RECE 1" in state
    work = diffusion.erase(pipe, "somewhere", "teapot", "object", "", "a teapot", ASKED)
    while not next(work)[2].startswith("after"):
        pass
    assert any(not torch.equal(weight, weights[name]) for name, weight in matrices_of(pipe.unet).items())
    work.close()  # stopped while the second picture is made
    assert all(torch.equal(weight, weights[name]) for name, weight in matrices_of(pipe.unet).items())


def test_a_call_that_is_left_ends(pipe):
    steps = []
    pipe.unet.register_forward_hook(lambda *_: steps.append(1))
    work = diffusion.draw_steps(pipe, "a dog", ASKED | {"num_inference_steps": 50})
    next(work)
    work.close()
    assert len(steps) < 50


def test_an_error_inside_a_call_comes_out(pipe):
    with pytest.raises(ValueError, match="divisible by 8"):
        list(diffusion.draw_steps(pipe, "a dog", ASKED | {"height": 7}))
