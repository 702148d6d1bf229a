"""SEED-LLaMA on own images and captions: the sequences it learns, LoRA with layers that are trained whole, what is written and refused."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_seed_llama import pipe as published  # noqa: F401, a fixture
from transformers import LlamaConfig, LlamaForCausalLM

import argen
from argen.cli.main import main
from argen.models.lora import CONFIG, FILE, add_adapters, digest_of, read_adapter
from argen.models.seed_llama import image_text
from argen.pipelines.seed_llama import SeedLlamaPipeline
from argen.registry import recipes
from argen.train import lora
from argen.train.loop import Training
from argen.train.own import seed_lm
from argen.train.own.options import OwnOptions
from argen.train.own.run import run
from argen.train.sources import open_source

MODEL = "argen/emoji-seed-lm"
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 60, 220)}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    for colour, value in COLOURS.items():
        for number in range(4):
            image = np.full((128, 160, 3), 255, np.uint8)
            image[20 + number : 90 + number, 30:100] = value
            Image.fromarray(image).save(folder / f"{colour}{number}.png")
            (folder / f"{colour}{number}.txt").write_text(f"a {colour} square")
    return folder


@pytest.fixture(scope="module")
def pipe():
    return argen.load(MODEL, dtype="fp32")


def options(folder, **more) -> OwnOptions:
    given = {"init": MODEL, "batch_size": 4, "evaluate_every": 2, "learning_rate": 1e-3, "warmup": 0}
    return OwnOptions(images=str(folder), **given | more)


def task_of(folder, **more) -> seed_lm.OwnSeedLMTask:
    source = open_source(folder)
    return seed_lm.prepare(options(folder, **more), source, source.subset(range(3)))


def train(folder, out, *more):
    few = ["--steps", "2", "--batch-size", "4", "--evaluate-every", "2"]
    return main(["train", "seed-lm", "--images", str(folder), "--out", str(out), *few, *more])


def test_sequences_are_what_is_sampled(pipe):
    sequences, codes, caption = seed_lm.Sequences(pipe), list(range(pipe.length)), "a red square"
    words, end = pipe.words, pipe.tokenizer.eos_token_id
    image = [words.begin, *(code + words.shift for code in codes), words.end]
    text = pipe.encode_text(caption)
    start = text[0]
    assert start == pipe.tokenizer.bos_token_id
    assert sequences.of(codes, caption, described=False, dropped=False) == ([*text, *image, end], 1)
    assert sequences.of(codes, caption, described=True, dropped=False) == ([start, *image, *text[1:], end], 1)
    assert sequences.of(codes, caption, described=True, dropped=True) == ([start, *image, end], 1)
    long = "a red square and " * 20
    assert sequences.too_long(long)
    assert not sequences.too_long(caption)
    most = pipe.transformer.config.max_position_embeddings
    assert most - 2 <= len(sequences.of(codes, sequences.cut(long), described=True, dropped=False)[0]) <= most


def test_a_model_that_answers_learns_its_answers(pipe):
    tuned = SeedLlamaPipeline(pipe.transformer, pipe.tokenizer, pipe.image_tokenizer, "8b-sft")
    tuned.transformer.config.max_position_embeddings, kept = 500, tuned.transformer.config.max_position_embeddings
    sequences, codes = seed_lm.Sequences(tuned), list(range(pipe.length))
    tuned.transformer.config.max_position_embeddings = kept
    image = [word + tuned.words.shift for word in codes]
    ids, given = sequences.of(codes, "a red square", described=False, dropped=False)
    assert ids[:given] == tuned.encode_text("USER: Please generate an image of a red square.\nASSISTANT:")
    assert ids[given:] == [tuned.words.begin, *image, tuned.words.end, tuned.tokenizer.eos_token_id]
    ids, given = sequences.of(codes, "a red square", described=True, dropped=False)
    assert ids[given:-1] == tuned.encode_text("a red square")[1:]
    assert [code for code in ids[:given] if code in image] == image


def test_a_published_layout_is_trained(published, captioned, tmp_path, monkeypatch):  # noqa: F811
    """With the words of sentencepiece and two tables, both of which a LoRA trains."""
    sequences = seed_lm.Sequences(published)
    codes, words, end = list(range(published.length)), published.words, published.tokenizer.eos_token_id
    image = [words.begin, *(code + words.shift for code in codes), words.end]
    ids, given = sequences.of(codes, "a red square", described=False, dropped=False)
    assert ids[:given] == published.encode_text("USER: Please generate an image of a red square.\nASSISTANT:")
    assert ids[given:] == [*image, end]
    ids, given = sequences.of(codes, "a red square", described=True, dropped=False)
    assert ids[:given] == published.encode_text(f"USER: {image_text(codes)}\nASSISTANT:")
    assert published.tokenizer.decode(ids[given:-1]).strip() == "a red square"
    monkeypatch.setattr("argen.train.own.start.load", lambda *_, **__: copy.deepcopy(published))
    given = ["--init", "a published one", "--learning-rate", "0.01", "--warmup", "0"]
    assert train(captioned, tmp_path / "run", *given, "--lora", "2") == 0
    trained, before = published.transformer, copy.deepcopy(published.transformer)
    add_adapters(trained, [(read_adapter(tmp_path / "run" / "final"), 1.0)])
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        assert not torch.equal(trained.get_parameter(name), before.get_parameter(name)), name
    task = task_of(captioned)
    assert task.dropped == 0
    assert task.examples.tokens.ids(3).tolist() == task.pipe.read(task.examples.source.image(3))  # squashed


def test_the_loss_is_that_of_the_learned_words(captioned):
    task = task_of(captioned, described=1.0, dropped=0.0)
    model = task.networks["model"]
    model.eval()
    batch = task.read(task.batch(3, torch.Generator().manual_seed(0)))
    batch["given"][1] = 5
    with torch.no_grad():
        log_probs = model(input_ids=batch["ids"].clamp(min=0)).logits.log_softmax(dim=-1)
        losses = []
        for row, given in enumerate(batch["given"].tolist()):
            ids = batch["ids"][row][batch["ids"][row] >= 0]
            words = [-log_probs[row, place - 1, ids[place]] for place in range(given, len(ids))]
            losses.append(torch.stack(words).mean())
        assert task.loss(model, batch).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def test_shares_of_what_is_learned(captioned):
    task = task_of(captioned, described=0.25, dropped=0.4)
    drawn = task.batch(2000, torch.Generator().manual_seed(0))
    assert drawn["described"].float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert drawn["dropped"].float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert task_of(captioned).dropped == 0.1


def test_codes_are_those_of_the_whole_image(captioned):
    task = task_of(captioned)
    for row in (0, 7):
        assert task.examples.tokens.ids(row).tolist() == task.pipe.read(task.examples.source.image(row))


def test_it_learns_to_draw_and_to_describe(captioned, tmp_path):
    task = task_of(captioned, batch_size=8)
    schedule = recipes["seed-lm"].scheduled(options(captioned, batch_size=8), 30)
    training = Training(task, schedule, tmp_path / "run", 0, "fp32")
    before = task.evaluate()
    for _ in range(30):
        training.step()
    training.model.eval()
    after = task.evaluate()
    assert after["held-out loss"] < 0.8 * before["held-out loss"]
    assert after["held-out loss of captions"] < 0.8 * before["held-out loss of captions"]


def test_parts_of_a_batch_train_as_the_whole(captioned):
    """Though its sequences are of different lengths."""
    task = task_of(captioned)
    model, batch = task.networks["model"].eval(), task.batch(6, torch.Generator().manual_seed(0))
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(2), slice(2, 6))]
    with torch.no_grad():
        whole, few, many = (task.loss(model, task.read(part)).item() for part in (batch, *parts))
    assert whole == pytest.approx((2 * few + 4 * many) / 6, rel=1e-5)


@pytest.mark.parametrize(("rank", "file"), [(4, FILE), (None, "transformer/model.safetensors")])
def test_a_stopped_run_goes_on_exactly(captioned, tmp_path, rank, file):
    given = options(captioned, lora=rank)
    straight = run(recipes["seed-lm"], given, tmp_path / "straight", steps=4)
    run(recipes["seed-lm"], given, tmp_path / "stopped", steps=4, stop=2)
    assert run(recipes["seed-lm"], given, tmp_path / "stopped", steps=4) == straight
    ends = [load_file(tmp_path / name / "final" / file) for name in ("straight", "stopped")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_all_weights_are_trained(captioned, tmp_path, capsys, pipe):
    assert train(captioned, tmp_path / "run", "--init", MODEL) == 0
    assert "captions: 11, for 11 of 11 images" in (said := capsys.readouterr().out)
    assert "held-out loss of captions" in said
    final = tmp_path / "run" / "final"
    trained = argen.load(final, dtype="fp32")
    before, after = pipe.transformer.state_dict(), trained.transformer.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    images = trained.image_tokenizer.network.state_dict()
    assert all(torch.equal(value, images[name]) for name, value in pipe.image_tokenizer.network.state_dict().items())
    assert main(["generate", "a red square", "--model", str(final), "-o", str(tmp_path / "a.png")]) == 0
    assert trained.describe(Image.open(captioned / "red0.png"))
    assert train(captioned, tmp_path / "again", "--init", str(final), "--lora", "2") == 0


def test_a_lora_is_added_by_its_weight(captioned, tmp_path, pipe):
    rate = ["--learning-rate", "0.01", "--warmup", "0"]
    assert train(captioned, tmp_path / "run", "--init", MODEL, "--lora", "4", *rate) == 0
    final = tmp_path / "run" / "final"
    assert {path.name for path in final.iterdir()} == {CONFIG, FILE, "argen.toml"}
    config = json.loads((final / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.05)
    trained, half = argen.load(final, dtype="fp32"), argen.load(MODEL, lora=f"{final}:0.5", dtype="fp32")
    states = [each.transformer.state_dict() for each in (pipe, trained, half)]
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert "model.layers.0.self_attn.o_proj.weight" in changed
    assert "model.norm.weight" in changed
    assert not changed & {"model.embed_tokens.weight", "lm_head.weight"}  # one table
    for name in changed:
        torch.testing.assert_close(states[2][name], (states[0][name] + states[1][name]) / 2, atol=1e-5, rtol=1e-4)
    for name, value in {"--model": str(final), "--lora": f"{final}:0.8"}.items():
        given = [name, value] if name == "--model" else ["--model", MODEL, name, value]
        assert main(["generate", "a red square", *given, "-o", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_lora_of_a_llama_is_what_peft_reads(tmp_path, tied):
    """The official layers; two tables are trained, one that is both is not."""
    from peft import PeftModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=60, tie_word_embeddings=tied, **sizes)

    def network() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    trained, ids, base = network(), torch.arange(7)[None], network()
    adapter, digest = lora.inject(trained, 2), digest_of(base)
    assert torch.equal(trained(input_ids=ids).logits, base(input_ids=ids).logits)
    learned = [name for name, value in trained.named_parameters() if value.requires_grad]
    assert sum("lora_A" in name for name in learned) == 2 * 7
    assert sum("lora_" not in name for name in learned) == 2 * 2 + 1 + 2 * (not tied)
    generator = torch.Generator().manual_seed(0)
    for value in trained.parameters():
        if value.requires_grad:
            value.data = (value + 0.2 * torch.randn(value.shape, generator=generator)).bfloat16().float()
    trained.eval()
    lora.save(trained, adapter, "a base", digest, tmp_path / "lora")
    expected = trained(input_ids=ids).logits
    add_adapters(base, [(read_adapter(tmp_path / "lora"), 1.0)])
    torch.testing.assert_close(base(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-3)
    merged = PeftModel.from_pretrained(network(), tmp_path / "lora").merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "seed-lm starts from a model: give --init a SEED-LLaMA"),
        (["--init", "argen/emoji-parti"], "argen/emoji-parti is no SEED-LLaMA: expected one to start from"),
        (["--init", "argen/emoji-seed"], "argen/emoji-seed is no SEED-LLaMA"),
        (["--init", MODEL, "--size", "mini"], "size is for a new network"),
        (["--init", MODEL, "--tokenizer", "argen/emoji-seed"], "tokenizer is for a new network"),
        (["--init", MODEL, "--text-encoder", "argen/emoji-clip"], "text_encoder is for a new network"),
        (["--init", MODEL, "--image-size", "64"], "image_size is 64: expected 128"),
        (["--init", MODEL, "--crops", "five"], "unknown crops 'five'"),
        (["--init", MODEL, "--described", "2"], "described is 2.0: expected"),
    ],
)
def test_what_cannot_be_trained_is_refused(captioned, tmp_path, capsys, given, message):
    assert train(captioned, tmp_path / "run", *given) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_classes_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / "classes" / name / f"{number}.png")
    assert train(tmp_path / "classes", tmp_path / "run", "--init", MODEL) == 2
    assert "have classes, and SEED-LLaMA reads captions" in capsys.readouterr().err
