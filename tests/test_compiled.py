"""Compiled decoding: the same tokens as without, whatever the sampler and the batch; refused in one line where it cannot be."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import argen
from argen.cli.main import main
from argen.hub.cards import all_cards
from argen.hub.loading import compile_decoding, loader
from argen.models.kv_cache import KeyValueCache
from argen.models.llamagen import LlamaGen
from argen.models.session import LlamaGenSession

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed: pip install '.[openvino]'"
)
GENERATORS = ["argen/emoji-parti", "argen/emoji-llamagen", "argen/emoji-control", "argen/emoji-flextok-ar"]


@pytest.fixture(scope="module", params=GENERATORS)
def pipe(request):
    """A generator with its settings; compiled by the tests."""
    pipe = argen.load(request.param)
    pipe.set_progress_bar_config(disable=True)
    pipe.settings = {}
    if "control" in all_cards()[request.param].takes:
        outline = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(outline).ellipse((20, 20, 100, 100), outline="black", width=4)
        pipe.settings["control_image"] = outline
    return pipe


def tokens_of(pipe, sampler: str, seeds: list[int], **settings) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = pipe.settings | {"num_images_per_prompt": len(seeds), "generator": generator} | settings
    return pipe("a pizza", sampler=sampler, output_type="latent", **settings).tokens


@needs_openvino
def test_every_sampler_draws_the_same_tokens(pipe):
    names = [name for name in pipe.samplers if name != "auto"]  # which measures what is faster
    plain = {name: tokens_of(pipe, name, [0, 1, 2]) for name in names}
    compile_decoding(pipe)
    try:
        for name in names:
            assert torch.equal(tokens_of(pipe, name, [0, 1, 2]), plain[name]), name
        assert torch.equal(tokens_of(pipe, "jacobi", [0, 1, 2]), plain["sequential"])
        alone = torch.cat([tokens_of(pipe, "sequential", [seed]) for seed in (0, 1, 2)])
        assert torch.equal(alone, plain["sequential"])
        without_guidance = tokens_of(pipe, "sequential", [0, 1], guidance_scale=1.0)
        assert torch.equal(without_guidance, tokens_of(pipe, "jacobi:window=5", [0, 1], guidance_scale=1.0))
        assert len(pipe.transformer.compiled.graphs) == 1  # one graph for any number of rows, tokens and slots
    finally:
        pipe.transformer.compiled = None


@needs_openvino
@torch.no_grad()
def test_logits_are_those_of_the_network_for_any_rows_tokens_and_slots():
    torch.manual_seed(0)
    network = LlamaGen(grid=8, classes=5, dim=64, depth=3, heads=4, n_embed=96).eval()
    torch.nn.init.normal_(network.output.weight, std=0.5)
    condition, prompts = torch.tensor([0, 1, 2, 3, 4, 1, 2, 3]), torch.randint(0, 96, (8, 70))

    def logits(rows: slice, steps: list[int]) -> torch.Tensor:
        """Of so many tokens in each pass, [R, n, K]."""
        mask = torch.ones(len(condition[rows]), 1, dtype=torch.bool)
        session = LlamaGenSession(network, network.cls_embedding(condition[rows]), mask, guided=False)
        parts, first = [], 0
        for count in steps:
            cells = torch.arange(first, first + count)
            parts.append(session.forward(prompts[rows, first : first + count], cells)[0])
            first += count
        return torch.cat(parts, dim=1)

    everything = slice(0, 8)
    expected = logits(everything, [1] * 6)
    compile_decoding(network)
    torch.testing.assert_close(logits(everything, [1] * 6), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(everything, [3, 1, 2]), expected, atol=1e-4, rtol=1e-4)
    alone = logits(slice(2, 4), [1, 4, 1])
    torch.testing.assert_close(alone, expected[2:4], atol=1e-4, rtol=1e-4)
    long = logits(everything, [63])  # more slots than there is room for at first
    network.compiled = None
    torch.testing.assert_close(long, logits(everything, [63]), atol=1e-4, rtol=1e-4)


@needs_openvino
@pytest.mark.parametrize("options", [{"compile": True}, {"quantize": "int8"}])
def test_a_precision_that_graphs_do_not_have_is_decoded_without_them(options, caplog):
    pipe = argen.load("argen/emoji-llamagen", **options)
    pipe.settings = {}
    pipe.set_progress_bar_config(disable=True)
    tokens_of(pipe, "sequential", [0])
    half = argen.load("argen/emoji-llamagen", **{"dtype": "bf16"} | ({} if "compile" in options else options))
    half.settings = {}
    assert half.transformer.dtype == torch.bfloat16
    pipe.to(torch.bfloat16)
    assert "in torch.bfloat16 it decodes uncompiled" in caplog.text
    assert torch.equal(tokens_of(pipe, "sequential", [0]), tokens_of(half, "sequential", [0]))
    pipe.to(torch.float32)
    compiled = tokens_of(pipe, "sequential", [0])
    assert len(pipe.transformer.compiled.graphs) == 1  # of the weights as they are now
    pipe.transformer.compiled = None
    assert (tokens_of(pipe, "sequential", [0]) == compiled).float().mean() > (0.3 if "quantize" in options else 0.99)


@needs_openvino
def test_a_copy_compiles_anew():
    pipe = argen.load("argen/emoji-parti", compile=True)
    pipe.settings = {}
    tokens = tokens_of(pipe, "sequential", [0])
    copied = copy.deepcopy(pipe)
    step = copied.transformer.compiled
    assert not step.graphs
    assert step.network is step.decode.__self__ is copied.transformer
    assert torch.equal(tokens_of(copied, "sequential", [0]), tokens)


def test_without_it_nothing_is_imported():
    pipe = argen.load("argen/emoji-parti")
    assert pipe.transformer.compiled is None
    assert type(pipe.start(["a"], guided=False).cache) is KeyValueCache


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("argen/emoji-xar", {}, "compile is for networks that decode token by token, not for a XAR: leave it out"),
        ("argen/emoji-vitvqgan", {}, "not for a ViTVQGAN: leave it out"),
        ("argen/emoji-parti", {"dtype": "bf16"}, "compile takes the dtype fp32, and it is bf16: leave one of them out"),
        (
            "argen/emoji-parti",
            {"device": "mps"},
            "compile is for a CPU or a CUDA GPU, and the device is mps: leave it out",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(monkeypatch, model, arguments, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("argen.hub.loading.pick", torch.device)  # as where there is such a device
    with pytest.raises(ValueError, match=message):
        argen.load(model, compile=True, **arguments)


def test_the_shell_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "x.png"
    assert main(["generate", "a pizza", "-o", str(file), "--compile", "--device", "cpu"]) == 2
    assert "compile needs OpenVINO: pip install 'argen[openvino]'" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(
    "error", ["ImportError('libtbb.so is missing')", "ModuleNotFoundError('libtbb.so is missing')"]
)
def test_a_broken_openvino_is_one_line_or_done_without(tmp_path, error):
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino/__init__.py").write_text(f"raise {error}")
    paths = os.pathsep.join([str(tmp_path), str(Path(argen.__file__).parent.parent)])

    def generate(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "argen", "generate", "star", "-o", str(tmp_path / "x.png"), "--device", "cpu"]
        env = os.environ | {"PYTHONPATH": paths}
        return subprocess.run([*command, *options], env=env, capture_output=True, text=True)

    refused = generate("--compile")
    assert refused.returncode == 2
    assert "cannot be imported (libtbb.so is missing): pip install 'argen[openvino]'" in refused.stderr
    assert refused.stderr.count("\n") == 1
    drawn = generate("--quantize", "int8")
    assert drawn.returncode == 0
    assert "OpenVINO cannot be imported (libtbb.so is missing): weights are unpacked in each pass" in drawn.stderr
    assert (tmp_path / "x.png").exists()


def test_a_server_that_cannot_compile_says_so_at_its_start(monkeypatch):
    with pytest.raises(ValueError, match="compile is for a CPU or a CUDA GPU, and the device is mps"):
        loader("mps", compile=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="compile needs OpenVINO"):
        loader("cpu", compile=True)


@needs_openvino
def test_a_server_compiles_what_it_can():
    load = loader("cpu", compile=True)
    assert load("argen/emoji-parti").transformer.compiled is not None
    assert not hasattr(load("argen/emoji-xar").transformer, "compiled")
    load("argen/emoji-vitvqgan")
