"""xAR against the official code's numbers and the published key lists."""

import json
from argparse import Namespace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes
from PIL import Image

import argen
from argen.models.xar import SIZES, XAR, Entities, XARSession, converted, timesteps_of
from argen.pipelines.base import UNDECIDED
from argen.pipelines.xar import XARPipeline
from argen.request import Request
from samplers.next_x import Euler, EulerMaruyama, Heun
from tokenizers_img import kl_vae
from tokenizers_img.checkpoint import load_strict

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(params=["depth2_1", "cells3x3"])
def case(request, golden):
    return golden(f"xar/{request.param}")


def tiny(case) -> XAR:
    config = case.config
    sizes = {key: config[key] for key in ("dim", "encoder_depth", "decoder_depth", "heads")}
    model = XAR(**sizes, grid=config["latent_size"], size=config["cell"], channels=config["latent_channels"])
    return load_strict(model, converted(case.weights), source="golden")


def test_training_loss_and_gradients(case):
    model, io = tiny(case).train(), case.io
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = model.entities.patchify(io["latents"])
    times = io["train_time"].view(-1, len(x)).T  # [B, K]
    spread = times[:, model.entity, None]
    noise = io["train_noise"].transpose(0, 1).flatten(1, 2)
    dropped = io["label_drop_draw"] < case.config["label_drop_prob"]
    velocity = model((1 - spread) * x + spread * noise, times, io["class_ids"], dropped)
    torch.testing.assert_close(velocity, io["train_velocity"], **CLOSE)
    loss = F.mse_loss(velocity, noise - x)
    torch.testing.assert_close(loss, io["train_loss"], **CLOSE)
    loss.backward()
    norms = [parameter.grad.norm() for _, parameter in sorted(model.named_parameters())]
    torch.testing.assert_close(torch.stack(norms), io["train_grad_norms"], atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("precise", [True, False])
def test_sampling(case, precise):
    model, io = tiny(case), case.io
    for run in case.config["sampled"]:
        stochastic, steps = run["kind"] == "sde", run["num_steps"]
        sampler = (EulerMaruyama if stochastic else Euler)(steps, precise)

        def noise(entity, draws, run=run, stochastic=stochastic, steps=steps):
            start = io["init_noise" if stochastic else "init_noise_ode"][entity]
            assert draws == (steps - 1 if stochastic else 0)
            return start, io[f"step_noise_{steps}"][entity] if stochastic else torch.zeros(0)

        session = XARSession(model, io["class_ids"], sampler.times(0, 1), run["cfg"] != 1)
        latents = torch.full_like(model.entities.patchify(io["latents"]), torch.nan)
        *_, last = sampler(session, latents, model.entities.lengths, run["cfg"], noise)
        expected = io[f"sampled_{run['tag']}"]
        torch.testing.assert_close(model.entities.unpatchify(last.sequence), expected, atol=2e-3, rtol=2e-3)
        assert last.finished == last.decided == latents.shape[1]
        entities = len(model.entities.lengths)
        assert last.forward_passes == steps * entities + entities - 1


@pytest.mark.parametrize(("name", "size"), [("xAR-B", "B"), ("xAR-L", "L"), ("xAR-H", "H")])
def test_every_published_key_has_its_place(name, size):
    published = published_keys("xar")[name]
    with torch.device("meta"):
        model = XAR(**SIZES[size])
    assert shapes(model) == converted(published)


@pytest.mark.parametrize(
    ("kind", "size", "lengths"),
    [
        ("cell", 1, [1] * 64),
        ("cell", 4, [16] * 4),
        ("cell", 8, [64]),
        ("subsample", 2, [16] * 4),
        ("scale", 2, [1, 4, 16, 64]),
    ],
)
@torch.no_grad()
def test_any_x_is_cut_joined_and_cached(kind, size, lengths):
    entities = Entities(kind, size, 8)
    assert entities.lengths == lengths
    latents = torch.randn(2, 4, 8, 8)
    sequence = entities.patchify(latents)
    assert torch.equal(entities.unpatchify(sequence), latents)
    model = XAR(32, 1, 1, 2, grid=8, kind=kind, size=size, channels=4, classes=3).eval()
    times, class_ids = torch.rand(2, len(lengths)), torch.tensor([0, 2])
    times[0] = times[1]  # a session asks for one time at once
    whole = model.double()(sequence.double(), torch.zeros_like(times), class_ids)
    session = XARSession(model, class_ids, [0.5], guided=False)
    for index, part in enumerate(sequence.double().split(lengths, dim=1)):
        velocity, uncond = session.velocity(index, part, 0.0, guided=False)
        assert uncond is None
        first = session.bounds[index]
        torch.testing.assert_close(velocity, whole[:, first : first + lengths[index]].float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_caption_is_read_and_its_absence_is_the_empty_one():
    torch.manual_seed(0)
    model = XAR(32, 1, 1, 2, grid=4, size=2, channels=4, caption_dim=12, rank=3).eval().double()
    states, mask = torch.randn(2, 5, 12).double(), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    x, times = torch.randn(2, 16, 4).double(), torch.zeros(2, 4)
    whole = model(x, times, states, mask=mask)
    states[1, 3:] = 9.0  # behind the mask
    torch.testing.assert_close(model(x, times, states, mask=mask), whole)
    alone = model(x[1:], times[1:], states[1:, :3], mask=mask[1:, :3])
    torch.testing.assert_close(alone, whole[1:])
    assert not torch.allclose(model(x[:1], times[:1], states[1:], mask=mask[1:]), whole[:1], atol=1e-3)
    session = XARSession(
        model, model.read(states, mask), [0.5], guided=True
    )  # of one picture: the second row is its "none"
    for index, part in enumerate(x[:1].split(4, dim=1)):
        velocity, uncond = session.velocity(index, part, 0.0, guided=True)
        where = slice(4 * index, 4 * index + 4)
        torch.testing.assert_close(velocity, whole[:1, where].float(), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(velocity, uncond, atol=1e-3)


def test_positions_of_a_subsample_lie_far_apart():
    positions = Entities("subsample", 2, 4).positions
    assert positions[:4].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert Entities("scale", 2, 4).positions[:5].tolist() == [
        [1.5, 1.5],
        [0.5, 0.5],
        [0.5, 2.5],
        [2.5, 0.5],
        [2.5, 2.5],
    ]


def test_what_is_no_x_is_refused():
    with pytest.raises(ValueError, match="unknown kind of X 'row': expected one of cell, subsample, scale"):
        Entities("row", 2, 8)
    with pytest.raises(ValueError, match="the size of X is 3: expected a divisor of 8"):
        Entities("cell", 3, 8)
    with pytest.raises(ValueError, match="scales grow by 3"):
        Entities("scale", 3, 8)
    with pytest.raises(ValueError, match="steps is 0: expected a whole number, 1 to 1,000"):
        EulerMaruyama(steps=0)


def test_times_are_cut_in_float32():
    assert timesteps_of(torch.tensor([0.04, 1.0, 0.0])).tolist() == [40, 1000, 0]


def test_later_entities_may_take_fewer_steps():
    sampler = Euler((50, 15))
    assert [len(sampler.times(entity, 4)) - 1 for entity in range(4)] == [50, 38, 26, 15]


@pytest.fixture
def pipe():
    """A small one of the published kind; untrained, because only the mechanics are looked at."""
    torch.manual_seed(0)
    model = XAR(32, 1, 1, 2, grid=4, size=2, channels=16)
    vae = kl_vae.network((8, 8, 16, 16, 32), 16, 2, image_size=64)
    pipe = XARPipeline(model.eval(), vae.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_an_image_depends_on_its_own_seed_alone(pipe):
    kwargs = {"guidance_scale": 2.0, "sampler": EulerMaruyama(steps=3), "output_type": "latent"}
    both = pipe(["class:1", "class:goldfish"], generator=generators(5, 6), **kwargs)
    alone = pipe("class:goldfish", generator=generators(6), **kwargs)
    assert both.tokens.shape == (2, 16, 4, 4)
    torch.testing.assert_close(both.tokens[1:], alone.tokens, atol=1e-4, rtol=1e-4)
    assert both.forward_passes == 3 * 4 + 3
    image = pipe("class:1", generator=generators(5), guidance_scale=2.0, sampler=EulerMaruyama(steps=3)).images[0]
    assert image.size == (64, 64)


def test_what_is_given_stays_and_the_rest_is_written(pipe):
    kwargs = {"sampler": Euler(4), "output_type": "latent"}
    whole = pipe("class:1", generator=generators(3), **kwargs).tokens

    def stop(pipe, index, decided, state):
        pipe._interrupt = decided >= 8

    part = pipe("class:1", generator=generators(3), callback_on_step_end=stop, **kwargs).tokens
    assert torch.equal(part[..., :2, :], whole[..., :2, :])
    assert part[..., 2:, :].isnan().all()
    rest = pipe("class:1", generator=generators(4), tokens=part, **kwargs)
    assert torch.equal(rest.tokens[..., :2, :], whole[..., :2, :])
    assert rest.tokens.isfinite().all()
    assert rest.forward_passes == 4 * 2 + 3
    hole = whole.clone()
    hole[..., 0, 0] = torch.nan
    mended = pipe("class:1", generator=generators(9), tokens=hole, **kwargs)
    assert torch.equal(mended.tokens.isclose(whole).all(dim=1), hole.isfinite().all(dim=1))
    image = pipe.images(part, "pt")
    torch.testing.assert_close(image[:, :, 32:].unique(), torch.tensor([UNDECIDED]))
    assert (image[:, :, :32] != 1).any()


def test_a_request_is_carried_out_and_says_its_steps(pipe):
    request = Request("class:3", "a model", num_images=2, seed=4, sampler="heun", steps=(3, 2))
    jobs = [(job.progress, job.forward_passes) for job in pipe.run(request)]
    assert jobs[-1][0] == 1
    assert [progress for progress, _ in jobs] == sorted(progress for progress, _ in jobs)
    *_, job = pipe.run(Request.from_dict(json.loads(json.dumps(request.to_dict()))))
    assert job.request.steps == (3, 2)
    assert job.request.top_k == 0
    assert len(job.images) == 2
    again = pipe("class:3", generator=generators(5), sampler=Heun((3, 2))).images[0]
    assert again.tobytes() == job.images[1].tobytes()


def test_what_does_not_fit_a_flow_is_refused(pipe):
    with pytest.raises(
        ValueError, match="writes continuous latents, and the sampler jacobi tokens: choose one of auto, sde"
    ):
        pipe("class:1", sampler="jacobi")
    with pytest.raises(ValueError, match="top_k is 5: this model draws no tokens"):
        pipe("class:1", top_k=5)
    with pytest.raises(ValueError, match="this model takes no control image"):
        pipe("class:1", control_image=Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match=r"latents are \[1, 16, 3, 4\]: expected \[1, 16, 4, 4\]"):
        pipe("class:1", tokens=torch.zeros(1, 16, 3, 4))
    with pytest.raises(ValueError, match="steps are those of a flow, but the sampler is sequential"):
        Request("x", sampler="sequential", steps=5)
    with pytest.raises(ValueError, match="steps is 0: expected a whole number, 1 to 1,000"):
        Request("x", steps=0)
    with pytest.raises(ValueError, match="this model writes tokens, and the sampler sde and its steps"):
        argen.load("argen/emoji-parti")("a red apple", sampler="sde")


def test_a_saved_pipeline_comes_back(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = argen.load(tmp_path)
    again.set_progress_bar_config(disable=True)
    kwargs = {"sampler": EulerMaruyama(steps=2), "output_type": "latent"}
    tokens = [one("class:1", generator=generators(1), **kwargs).tokens for one in (pipe, again)]
    assert torch.equal(*tokens)


def test_released_files_load_by_name(tmp_path, monkeypatch, golden):
    """A bare dict, as xAR's, and a training checkpoint with averaged weights and the script's settings beside them."""
    case = golden("xar/depth2_1")
    sizes = {key: case.config[key] for key in ("dim", "encoder_depth", "decoder_depth", "heads")}
    monkeypatch.setitem(SIZES, "B", sizes)
    monkeypatch.setattr(kl_vae, "network", partial(kl_vae.network, (8, 8, 16, 16, 32), 16, 2))
    torch.save({"model": golden("kl16_vae/scaled").weights}, tmp_path / "kl16.ckpt")
    torch.save(case.weights, tmp_path / "xAR-B.pth")
    training = {"model_ema": case.weights, "model": {"pred.bias": torch.zeros(16)}, "args": Namespace(seed=1)}
    torch.save(training, tmp_path / "Neon_xARB_imagenet256.pth")
    pipes = [argen.load(tmp_path / name) for name in ("xAR-B.pth", "Neon_xARB_imagenet256.pth")]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        assert pipe.defaults.steps == 40
    images = [pipe("class:207", generator=generators(1), sampler=EulerMaruyama(steps=2)).images[0] for pipe in pipes]
    assert images[0].size == (256, 256)
    assert images[0].tobytes() == images[1].tobytes()
