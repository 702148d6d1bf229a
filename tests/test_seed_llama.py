"""SEED-LLaMA against the official code's numbers."""

import json

import pytest
import torch
from conftest import published_keys, shapes
from PIL import Image
from test_seed import decoder
from transformers import LlamaConfig, LlamaForCausalLM

from argen.models.seed_llama import SeedLlamaSession, Vocabulary, image_text, read_tokenizer
from argen.pipelines.seed_llama import SeedLlamaPipeline
from tokenizers_img.checkpoint import load_strict
from tokenizers_img.seed import checkpoint
from tokenizers_img.seed.network import Seed
from tokenizers_img.seed.tokenizer import SeedTokenizer, UnCLIP


def small(case) -> tuple[LlamaForCausalLM, Vocabulary, int]:
    config = case.config
    sizes = {key: value for key, value in config.items() if key not in ("note", "architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    state = {key: value for key, value in case.weights.items() if not key.endswith("inv_freq")}
    words = Vocabulary(
        config["image_id_shift"], config["num_image_codes"], config["boi_token_id"], config["eoi_token_id"]
    )
    return load_strict(model, state, source="golden"), words, config["num_image_tokens"]


@torch.no_grad()
def test_logits_are_official(golden):
    case = golden("seed/seed_llama")
    (model, words, count), io = small(case), case.io
    out = model(io["sequence_ids"], labels=io["sequence_ids"])
    torch.testing.assert_close(out.logits, io["logits"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, io["loss"].squeeze(), atol=1e-4, rtol=1e-4)
    assert len(words.images(io["sequence_ids"][0].tolist(), count)) == 1
    greedy = model.generate(io["prompt_ids"], max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert torch.equal(greedy[:, -12:], io["greedy_ids"][:, -12:])


@torch.no_grad()
def test_an_image_is_written_within_its_vocabulary(golden):
    case = golden("seed/seed_llama")
    (model, words, count), io = small(case), case.io
    session = SeedLlamaSession(model, io["prompt_ids"].tolist(), False, words, count)
    token, written = torch.tensor([[-1]]), []
    for cell in range(count):
        logits, none = session.forward(token, torch.tensor([cell - 1]))
        assert none is None
        token = logits[:, -1:].argmax(dim=-1)
        written.append(token)
    assert torch.equal(torch.cat(written, dim=1), io["image_ids_constrained_greedy"])


@torch.no_grad()
def test_a_batch_writes_what_each_writes_alone_and_any_cell_again(golden):
    model, words, count = small(golden("seed/seed_llama"))
    prompts = [[1, 5, 9, 30, 12], [1, 7], [1], [1]]
    tokens = torch.randint(words.codes, (2, count), generator=torch.Generator().manual_seed(0))
    read = torch.cat([torch.full((2, 1), -1), tokens[:, :-1]], dim=1)
    both = SeedLlamaSession(model, prompts, True, words, count)
    cond_logits, uncond_logits = both.forward(read, torch.arange(count) - 1)
    again, _ = both.forward(read[:, 5:8], torch.arange(4, 7))
    torch.testing.assert_close(again, cond_logits[:, 5:8])
    for row in range(2):
        alone = SeedLlamaSession(model, [prompts[row]], False, words, count)
        torch.testing.assert_close(alone.forward(read[row : row + 1], torch.arange(count) - 1)[0][0], cond_logits[row])
    assert not torch.allclose(cond_logits, uncond_logits, atol=1e-3)


def test_prompts_have_the_ids_of_the_authors(golden):
    pytest.importorskip("sentencepiece")
    folder = golden("seed/seed_llama_tokenizer").folder
    expected, tokenizer = json.loads((folder / "expected.json").read_text()), read_tokenizer(folder / "tokenizer")
    for name, text in expected["prompts"].items():
        assert tokenizer(text, add_special_tokens=False).input_ids == expected["ids"][name], name
    words = Vocabulary.of(tokenizer)
    assert (words.shift, words.codes) == (480, 64)
    text = tokenizer("<s>" + image_text([5, 63, 0]), add_special_tokens=False).input_ids
    assert words.images(text, 3) == [[5, 63, 0]]
    assert words.images(text, 4) == []
    assert words.images([words.begin, 3, words.end, words.begin, 480], 1) == []


def test_every_published_key_has_its_place():
    published = published_keys("seed")
    for name, sizes in {"seed_llama_8b": (4096, 11008, 32), "seed_llama_14b": (5120, 13824, 40)}.items():
        dim, hidden, layers = sizes
        config = LlamaConfig(
            vocab_size=40194,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=layers,
        )
        with torch.device("meta"):
            key_shapes = shapes(LlamaForCausalLM(config))
        assert key_shapes == {key: shape for key, shape in published[name].items() if not key.endswith("inv_freq")}


@pytest.fixture
def pipe(golden):
    """All of it, of random weights."""
    pytest.importorskip("sentencepiece")
    case = golden("seed/seed_llama_tokenizer")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=case.config["vocab_size"], **sizes)).eval()
    vision = checkpoint.vision_network(28, dim=48, depth=2, heads=3)
    sizes = {"features": 48, "dim": 48, "layers": 2, "heads": 4, "hidden": 96, "depth": 1, "block_heads": 4}
    network = Seed(**sizes, n_embed=64, embed_dim=8, embedding=24).eval()
    drawn = SeedTokenizer(network, vision.eval(), unclip(golden("seed/unclip_decode")), steps=2)
    pipeline = SeedLlamaPipeline(model, read_tokenizer(case.folder / "tokenizer"), drawn)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unclip(case) -> UnCLIP:
    """The decoder of the golden case; it has no text encoder, and an empty prompt is recorded."""
    pipe = decoder(case)
    empty = case.io["empty_prompt_embeds"]
    pipe.encode_prompt = lambda prompt, **kwargs: (empty[:1].expand(len(prompt), -1, -1),) * 2
    return pipe


def test_words_become_an_image(pipe):
    generators = [torch.Generator().manual_seed(index) for index in range(2)]
    out = pipe(["a red apple", "Can you draw a dog?"], generator=generators, output_type="np")
    assert out.tokens.shape == (2, 32)
    assert out.tokens.min() >= 0
    assert out.tokens.max() < 64
    assert out.images.shape == (2, 16, 16, 3)
    again = pipe("a red apple", generator=[torch.Generator().manual_seed(0)], output_type="np")
    assert torch.equal(again.tokens[0], out.tokens[0])
    assert (again.images[0] == out.images[0]).all()
    assert pipe.request("a red apple") == "Please generate an image of a red apple."
    assert pipe.request("Can you draw a dog?") == "Can you draw a dog?"
    with pytest.raises(ValueError, match="needs a generator with a drafter"):
        pipe("a dog", sampler="lantern")


def test_an_image_becomes_words_and_images_come_in_between(pipe, monkeypatch):
    image = Image.new("RGB", (40, 30), (200, 40, 40))
    codes = pipe.read(image)
    assert len(codes) == 32
    assert isinstance(pipe.describe(image, "What is this?", max_new_tokens=5, temperature=0), str)
    pieces = ["Sure, ", "here.<img>", *(f"<img_{code:05}>" for code in codes), "</img>", " Do you", " like it?</s>"]
    parts = list(pipe._parts(pieces))
    assert [part if isinstance(part, str) else part.size for part in parts] == [
        "Sure, ",
        "here.",
        (16, 16),
        " Do you",
        " like it?",
    ]
    assert [part for part in pipe._parts(["a<img><img_00001></img>b"])] == ["a", "b"]  # no whole picture
