"""LlamaGen against the official code's numbers and the published key lists."""

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes

from argen.models.llamagen import SIZES, LlamaGen, LlamaGenSession
from samplers.logits import Sampling
from samplers.steps import Plain
from tokenizers_img import llamagen_vq
from tokenizers_img.checkpoint import load_strict


@pytest.fixture(params=["c2i", "t2i"])
def case(request, golden):
    return golden(f"llamagen/{request.param}")


def tiny(case) -> LlamaGen:
    config = case.config
    model = LlamaGen(
        n_embed=config["vocab_size"],
        grid=int(config["block_size"] ** 0.5),
        classes=config.get("num_classes"),
        caption_dim=config.get("caption_dim", 0),
        caption_length=config["cls_token_num"],
        dim=config["dim"],
        depth=config["n_layer"],
        heads=config["n_head"],
        multiple_of=config["multiple_of"],
    )
    return load_strict(model, case.weights, source="golden")


def condition(model, case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embedded condition, embedded "none", mask."""
    if case.config["model_type"] == "c2i":
        ids = case.io["class_ids"]
        none = torch.full_like(ids, case.config["num_classes"])
        return model.cls_embedding(ids), model.cls_embedding(none), torch.ones(len(ids), 1, dtype=torch.bool)
    features = case.io["caption_features"]
    none = model.cls_embedding.uncond_embedding.expand(len(features), -1, -1)
    return model.cls_embedding(features), model.cls_embedding(none), case.io["caption_mask"].bool()


@torch.no_grad()
def test_training_logits_and_loss(case):
    model = tiny(case)
    embedded, _, mask = condition(model, case)
    logits = model(embedded, mask, case.io["image_ids"])
    torch.testing.assert_close(logits, case.io["train_logits"], atol=1e-4, rtol=1e-4)
    loss = F.cross_entropy(logits.flatten(0, 1), case.io["image_ids"].flatten())
    torch.testing.assert_close(loss, case.io["train_loss"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def written(case, sampling: Sampling, scale=1.0, uniforms=None) -> torch.Tensor:
    model = tiny(case)
    embedded, none, mask = condition(model, case)
    guided = callable(scale) or scale != 1
    if guided:
        embedded, mask = torch.cat([embedded, none]), torch.cat([mask, mask])
    session = LlamaGenSession(model, embedded, mask, guided)
    batch = len(case.io["image_ids"])
    grid = torch.full((batch, model.length), -1)
    uniforms = torch.zeros(batch, model.length) if uniforms is None else uniforms
    *_, last = Plain()(session, grid, sampling, scale, uniforms)
    assert session.cached == model.length  # one entry for the condition, and no more than a cell each
    return last.tokens


def test_greedy_ids(case):
    greedy = Sampling(temperature=0)
    assert torch.equal(written(case, greedy), case.io["ids_greedy"])
    assert torch.equal(written(case, greedy, 4.0), case.io["ids_greedy_cfg4"])
    # the interval counts passes after the first token
    interval = written(case, greedy, lambda cell: 4.0 if cell - 1 <= 3 else 1.0)
    assert torch.equal(interval, case.io["ids_greedy_cfg4_interval3"])


def test_sampled_ids(case):
    settings = dict(case.config["sampled"])
    scale = settings.pop("cfg_scale")
    ids = written(case, Sampling(**settings), scale, case.io["uniform_draws"])
    assert torch.equal(ids, case.io["ids_sampled_t0.9_topk3rd_topp0.95_cfg2"])


@torch.no_grad()
def test_chunks_trees_and_rollback_equal_single_steps(case):
    model = tiny(case)
    embedded, _, mask = condition(model, case)
    model.double()
    ids, places = case.io["image_ids"], torch.arange(-1, model.length - 1)
    read = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)
    straight = LlamaGenSession(model, embedded.double(), mask, guided=False)
    one = torch.cat([straight.forward(read[:, i : i + 1], places[i : i + 1])[0] for i in range(8)], dim=1)
    chunked = LlamaGenSession(model, embedded.double(), mask, guided=False)
    first, _ = chunked.forward(read[:, :5], places[:5])
    wrong = torch.zeros_like(read[:, 5:7])
    chunked.forward(wrong, places[5:7])
    chunked.keep(torch.arange(5))  # the two were wrong
    branch = torch.tensor([[True, False, False], [False, True, False], [True, False, True]])  # 5 | 5' -> 6 after 5
    tree = torch.cat([read[:, 5:6], wrong[:, :1], read[:, 6:7]], dim=1)
    more, _ = chunked.forward(tree, torch.tensor([places[5], places[5], places[6]]), branch)
    torch.testing.assert_close(torch.cat([first, more[:, [0, 2]]], dim=1), one[:, :7])


PUBLISHED = {
    "c2i": [("B", 256), ("B", 384), ("L", 256), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384)],
    "t2i": [("XL", "stage1_256"), ("XL", "stage2_512")],
}


@pytest.mark.parametrize(
    ("kind", "size", "pixels"), [(k, *entry) for k, entries in PUBLISHED.items() for entry in entries]
)
def test_every_published_key_and_shape_is_there(kind, size, pixels):
    with torch.device("meta"):
        model = LlamaGen(classes=1000 if kind == "c2i" else None, **SIZES[size])
    assert shapes(model) == published_keys("llamagen")[f"{kind}_{size}_{pixels}"]


@pytest.mark.parametrize("name", ["f16", "f4_wide_groups"])
@torch.no_grad()
def test_the_tokenizer_gives_the_official_numbers(golden, name):
    case = golden(f"llamagen_vq/{name}")
    config, io = case.config, case.io
    sizes = {"width": config["ch"], "latent_channels": config["z_channels"]}
    sizes |= {"codes": config["codebook_size"], "code_width": config["codebook_embed_dim"]}
    vq = llamagen_vq.network(tuple(config["encoder_ch_mult"]), **sizes)
    tokenizer = llamagen_vq.LlamaGenVQ(load_strict(vq, llamagen_vq.converted(case.weights), source="golden"))
    pixels, close = (io["pixels"] + 1) / 2, {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(vq.encode(io["pixels"]).latents, io["pre_quant"], **close)
    ids = tokenizer.encode(pixels)
    assert torch.equal(ids, io["ids"])
    shape = tuple(io["quant"].shape[2:])
    looked_up = vq.quantize.get_codebook_entry(ids.flatten(), (len(ids), *shape, config["codebook_embed_dim"]))
    torch.testing.assert_close(looked_up, io["quant"], **close)
    torch.testing.assert_close(2 * tokenizer.decode(ids, shape) - 1, io["decoded"], **close)
    with pytest.raises(ValueError, match="expected multiples of"):
        tokenizer.encode(pixels[:, :, :-1])


@pytest.mark.parametrize(("name", "stride"), [("vq_ds16_c2i", 16), ("vq_ds8_c2i", 8), ("vq_ds16_t2i", 16)])
def test_every_published_key_of_the_tokenizers_has_its_place(name, stride):
    with torch.device("meta"):
        vq = llamagen_vq.network(llamagen_vq.MULTIPLIERS[stride])
        published = {key: torch.empty(shape) for key, shape in published_keys("llamagen")[name].items()}
    assert shapes(vq) == {key: list(value.shape) for key, value in llamagen_vq.converted(published).items()}
