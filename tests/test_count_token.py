"""CLIP-Count and the optimised count token against the official code's numbers."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes, tiny_pipeline
from torch import nn
from transformers import CLIPConfig, CLIPModel

import argen
from argen.cli.main import main
from argen.diffusion.base import unit_noise
from argen.diffusion.count_token import CountToken, centre_crop
from argen.diffusion.model_settings import counters, counting
from argen.hub.loading import load_diffusion
from argen.images import open_image
from argen.models.clip_count import FROZEN, SCALE, CLIPCount
from tokenizers_img.checkpoint import load_strict
from tokenizers_img.pixels import from_pil


def small(case) -> CLIPCount:
    tiny = case.config["tiny"]
    model = CLIPCount(
        dim=tiny["dim"],
        vision_dim=tiny["vwidth"],
        vision_depth=tiny["vlayers"],
        length=tiny["ctx"],
        vocab=tiny["vocab"],
        text_heads=tiny["theads"],
        text_depth=tiny["tlayers"],
        heads=tiny["fheads"],
        hidden=tiny["mlp_ratio"] * tiny["dim"],
        groups=tiny["groups"],
        context=tiny["coop"],
        prompts=tiny["vptw"],
        prompt_depth=tiny["vptd"],
    )
    state = {key.removeprefix("model."): value for key, value in case.weights.items()}
    return load_strict(model, state, source="golden").eval()


def test_clip_count(golden):
    case = golden("count_token/clip_count")
    model, io, close = small(case), case.io, {"atol": 1e-4, "rtol": 1e-4}
    pixels = F.interpolate(io["image56_uint8"].float() / 255, (224, 224), mode="bilinear").requires_grad_()
    torch.testing.assert_close(model.encode_text(io["text_ids"]), io["text_embedding"], **close)
    density = model(pixels, io["text_ids"])
    torch.testing.assert_close(density[:, ::4, ::4], io["density_stride4"], **close)
    counts = density.sum(dim=(1, 2)) / SCALE
    torch.testing.assert_close(counts, io["count_scale60"], **close)
    counts[0].backward()
    torch.testing.assert_close(pixels.grad[:1, :, ::8, ::8], io["grad_count_wrt_image_stride8"], **close)


def test_every_published_key_has_its_place():
    published = published_keys("count_token")
    with torch.device("meta"):
        key_shapes = shapes(CLIPCount())
    trained_shapes = {f"model.{key}": shape for key, shape in key_shapes.items() if not key.startswith(FROZEN)}
    assert trained_shapes == published["clip_count"]
    scalars = ("input_resolution", "context_length", "vocab_size")
    clip = {key: shape for key, shape in published["openai_clip_vit_b16"].items() if key not in scalars}
    assert {key.removeprefix("clip."): shape for key, shape in key_shapes.items() if key.startswith("clip.")} == clip


class StandIn(nn.Module):
    """The counter of the golden cases."""

    def __init__(self, weights):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(4, 1, 1)
        self.load_state_dict({key[8:]: value for key, value in weights.items() if key.startswith("counter.")})
        self.requires_grad_(False)

    def forward(self, pixels, name):
        return F.interpolate(self.c2(F.gelu(self.c1(pixels))).sigmoid(), (384, 384), mode="bilinear")[:, 0]


@pytest.mark.parametrize("name", ["token_dynamic_scale", "token_static_scale"])
def test_a_token_is_optimised_as_by_the_authors(golden, name):
    case = golden(f"count_token/{name}")
    io, config, pipe = case.io, case.config, tiny_pipeline(case)
    official, labels = config["official_parameters"], config["labels"]
    clip = CLIPModel(CLIPConfig(**config["components"]["clip"])).eval().requires_grad_(False)
    clip.load_state_dict({key[5:]: value for key, value in case.weights.items() if key.startswith("clip.")})
    detector_logits = iter(io.get("det_logits", []))

    def detector(image, word):
        assert word == config["clip_class_word"]
        sure, label = next(detector_logits).softmax(dim=-1)[:, :-1].max(dim=-1)
        expected = label == labels.index(config["detector_class"])
        return int((expected & (sure > official["yolo_threshold"])).sum())

    def relevance(pixels, word):
        parts = clip.get_image_features(pixels), clip.get_text_features(io["clip_text_ids"])
        return F.cosine_similarity(*(getattr(part, "pooler_output", part) for part in parts))

    token = CountToken(pipe, StandIn(case.weights), detector if "det_logits" in io else None, relevance)
    assert token.id == io["placeholder_id"]
    assert token.prompt(official["clazz"], official["amount"]) == config["prompt"]
    rows = pipe.text_encoder.get_input_embeddings().weight
    pipe.scheduler.set_timesteps(1)
    kwargs = {
        "latents": io["latents_scaled"] / pipe.scheduler.init_noise_sigma,
        "steps": official["num_train_epochs"],
        "learning_rate": official["lr"],
        "relevance_scale": official["_lambda"],
        "scale": official["scale"],
        "patience": official["early_stopping"],
    }
    done, saved = 0, []
    for step in token.optimise(official["clazz"], official["amount"], height=64, width=64, **kwargs):
        at = f"epoch{step.index}."
        close = {"atol": 1e-4, "rtol": 1e-3}
        for ours, theirs in (("loss", "total_loss"), ("count_loss",) * 2, ("count",) * 2, ("relevance", "clip_cosine")):
            torch.testing.assert_close(torch.tensor(getattr(step, ours)), io[at + theirs].squeeze(), **close)
        if f"{at}image" in io:
            torch.testing.assert_close(step.image, io[f"{at}image"], **close)
        if step.best:
            saved.append(step.index)
            torch.testing.assert_close(token.vector, io[f"{at}token_before"], atol=5e-3, rtol=0)
        with torch.no_grad():
            rows *= 1 - official["lr"] * 0.01  # the authors' optimizer has the whole table
        torch.testing.assert_close(rows[config["other_row"]], io[f"{at}other_row_after"])
        done += 1
    assert done == io["epochs_run"]
    if "saved_epochs" in io:
        assert saved == io["saved_epochs"].tolist()
    torch.testing.assert_close(token.vector, io["saved_token"], atol=5e-3, rtol=0)


def searched(numbers, count):
    """A search among images of which a counter says `numbers`, on a shipped pipeline."""
    pipe = load_diffusion("argen/emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    remaining = iter(numbers)
    settings = counters("argen/emoji-sd", "cpu") | {"counter": lambda pixels, things: next(remaining)}
    token = CountToken(pipe, **settings, **counting("argen/emoji-sd", count, steps=1))
    latents = unit_noise(pipe, torch.Generator().manual_seed(0))
    steps = list(token.search("apples", count, latents, steps=len(numbers), learning_rate=0.003))
    return token, latents, steps


def test_the_image_that_is_counted_best_is_kept_be_it_the_original_one():
    token, latents, steps = searched([4.4, 2.0, 9.0], 5)
    assert [step.best for step in steps] == [True, False, False]
    assert torch.equal(token.vector, steps[0].vector)
    drawn = from_pil(token.draw("apples", 5, latents), 128)
    torch.testing.assert_close(drawn, steps[0].image[0], atol=0.01, rtol=0)
    token, _, steps = searched([2.0, 4.2, 3.0], 5)
    assert [step.best for step in steps] == [True, True, False]
    assert torch.equal(token.vector, steps[1].vector)
    assert not torch.equal(steps[0].vector, steps[1].vector)


def test_a_search_ends_with_an_image_that_is_right():
    _, _, steps = searched([5.4, 1.0, 1.0], 5)
    assert len(steps) == 1
    assert steps[0].is_right(5)
    _, _, steps = searched([4.0, 4.9, 1.0], 5)
    assert [step.count for step in steps] == [4.0, 4.9]
    assert steps[-1].best


def test_the_count_is_that_of_the_file(tmp_path, capsys):
    out = tmp_path / "five.png"
    arguments = "--seed", "2", "--iterations", "3", "--json"
    assert main(["count", "five tomatoes", "-o", str(out), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    pixels = from_pil(open_image(out), 128)[None]
    with torch.no_grad():
        assert report["count"] == pytest.approx(argen.load("argen/emoji-counter")(pixels).sum().item(), abs=1e-3)


def test_several_images_share_a_token(golden):
    """Their losses count alike, and the token goes where the mean of them leads."""
    case = golden("count_token/token_static_scale")
    noises = torch.randn(2, *case.io["latents_scaled"].shape[1:], generator=torch.Generator().manual_seed(0))

    def begun(latents):
        token = CountToken(tiny_pipeline(case), StandIn(case.weights), lambda image, word: 3)
        steps = token.optimise("birds", 5, latents, steps=2, height=64, width=64)
        return next(steps), next(steps)

    together, alone = begun(noises), [begun(noise[None]) for noise in noises]
    assert together[0].image.shape == (2, 3, 64, 64)
    assert together[0].detected == (3, 3)
    for name in ("loss", "count", "count_loss"):
        mean = sum(getattr(first, name) for first, _ in alone) / 2
        assert getattr(together[0], name) == pytest.approx(mean, rel=1e-4)
    assert not torch.equal(together[1].image, together[0].image)


def test_a_token_is_an_ordinary_textual_inversion(golden, tmp_path):
    case = golden("count_token/token_static_scale")
    pipe = tiny_pipeline(case)
    token = CountToken(pipe, StandIn(case.weights))
    token.vector = torch.full_like(token.vector, 0.5)
    kwargs = {
        "latents": case.io["latents_scaled"],
        "num_inference_steps": 1,
        "guidance_scale": 0.0,
        "output_type": "pt",
    }
    kwargs |= {"height": 64, "width": 64}
    plain = pipe("a photo of some 7 birds", **kwargs).images
    with token.applied():
        changed = pipe("a photo of some 7 birds", **kwargs).images
    assert not torch.allclose(plain, changed, atol=1e-4)
    assert torch.equal(pipe("a photo of some 7 birds", **kwargs).images, plain)
    token.save(tmp_path / "seven.safetensors", "<seven>", count=7)
    pipe.load_textual_inversion(
        tmp_path / "seven.safetensors", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
    )
    row = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("<seven>")]
    torch.testing.assert_close(row, token.vector)


def test_what_cannot_be_counted_is_refused(golden):
    case = golden("count_token/token_static_scale")
    token = CountToken(tiny_pipeline(case), StandIn(case.weights))
    for count in (0, 26, 2.5):
        with pytest.raises(ValueError, match=f"count is {count}: expected a whole number from 1 to 25"):
            next(token.optimise("birds", count, case.io["latents_scaled"]))
    with pytest.raises(ValueError, match="str cannot count: expected a StableDiffusionPipeline"):
        CountToken("pipe", StandIn(case.weights))
    with pytest.raises(ValueError, match="the placeholder 'quite some' has"):
        CountToken(tiny_pipeline(case), StandIn(case.weights), placeholder="quite some")


def test_counters_see_the_middle_square():
    wide = torch.rand(1, 3, 64, 128)
    assert centre_crop(wide).shape == (1, 3, 224, 224)
    torch.testing.assert_close(centre_crop(wide), F.interpolate(wide, (224, 448), mode="bilinear")[..., 112:336])
