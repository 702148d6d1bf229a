"""Attention backends: chosen for each model, refused where they cannot run. xformers is a stand-in here, which computes on the CPU."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.nn.attention import SDPBackend, sdpa_kernel

import argen
from argen.cli.main import main
from argen.hub.loading import choose_attention, load_diffusion, loader
from argen.hub.options import Attention
from argen.models.xar import XAR, XARSession
from tokenizers_img.attention import BACKENDS, KERNELS, DispatchedAttention, check_attention, set_attention

GENERATORS = ("parti", "llamagen", "flextok-ar", "xar", "control")


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in with the interface of xformers and its demands on masks; gives the masks of all calls."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, op=None):
        calls.append(attn_bias)
        if query.ndim == 3:  # of diffusers' classic layers: [B H, n, D/H]
            return memory_efficient_attention(query[:, :, None], key[:, :, None], value[:, :, None], scale=scale)[
                :, :, 0
            ]
        if attn_bias is not None:
            assert attn_bias.dtype == query.dtype
            assert attn_bias.shape == (len(query), query.shape[2], query.shape[1], key.shape[1])
            assert attn_bias.stride(-1) == 1
            assert attn_bias.stride(-2) % 8 == 0
        logits = torch.einsum("bnhd,bmhd->bhnm", query, key) * (scale or query.shape[-1] ** -0.5)
        weights = (logits if attn_bias is None else logits + attn_bias).softmax(dim=-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, value)

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "xops", ops)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(BACKENDS, "xformers", replace(BACKENDS["xformers"], devices=()))
    return calls


def latents_or_tokens(pipe, **settings):
    prompts = ["a red apple", "a rocket"]
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(prompts, generator=generators, sampler="auto", output_type="latent", **settings).tokens


@pytest.mark.parametrize("name", GENERATORS)
def test_backends_write_the_same_tokens(name, xformers):
    pipe = argen.load(f"argen/emoji-{name}")
    expected = latents_or_tokens(pipe)
    assert not xformers
    for attention in ("native", "sdpa-math", "xformers"):
        choose_attention(pipe, attention)
        tokens = latents_or_tokens(pipe)
        if tokens.is_floating_point():
            torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-3)
        else:
            assert tokens.equal(expected), attention
        if attention != "xformers":
            assert not xformers
    assert xformers
    assert any(mask is not None for mask in xformers)
    pixels = pipe.images(expected, "pt")
    pipe.disable_xformers_memory_efficient_attention()
    xformers.clear()
    torch.testing.assert_close(pipe.images(expected, "pt"), pixels, atol=1e-4, rtol=1e-3)
    assert latents_or_tokens(pipe).shape == expected.shape
    assert not xformers


@pytest.mark.parametrize("name", ["argen/emoji-vitvqgan", "argen/emoji-flextok", "argen/emoji-seed", "argen/emoji-vae"])
def test_image_tokenizers_have_backends(name, xformers):
    plain, other = argen.load(name), argen.load(name, attention="xformers")
    side = plain.config.image_size
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = plain.encode(pixels)
        torch.testing.assert_close(other.encode(pixels).float(), tokens.float(), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(other.decode(tokens), plain.decode(tokens), atol=1e-3, rtol=1e-3)
    assert xformers


def test_each_model_has_its_own_even_in_threads(xformers):
    pipes = {name: argen.load("argen/emoji-parti", attention=name) for name in ("native", "xformers")}
    expected = latents_or_tokens(pipes["native"])
    assert not xformers
    counted = {}
    latents_or_tokens(pipes["xformers"])
    counted["alone"] = len(xformers)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(latents_or_tokens, [*pipes.values(), *pipes.values()]))
    assert all(tokens.equal(expected) for tokens in drawn)
    assert len(xformers) == 3 * counted["alone"]  # alone, and twice of the four
    assert _AttentionBackendRegistry.get_active_backend()[0] == "native"


@pytest.mark.parametrize(
    ("name", "kernel"), [("sdpa-math", SDPBackend.MATH), ("sdpa-flash", SDPBackend.FLASH_ATTENTION)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_kernel_is_called_and_not_chosen_for_the_process(name, kernel, masked, monkeypatch):
    layer, generator = DispatchedAttention(), torch.Generator().manual_seed(0)
    layer.attention = name
    query, key, value = (torch.randn(2, n, 3, 16, generator=generator) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7, generator=generator) > 0.3 if masked and name == "sdpa-math" else None
    heads_first = [part.transpose(1, 2) for part in (query, key, value)]
    with sdpa_kernel(kernel):
        expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).flatten(2)
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda *_: pytest.fail("chosen for the process"))
    torch.testing.assert_close(layer.attend(query, key, value, mask), expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_called_as_pytorch_declares_them(name):
    query, key = (torch.empty(2, 4, n, 20, device="meta", dtype=torch.float16) for n in (5, 7))
    mask = None if name == "sdpa-flash" else query.new_empty(2, 4, 5, 7)
    assert KERNELS[name](query, key, key, mask, 0.0, None).shape == query.shape


def test_what_diffusers_sets_for_the_process_changes_nothing(xformers):
    pipe = argen.load("argen/emoji-parti")
    expected = latents_or_tokens(pipe)
    with attention_dispatch.attention_backend("xformers"):
        assert latents_or_tokens(pipe).equal(expected)
    assert not xformers


def test_xar_by_class_attends_without_a_mask():
    network = XAR(dim=32, encoder_depth=1, decoder_depth=1, heads=2, grid=4, size=2, channels=4, classes=3).eval()
    x = torch.randn(2, network.entities.lengths[0], 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = XARSession(network, torch.tensor([0, 1]), [0.5], guided=True).velocity(0, x, 0.5, True)
        set_attention([network], "sdpa-flash")
        flash = XARSession(network, torch.tensor([0, 1]), [0.5], guided=True).velocity(0, x, 0.5, True)
    torch.testing.assert_close(flash, plain, atol=1e-5, rtol=1e-5)


def test_diffusers_pipelines_take_xformers(xformers):
    pipe = load_diffusion("argen/emoji-sd", attention="xformers")
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    made = pipe("a dog", generator=torch.Generator().manual_seed(0), **settings).images
    assert xformers
    xformers.clear()
    choose_attention(pipe, "native")
    again = pipe("a dog", generator=torch.Generator().manual_seed(0), **settings).images
    assert not xformers
    torch.testing.assert_close(torch.as_tensor(made), torch.as_tensor(again), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="no attention that sdpa-math could compute"):
        choose_attention(pipe, "sdpa-math")


def test_refusals_are_one_line_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("argen.hub.loading._load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(
        ValueError, match="attention is 'moon': expected one of native, sdpa-math, .*, xformers, flash$"
    ):
        argen.load("argen/emoji-parti", attention="moon")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"xformers runs on cuda only, and the device is cpu: .*pip install 'argen\[xformers\]'"
    ):
        argen.load("argen/emoji-parti", attention="xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", False)
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    with pytest.raises(ValueError, match=r"xformers is not installed, or too old: pip install 'argen\[xformers\]'"):
        argen.load("argen/emoji-parti", attention="xformers")
    with pytest.raises(
        ValueError, match="flash is not installed, or too old: pip install flash-attn, or choose native"
    ):
        argen.load("argen/emoji-parti", attention="flash")
    with pytest.raises(ValueError, match="sdpa-efficient runs on cuda only, and the device is mps"):
        check_attention("sdpa-efficient", "mps")


def test_a_backend_without_masks_is_refused_when_it_is_chosen():
    pipe = argen.load("argen/emoji-parti", attention="sdpa-math")
    with pytest.raises(ValueError, match=r"takes no mask, and this model attends under one \(argen.models.parti\)"):
        choose_attention(pipe, "sdpa-flash")
    layers = [layer for layer in pipe.transformer.modules() if isinstance(layer, DispatchedAttention)]
    assert {layer.attention for layer in layers} == {"sdpa-math"}
    plain, flash = argen.load("argen/emoji-vitvqgan"), argen.load("argen/emoji-vitvqgan", attention="sdpa-flash")
    pixels = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert flash.encode(pixels).equal(plain.encode(pixels))


def test_precision_and_device_are_looked_at_before_the_first_token(monkeypatch):
    pipe = argen.load("argen/emoji-parti")
    monkeypatch.setitem(BACKENDS, "sdpa-cudnn", replace(BACKENDS["sdpa-cudnn"], devices=()))
    choose_attention(pipe, "sdpa-cudnn")
    with pytest.raises(
        ValueError, match="sdpa-cudnn computes in bfloat16 or float16, and the model is in torch.float32"
    ):
        latents_or_tokens(pipe)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose_attention(pipe, "sdpa-efficient")
    with pytest.raises(ValueError, match="sdpa-efficient runs on cuda only, and the device is cpu"):
        latents_or_tokens(pipe)


def test_the_habit_of_diffusers_chooses_or_refuses(xformers, monkeypatch):
    pipe = argen.load("argen/emoji-llamagen")
    pipe.enable_xformers_memory_efficient_attention()
    networks = (pipe.transformer, pipe.vq, pipe.drafter)
    layers = [layer for net in networks for layer in net.modules() if isinstance(layer, DispatchedAttention)]
    assert {layer.attention for layer in layers} == {"xformers"}
    pipe.disable_xformers_memory_efficient_attention()
    assert {layer.attention for layer in layers} == {"native"}
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_XFORMERS_ATTN", False)
    with pytest.raises(ValueError, match="xformers is not installed"):
        pipe.enable_xformers_memory_efficient_attention()
    with pytest.raises(ValueError, match="attention_op is not taken"):
        pipe.enable_xformers_memory_efficient_attention(object())


def test_networks_of_transformers_keep_their_own():
    with pytest.raises(ValueError, match="cannot be chosen for a LlamaForCausalLM"):
        argen.load("argen/emoji-seed-lm", attention="sdpa-math")
    argen.load("argen/emoji-seed-lm", attention="native")
    with pytest.raises(ValueError, match="no attention that sdpa-math could compute"):
        set_attention([argen.load("argen/emoji-judge")], "sdpa-math")
    load = loader(attention="sdpa-math")
    assert load("argen/emoji-judge") is not None  # a server's other models
    layers = [layer for layer in load("argen/emoji-vitvqgan").modules() if isinstance(layer, DispatchedAttention)]
    assert {layer.attention for layer in layers} == {"sdpa-math"}


def test_the_shell_refuses_with_exit_code_2(tmp_path, capsys):
    out = tmp_path / "apple.png"
    for name, said in (("moon", "'moon': expected one of"), ("xformers", "xformers runs on cuda only")):
        arguments = ["generate", "a red apple", "-o", str(out), "--device", "cpu", "--attention", name]
        try:
            code = main(arguments)
        except SystemExit as stopped:  # by argparse
            code = stopped.code
        assert code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not out.exists()
    assert main(["generate", "a red apple", "-o", str(out), "--device", "cpu", "--attention", "sdpa-math"]) == 0
    assert out.exists()
    assert get_args(Attention) == tuple(BACKENDS)
