"""Calibrated rounding and rotation of every network, and folders of what was rounded."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import argen
from argen.cli.main import main
from argen.hub.calibration import Images, default_prompts, drawn, quantize_calibrated
from argen.models import calibration
from argen.models.calibration import Batch, attention_columns, calibrate
from argen.models.controlar import ControlAR
from argen.models.dalle_mini import DalleMiniDecoder
from argen.models.flexar import FlexAR, FlexARSession
from argen.models.gptq import hessian
from argen.models.llamagen import LlamaGen
from argen.models.parti import Parti
from argen.models.quantized import HEADS, Quantization, QuantizedLinear, layers_of
from argen.models.rotation import random_rotation, rotate, stream_of
from argen.models.seed_llama import SeedLlamaSession, Vocabulary
from argen.models.session import DecoderSession, LlamaGenSession

# --- every network, tiny

CODES, CELLS, DIM = 16, 9, 24
SIZES = {"n_embed": CODES, "dim": DIM, "depth": 3, "heads": 2}
FLEXAR = {**SIZES, "length": CELLS, "hidden": 16, "bias": True, "qkv_bias": True}
Start = Callable[[], object]


def filled(network: nn.Module) -> nn.Module:
    """With numbers everywhere, also in norms and in what training begins with zeros."""
    torch.manual_seed(0)
    for part in network.parameters():
        part.data = torch.randn_like(part) * 0.3 + (part.ndim == 1)
    return network.eval()


def llamagen(**arguments) -> tuple[nn.Module, Start]:
    network = filled(LlamaGen(grid=3, multiple_of=8, **SIZES, **arguments))
    return network, lambda: LlamaGenSession(network, *condition_of(network), guided=True)


def condition_of(network: LlamaGen) -> tuple[Tensor, Tensor]:
    """Of two images, embedded, and "none" twice; mask."""
    if network.config.classes is not None:
        return network.cls_embedding(torch.tensor([1, 3, 5, 5])), torch.ones(4, 1, dtype=torch.bool)
    features = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(1))
    return network.cls_embedding(features), torch.ones(4, 4, dtype=torch.bool)


def controlar() -> tuple[nn.Module, Start]:
    vit = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    vit |= {"image_size": 48, "patch_size": 16}
    network = filled(ControlAR("vit", vit, grid=3, multiple_of=8, classes=5, **SIZES))
    images = torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    return network, lambda: LlamaGenSession(
        network, *condition_of(network), guided=True, control=network.control(images)
    )


def text(padding: int = 0, width: int = DIM) -> tuple[Tensor, Tensor]:
    states = torch.randn(4, 5 + padding, width, generator=torch.Generator().manual_seed(1))
    return states, (torch.arange(5 + padding) < 5).expand(4, -1)


def parti(padding: int = 0) -> tuple[nn.Module, Start]:
    network = filled(Parti(DIM, CODES, 3, DIM, encoder_depth=1, decoder_depth=2, heads=2, mlp_dim=32))
    states, mask = text(padding)
    states[:, :5] = text()[0]
    return network, lambda: DecoderSession(network, network.encode_text(states, mask), mask, guided=True)


def dalle() -> tuple[nn.Module, Start]:
    network = filled(DalleMiniDecoder(DIM, 2, 2, 32, CODES, codes=CODES, length=CELLS))
    return network, lambda: DecoderSession(network, *text(), guided=True)


def flexar(norm: str = "rms") -> tuple[nn.Module, Start]:
    network = filled(FlexAR(text_dim=8, norm=norm, **FLEXAR))
    states, mask = text(width=8)
    return network, lambda: FlexARSession(network, network.encode_text(states), mask, guided=True)


def flexar_of_classes() -> tuple[nn.Module, Start]:
    network = filled(FlexAR(text_dim=None, classes=5, norm="rms", final_norm=False, gated=False, **FLEXAR))
    ids = torch.tensor([1, 3, -1, -1])
    mask = torch.ones(4, 1, dtype=torch.bool)
    return network, lambda: FlexARSession(network, network.encode_class(ids), mask, guided=True)


def llama(prompts: tuple = ((1, 5, 9), (1, 7, 2), (1, 4, 6), (1, 4, 6)), tied: bool = True) -> tuple[nn.Module, Start]:
    sizes = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = filled(LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **sizes)))
    words = Vocabulary(20, CODES, 38, 39)
    return network, lambda: SeedLlamaSession(network, prompts, len(prompts) > 2, words, CELLS)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Start]]] = {
    "llamagen, classes": lambda: llamagen(classes=5),
    "llamagen, captions": lambda: llamagen(caption_dim=8, caption_length=4),
    "llamagen, words": lambda: llamagen(caption_dim=8, caption_length=4, caption_attention=True),
    "controlar": controlar,
    "parti": parti,
    "dalle mini": dalle,
    "flexar": flexar,
    "flexar, layer norm": lambda: flexar("layer"),
    "flexar, classes": flexar_of_classes,
    "llama": llama,
}
ROTATED = {name for name in NETWORKS if name not in ("parti", "dalle mini", "flexar, layer norm")}


def batches_of(start: Start, count: int = 2, images: int = 2) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [Batch(start, torch.randint(CODES, (images, CELLS), generator=generator)) for _ in range(count)]


def hessians(network: nn.Module, batches: list[Batch], monkeypatch, how: Quantization) -> dict[str, Tensor]:
    """What is collected for each layer, where rounding changes nothing."""
    names = {id(layer.weight): name for name, layer in layers_of(network).items()}
    matrices = {}

    class Same:
        def __init__(self, weight: Tensor):
            self.weight = weight

        def dequantized(self) -> Tensor:
            return self.weight.clone()

    def remembered(weight: Tensor, matrix: Tensor, *_) -> Same:
        matrices[names[id(weight)]] = matrix
        return Same(weight)

    monkeypatch.setattr(calibration, "gptq", remembered)
    calibrate(network, batches, how)
    return matrices


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_one_block_after_the_other_sees_what_whole_passes_do(name, monkeypatch):
    network, start = NETWORKS[name]()
    batches = batches_of(start)
    expected: dict[str, Tensor] = {}

    def hook(called: str):
        def added(_, args):
            expected[called] = expected.get(called, 0) + hessian(args[0])

        return added

    layers = layers_of(network)
    handles = [layer.register_forward_pre_hook(hook(called)) for called, layer in layers.items()]
    for batch in batches:
        batch.read(batch.start())
    for handle in handles:
        handle.remove()
    before = [logits.clone() for batch in batches for logits in batch.read(batch.start())]
    matrices = hessians(network, batches, monkeypatch, Quantization(4, 0, "gptq"))
    assert matrices.keys() == {called for called in layers if called.split(".")[-1] not in HEADS}
    for called, matrix in matrices.items():
        torch.testing.assert_close(matrix, expected[called], rtol=1e-3, atol=1e-3, msg=called)
    after = [logits for batch in batches for logits in batch.read(batch.start())]  # nothing stays behind
    torch.testing.assert_close(after, before)


@torch.no_grad()
def test_padding_does_not_count(monkeypatch):
    how = Quantization(4, 0, "gptq")
    network, start = parti()
    plain = hessians(network, batches_of(start), monkeypatch, how)
    network, start = parti(padding=3)
    for name, matrix in hessians(network, batches_of(start), monkeypatch, how).items():
        torch.testing.assert_close(matrix, plain[name], rtol=1e-3, atol=1e-3, msg=name)
    prompts = (1, 5, 9, 4), (1, 7)
    network, start = llama(prompts)
    together = batches_of(start, 1)
    alone = [
        Batch(lambda index=index: llama_session(network, prompts[index]), together[0].tokens[index : index + 1])
        for index in range(2)
    ]
    one_by_one = hessians(network, alone, monkeypatch, how)
    for name, matrix in hessians(network, together, monkeypatch, how).items():
        torch.testing.assert_close(matrix, one_by_one[name], rtol=1e-3, atol=1e-3, msg=name)


def llama_session(network: nn.Module, prompt: tuple) -> SeedLlamaSession:
    return SeedLlamaSession(network, [prompt], False, Vocabulary(20, CODES, 38, 39), CELLS)


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_network_is_rounded_by_rsq(name):
    network, start = NETWORKS[name]()
    batches = batches_of(start)
    expected = torch.cat(batches[0].read(start()))
    rounded = calibrate(network, batches, Quantization(8, 0, "rsq"))
    assert len(rounded) == sum(called.split(".")[-1] not in HEADS for called in layers_of(network))
    logits = torch.cat(batches[0].read(start()))
    assert 0 < (logits - expected).norm() / (expected - expected.mean(dim=-1, keepdim=True)).norm() < 0.1


def test_columns_of_attention_are_those_of_its_map():
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4)
    mask = torch.ones(3, 5, dtype=torch.bool).tril(2)[None, None]
    scores = torch.einsum("rnhd,rmhd->rhnm", query, key) / 2
    attention = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    for form in (mask, torch.zeros(1, 1, 3, 5).masked_fill(~mask, -torch.inf)):
        torch.testing.assert_close(attention_columns(query, key, form), attention.sum(dim=(1, 2)))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_rotation_leaves_the_logits(name):
    network, start = NETWORKS[name]()
    if name not in ROTATED:
        assert stream_of(network) is None
        with pytest.raises(ValueError, match="cannot be rotated"):
            rotate(network, torch.eye(DIM))
        return
    batch = batches_of(start)[0]
    before = torch.cat(batch.read(start()))
    weights = [layer.weight.clone() for layer in layers_of(network).values()]
    rotate(network, random_rotation(DIM, torch.Generator().manual_seed(0))[0])
    torch.testing.assert_close(torch.cat(batch.read(start())), before, rtol=1e-4, atol=1e-4)
    pairs = zip(layers_of(network).values(), weights, strict=True)
    assert max((layer.weight - weight).abs().max() for layer, weight in pairs) > 0.1


# --- shipped generators


@pytest.fixture
def uncompiled(monkeypatch):
    """As where OpenVINO is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))


def draw(pipe, seeds: list[int]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe("a pizza", len(seeds), sampler="sequential", generator=generator, output_type="latent").tokens


@pytest.mark.parametrize(
    ("name", "method", "rotated"),
    [("argen/emoji-llamagen", "rsq", True), ("argen/emoji-seed-lm", "gptq", False)],
)
def test_a_folder_is_written_and_loaded_without_the_calibration(
    tmp_path, capsys, monkeypatch, uncompiled, name, method, rotated
):
    folder, prompts = tmp_path / "small", tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    arguments = ["--bits", "4", "--method", method, "--samples", "3", "--prompts", str(prompts), "--seed", "5"]
    assert main(["quantize", name, *arguments, "-o", str(folder), "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] < report["bytes_before"] / 2
    assert (report["bits"], report["group"], report["method"]) == (4, 32, method)
    assert report["calibration"] == {"prompts": ["a cat", "a dog", "a cat"], "seeds": [5, 6, 7], "count": 3}
    expected = {"kind": "hadamard", "signs": "rotation.signs"} if rotated else None
    assert (report["rotation"], report["r_min"]) == (expected, 0.005 if method == "rsq" else None)
    assert len(report["base_sha256"]) == 64
    for module in ("argen.models.gptq", "argen.models.calibration", "argen.models.rotation", "argen.hub.calibration"):
        monkeypatch.setitem(sys.modules, module, None)
    pipe = argen.load(folder)
    assert getattr(pipe, "drafter", None) is None
    together = draw(pipe, [0, 1])
    assert torch.equal(draw(pipe, [1]), together[1:])  # rows are independent
    capsys.readouterr()
    assert main(["generate", "a cat", "--model", str(folder), "-o", str(tmp_path / "cat.png")]) == 0
    capsys.readouterr()
    monkeypatch.undo()
    assert main(["quantize", str(folder), "--method", method, "-o", str(tmp_path / "again")]) == 2
    assert "quantized already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@torch.no_grad()
def test_calibration_keeps_the_distribution_better_than_rounding():
    name, divergence = "argen/emoji-seed-lm", {}
    pipe = argen.load(name)
    prompts = default_prompts(pipe, 8)
    tokens = drawn(pipe, prompts, seed=100)[0].tokens

    def log_probs(drawing) -> Tensor:
        batch = Batch(lambda: drawing.start(prompts, True), tokens)
        return torch.cat(batch.read(batch.start())).log_softmax(dim=-1)

    official = log_probs(pipe)
    for method in ("rtn", "gptq"):
        other = argen.load(name)
        quantize_calibrated(other, Quantization(4, 32, method), Images(8))
        divergence[method] = (official.exp() * (official - log_probs(other))).sum(dim=-1).mean()
    assert 0 < divergence["gptq"] < 0.8 * divergence["rtn"]


def test_a_language_model_is_quantized_when_it_is_loaded():
    pipe, plain = argen.load("argen/emoji-seed-lm", quantize="int8"), argen.load("argen/emoji-seed-lm")
    assert isinstance(pipe.transformer.lm_head, QuantizedLinear)
    assert isinstance(pipe.transformer.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert (draw(pipe, [0, 1]) == draw(plain, [0, 1])).float().mean() > 0.3
    with pytest.raises(
        ValueError, match="compile is for networks that decode token by token, not for a LlamaForCausalLM"
    ):
        argen.load("argen/emoji-seed-lm", compile=True)


def test_classes_are_taken_from_end_to_end():
    class Pipe:
        transformer = LlamaGen(classes=5, grid=2, **SIZES)

    assert default_prompts(Pipe(), 2) == ["class:0", "class:2"]
    assert default_prompts(Pipe(), 7) == [f"class:{i}" for i in (0, 0, 1, 2, 2, 3, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "awq"], "method is awq: expected rtn, gptq or rsq"),
        (["--method", "gptq", "--bits", "3"], "bits is 3: expected 8 or 4"),
        (["--samples", "8"], "samples is for the methods gptq and rsq, and the method is rtn: leave it out"),
        (["--method", "gptq", "--samples", "0"], "samples is 0: expected 1 to"),
        (["--method", "gptq", "--seed", "-1"], "seed is -1: expected 0 to"),
        (["--method", "gptq", "--act-order", "--bits", "4"], "act_order is for gptq and rsq with whole rows"),
        (["--act-order"], "act_order is for gptq and rsq with whole rows"),
        (["--method", "gptq", "--prompts", "nothing.txt"], "nothing.txt"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    assert main(["quantize", "argen/emoji-parti", *arguments, "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no prompts can be read from .*p.txt \(no such file or directory\): expected a text file, one a line"),
        ("folder", r"no prompts can be read from .*p.txt \(is a directory\): expected a text file, one a line"),
        (b"", "p.txt holds no prompts: expected one a line"),
        (b" \n\n", "p.txt holds no prompts: expected one a line"),
        (b"\x89PNG\xff\xfe", "p.txt is no text in UTF-8: save it as such"),
        (b"a cat\0", "p.txt is no text file: it holds zero bytes"),
        (b"a cat\n" + b"x" * 1001, "line 2 of .*p.txt: the prompt has 1,001 characters: expected at most 1,000"),
    ],
)
def test_bad_files_of_prompts_are_one_line_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.setattr("argen.hub.loading.load_to_quantize", lambda *_, **__: pytest.fail("loaded"))
    file = tmp_path / "p.txt"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    arguments = ["quantize", "argen/emoji-parti", "--method", "gptq", "--prompts", str(file)]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert re.search(message, line)
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
