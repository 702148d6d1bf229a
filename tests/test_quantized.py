"""Quantized weights: their numbers, their files, and what a generator draws with them."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

import argen
from argen.cli.main import main
from argen.hub import loading
from argen.models.quantized import Quantization, QuantizedLinear, packed, quantize, rounded, unpacked
from argen.pipelines import saving

IDS = ["argen/emoji-parti", "argen/emoji-llamagen", "argen/emoji-flextok-ar"]


def draw(pipe, seeds: list[int], sampler: str = "sequential") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe("a pizza", len(seeds), sampler=sampler, generator=generator, output_type="latent").tokens


@pytest.fixture
def uncompiled(monkeypatch):
    """As where OpenVINO is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))


def test_weights_are_rounded_to_nearest():
    weight = torch.tensor([[1.27, -0.634, 0.0049, 0.0], [-2.54, 0.02, 0.01, 1.0]])
    integers, scales = rounded(weight, 8, 0)
    torch.testing.assert_close(scales, torch.tensor([[0.01], [0.02]]))
    assert integers.tolist() == [[127, -63, 0, 0], [-127, 1, 0, 50]]
    integers, scales = rounded(weight, 4, 2)
    torch.testing.assert_close(scales, torch.tensor([[1.27, 0.0049], [2.54, 1.0]]) / 7)
    assert integers.tolist() == [[7, -3, 7, 0], [-7, 0, 0, 7]]
    assert rounded(torch.zeros(1, 4), 8, 0)[0].tolist() == [[0] * 4]


def test_two_weights_of_4_bits_share_a_byte():
    integers = torch.arange(-8, 8, dtype=torch.int8)[None]
    data = packed(integers)
    assert data[0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]  # the even column low, 8 added
    assert torch.equal(unpacked(data).to(torch.int8) - 8, integers)


@pytest.mark.parametrize(("bits", "group", "error"), [(8, 0, 0.01), (8, 16, 0.008), (4, 16, 0.12), (4, 0, 0.2)])
def test_a_layer_gives_about_what_it_gave(bits, group, error):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(5, 64)
    quantized = QuantizedLinear(*rounded(layer.weight, bits, group), layer.bias, bits)
    assert (quantized(x) - layer(x)).norm() / layer(x).norm() < error
    half = quantized.to(torch.bfloat16)
    assert half.scales.dtype == torch.float32
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", IDS)
def test_a_generator_keeps_most_of_its_tokens(name, uncompiled):
    plain = draw(argen.load(name), [0, 1])
    pipe = argen.load(name, quantize="int8")
    assert pipe.transformer.compiled is None
    assert (draw(pipe, [0, 1]) == plain).float().mean() > 0.4  # one token that differs changes what follows
    layers = [layer for layer in pipe.transformer.modules() if isinstance(layer, QuantizedLinear)]
    assert {layer.qweight.dtype for layer in layers} == {torch.int8}
    assert pipe.transformer.dtype == torch.float32


def test_the_heads_of_a_network_of_4_bits_keep_8():
    pipe = argen.load("argen/emoji-llamagen", quantize="int4")
    assert pipe.transformer.output.bits == 8
    assert pipe.transformer.layers[0].attention.wqkv.bits == 4
    assert not isinstance(pipe.transformer.cls_embedding, QuantizedLinear)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_folder_is_written_and_loaded(tmp_path, capsys, bits, uncompiled):
    folder, name = tmp_path / "small", "argen/emoji-llamagen"
    assert main(["quantize", name, "--bits", str(bits), "-o", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] < report["bytes_before"] / 2
    with safe_open(folder / "transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        how = json.loads(file.metadata()["quantization"])
        assert "layers.0.attention.wqkv.qweight" in file.keys()  # noqa: SIM118 - no mapping
        assert "layers.0.attention.wqkv.weight" not in file.keys()  # noqa: SIM118
    assert len(how.pop("base_sha256")) == 64
    assert how == {"bits": bits, "group": {8: 0, 4: 32}[bits], "method": "rtn", "symmetric": True}
    assert torch.equal(draw(argen.load(folder), [3]), draw(argen.load(name, quantize=f"int{bits}"), [3]))
    assert argen.load(folder).defaults == argen.load(name).defaults
    assert main(["quantize", str(folder), "-o", str(tmp_path / "again")]) == 2
    assert "quantized already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("name", IDS)
def test_on_a_cpu_it_is_compiled_and_an_image_does_not_depend_on_its_batch(name):
    pipe = argen.load(name, quantize="int8")
    assert pipe.transformer.compiled is not None
    together = draw(pipe, [0, 1, 2])
    assert torch.equal(torch.cat([draw(pipe, [seed]) for seed in (0, 1, 2)]), together)
    pipe.transformer.compiled = None
    assert (draw(pipe, [0, 1, 2]) == together).float().mean() > 0.2  # activations are rounded, too


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_a_server_compiles_what_it_quantizes():
    assert loading.loader("cpu", quantize="int8")("argen/emoji-parti").transformer.compiled is not None


def test_a_server_quantizes_what_it_can(uncompiled):
    load = loading.loader("cpu", quantize="int8")
    assert loading.quantized(load("argen/emoji-parti"))
    assert not loading.quantized(load("argen/emoji-xar"))
    load("argen/emoji-vitvqgan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["argen/emoji-parti", "--bits", "3"], "bits is 3: expected 8 or 4"),
        (["argen/emoji-parti", "--group", "3"], "group is 3: expected an even number, or 0 for whole rows"),
        (["argen/emoji-xar"], "quantize is for networks that decode token by token, not for a XAR"),
        (["argen/emoji-vitvqgan"], "is a tokenizer"),
        (["argen/nothing"], "argen/nothing"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(tmp_path, capsys, arguments, message):
    assert main(["quantize", *arguments, "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="a Sequential has no layers to quantize"):
        quantize(nn.Sequential(nn.Conv2d(1, 1, 1)), Quantization())


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_few_rows_are_multiplied_by_the_integers_themselves(rows, monkeypatch):
    layer = QuantizedLinear(*rounded(torch.randn(48, 64), 8, 0), torch.randn(48), 8)
    x = torch.randn(1, rows, 64)
    wanted = torch.nn.functional.linear(x, layer.dequantized(), layer.bias)
    if rows < 5:
        monkeypatch.setattr(QuantizedLinear, "dequantized", lambda self: pytest.fail("unpacked"))
    torch.testing.assert_close(layer(x), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")
@pytest.mark.parametrize("memory", [0, 10**9])
def test_quantized_weights_are_compiled_where_memory_holds_a_copy(monkeypatch, memory):
    monkeypatch.setattr(loading, "free", lambda device: memory)
    pipe = argen.load("argen/emoji-parti", quantize="int8", device="cpu")
    assert (pipe.transformer.compiled is not None) == (memory > 0)


def test_a_quantized_pipeline_is_saved_as_it_is(tmp_path):
    pipe = argen.load("argen/emoji-llamagen", quantize="int8")
    pipe.set_progress_bar_config(disable=True)

    def tokens(pipe):
        return pipe("a pizza", generator=torch.Generator().manual_seed(0), output_type="latent").tokens

    pipe.save_pretrained(tmp_path / "saved")
    again = argen.load(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(again), tokens(pipe))
    again.save_pretrained(tmp_path / "again")
    assert argen.load(tmp_path / "again").transformer.quantization == pipe.transformer.quantization
    names = ["saved/transformer", "again/transformer"]
    assert [len(list((tmp_path / name).glob("*.safetensors"))) for name in names] == [1, 1]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qweight", lambda tensor: tensor[1:], "expected int8 or packed uint8 of a layer"),
        ("qweight", lambda tensor: tensor.float(), "expected int8 or packed uint8 of a layer"),
        ("qweight", lambda tensor: tensor[0], "expected int8 or packed uint8 of a layer"),
        (
            "scales",
            lambda tensor: tensor[1:],
            r"scales do not fit its weights, they are torch.float32 \[\d+, 1\]: expected torch.float32 \[\d+, G\]",
        ),
        ("scales", lambda tensor: tensor[:, 0], "scales do not fit its weights"),
        ("scales", lambda tensor: tensor * float("nan"), "scales are not finite"),
    ],
)
def test_damaged_weights_are_refused_when_they_are_read(tmp_path, name, change, message):
    from safetensors.torch import load_file, save_file

    pipe = argen.load("argen/emoji-parti", quantize="int8")
    pipe.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    key = f"decoder_layers.0.mlp.up_proj.{name}"
    save_file(state | {key: change(state[key]).contiguous()}, file)  # which drops the metadata, too
    with pytest.raises(ValueError, match=message):
        argen.load(tmp_path / "saved")
    save_file(state, file)
    assert argen.load(tmp_path / "saved").transformer.quantization == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, capsys, value):
    pipe = argen.load("argen/emoji-parti")
    pipe.transformer.decoder_layers[1].mlp.up_proj.weight.data[3, 2] = value
    pipe.save_pretrained(tmp_path / "damaged")
    out, name = tmp_path / "out", "decoder_layers.1.mlp.up_proj.weight"
    capsys.readouterr()
    for command in (
        *(["quantize", str(tmp_path / "damaged"), "--method", method, "-o", str(out)] for method in ("rtn", "gptq")),
        ["generate", "a pizza", "--model", str(tmp_path / "damaged"), "--quantize", "int4", "-o", f"{out}.png"],
    ):
        assert main(command) == 2
        line = capsys.readouterr().err
        assert f"{name} holds numbers that are not finite: the file is damaged, fetch or train it again" in line
        assert line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


SLOW = """
import signal, sys, time
import argen.hub.quantized as quantized
from argen.cli.main import main

def save_file(*_):
    print("writing", flush=True)
    time.sleep(60)

quantized.save_file = save_file
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has children ignore it
sys.exit(main(["quantize", "argen/emoji-parti", "-o", sys.argv[1]]))
"""


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_leaves_nothing_half_written(tmp_path, sent):
    command = [sys.executable, "-c", SLOW, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "writing\n"
        assert [path.name for path in tmp_path.iterdir()][0].startswith(".argen-")
        number = getattr(signal, sent)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert errors == "argen quantize: stopped\n"
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_is_deleted_by_the_next_run(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    running, (left,) = tmp_path / f".argen-{os.getpid()}-abcdefgh", tmp_path.iterdir()
    running.mkdir()
    process.kill()
    process.communicate()
    assert left.exists()
    assert main(["quantize", "argen/emoji-parti", "-o", str(tmp_path / "out")]) == 0
    assert sorted(tmp_path.iterdir()) == [running, tmp_path / "out"]


def test_a_folder_that_another_run_has_made_since_is_kept(tmp_path, capsys, monkeypatch):
    write = saving.write_network

    def writes_late(*arguments):
        write(*arguments)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/theirs").write_text("x")

    monkeypatch.setattr(saving, "write_network", writes_late)
    assert main(["quantize", "argen/emoji-parti", "-o", str(tmp_path / "out")]) == 2
    assert f"{tmp_path}/out is there already: choose another folder\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_path_through_a_folder_that_is_not_there_makes_none(tmp_path):
    assert main(["quantize", "argen/emoji-parti", "-o", str(tmp_path / "nosuch/../small")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are of POSIX")
def test_where_there_is_no_room_it_is_one_line_and_nothing_stays(tmp_path):
    for command in (["quantize", "argen/emoji-parti", "-o", "a/b/out"], ["generate", "star", "-o", "out.png"]):
        limited = f"ulimit -f 4; exec {shlex.join([sys.executable, '-m', 'argen', *command])}"
        result = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2
        assert result.stderr == (
            f"argen {command[0]}: error: {command[-1]}: file too large: raise the limit of file sizes (ulimit -f), or "
            "write elsewhere\n"
        )
        assert not list(tmp_path.iterdir())


def network_of(*columns: int) -> nn.Module:
    layers = nn.ModuleList([nn.Sequential(nn.Linear(count, 8)) for count in columns])
    return nn.ModuleDict({"layers": layers, "output": nn.Linear(30, 8)})


def test_a_group_that_fits_no_layer_is_refused_and_one_that_fits_some_is_logged(caplog):
    message = (
        "group is 32, and layers have 24, 40 columns: expected an even number that divides them, or 0 for whole rows"
    )
    with pytest.raises(ValueError, match=message):
        quantize(network_of(24, 40), Quantization(4, 32))
    network = network_of(24, 64)
    quantize(network, Quantization(4, 32))
    assert [layer[0].scales.shape[1] for layer in network.layers] == [1, 2]
    assert network.output.bits == 8
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 layers have one scale a row: group 32 does not divide their 24 columns"
    ]
    with pytest.raises(ValueError, match="group is 32.0: expected an even number"):
        Quantization(4, 32.0)
    with pytest.raises(ValueError, match="bits is 4, and a layer has 15 columns, which are not even: choose 8"):
        quantize(network_of(15), Quantization(4))


def test_a_group_that_fits_no_layer_is_one_line_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("argen.hub.loading._prepared", lambda *_: pytest.fail("weights were read"))
    for method in ("rtn", "gptq"):
        command = ["quantize", "argen/emoji-parti", "--bits", "4", "--group", "1000", "--method", method]
        assert main([*command, "-o", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err
        assert re.search(r"group is 1000, and layers have [\d, ]+ columns: expected an even number that divides", line)
        assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "saved"
    assert main(["quantize", "argen/emoji-parti", "--bits", "4", "-o", str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, r"has 4 bits and \d+ scales a row, and by the metadata of its file \(bits 8, group 32\) 8 and"),
        ({"group": 64}, r"has 4 bits and \d+ scales a row, and by the metadata of its file \(bits 4, group 64\) 4 and"),
        ({"group": 0}, r"by the metadata of its file \(bits 4, group 0\) 4 and 1: quantize the model again"),
        ({"bits": 3}, "bits is 3: expected 8 or 4"),
        ({"bits": "4"}, "bits is '4': expected a whole number"),
        ({"bits": True}, "bits is True: expected a whole number"),
        ({"group": None}, "group is None: expected a whole number"),
        ({"group": 3}, "group is 3: expected an even number"),
        ({"method": "awq"}, "method is awq: expected rtn, gptq or rsq"),
        ({"method": 7}, "method is 7: expected a name"),
        ({"symmetric": False}, "symmetric is False: expected true"),
        ("{}", "'bits' is missing"),
        ("[]", "expected an object with bits, group and method"),
        ("4", "expected an object with bits, group and method"),
        ("{", "is no JSON"),
    ],
)
def test_metadata_that_do_not_fit_are_one_line(tmp_path, capsys, quantized_folder, changes, message):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "folder"
    shutil.copytree(quantized_folder, folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    if isinstance(changes, dict):
        changes = json.dumps(json.loads(metadata["quantization"]) | changes)
    save_file(load_file(file), file, metadata | {"quantization": changes})
    assert main(["generate", "a cat", "--model", str(folder), "-o", str(tmp_path / "a.png")]) == 2
    line = capsys.readouterr().err
    assert re.search(message, line), line
    assert "quantize the model again" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_scales_of_another_precision_are_one_line(tmp_path, quantized_folder, dtype):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "folder"
    shutil.copytree(quantized_folder, folder)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    state, name = load_file(file), "decoder_layers.0.mlp.up_proj.scales"
    save_file(state | {name: state[name].to(dtype)}, file)
    with pytest.raises(
        ValueError, match=f"{name} do not fit its weights, they are {dtype}.*expected torch.float32"
    ) as e:
        argen.load(folder)
    assert "\n" not in str(e.value)
    assert str(e.value).startswith(f"the weights in {folder} cannot be used: {name}")
    assert str(e.value).endswith("quantize the model again")


NEVER = "read before it was refused"


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("argen/emoji-xar", {"quantize": "int8"}, "quantize is for networks that decode token by token, not for a XAR"),
        ("OliverRen/xAR:xAR-H", {"quantize": "int8"}, "quantize is for networks that .*, not for a XAR"),
        ("OliverRen/xAR:xAR-H", {"compile": True}, "compile is for networks that decode .*, not for a XAR"),
        ("AILab-CVC/seed-llama-8b-sft", {"compile": True}, "not for a LlamaForCausalLM"),
        ("AILab-CVC/seed-llama-8b-sft", {"attention": "sdpa-math"}, "cannot be chosen for a LlamaForCausalLM"),
        ("EPFL-VILAB/flextok_d12_d12_in1k", {"quantize": "int8"}, "not for a model of kind tokenizer"),
        ("argen/emoji-sd", {"compile": True}, "compile is for generators of tokens, not for a diffusion pipeline"),
        ("FoundationVision/LlamaGen:c2i_3B_384", {"offload": "model"}, "offload on cpu is for a generator that reads"),
        ("peizesun/llamagen_t2i:t2i_XL_stage1_256", {"dtype": "fp16"}, "overflows: expected fp32 or bf16"),
        ("FoundationVision/LlamaGen:c2i_3B_384", {"dtype": "bf16", "compile": True}, "compile takes the dtype fp32"),
        ("FoundationVision/LlamaGen:c2i_3B_384", {"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch, model, options, message):
    for name in ("argen.hub.loading._load", "argen.hub.loading.check_memory"):
        monkeypatch.setattr(name, lambda *_: pytest.fail(NEVER))
    with pytest.raises(ValueError, match=message):
        argen.load(model, **{"device": "cpu"} | options)
    if "generator" not in (card := argen.hub.cards.find_card(model)).kind:
        return
    flags = [part for name, value in options.items() for part in ([f"--{name}"] + [value] * (value is not True))]
    flags += [] if "device" in options else ["--device", "cpu"]
    table = tmp_path / "t.csv"
    table.write_text(f"prompt,model\na cat,argen/emoji-parti\nclass:1,{card.id}\n")
    for command in (
        ["generate", "class:1", "--model", model, "-o", str(tmp_path / "a.png")],
        ["grid", "class:1", "--model", model, "--x", "seed=0,1", "-o", str(tmp_path / "a.png")],
        ["batch", str(table), "-o", str(tmp_path / "out")],
        ["eval", "emoji", "--model", model, "--out", str(tmp_path / "out")],
    ):
        assert main([*command, *flags]) == 2, command
        line = capsys.readouterr().err
        assert re.search(message, line), line
        assert line.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv"]


def test_the_network_of_a_quantized_folder_is_not_loaded_alone(quantized_folder):
    for path in (
        quantized_folder / "transformer",
        quantized_folder / "transformer/diffusion_pytorch_model.safetensors",
    ):
        with pytest.raises(ValueError, match="is the network of a quantized pipeline: load the folder"):
            argen.load(path)


def test_of_a_saved_folder_it_is_refused_before_too(tmp_path, monkeypatch, quantized_folder):
    argen.load("argen/emoji-xar").save_pretrained(tmp_path / "xar")
    (tmp_path / "xAR-B.pth").write_bytes(b"PK")
    monkeypatch.setattr("argen.hub.loading._load", lambda *_: pytest.fail(NEVER))
    for folder, options, message in (
        (quantized_folder, {"quantize": "int8"}, "the model is quantized already"),
        (quantized_folder, {"offload": "model"}, "offload on cpu is for a generator that reads text through T5"),
        (tmp_path / "xar", {"quantize": "int4"}, "not for a XAR"),
        (tmp_path / "xar", {"compile": True}, "not for a XAR"),
        (tmp_path / "xAR-B.pth", {"quantize": "int4"}, "not for a XAR"),
    ):
        with pytest.raises(ValueError, match=message):
            argen.load(folder, device="cpu", **options)
