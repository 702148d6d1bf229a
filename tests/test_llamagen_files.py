"""LlamaGen checkpoints of one's own: any number of classes, any size, any name."""

from argparse import Namespace

import pytest
import torch
from diffusers import VQModel

import argen
from argen.cli.main import main
from argen.models.llamagen import LlamaGen
from tokenizers_img import llamagen_vq

SIZES = {"n_embed": 96, "dim": 64, "depth": 2, "heads": 1}


def published(vq: VQModel) -> dict[str, torch.Tensor]:
    """Names of diffusers -> LlamaGen's own."""
    pairs = [
        (".down_blocks.", ".conv_blocks."),
        (".up_blocks.", ".conv_blocks."),
        (".mid_block.resnets.0.", ".mid.0."),
        (".mid_block.attentions.0.", ".mid.1."),
        (".mid_block.resnets.1.", ".mid.2."),
        (".resnets.", ".res."),
        (".attentions.", ".attn."),
        ("samplers.0.", "sample."),
        (".conv_shortcut.", ".nin_shortcut."),
        ("conv_norm_out.", "norm_out."),
        (".group_norm.", ".norm."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".proj_out."),
    ]
    state = {}
    for key, value in vq.state_dict().items():
        linear = ("attn" in key or "attentions" in key) and value.ndim == 2
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        state[key] = value[..., None, None] if linear else value
    return state


@pytest.fixture
def files(tmp_path):
    """A trained generator of 10 classes, named after its step, and its tokenizer: f4, 96 codes."""
    torch.manual_seed(0)
    vq = llamagen_vq.network((1, 1, 2), width=32, latent_channels=32, codes=96, code_width=6)
    torch.save({"model": published(vq)}, tmp_path / "tokenizer.pt")
    model = LlamaGen(grid=4, classes=10, **SIZES)
    torch.nn.init.normal_(model.output.weight)
    return tmp_path, model


@pytest.mark.parametrize("name", ["0050000.pt", "last", "c2i_B_256.pt"])
@pytest.mark.parametrize("half", [False, True])
def test_sizes_and_classes_are_read_from_the_tensors(files, name, half):
    folder, model = files
    state = {f"module.{key}": value.half() if half else value for key, value in model.state_dict().items()}
    torch.save({"model": state, "optimizer": {}, "steps": 50000}, folder / name)
    pipe = argen.load(folder / name, tokenizer=folder / "tokenizer.pt", image_size=16)
    config = pipe.transformer.config
    assert (config.n_embed, config.dim, config.depth, config.heads, config.classes, config.grid) == (
        96,
        64,
        2,
        1,
        10,
        4,
    )
    for key, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], atol=1e-3, rtol=1e-3)
        assert value.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    assert pipe("class:9").images[0].size == (16, 16)
    with pytest.raises(ValueError, match="class 10 does not exist: expected 0 to 9"):
        pipe("class:10")


@pytest.mark.parametrize("form", ["lightning", "metric", "averaged", "ema", "params", "net"])
def test_files_of_every_trainer_are_read(files, form):
    folder, model = files
    state = model.state_dict()
    under = {f"model.{key}": value for key, value in state.items()}
    held = {
        "lightning": {"state_dict": under | {"loss.w": torch.ones(1)}, "epoch": 3},
        "metric": {"state_dict": under | {"fid.sum": torch.ones(4, 4)}},
        "averaged": {f"module.{key}": value for key, value in state.items()} | {"n_averaged": torch.tensor(3)},
        "ema": {f"ema_model.{key}": value for key, value in state.items()},
        "params": {"params": state},
        "net": {"net_state_dict": state},
    }
    torch.save(held[form], folder / "a.pt")
    pipe = argen.load(folder / "a.pt", tokenizer=folder / "tokenizer.pt", image_size=16)
    assert all(torch.equal(value, state[key]) for key, value in pipe.transformer.state_dict().items())


def test_the_settings_of_the_training_say_the_size(files):
    folder, model = files
    torch.save({"model": model.state_dict(), "args": Namespace(image_size=16)}, folder / "a.pt")
    (folder / "tokenizer.pt").rename(folder / "vq_ds16_c2i.pt")
    assert argen.load(folder / "a.pt").transformer.config.grid == 4


def test_a_tokenizer_alone_is_read(files):
    tokenizer = argen.load(files[0] / "tokenizer.pt")
    ids = tokenizer.encode(torch.rand(1, 3, 16, 16))
    assert ids.shape == (1, 16)
    assert tokenizer.decode(ids).shape == (1, 3, 16, 16)


def test_what_cannot_be_read_is_asked_for_in_one_short_line(files, capsys):
    folder, model = files
    torch.save(model.state_dict(), folder / "a.pt")
    torch.save({"weight": torch.ones(2)}, folder / "b.pt")
    tokenizer = ["--tokenizer", str(folder / "tokenizer.pt")]
    for options, message in (
        ([str(folder / "a.pt")], "no vq_ds16_c2i.pt lies beside"),
        ([str(folder / "a.pt"), *tokenizer], "does not say the size of its images: give --size"),
        ([str(folder / "a.pt"), *tokenizer, "--size", "18x18"], "expected a multiple of 4"),
        ([str(folder / "a.pt"), *tokenizer, "--size", "16x32"], "expected a square"),
        ([str(folder / "b.pt"), *tokenizer], "holds no LlamaGen"),
        ([str(folder / "none.pt")], "unknown model"),
        (["argen/emoji-parti", *tokenizer], "--tokenizer goes with --model FILE"),
    ):
        command = ["generate", "class:3", "-o", str(folder / "x.png"), "--model", *options]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert len(error) < 400
        assert not (folder / "x.png").exists()


def test_the_command_line_draws_with_ones_own(files, capsys):
    folder, model = files
    torch.save(model.state_dict(), folder / "a.pt")
    out = ["-o", str(folder / "x.png"), "--tokenizer", str(folder / "tokenizer.pt"), "--size", "16x16"]
    assert main(["generate", "class:3", "--model", str(folder / "a.pt"), *out]) == 0
    assert (folder / "x.png").is_file()
