"""LlamaGen against the official code's numbers and the published key lists."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import published_keys, shapes
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import argen
from argen.data.imagenet import class_id
from argen.models.llamagen import SIZES, LlamaGen
from argen.models.session import LlamaGenSession
from argen.pipelines.llamagen import LlamaGenPipeline, clean_caption, left_padded
from samplers.jacobi import Jacobi
from samplers.logits import Recorded, Sampling
from samplers.steps import Sequential
from tokenizers_img import llamagen_vq
from tokenizers_img.checkpoint import load_strict


@pytest.fixture(params=["c2i", "t2i"])
def case(request, golden):
    return golden(f"llamagen/{request.param}")


def sizes(config: dict) -> dict:
    """Of a golden case, under our names."""
    return {
        "n_embed": config["vocab_size"],
        "grid": int(config["block_size"] ** 0.5),
        "classes": config.get("num_classes"),
        "caption_dim": config.get("caption_dim", 0),
        "caption_length": config["cls_token_num"],
        "dim": config["dim"],
        "depth": config["n_layer"],
        "heads": config["n_head"],
        "multiple_of": config["multiple_of"],
    }


def tiny(case) -> LlamaGen:
    return load_strict(LlamaGen(**sizes(case.config)), case.weights, source="golden")


def condition(model, case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embedded condition, embedded "none", mask."""
    if "class_ids" in case.io:
        ids = case.io["class_ids"]
        none = torch.full_like(ids, case.config["num_classes"])
        return model.cls_embedding(ids), model.cls_embedding(none), torch.ones(len(ids), 1, dtype=torch.bool)
    features = case.io["caption_features"]
    none = model.cls_embedding.uncond_embedding.expand(len(features), -1, -1)
    return model.cls_embedding(features), model.cls_embedding(none), case.io["caption_mask"].bool()


@torch.no_grad()
def test_training_logits_and_loss(case):
    model, labels = tiny(case), case.io["class_ids" if "class_ids" in case.io else "caption_features"]
    logits = model(labels, condition(model, case)[2], case.io["image_ids"])
    torch.testing.assert_close(logits, case.io["train_logits"], atol=1e-4, rtol=1e-4)
    loss = F.cross_entropy(logits.flatten(0, 1), case.io["image_ids"].flatten())
    torch.testing.assert_close(loss, case.io["train_loss"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def written(case, sampling: Sampling, scale=1.0, uniforms=None, sampler=Sequential()) -> torch.Tensor:  # noqa: B008
    model = tiny(case)
    embedded, none, mask = condition(model, case)
    guided = callable(scale) or scale != 1
    if guided:
        embedded, mask = torch.cat([embedded, none]), torch.cat([mask, mask])
    session = LlamaGenSession(model, embedded, mask, guided)
    batch = len(case.io["image_ids"])
    grid = torch.full((batch, model.length), -1)
    noise = Recorded(torch.zeros(batch, model.length) if uniforms is None else uniforms)
    *_, last = sampler(session, grid, sampling, scale, noise)
    assert session.cache.end == model.length  # one slot for the condition, and no more than a cell each
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
    for sampler in (Sequential(), Jacobi(1), Jacobi(5), Jacobi(100)):
        ids = written(case, Sampling(**settings), scale, case.io["uniform_draws"], sampler)
        assert torch.equal(ids, case.io["ids_sampled_t0.9_topk3rd_topp0.95_cfg2"])


@torch.no_grad()
def test_chunks_trees_and_rollback_equal_single_steps(case):
    model = tiny(case)
    embedded, _, mask = condition(model, case)
    model.double()
    ids, positions = case.io["image_ids"], torch.arange(-1, model.length - 1)
    read = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)
    straight = LlamaGenSession(model, embedded.double(), mask, guided=False)
    one = torch.cat([straight.forward(read[:, i : i + 1], positions[i : i + 1])[0] for i in range(8)], dim=1)
    chunked = LlamaGenSession(model, embedded.double(), mask, guided=False)
    first, _ = chunked.forward(read[:, :5], positions[:5])
    wrong = torch.zeros_like(read[:, 5:7])
    chunked.forward(wrong, positions[5:7])
    branch = torch.tensor([[True, False, False], [False, True, False], [True, False, True]])  # 5 | 5' -> 6 after 5
    tree = torch.cat([read[:, 5:6], wrong[:, :1], read[:, 6:7]], dim=1)
    more, _ = chunked.forward(tree, torch.tensor([positions[5], positions[5], positions[6]]), branch)
    torch.testing.assert_close(torch.cat([first, more[:, [0, 2]]], dim=1), one[:, :7])


@torch.no_grad()
def test_words_that_attend_are_read_one_by_one(golden):
    case = golden("llamagen/t2i")
    model = LlamaGen(**sizes(case.config), caption_attention=True)
    model = load_strict(model, case.weights, source="golden").double()
    features, ids, mask = case.io["caption_features"].double(), case.io["image_ids"], case.io["caption_mask"].bool()
    logits = model(features, mask, ids)
    assert not torch.allclose(logits, case.io["train_logits"], atol=1e-3)
    noise = torch.randn_like(features)
    unread = torch.where(mask[..., None], features, noise)
    torch.testing.assert_close(model(unread, mask, ids), logits)

    read = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], dim=1)
    positions = torch.arange(-1, model.length - 1)
    session = LlamaGenSession(model, model.cls_embedding(features), mask, guided=False)
    steps = [session.forward(read[:, part], positions[part])[0] for part in (slice(0, 1), slice(1, 4), slice(4, None))]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits)


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
    widths = {"width": config["ch"], "latent_channels": config["z_channels"]}
    widths |= {"codes": config["codebook_size"], "code_width": config["codebook_embed_dim"]}
    vq = llamagen_vq.network(tuple(config["encoder_ch_mult"]), **widths)
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


@pytest.fixture
def class_pipe(golden):
    case, vq_case = golden("llamagen/c2i"), golden("llamagen_vq/f4_wide_groups")  # 96 codes both
    config = vq_case.config
    widths = {"width": config["ch"], "latent_channels": config["z_channels"], "codes": 96, "code_width": 6}
    vq = llamagen_vq.network(tuple(config["encoder_ch_mult"]), **widths)
    pipe = LlamaGenPipeline(tiny(case), load_strict(vq, llamagen_vq.converted(vq_case.weights), source="golden"))
    pipe.set_progress_bar_config(disable=True)
    return pipe, case


def test_the_pipeline_writes_the_official_ids(class_pipe, tmp_path):
    pipe, case = class_pipe
    prompts = [f"class:{number}" for number in case.io["class_ids"].tolist()]
    out = pipe(prompts, guidance_scale=4.0, temperature=0)
    assert torch.equal(out.tokens, case.io["ids_greedy_cfg4"])
    assert out.images[0].size == (16, 16)
    pipe.save_pretrained(tmp_path)
    again = argen.load(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(prompts, guidance_scale=4.0, temperature=0).tokens, out.tokens)
    partly = pipe.images(torch.where(torch.arange(16) < 8, out.tokens, -1))[0]
    assert partly.getpixel((8, 15)) == (230, 230, 230)


def test_classes_are_asked_for_by_number_or_name():
    assert class_id("class:207") == class_id("Golden Retriever") == class_id("class: golden retriever") == 207
    assert (class_id("class:0"), class_id("class:999")) == (0, 999)
    assert class_id("class:food", ["animals-nature", "food-drink"]) == 1  # no other begins so
    with pytest.raises(ValueError, match="did you mean golden retriever"):
        class_id("class:golden retreiver")
    with pytest.raises(ValueError, match="class 1000 does not exist: expected 0 to 999"):
        class_id("class:1000")
    with pytest.raises(ValueError, match="no class is named"):
        class_id("a red apple")


def test_captions_are_cleaned_as_published(golden):
    cases = json.loads((golden("llamagen/captions").folder / "cases.json").read_text())
    assert len(cases) == 25
    assert [clean_caption(typed) for typed, _ in cases] == [expected for _, expected in cases]


def test_words_stand_last():
    features = torch.arange(1.0, 9.0).reshape(2, 4, 1)
    moved, mask = left_padded(features, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    assert moved[..., 0].tolist() == [[0, 1, 2, 3], [0, 0, 0, 5]]
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]


@torch.no_grad()
def test_a_caption_becomes_an_image(golden, class_pipe):
    case, words = golden("llamagen/t2i"), ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁apple"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=6, d_model=24, d_kv=6, num_heads=4, num_layers=1, d_ff=32)).eval()
    pipe = LlamaGenPipeline(tiny(case), class_pipe[0].vq, t5, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    features, mask = pipe.encode_text(["A RED apple", "a"])
    assert mask.tolist() == [[False, False, True, True, True, True], [False, False, False, False, True, True]]
    alone = t5(input_ids=torch.tensor([[3, 1]])).last_hidden_state
    torch.testing.assert_close(features[1, -2:], alone[0])
    assert pipe.defaults.guidance_scale == 7.5
    out = pipe(["a red apple", "a"], generator=torch.Generator().manual_seed(0))
    assert out.tokens.shape == (2, 16)


def test_released_files_are_read_where_they_lie(golden, monkeypatch, tmp_path):
    config = golden("llamagen/c2i").config
    monkeypatch.setitem(SIZES, "B", {"dim": 48, "depth": 3, "heads": 4})
    monkeypatch.setattr(llamagen_vq, "MULTIPLIERS", {16: (1, 1, 1, 1, 1)})
    monkeypatch.setattr(llamagen_vq, "network", partial(llamagen_vq.network, width=32, latent_channels=32, codes=64))
    published = LlamaGen(classes=1000, **SIZES["B"]).state_dict()
    torch.save({"model": published | {"freqs_cis": torch.zeros(3)}, "steps": 3}, tmp_path / "c2i_B_256.pt")
    weights = golden("llamagen_vq/f16").weights | {llamagen_vq.UNUSED: torch.zeros(65536)}
    torch.save({"model": weights}, tmp_path / "vq_ds16_c2i.pt")
    pipe = argen.load(tmp_path / "c2i_B_256.pt")
    assert (pipe.length, pipe.defaults.guidance_scale) == (256, 4.0)
    assert torch.equal(pipe.transformer.state_dict()["norm.weight"], published["norm.weight"])
    assert argen.load(tmp_path / "vq_ds16_c2i.pt").stride == 16
    torch.save({"model": published | {"norm.weight": torch.zeros(config["dim"] + 1)}}, tmp_path / "c2i_B_256.pt")
    with pytest.raises(ValueError, match=r"norm.weight has shape \[49\], expected \[48\]"):
        argen.load(tmp_path / "c2i_B_256.pt")
