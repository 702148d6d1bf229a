"""Checkpoint files of every age, wrapped and cut as people have them."""

import json
import logging
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokenizers_img.checkpoint import load_strict, read_state_dict

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([-1.0, 1.0])}
OTHER = {key: value + 10 for key, value in STATE.items()}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"


def same(found: dict, wanted: dict = STATE) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin", "a.safetensors", "0050000"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_any_age_and_name_are_read(tmp_path, name, zipped):
    torch.save({"model": STATE, "steps": 3}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(tmp_path / name))


def test_safetensors_are_known_by_their_content(tmp_path):
    save_file(STATE, tmp_path / "a.bin")
    assert same(read_state_dict(tmp_path / "a.bin"))


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "is a pointer of Git LFS, not the checkpoint: run `git lfs pull`"),
        ("<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"is a web page \(HTML\), not a checkpoint"),
        ("\n  <html lang=en><head></head></html>", "is a web page"),
        ("Entry not found", "is a text, not a checkpoint"),
        ('{"error": "Repository not found"}', "is a text, not a checkpoint"),
        ("", "is empty: fetch it again"),
    ],
)
def test_what_downloads_leave_is_named(tmp_path, suffix, content, said):
    path = tmp_path / f"a.{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as refused:
        read_state_dict(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_files_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / f"a.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 5, 12):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="could not be read as a checkpoint") as refused:
            read_state_dict(path)
        assert "\n" not in str(refused.value)
        assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_settings_are_passed_over_and_objects_refused(tmp_path, zipped):
    settings = {
        "args": Namespace(lr=np.float64(0.1), out=Path("a/b")),
        "loss": np.float32(1.5),
        "steps": np.int64(3),
        "done": np.bool_(True),
        "history": np.zeros(3),
    }
    path = tmp_path / "a.pt"
    torch.save({"model": STATE, **settings}, path, _use_new_zipfile_serialization=zipped)
    assert same(read_state_dict(path))
    torch.save({"model": STATE, "network": nn.Linear(2, 2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"it holds a torch.nn.modules.linear.Linear, which could run") as refused:
        read_state_dict(path)
    assert "\n" not in str(refused.value)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module."]
)
def test_prefixes_of_wrappers_are_taken_away(tmp_path, prefix):
    torch.save({"state_dict": {prefix + key: value for key, value in STATE.items()}}, tmp_path / "a.pt")
    assert same(read_state_dict(tmp_path / "a.pt"))


def test_compiled_layers_and_losses_beside_the_model(tmp_path):
    state = {"model.layers.0._orig_mod.weight": torch.ones(2), "loss.logits": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt").keys() == {"layers.0.weight", "loss.logits"}
    held = {**{f"model.{key}": value for key, value in STATE.items()}, "teacher.weight": torch.ones(1)}
    torch.save(held, tmp_path / "a.pt")
    network = load_strict(nn.Linear(3, 2), read_state_dict(tmp_path / "a.pt"), source="a.pt")
    assert same(network.state_dict())


def test_names_that_begin_with_model_by_right_stay(tmp_path):
    state = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "a.safetensors")
    assert read_state_dict(tmp_path / "a.safetensors").keys() == state.keys()


def test_averages_are_preferred_where_asked_and_said(tmp_path, caplog):
    path = tmp_path / "a.pt"
    torch.save({"model": STATE, "ema": OTHER}, path)
    with caplog.at_level(logging.INFO):
        assert same(read_state_dict(path), OTHER)
        assert same(read_state_dict(path, averaged=False))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: the weights under 'ema' are taken, not those under 'model'",
        f"{path}: the weights under 'model' are taken, not those under 'ema'",
    ]
    torch.save({"ema": OTHER, "steps": 3}, path)
    assert same(read_state_dict(path, averaged=False), OTHER)
    torch.save({"model": STATE, "ema": {"decay": 0.99}}, path)
    assert same(read_state_dict(path))


@pytest.mark.parametrize("torch_files", [False, True])
def test_shards_are_read_by_their_index_or_folder(tmp_path, torch_files):
    save, suffix = (torch.save, "bin") if torch_files else (save_file, "safetensors")
    names = {key: f"model-0000{n}-of-00002.{suffix}" for n, key in enumerate(STATE, 1)}
    for key, name in names.items():
        save({key: STATE[key]}, tmp_path / name)
    index = tmp_path / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert same(read_state_dict(index))
    assert same(read_state_dict(tmp_path))
    if not torch_files:
        index.unlink()
        assert same(read_state_dict(tmp_path))
    else:
        index.write_text("{}")
        with pytest.raises(ValueError, match="is no index of a checkpoint in shards"):
            read_state_dict(index)
    if not torch_files:
        (tmp_path / names["bias"]).unlink()
        with pytest.raises(FileNotFoundError, match="lacks the shards model-00002-of-00002.safetensors: fetch them"):
            read_state_dict(tmp_path)


def test_folders_hold_one_checkpoint(tmp_path):
    with pytest.raises(
        ValueError, match="is a folder: expected a checkpoint file, or a folder with one; it holds none"
    ):
        read_state_dict(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save(OTHER, tmp_path / "pytorch_model.bin")
    assert same(read_state_dict(tmp_path))
    save_file(STATE, tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match="it holds model.safetensors, pytorch_model.bin, second.safetensors"):
        read_state_dict(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        read_state_dict(tmp_path / "none.pt")


def test_weights_are_loaded_in_the_precision_of_the_network():
    half = {key: value.half() for key, value in STATE.items()}
    network = load_strict(nn.Linear(3, 2), half, source="half")
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert same(network.state_dict())
