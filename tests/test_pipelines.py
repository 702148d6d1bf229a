"""The pipelines as diffusers' users call them."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image

import argen
from argen.hub.cards import all_cards, ids
from argen.images import open_image
from argen.metadata import differences, fingerprint, save_images
from argen.models.dalle_mini import DalleMiniDecoder, DalleMiniEncoder, text_tokenizer
from argen.pipelines.dalle_mini import DalleMiniPipeline
from argen.pipelines.ranking import distinct_first
from argen.request import Request
from samplers.jacobi import Jacobi
from samplers.steps import Origin
from tokenizers_img.vqgan import VQGANDetokenizer


def generators(seed):
    return torch.Generator().manual_seed(seed)


def test_the_readme_call(pipe):
    out = pipe("a red apple, noto style", num_images_per_prompt=4, guidance_scale=3.0, generator=generators(0))
    assert [image.size for image in out.images] == [(256, 256)] * 4
    assert out.tokens.shape == (4, 64)
    assert out.tokens.min() >= 0
    assert out.scores is None


def test_the_image_is_of_the_prompt(pipe):
    """Of eight things the judge names the one that was asked for, more often than not."""
    prompts = ["a red apple", "a pizza", "a dog face", "a rocket", "a sunflower", "a guitar", "a house", "a red heart"]
    images = pipe(prompts, num_candidates=4, generator=generators(0)).images
    text, embeds = pipe.text_image_encoder.embed(prompts, images)
    right = (embeds @ text.T).argmax(dim=1) == torch.arange(len(prompts))
    assert right.sum() >= 6


@pytest.mark.parametrize(("output_type", "kind"), [("np", np.ndarray), ("pt", torch.Tensor), ("latent", torch.Tensor)])
def test_output_types(pipe, output_type, kind):
    images, tokens, *_ = pipe("a pizza", generator=generators(0), output_type=output_type, return_dict=False)
    assert isinstance(images, kind)
    shape = {"np": (1, 256, 256, 3), "pt": (1, 3, 256, 256), "latent": (1, 64)}[output_type]
    assert images.shape == shape
    if output_type != "latent":
        assert images.min() >= 0
        assert images.max() <= 1


def test_callback_sees_every_step_and_can_stop(pipe):
    seen = []

    def callback(pipe, step, decided, state):
        seen.append((step, decided, int((state["tokens"] >= 0).sum())))
        pipe._interrupt = decided == 20

    out = pipe("a pizza", generator=generators(0), sampler="sequential", callback_on_step_end=callback)
    assert seen == [(i, i + 1, i + 1) for i in range(20)]
    assert (out.tokens >= 0).sum() == 20
    assert np.unique(np.asarray(out.images[0])[128:]) == [230]  # what is not written is grey


def test_candidates_are_ranked(pipe):
    every = pipe("a rocket", num_images_per_prompt=8, num_candidates=8, generator=generators(0))
    assert every.scores == sorted(every.scores, reverse=True)
    best = pipe("a rocket", num_images_per_prompt=2, num_candidates=8, generator=generators(0))
    assert torch.equal(best.tokens, every.tokens[:2])
    assert best.scores == pytest.approx(every.scores[:2])
    assert pipe.rank("a rocket", best.images) == pytest.approx(best.scores, abs=1e-5)


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = argen.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again("a bus", generator=generators(4)).tokens, pipe("a bus", generator=generators(4)).tokens)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a" * 10_000}, "10,000 characters: expected at most"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "num_images_per_prompt": 3, "num_candidates": 2}, "at least as many candidates"),
        ({"prompt": "a", "output_type": "jpg"}, "unknown output_type 'jpg'"),
        ({"prompt": "a", "tokens": torch.zeros(1, 5, dtype=torch.int64)}, r"tokens are \[1, 5\]: expected \[1, 64\]"),
        ({"prompt": "a", "generator": [generators(0), generators(1)]}, "got 2 generators for 1 image"),
        ({"prompt": "a", "temperature": -0.5}, "temperature is -0.5"),
    ],
)
def test_bad_calls(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)


def test_a_long_prompt_is_said_to_be_cut(pipe, caplog):
    pipe("a red apple " * 30, generator=generators(0), literal=True)
    assert "the rest of it is not read" in caplog.text


@pytest.fixture
def dalle(golden):
    """The whole DALL-E pipeline with the golden's tiny networks and a tiny detokenizer."""
    config = golden("min_dalle/tiny").config
    size = {"dim": config["dim"], "depth": config["layers"], "heads": config["heads"], "mlp_dim": config["glu"]}
    torch.manual_seed(0)
    pipe = DalleMiniPipeline(
        tokenizer=text_tokenizer(GOLDEN / "min_dalle_text/vocab.json", GOLDEN / "min_dalle_text/merges.txt"),
        encoder=DalleMiniEncoder(**size, vocab_size=200),
        transformer=DalleMiniDecoder(**size, image_vocab=64, codes=64, length=16),
        image_tokenizer=VQGANDetokenizer(n_embed=64, embed_dim=32, channels=(32, 32, 64), layers_per_block=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_dalle_mini_draws_saves_and_loads(dalle, tmp_path):
    out = dalle("a red apple", num_images_per_prompt=2, guidance_scale=16.0, generator=generators(0))
    assert [image.size for image in out.images] == [(16, 16)] * 2
    assert out.tokens.max() < 64
    dalle.save_pretrained(tmp_path / "dalle")
    again = argen.load(tmp_path / "dalle")
    again.set_progress_bar_config(disable=True)
    same = again("a red apple", num_images_per_prompt=2, guidance_scale=16.0, generator=generators(0))
    assert torch.equal(same.tokens, out.tokens)


def test_dalle_mini_says_that_it_cannot_rank(dalle):
    with pytest.raises(ValueError, match="has no image encoder to rank candidates with"):
        dalle("a red apple", num_candidates=3)


def test_the_map_of_cells_shows_how_each_was_written():
    from argen.ui.context import TINTS, origin_overlay

    origins = ((Origin.DRAWN, Origin.ACCEPTED), (Origin.RELAXED, Origin.GIVEN))
    overlay = np.asarray(origin_overlay(Image.new("RGB", (128, 128), "white"), origins))
    half = len(overlay) // 2
    assert (overlay[:half, :half] == 255).all()
    assert (overlay[half:, half:] == 255).all()
    for place, origin in (((0, half), Origin.ACCEPTED), ((half, 0), Origin.RELAXED)):
        red, green, blue, alpha = TINTS[origin]
        wanted = [255 + (value - 255) * alpha / 255 for value in (red, green, blue)]
        assert np.abs(overlay[place].astype(float) - wanted).max() < 2


def test_a_job_knows_what_its_sampler_did(pipe):
    *_, job = pipe.run(Request("a rocket", num_images=2, num_candidates=3, sampler="gsd"))
    assert not job.lossless
    assert job.origins.shape == job.tokens.shape == (2, 8, 8)
    assert job.tokens_per_step == pytest.approx(64 / job.forward_passes)
    *_, sequential = pipe.run(Request("a rocket", sampler="sequential"))
    assert sequential.lossless
    assert sequential.origins is None


@pytest.mark.parametrize("name", [name for name in ids("generator") if all_cards()[name].repo is None])
def test_every_shipped_generator_tells_how_long_a_prompt_is(name):
    words, most = argen.load(name).text_tokens("a pizza")
    assert 2 <= words < most


def test_one_generator_is_a_list_of_one(pipe):
    one = pipe("a cat", generator=torch.Generator().manual_seed(3)).tokens
    assert torch.equal(one, pipe("a cat", generator=[torch.Generator().manual_seed(3)]).tokens)
    several = pipe("a cat", generator=torch.Generator().manual_seed(3), num_images_per_prompt=3).tokens
    assert torch.equal(several[:1], one)
    assert len({tuple(row) for row in several.tolist()}) == 3
    *_, job = pipe.run(Request("a cat", seed=3))  # as its PNG says
    assert torch.equal(job.tokens.flatten(1), one)


def test_candidates_that_are_equal_are_kept_last():
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4], [1, 2], [5, 6]])
    assert distinct_first([1, 0, 2, 3, 4], tokens) == [1, 2, 4, 0, 3]


def test_what_a_callback_returns_is_gone_on_with(pipe):
    seen = []

    def fixed(pipe, step, decided, kwargs):
        seen.append(step)
        if step == 4:
            tokens = kwargs["tokens"].clone()
            tokens[:, 60:] = 7  # written before their turn
            return {"tokens": tokens}
        return None

    generator = [torch.Generator().manual_seed(0)]
    out = pipe("a pizza", generator=generator, sampler="sequential", callback_on_step_end=fixed)
    assert (out.tokens[0, 60:] == 7).all()
    sequential = pipe("a pizza", generator=[torch.Generator().manual_seed(0)], sampler="sequential")
    assert torch.equal(out.tokens[0, :60], sequential.tokens[0, :60])  # the same noise in each cell
    assert seen == list(range(len(seen)))
    assert len(seen) < 64


def test_an_image_knows_what_made_it(pipe, tmp_path):
    *_, job = pipe.run(Request("a pizza", seed=3))
    save_images(list(zip(job.images, job.requests, strict=True)), [tmp_path / "a.png"])
    assert differences(tmp_path / "a.png", pipe) is None
    before, made_by = fingerprint(pipe), json.loads(open_image(tmp_path / "a.png").info["argen version"])
    assert made_by == {"argen": argen.__version__, "weights": before, "dtype": "float32"}
    weight = pipe.transformer.embed_tokens.weight
    with torch.no_grad():
        weight.mul_(2)
        try:
            assert "other weights" in differences(tmp_path / "a.png", pipe)
        finally:
            weight.div_(2)
    assert fingerprint(pipe) == before


def test_weights_of_any_size_have_a_fingerprint():
    network = torch.nn.Module()
    network.register_buffer("large", torch.zeros(1).expand(52_428_800))  # whose last place float32 rounds up
    assert len(fingerprint(network)) == 16


def test_what_other_pipelines_take_is_refused_with_what_to_use(pipe):
    for name, message in (
        ("negative_prompt", "guidance_scale"),
        ("height", "size="),
        ("num_inference_steps", "steps=40"),
    ):
        with pytest.raises(ValueError, match=f"{name} is not an argument of PartiPipeline: .*{message}"):
            pipe("a pizza", **{name: 1})
    with pytest.raises(ValueError, match="colour is not an argument"):
        pipe("a pizza", colour="red")


def test_a_sampler_with_its_settings_is_a_text(pipe):
    typed = pipe("a pizza", generator=generators(0), sampler="jacobi:window=4", output_type="latent")
    direct = pipe("a pizza", generator=generators(0), sampler=Jacobi(4), output_type="latent")
    assert torch.equal(typed.tokens, direct.tokens)
    assert typed.forward_passes == direct.forward_passes
    with pytest.raises(ValueError, match="window is 0"):
        pipe("a pizza", sampler="jacobi:window=0")
