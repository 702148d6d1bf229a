"""Precision: what "auto" chooses, that every generator draws in each safe one, and that others are refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import argen
from argen import device
from argen.cli.main import main
from argen.hub import loading
from argen.hub.cards import all_cards

GENERATORS = [card for card in all_cards().values() if card.kind == "generator" and card.ships]
PROMPT = "a pizza"


def drawn(card, dtype: str, **settings) -> tuple[np.ndarray, torch.Tensor]:
    pipe = argen.load(card.id, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if "control" in card.takes:
        outline = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(outline).ellipse((20, 20, 100, 100), outline="black", width=4)
        settings["control_image"] = outline
    assert pipe.transformer.dtype == device.DTYPES[dtype]
    output = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **settings)
    return np.asarray(output.images[0], np.float32), output.tokens


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("card", GENERATORS, ids=lambda card: card.id)
def test_every_shipped_generator_draws_in_half_precision(card, dtype):
    full, half = (drawn(card, name)[0] for name in ("fp32", dtype))
    assert half.std() > 10  # no empty image
    assert np.abs(full - half).mean() < 20  # of 255: the same thing, though single tokens may differ


def test_a_drafter_has_the_precision_of_its_generator():
    card = all_cards()["argen/emoji-llamagen"]
    full, half = (drawn(card, name, sampler="speculative") for name in ("fp32", "bf16"))
    assert (full[1] == half[1]).float().mean() > 0.5


@pytest.mark.skipif(
    not device.has_bf16("cpu"), reason="this CPU has no units for bfloat16: its convolutions are emulated"
)
@pytest.mark.parametrize(
    "command", [["bind", "a blue robot and a green pizza"], ["count", "two apples", "--iterations", "1"]]
)
def test_the_diffusion_tools_draw_in_bfloat16(tmp_path, command):
    images = []
    for dtype in ("fp32", "bf16"):
        file = tmp_path / f"{dtype}.png"
        assert main([*command, "-o", str(file), "--steps", "4", "--dtype", dtype]) == 0
        images.append(np.asarray(Image.open(file).convert("RGB"), np.float32))
    assert np.abs(images[0] - images[1]).mean() < 15


@pytest.mark.parametrize(
    ("kind", "has", "amx", "parameters", "expected"),
    [
        ("cuda", True, False, 1, torch.bfloat16),
        ("cuda", False, False, 10**9, torch.float32),
        ("mps", True, False, 1, torch.bfloat16),
        ("cpu", True, True, 10**9, torch.bfloat16),
        ("cpu", True, True, 10**6, torch.float32),
        ("cpu", True, False, 10**9, torch.float32),
        ("cpu", False, False, 10**9, torch.float32),
    ],
)
def test_auto_asks_the_device(monkeypatch, kind, has, amx, parameters, expected):
    monkeypatch.setattr(device, "has_bf16", lambda device: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert device.auto_dtype(kind, parameters) == expected


def test_auto_casts_what_writes_tokens_and_leaves_the_rest(monkeypatch):
    monkeypatch.setattr(loading, "auto_dtype", lambda device, parameters: torch.bfloat16)
    pipe = argen.load("argen/emoji-llamagen")
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.drafter.dtype} == {torch.bfloat16}
    assert pipe.vq.dtype == torch.float32
    assert argen.load("argen/emoji-vitvqgan").dtype == torch.float32
    assert argen.load("argen/emoji-vitvqgan", dtype="bf16").dtype == torch.bfloat16
    assert argen.load("argen/emoji-sd").unet.dtype == torch.float32  # whose weights are edited
    assert argen.load("argen/emoji-sd", dtype="bf16").unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp8"], "dtype is 'fp8': expected one of auto, fp32, bf16, fp16"),
        (
            ["--dtype", "fp16", "--model", "peizesun/llamagen_t2i:t2i_XL_stage2_512"],
            "dtype is fp16, in which peizesun/llamagen_t2i:t2i_XL_stage2_512 overflows: expected fp32 or bf16",
        ),
    ],
)
def test_an_unsafe_precision_is_refused_before_loading(capsys, tmp_path, arguments, message):
    assert main(["generate", "a castle", "-o", str(tmp_path / "x.png"), *arguments]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torchs_own_precisions_are_taken(dtype, caplog):
    pipe = argen.load("argen/emoji-parti", dtype=dtype, device="cpu")
    assert pipe.transformer.dtype == dtype
    assert loading.loader("cpu", dtype=dtype)("argen/emoji-parti").transformer.dtype == dtype
    assert loading.load_diffusion("argen/emoji-sd", "cpu", dtype).unet.dtype == dtype
    assert not caplog.records  # diffusers warns of float16 on a CPU


def test_other_precisions_of_torch_are_refused():
    with pytest.raises(ValueError, match="dtype is torch.float64: expected auto, fp32, .*or torch.float16"):
        argen.load("argen/emoji-parti", dtype=torch.float64)


def test_float16_on_a_cpu_prints_nothing_else(tmp_path):
    command = ["generate", "a pizza", "--dtype", "fp16", "--device", "cpu", "-o", str(tmp_path / "a.png"), "--json"]
    result = subprocess.run([sys.executable, "-m", "argen", *command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "float16" not in result.stderr
