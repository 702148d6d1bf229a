"""SEED-LLaMA against the official code's numbers."""

import json

import pytest
import torch
from conftest import published_keys, shapes
from transformers import LlamaConfig, LlamaForCausalLM

from argen.models.seed_llama import SeedLlamaSession, Vocabulary, picture_text, read_tokenizer
from tokenizers_img.checkpoint import load_strict


def small(case) -> tuple[LlamaForCausalLM, Vocabulary, int]:
    config = case.config
    own = {key: value for key, value in config.items() if key not in ("note", "architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**own)).eval()
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
    assert len(words.pictures(io["sequence_ids"][0].tolist(), count)) == 1
    greedy = model.generate(io["prompt_ids"], max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert torch.equal(greedy[:, -12:], io["greedy_ids"][:, -12:])


@torch.no_grad()
def test_a_picture_is_written_within_its_vocabulary(golden):
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
    given, none = both.forward(read, torch.arange(count) - 1)
    again, _ = both.forward(read[:, 5:8], torch.arange(4, 7))
    torch.testing.assert_close(again, given[:, 5:8])
    for row in range(2):
        alone = SeedLlamaSession(model, [prompts[row]], False, words, count)
        torch.testing.assert_close(alone.forward(read[row : row + 1], torch.arange(count) - 1)[0][0], given[row])
    assert not torch.allclose(given, none, atol=1e-3)


def test_prompts_have_the_ids_of_the_authors(golden):
    pytest.importorskip("sentencepiece")
    folder = golden("seed/seed_llama_tokenizer").folder
    told, tokenizer = json.loads((folder / "expected.json").read_text()), read_tokenizer(folder / "tokenizer")
    for name, text in told["prompts"].items():
        assert tokenizer(text, add_special_tokens=False).input_ids == told["ids"][name], name
    words = Vocabulary.of(tokenizer)
    assert (words.shift, words.codes) == (480, 64)
    text = tokenizer("<s>" + picture_text([5, 63, 0]), add_special_tokens=False).input_ids
    assert words.pictures(text, 3) == [[5, 63, 0]]
    assert words.pictures(text, 4) == []
    assert words.pictures([words.begin, 3, words.end, words.begin, 480], 1) == []


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
            found = shapes(LlamaForCausalLM(config))
        assert found == {key: shape for key, shape in published[name].items() if not key.endswith("inv_freq")}
