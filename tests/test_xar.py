"""xAR against the official code's numbers and the published key lists."""

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes

from argen.models.xar import SIZES, XAR, Entities, XARSession, converted, thousandths
from samplers.next_x import NextX
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


def test_training_pass_and_gradients(case):
    model, io = tiny(case).train(), case.io
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x = model.entities.cut(io["latents"])
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
        sampler = NextX("sde" if stochastic else "euler", steps, precise)

        def noise(entity, draws, run=run, stochastic=stochastic, steps=steps):
            start = io["init_noise" if stochastic else "init_noise_ode"][entity]
            assert draws == (steps - 1 if stochastic else 0)
            return start, io[f"step_noise_{steps}"][entity] if stochastic else torch.zeros(0)

        session = XARSession(model, io["class_ids"], sampler.times(0, 1), run["cfg"] != 1)
        *_, last = sampler(session, model.entities.lengths, run["cfg"], noise)
        expected = io[f"sampled_{run['tag']}"]
        torch.testing.assert_close(model.entities.join(last.sequence), expected, atol=2e-3, rtol=2e-3)
        assert last.progress == 1
        assert last.entities == len(model.entities.lengths)
        assert last.passes == steps * last.entities + last.entities - 1


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
    sequence = entities.cut(latents)
    assert torch.equal(entities.join(sequence), latents)
    model = XAR(32, 1, 1, 2, grid=8, kind=kind, size=size, channels=4, classes=3).eval()
    times, asked = torch.rand(2, len(lengths)), torch.tensor([0, 2])
    times[0] = times[1]  # a session asks for one time at once
    whole = model.double()(sequence.double(), torch.zeros_like(times), asked)
    session = XARSession(model, asked, [0.5], guided=False)
    for index, part in enumerate(sequence.double().split(lengths, dim=1)):
        found, none = session.velocity(index, part, 0.0, guided=False)
        assert none is None
        first = session.bounds[index]
        torch.testing.assert_close(found, whole[:, first : first + lengths[index]].float(), atol=1e-5, rtol=1e-5)


def test_positions_of_a_subsample_lie_far_apart():
    places = Entities("subsample", 2, 4).places
    assert places[:4].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert Entities("scale", 2, 4).places[:5].tolist() == [[1.5, 1.5], [0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_what_is_no_x_is_refused():
    with pytest.raises(ValueError, match="unknown kind of X 'row': expected one of cell, subsample, scale"):
        Entities("row", 2, 8)
    with pytest.raises(ValueError, match="the size of X is 3: expected a divisor of 8"):
        Entities("cell", 3, 8)
    with pytest.raises(ValueError, match="scales grow by 3"):
        Entities("scale", 3, 8)
    with pytest.raises(ValueError, match="the number of flow steps is 0: expected at least 1"):
        NextX(steps=0)


def test_times_are_cut_in_float32():
    assert thousandths(torch.tensor([0.04, 1.0, 0.0])).tolist() == [40, 1000, 0]


def test_later_entities_may_take_fewer_steps():
    sampler = NextX("euler", (50, 15))
    assert [len(sampler.times(entity, 4)) - 1 for entity in range(4)] == [50, 38, 26, 15]
