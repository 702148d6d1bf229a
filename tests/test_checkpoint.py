"""Checkpoint files of every age, wrapped and cut as people have them."""

import json
import logging
import zipfile
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


def same(state: dict, expected: dict = STATE) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


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
    ("content", "message"),
    [
        (POINTER, "is a pointer of Git LFS, not the checkpoint: run `git lfs pull`"),
        ("<!DOCTYPE html>\n<html><body>Sign in</body></html>", r"is a web page \(HTML\), not a checkpoint"),
        ("\n  <html lang=en><head></head></html>", "is a web page"),
        ("Entry not found", "is a text, not a checkpoint"),
        ('{"error": "Repository not found"}', "is a text, not a checkpoint"),
        ("", "is empty: fetch it again"),
    ],
)
def test_what_downloads_leave_is_named(tmp_path, suffix, content, message):
    path = tmp_path / f"a.{suffix}"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
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
    content = {**{f"model.{key}": value for key, value in STATE.items()}, "teacher.weight": torch.ones(1)}
    torch.save(content, tmp_path / "a.pt")
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


@pytest.mark.parametrize("kind", ["model", "net", "network", "params", "generator", "module"])
def test_weights_and_averages_are_found_under_any_usual_name(tmp_path, kind, caplog):
    path = tmp_path / "a.pt"
    for plain, averages in (
        (kind, f"ema_{kind}"),
        (kind, f"{kind}_ema"),
        (f"{kind}_state_dict", f"ema_{kind}_state_dict"),
        (f"{kind}_state_dict", f"{kind}_ema_state_dict"),
    ):
        torch.save({plain: STATE, averages: OTHER, "step": 3}, path)
        caplog.clear()
        assert same(read_state_dict(path), OTHER)
        assert same(read_state_dict(path, averaged=False))
        assert [f"under {plain!r} are taken, not those under {averages!r}" in text for text in caplog.messages] == [
            False,
            True,
        ]
        torch.save({plain: STATE}, path)
        assert same(read_state_dict(path))


MANY = {f"layers.{number}.weight": torch.full((2,), float(number)) for number in range(12)}
MANY_OTHER = {key: value + 100 for key, value in MANY.items()}


@pytest.mark.parametrize(
    "beside",
    [
        {"n_averaged": torch.tensor(3)},
        {"initted": torch.tensor(True), "step": torch.tensor(5)},
        {"val_fid.total": torch.zeros(4, 4), "val_fid.count": torch.tensor(1)},
    ],
)
@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "ema_model.", "ema_model.module."])
def test_what_stands_beside_a_prefix_is_left_out(tmp_path, prefix, beside):
    torch.save({prefix + key: value for key, value in MANY.items()} | beside, tmp_path / "a.pt")
    assert same(read_state_dict(tmp_path / "a.pt"), MANY)


def test_averages_under_a_prefix_are_chosen_and_said(tmp_path, caplog):
    for plain, averages in (("model.", "ema_model."), ("online_model.", "ema_model."), ("net.", "net_ema.")):
        content = {plain + key: value for key, value in MANY.items()} | {
            averages + key: value for key, value in MANY_OTHER.items()
        }
        torch.save({"state_dict": content | {"loss.weight": torch.ones(1)}}, tmp_path / "a.ckpt")
        caplog.clear()
        state = read_state_dict(tmp_path / "a.ckpt")
        assert same({key: state[key] for key in MANY}, MANY_OTHER)
        state = read_state_dict(tmp_path / "a.ckpt", averaged=False)
        assert same({key: state[key] for key in MANY}, MANY)
        assert [text.partition(": the weights under ")[2] for text in caplog.messages] == [
            f"{averages!r} are taken, not those under {plain!r}",
            f"{plain!r} are taken, not those under {averages!r}",
        ]


def test_losses_and_counters_are_no_part_of_a_network():
    content = STATE | {"loss.weight": torch.ones(1), "n_averaged": torch.tensor(2)}
    assert same(load_strict(nn.Linear(3, 2), content, source="a").state_dict())


def test_folders_of_accelerate_and_shards_of_torch_files(tmp_path):
    for name in (
        "optimizer.bin",
        "scheduler.bin",
        "random_states_0.pkl",
        "training_args.bin",
        "scaler.pt",
        "rng_state_0.pth",
    ):
        torch.save({"state": {"step": torch.ones(1)}}, tmp_path / name)
    for number, (key, value) in enumerate(STATE.items(), 1):
        torch.save({key: value}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    assert same(read_state_dict(tmp_path))
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the shards pytorch_model-00002-of-00002.bin"):
        read_state_dict(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    torch.save(OTHER, tmp_path / "pytorch_model.bin")
    assert same(read_state_dict(tmp_path), OTHER)


def test_files_of_other_programs_are_named(tmp_path):
    import gzip
    import pickle
    import zipfile

    path = tmp_path / "a.pt"
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    for data, kind in (
        (gzip.compress(b"a" * 99), "compressed by gzip"),
        (pickle.dumps({"a": np.zeros(3)}), "a pickle that torch did not write"),
        ((tmp_path / "a.npz").read_bytes(), "arrays of NumPy"),
        (b"\x93NUMPY\x01\x00" + b"\0" * 80, "an array of NumPy"),
        ((tmp_path / "z.zip").read_bytes(), "a zip archive of other files"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "an archive of tar"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 80, "a file of HDF5"),
    ):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=f"a.pt is {kind}, not a checkpoint: expected a file of torch or of safetensors"
        ):
            read_state_dict(path)


LARGE = {"weight": torch.randn(300, 200), "bias": torch.randn(300)}  # of which the first is mapped


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [9, 300, 5000, 100_000, -70_000, -1])
def test_a_file_that_is_cut_off_is_one_line(tmp_path, kind, kept):
    path = tmp_path / f"a.{kind}"
    save_file(LARGE, path) if kind == "safetensors" else torch.save(LARGE, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"could not be read as a checkpoint \(the file is cut off.*fetch it again"
    ) as e:
        read_state_dict(path)
    assert "\n" not in str(e.value)


def test_a_storage_that_is_shorter_than_its_tensor_is_refused(tmp_path):
    torch.save(LARGE, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
        for member in whole.infolist():
            content = whole.read(member)
            short.writestr(member.filename, content[:100_000] if len(content) > 100_000 else content)
    with pytest.raises(ValueError, match="a tensor is larger than what is stored of it"):
        read_state_dict(tmp_path / "short.pt")


class Larger:
    """A tensor that says more rows than its storage has."""

    def __reduce__(self):
        storage = torch.ones(100, 200).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (300, 200), (200, 1), False, {})


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_that_is_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"weight": Larger(), "other": torch.ones(300, 200)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="could not be read as a checkpoint"):
        read_state_dict(tmp_path / "a.pt")


def test_negated_and_conjugated_tensors_are_read_right(tmp_path):
    values = torch.randn(300, 200, dtype=torch.complex64)
    for name, value in {
        "negative": torch._neg_view(LARGE["weight"]),
        "conjugate": values.conj(),
        "imaginary": values.conj().imag,
        "small": torch._neg_view(LARGE["bias"]),
        "turned": LARGE["weight"].T,
        "repeated": LARGE["bias"].expand(400, 300),
        "empty": torch.zeros(0, 3),
    }.items():
        torch.save({name: value}, tmp_path / "a.pt")
        read = read_state_dict(tmp_path / "a.pt")[name]
        assert torch.equal(read, value), name
        assert not read.is_neg()
        assert not read.is_conj()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LARGE["weight"].to_sparse(), "layout torch.sparse_coo, expected dense ones"),
        (lambda: LARGE["weight"].to_sparse_csr(), "layout torch.sparse_csr, expected dense ones"),
        (lambda: torch.quantize_per_tensor(LARGE["weight"], 0.1, 0, torch.qint8), "could not be read"),
        (lambda: torch.nested.nested_tensor([LARGE["bias"], LARGE["bias"][:9]]), "could not be read"),
        (lambda: torch.empty(300, 200, device="meta"), "a tensor without numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors_are_one_line(tmp_path, make, message):
    torch.save({"weight": make()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        read_state_dict(tmp_path / "a.pt")
    assert "\n" not in str(error.value)
