"""SEED on what a CLIP and small convolutions see: tokens in order, captions by likelihood, of random weights; and the shipped chain."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from argen.cli.main import main as argen
from argen.data.scenes import COMMON
from argen.data.tables import read_split
from argen.eval import retrieval
from argen.eval.judge import COMMON_PROMPTS, evaluate, read_prompts
from argen.files import WEIGHTS
from argen.hub.loading import load
from argen.models.seed_llama import Vocabulary, add_words
from argen.pipelines.seed_llama import SeedLlamaPipeline
from argen.train import seed as recipe
from tokenizers_img.conv_encoder import ConvEncoder, TwoEncoders
from tokenizers_img.seed.network import Seed
from tokenizers_img.seed.tokenizer import SeedTokenizer

SAMPLE = WEIGHTS.parent / "data" / "sample"


@pytest.fixture(scope="module")
def clip():
    return load("argen/emoji-clip")


@pytest.fixture(scope="module")
def tokenizer(clip):
    torch.manual_seed(0)
    how = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "squashed": False}
    return SeedTokenizer(Seed(**recipe.SIZES).eval(), TwoEncoders(clip.clip.vision_model, ConvEncoder().eval()), **how)


@pytest.fixture(scope="module")
def pipe(tokenizer):
    words = AutoTokenizer.from_pretrained(WEIGHTS / "emoji-clip")
    add_words(words, recipe.SIZES["n_embed"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return SeedLlamaPipeline(
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)), words, tokenizer, "pretrain"
    )


@torch.no_grad()
def test_a_token_says_nothing_of_those_after_it(tokenizer):
    """Neither when a picture is read nor when the first tokens are decoded alone."""
    network = tokenizer.network
    features = torch.randn(2, 81, 192, generator=torch.Generator().manual_seed(0))
    whole = network.queries(features)
    queries = network.query_tokens.clone()
    network.query_tokens.data[:, 9:] = queries[:, 9:].flip(2)
    changed = network.queries(features)
    network.query_tokens.data.copy_(queries)
    torch.testing.assert_close(changed[:, :9], whole[:, :9])
    assert not torch.allclose(changed[:, 9:], whole[:, 9:], atol=1e-3)
    ids = network.ids(features)
    codes = network.quantize.embedding(ids)
    codes[:, 5:] = 0
    torch.testing.assert_close(network.decode(ids[:, :5]), network.embed(codes))
    with pytest.raises(ValueError, match="got 17 tokens for an image: expected 1 to 16"):
        network.decode(torch.zeros(1, 17, dtype=torch.long))


@torch.no_grad()
def test_images_are_seen_as_the_encoders_see_them(tokenizer, clip):
    image = read_split(SAMPLE, "validation")[0]["image"]
    pixels = tokenizer.prepare(image)[None]
    assert pixels.shape == (1, 3, 128, 128)
    by_clip = clip.clip.vision_model(pixel_values=2 * pixels - 1).last_hidden_state
    by_conv = tokenizer.vision.conv.look(2 * torch.nn.functional.avg_pool2d(pixels, 2) - 1)
    assert by_conv.shape == (1, 16, 192)
    torch.testing.assert_close(tokenizer.features(pixels), torch.cat([by_clip, by_conv], dim=1))
    assert tokenizer.encode(pixels).shape == (1, 16)
    with pytest.raises(ValueError, match="the image is 4 x 90: SEED expects at least 8 pixels a side"):
        tokenizer.prepare(Image.new("RGB", (4, 90)))


def test_the_most_probable_caption_names_an_image(pipe):
    """Likelihoods are those of the whole sequence, less those of the caption alone."""
    image, captions = read_split(SAMPLE, "validation")[0]["image"], ["an apple", "a very red house, noto style"]
    scores = pipe.likelihoods([image], captions)
    start, end, words = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id, Vocabulary.of(pipe.tokenizer)
    for caption, value in zip(captions, scores[0], strict=True):
        caption_ids = [*pipe.tokenizer(caption, add_special_tokens=False).input_ids, end]
        image_ids = [start, words.begin, *(code + words.shift for code in pipe.read(image)), words.end]
        log_probs = []
        for before in (image_ids, [start]):
            logits = pipe.transformer(torch.tensor([before + caption_ids])).logits[0, len(before) - 1 : -1]
            log_probs.append(logits.log_softmax(dim=-1).gather(1, torch.tensor(caption_ids)[:, None]).sum())
        assert value.item() == pytest.approx((log_probs[0] - log_probs[1]).item(), abs=1e-3)


@torch.no_grad()
def test_meaning_is_measured(tokenizer, clip, pipe):
    scores = retrieval.of_tokens(tokenizer, clip.embed, SAMPLE)
    assert {f"first {count} tokens: recall@1 of 100" for count in (1, 2, 4, 8, 16)} <= set(scores)
    assert scores["first 16 tokens: recall@1 of 100"] == scores["16 tokens at random places: recall@1 of 100"]
    named = retrieval.of_captions(lambda images, captions: torch.eye(len(images)), SAMPLE, 5)
    assert named == {"concept named among 5": 1.0, "among the first five": 1.0}


SINGLES = tuple(truth for truth in read_prompts(COMMON_PROMPTS) if truth.kind == "single")[:16]


@pytest.fixture(scope="module")
def shipped():
    pipe = load("argen/emoji-seed-lm")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(index) for index in range(count)]


def test_the_judge_recognises_the_prompts(shipped):
    images = shipped([truth.prompt for truth in SINGLES], generator=generators(16), output_type="np").images
    scores = evaluate(load("argen/emoji-judge"), list((255 * images).round().astype("uint8")), SINGLES)
    assert scores["single: identity"]["value"] >= 0.5  # of 666 names; chance is 0.0075


def test_the_length_of_a_prompt_is_told(shipped, pipe):
    words, most = shipped.text_tokens("a pizza")
    assert words == len(shipped.tokenizer("a pizza").input_ids)
    assert most == shipped.tokenizer.model_max_length
    assert pipe.text_tokens("a pizza")[0] == words


def test_the_first_tokens_say_what_an_image_shows(shipped, clip):
    """Of the few pictures that argen ships: the right one of 8 captions is found by the first 8 tokens rather than by others, the
    right picture by all of them, and the right name by likelihood."""
    scores = retrieval.of_tokens(shipped.image_tokenizer, clip.embed, SAMPLE)
    assert scores["first 8 tokens: recall@1 of 100"] >= 0.25
    assert scores["first 8 tokens: recall@1 of 100"] > scores["8 tokens at random places: recall@1 of 100"]
    assert scores["16 tokens: own picture among 100"] >= 0.7
    named = retrieval.of_captions(shipped.likelihoods, SAMPLE, 8)
    assert named["concept named among 8"] >= 0.7


def test_both_are_scored(capsys):
    for model, wanted in (
        ("emoji-seed-lm", "concept named among 8"),
        ("emoji-seed", "first 8 tokens: recall@1 of 100"),
    ):
        assert argen(["eval", "held-out", "--model", f"argen/{model}", "--data", str(SAMPLE), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[wanted] >= 0.25


def test_an_image_is_described_and_comes_back(tmp_path, capsys):
    image = tmp_path / "in.png"
    rows = read_split(SAMPLE, "train")
    rows[next(row for row, name in enumerate(rows["concept"]) if name in COMMON)]["image"].save(image)
    assert argen(["describe", str(image), "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.split()) >= 1
    arguments = [str(image), "--tokenizer", "argen/emoji-seed"]
    assert argen(["tokenize", *arguments, "-o", str(tmp_path / "ids.npz")]) == 0
    assert argen(["detokenize", str(tmp_path / "ids.npz"), "-o", str(tmp_path / "again.png")]) == 0
    assert argen(["reconstruct", *arguments, "-o", str(tmp_path / "other.png")]) == 0
    again, other = (Image.open(tmp_path / name).convert("RGB") for name in ("again.png", "other.png"))
    assert again.size == (128, 128)
    assert again.tobytes() == other.tobytes()
    assert again.tobytes() != Image.open(image).convert("RGB").tobytes()
