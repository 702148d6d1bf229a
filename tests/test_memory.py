"""Memory: weights are held once, what is too large is said before, many images are split, prompts are encoded once."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import argen
from argen import device
from argen.cli.main import main
from argen.device import ON_DEMAND
from argen.files import WEIGHTS
from argen.hub import loading, memory
from argen.hub.cards import list_models
from argen.hub.options import LoadOptions
from argen.jobs.messages import error_message
from argen.models import prompt_cache, t5
from argen.models.llamagen import LlamaGen
from argen.models.quantized import Quantization, QuantizedLinear, quantize
from argen.pipelines.llamagen import LlamaGenPipeline
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.mapped import as_stored, unfilled

STATE = {"weight": torch.randn(300, 200), "bias": torch.randn(300)}
SIZES = {"n_embed": 64, "grid": 4, "dim": 32, "depth": 2, "heads": 4}


def saved(state: dict, folder: Path, kind: str) -> Path:
    path = folder / f"a.{kind}"
    save_file(state, path) if kind == "safetensors" else torch.save({"model": state, "steps": 1}, path)
    return path


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_each_tensor_is_released_alone(tmp_path, kind):
    state = read_state_dict(saved(STATE, tmp_path, kind))
    assert all(torch.equal(state[name], value) for name, value in STATE.items())
    storage = weakref.ref(state["weight"].untyped_storage())
    gc.disable()  # as while models are loaded
    try:
        state.pop("weight")
        assert storage() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_writing_into_a_tensor_changes_no_file(tmp_path, kind):
    path = saved(STATE, tmp_path, kind)
    before = path.read_bytes()
    read_state_dict(path)["weight"].zero_()
    assert path.read_bytes() == before


def test_tensors_that_share_numbers_share_them_when_read(tmp_path):
    weight = torch.randn(300, 200)
    state = read_state_dict(saved({"a": weight, "rows": weight[3:5]}, tmp_path, "pt"))
    assert torch.equal(state["rows"], weight[3:5])
    state["a"][3, 0] = 7
    assert state["rows"][0, 0] == 7


def test_a_network_takes_no_memory_before_it_is_read():
    network = unfilled(LlamaGen, **SIZES)
    assert all(part.is_meta for part in network.parameters() if part.ndim > 1)
    real = LlamaGen(**SIZES)
    assert torch.equal(network.freqs_cis, real.freqs_cis)
    loaded = load_strict(network, real.state_dict(), source="x")
    assert not any(part.is_meta for part in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.layers[0].attention.wqkv.weight.data_ptr() == real.layers[0].attention.wqkv.weight.data_ptr()


def test_numbers_are_cast_once_and_to_the_same(tmp_path):
    half = {name: value.bfloat16() for name, value in STATE.items()}
    assert load_strict(nn.Linear(200, 300), half, source="x").weight.dtype == torch.float32
    with as_stored():
        layer = load_strict(unfilled(nn.Linear, 200, 300), half, source="x")
    assert layer.weight.dtype == torch.bfloat16
    network = nn.Sequential(layer)
    loading.settle(network, [torch.float32])
    assert torch.equal(network[0].weight, half["weight"].float())


def test_a_quantized_layer_releases_its_source():
    network = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(64, 64)) for _ in range(3)])}).bfloat16()
    sources = [weakref.ref(part) for part in network.modules() if isinstance(part, nn.Linear)]
    expected = nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(64, 64)) for _ in range(3)])})
    expected.load_state_dict(network.state_dict())
    quantize(expected, Quantization(8))
    quantize(network, Quantization(8), [torch.float32])
    assert not any(source() for source in sources)
    for layer, other in zip(network.modules(), expected.modules(), strict=True):
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(layer.qweight, other.qweight)
            assert torch.equal(layer.scales, other.scales)


@pytest.fixture
def t5_folder(tmp_path):
    """A tiny T5 with the shipped text tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "emoji-clip")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/prompts"


@pytest.fixture
def reads(monkeypatch):
    """How often the weights of a T5 were read, and how often it ran."""
    counts = {"read": 0, "run": 0}
    read, run = T5EncoderModel.from_pretrained, T5EncoderModel.forward

    def counted(name, **kwargs):
        counts["read"] += 1
        return read(name, **kwargs)

    def forward(self, *args, **kwargs):
        counts["run"] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", counted)
    monkeypatch.setattr(T5EncoderModel, "forward", forward)
    return counts


def features(encoder, tokenizer, texts, length=8):
    return t5.text_features(encoder, tokenizer, texts, torch.device("cpu"), length)


def on_demand(folder):
    token = ON_DEMAND.set(True)
    try:
        return t5.read_t5(str(folder))
    finally:
        ON_DEMAND.reset(token)


def test_features_are_the_same_with_and_without_the_disk(t5_folder, cache, reads):
    texts = ["a red apple", "a cat", "a red apple"]
    encoder, tokenizer = t5.read_t5(str(t5_folder))
    first = features(encoder, tokenizer, texts)
    assert (reads["run"], len(list(cache.iterdir()))) == (2, 2)
    again = features(*on_demand(t5_folder), texts)
    assert reads == {"read": 1, "run": 2}  # nothing was read again
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with torch.no_grad():
        alone = encoder(**tokenizer(["a cat"], max_length=8, padding="max_length", return_tensors="pt"))
    assert torch.equal(first[0][1], alone.last_hidden_state[0])
    assert first[0].dtype == torch.bfloat16


def test_an_offloaded_encoder_is_read_once_for_a_table_and_released(t5_folder, cache, reads):
    encoder, tokenizer = on_demand(t5_folder)
    assert not list(encoder.parameters())
    features(encoder, tokenizer, ["a cat", "a dog", "a pizza"])
    assert reads["read"] == 1
    assert encoder.network is None
    features(encoder, tokenizer, ["a taxi"])
    assert reads["read"] == 2


def test_a_precision_and_other_weights_have_features_of_their_own(t5_folder, cache):
    encoder, tokenizer = t5.read_t5(str(t5_folder))
    features(encoder, tokenizer, ["a cat"])
    wide = features(encoder.float(), tokenizer, ["a cat"])[0]
    later, _ = on_demand(t5_folder)
    loading.settle(later, [torch.float32])
    assert torch.equal(features(later, tokenizer, ["a cat"])[0], wide)
    assert len(list(cache.iterdir())) == 2
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight.mul_(2)
    encoder.save_pretrained(t5_folder)
    other, _ = t5.read_t5(str(t5_folder))
    assert not torch.equal(features(other.float(), tokenizer, ["a cat"])[0], wide)


def test_a_damaged_file_is_written_again_and_old_ones_go(t5_folder, cache, reads, monkeypatch):
    encoder, tokenizer = t5.read_t5(str(t5_folder))
    first = features(encoder, tokenizer, ["a cat"])[0]
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert torch.equal(features(encoder, tokenizer, ["a cat"])[0], first)
    assert file.read_bytes() == whole
    monkeypatch.setattr(prompt_cache, "MAX_BYTES", 2 * len(whole))
    for text in ("a dog", "a taxi", "a pizza"):
        features(encoder, tokenizer, [text])
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_keeps_nothing(t5_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path / "file"))
    assert features(*t5.read_t5(str(t5_folder)), ["a cat"])[0].shape == (1, 8, 16)


def test_the_folder_is_where_others_keep_theirs(monkeypatch):
    monkeypatch.delenv("ARGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert prompt_cache.folder() == Path("/caches/argen/prompts")


@pytest.fixture
def t2i(t5_folder, tmp_path, monkeypatch):
    """A saved LlamaGen of captions with a T5."""
    shipped = argen.load("argen/emoji-llamagen")
    torch.manual_seed(0)
    codes = shipped.vq.config.n_embed
    network = LlamaGen(**SIZES | {"n_embed": codes}, caption_dim=16, caption_length=8).eval()
    nn.init.normal_(network.output.weight, std=0.5)
    monkeypatch.setattr("argen.pipelines.llamagen.clean_caption", lambda text: text)
    pipe = LlamaGenPipeline(network, shipped.vq, *t5.read_t5(str(t5_folder)))
    pipe.save_pretrained(tmp_path / "t2i")
    return tmp_path / "t2i"


def draw(pipe, prompts=("a cat", "a dog"), **kwargs):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    return pipe(list(prompts), generator=generators, output_type="latent", **kwargs)


def test_on_a_cpu_a_t5_is_offloaded(t2i, cache, reads):
    reads["read"] = 0
    expected = draw(argen.load(t2i)).tokens
    assert reads["read"] == 1
    pipe = argen.load(t2i, offload="model", device="cpu")
    assert not list(pipe.text_encoder.parameters())
    assert torch.equal(draw(pipe).tokens, expected)
    assert reads["read"] == 1
    assert torch.equal(draw(loading.loader("cpu", offload="model")(str(t2i))).tokens, expected)
    with pytest.raises(ValueError, match="the text encoder is offloaded, so that the pipeline cannot be saved"):
        pipe.save_pretrained(t2i.parent / "again")


def test_a_table_encodes_its_prompts_first(t2i, cache, reads, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("prompt\na cat\na dog\na pizza\na cat\n")
    reads["read"] = 0
    arguments = ["--model", str(t2i), "--offload", "model", "--device", "cpu", "--json"]
    assert main(["batch", str(table), "-o", str(tmp_path / "out"), *arguments]) == 0
    assert reads["read"] == 1
    assert len(json.loads(capsys.readouterr().out)["files"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--offload", "all"], "offload is 'all': expected one of model"),
        (["--offload", "model", "--device", "cpu"], "offload on cpu is for a generator that reads text through T5"),
    ],
)
def test_what_cannot_be_offloaded_is_one_line(tmp_path, capsys, arguments, message):
    assert main(["generate", "a cat", "-o", str(tmp_path / "a.png"), *arguments]) == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1


def test_a_server_offloads_what_it_can():
    loading.loader("cpu", offload="model")("argen/emoji-vitvqgan")


def test_on_a_gpu_only_the_networks_that_work_are_there(monkeypatch):
    pipe = argen.load("argen/emoji-llamagen")
    expected = draw(pipe).tokens
    images = pipe.images(expected, "pt")
    pipe._offloaded_from, there = torch.device("cpu"), []  # which stands for a GPU
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            monkeypatch.setattr(
                part, "to", lambda where, name=name: there.append(f"{name} {isinstance(where, str)}"), raising=False
            )
    assert torch.equal(draw(pipe).tokens, expected)
    moves = [move.split()[0] for move in there if move.endswith("False")]
    assert moves == ["transformer", "drafter", "text_encoder", "transformer", "drafter"]
    there.clear()
    assert torch.equal(pipe.images(expected, "pt"), images)
    assert [move for move in there if move.endswith("False")][0] == "vq False"


@pytest.mark.parametrize("name", ["argen/emoji-llamagen", "argen/emoji-parti", "argen/emoji-control"])
@pytest.mark.parametrize("sampler", ["auto", "jacobi"])
def test_images_do_not_depend_on_how_many_fit(monkeypatch, name, sampler):
    pipe = argen.load(name)
    prompts = ["a cat", "a dog", "a pizza", "a taxi", "a cup"]
    whole = draw(pipe, prompts, sampler=sampler)
    monkeypatch.setattr(memory, "free", lambda device: 0)
    assert memory.images_at_once(5, 1, "cpu") == 1
    monkeypatch.setattr("argen.pipelines.base.images_at_once", lambda count, *_: 2)
    decided = []
    callback = lambda pipe, step, cells, values: decided.append(cells)  # noqa: E731
    parts = draw(pipe, prompts, sampler=sampler, callback_on_step_end=callback)
    assert torch.equal(parts.tokens, whole.tokens)
    assert (parts.origins is None) == (whole.origins is None)
    assert decided == sorted(decided)
    assert decided[-1] == whole.tokens.shape[1]


def test_a_stopped_request_resumes_in_parts(monkeypatch):
    pipe = argen.load("argen/emoji-parti")
    prompts, generators = ["a cat"] * 3, lambda: [torch.Generator().manual_seed(seed) for seed in range(3)]
    whole = [step.tokens for step in pipe.stream(prompts, generators())][-1]
    monkeypatch.setattr("argen.pipelines.base.images_at_once", lambda count, *_: 2)
    steps = pipe.stream(prompts, generators())
    step = next(step for step in steps if (step.tokens[:2] >= 0).all())
    assert (step.tokens[2] < 0).any()
    assert torch.equal([step.tokens for step in pipe.stream(prompts, generators(), tokens=step.tokens)][-1], whole)


def test_images_at_once_are_planned(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 10_000)
    assert memory.images_at_once(4, 2000, "cpu") == 4
    assert memory.images_at_once(9, 2000, "cpu") == 3  # 4 + 4 + 1 are no fewer parts
    assert memory.images_at_once(3, 10**9, "cpu") == 1


GB = 10**9


@pytest.mark.parametrize(
    ("model", "options", "available", "message"),
    [
        (
            "FoundationVision/LlamaGen:c2i_3B_384",
            {},
            4 * GB,
            "12.7 GB for its weights in fp32.*choose quantize int8 or quantize int4",
        ),
        ("FoundationVision/LlamaGen:c2i_3B_384", {"dtype": "fp32"}, 8 * GB, "choose dtype bf16 or quantize int8"),
        (
            "FoundationVision/LlamaGen:c2i_3B_384",
            {"quantize": "int8"},
            GB,
            "3.4 GB for its weights in int8.*a smaller model",
        ),
        ("peizesun/llamagen_t2i:t2i_XL_stage1_256", {"quantize": "int8"}, 2 * GB, "choose offload model"),
        ("OliverRen/xAR:xAR-H", {}, GB, "choose a smaller model"),
    ],
)
def test_too_little_memory_is_said_before_loading(monkeypatch, model, options, available, message):
    monkeypatch.setattr(memory, "free", lambda device: available)
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: type("Swap", (), {"free": 0}))
    monkeypatch.setattr(loading, "_load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message) as error:
        argen.load(model, **options)
    assert "\n" not in str(error.value)


def test_what_may_fit_is_not_refused(monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 3 * GB)
    monkeypatch.setattr(memory.psutil, "swap_memory", lambda: type("Swap", (), {"free": 5 * GB}))
    memory.check_memory("FoundationVision/LlamaGen:c2i_3B_384", LoadOptions(), torch.device("cpu"))  # auto, swap
    memory.check_memory("no/such", LoadOptions(), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_the_size_of_a_file_is_in_its_header(tmp_path, kind):
    assert memory.size_of(saved(STATE, tmp_path, kind)).parameters == 300 * 201


def test_a_container_has_its_own_limit(tmp_path, monkeypatch):
    group = tmp_path / "memory/group"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("5000\n")
    (group / "memory.usage_in_bytes").write_text("4000\n")
    (group / "memory.stat").write_text("cache 3\ntotal_inactive_file 1500\n")
    monkeypatch.setattr(device, "CGROUPS", tmp_path)
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, read=Path.read_text: "4:memory:/group\n0::/\n" if str(self) == "/proc/self/cgroup" else read(self),
    )
    assert memory.free("cpu") == 2500


def allocated(size: int) -> Exception:
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (lambda: allocated(2**60), "1152921504.6 GB more were asked for"),
        (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.1 GB more"),
        (lambda: MemoryError("Unable to allocate 3.73 GiB for an array with shape (1000,)"), "4.0 GB more"),
        (lambda: MemoryError(), "no more can be had"),
        (lambda: OSError(12, "Cannot allocate memory"), "no more can be had"),
    ],
)
def test_used_up_memory_is_one_line_everywhere(monkeypatch, tmp_path, capsys, make, asked):
    error = make()
    line = memory.out_of_memory(error)
    assert asked in line
    assert "quantize int8 or int4, offload model" in line
    assert error_message(error) == line

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("argen.cli.generate.load_model", fail)
    assert main(["generate", "a cat", "-o", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err == f"argen generate: error: {line}\n"


def test_other_errors_are_not_about_memory():
    assert memory.out_of_memory(RuntimeError("shapes do not match")) is None
    assert memory.out_of_memory(ValueError("out of memory")) is None


def test_the_memory_of_every_model_is_listed(monkeypatch, capsys):
    monkeypatch.setattr("argen.device.pick", lambda name=None: torch.device("cpu"))
    monkeypatch.setattr(memory, "free", lambda device: 5 * GB)
    assert main(["models", "--memory", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["id"]: row for row in report["models"]}
    assert list(rows) == [card.id for card in list_models()]
    t2i = rows["peizesun/llamagen_t2i:t2i_XL_stage1_256"]
    assert t2i["bytes"]["fp32"] == pytest.approx(4 * (849.6e6 + 1223.5e6), rel=0.001)
    assert t2i["fits"] == ["int8", "int4"]
    assert rows["OliverRen/xAR:xAR-B"]["bytes"]["int8"] is None
    assert main(["models", "--memory"]) == 0
    assert "5.0 GB are free on cpu" in capsys.readouterr().out


def test_what_fits_counts_what_running_needs(monkeypatch, capsys):
    monkeypatch.setattr("argen.device.pick", lambda name=None: torch.device("cpu"))
    name = "FoundationVision/LlamaGen:c2i_B_256"

    def row(available: float) -> dict:
        monkeypatch.setattr(memory, "free", lambda device: available)
        assert main(["models", "--memory", name, "--json"]) == 0
        (only,) = json.loads(capsys.readouterr().out)["models"]
        return only

    weights, running = row(GB)["bytes"]["fp32"], row(GB)["running"]["fp32"]
    assert weights + 0.84e9 < running < weights + 0.95e9
    assert 0.96e9 < running < 1.68e9  # as measured: its own at most, and with all pages of its file and copies
    assert "fp32" not in row(running - 1)["fits"]
    assert "fp32" in row(running)["fits"]


@pytest.mark.parametrize(("bits", "dtypes"), [(8, {"int8"}), (4, {"int4"})])
def test_the_memory_of_a_folder_is_listed(tmp_path, capsys, bits, dtypes):
    folder = tmp_path / "small"
    assert main(["quantize", "argen/emoji-llamagen", "--bits", str(bits), "-o", str(folder)]) == 0
    argen.load("argen/emoji-xar").save_pretrained(tmp_path / "xar")
    capsys.readouterr()
    arguments = [str(folder), str(tmp_path / "xar"), "argen/emoji-llamagen"]
    assert main(["models", "--json", "--memory", *arguments]) == 0
    quantized, xar, card = json.loads(capsys.readouterr().out)["models"]
    assert [quantized["id"], xar["id"], card["id"]] == arguments
    assert {name for name, size in quantized["bytes"].items() if size} == dtypes
    assert set(quantized["fits"]) == dtypes
    assert quantized["bytes"][f"int{bits}"] == pytest.approx(card["bytes"][f"int{bits}"], rel=0.25)
    assert {name for name, size in xar["bytes"].items() if size} == {"fp32", "bf16"}
    assert main(["models", "--memory", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out
    assert main(["models", "--memory", str(tmp_path / "nothing")]) == 2
    assert "unknown model" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["models", "--memory", str(tmp_path / "empty")]) == 2
    line = capsys.readouterr().err
    assert "is a folder: expected a checkpoint file, or a folder with one; it holds none" in line
    assert line.count("\n") == 1


def test_one_bad_folder_does_not_hide_the_memory_of_the_others(tmp_path, capsys):
    argen.load("argen/emoji-parti").save_pretrained(tmp_path / "saved")
    (file,) = (tmp_path / "saved/transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    names = [str(tmp_path / name) for name in ("saved", "other.safetensors", "empty.safetensors", "nothing")]
    capsys.readouterr()
    assert main(["models", "--memory", *names, "argen/emoji-llamagen", "--json"]) == 2
    output = capsys.readouterr()
    assert [row["id"] for row in json.loads(output.out)["models"]] == ["argen/emoji-llamagen"]
    damaged, other, empty, unknown = output.err.split("; ")
    assert f"a file of {names[0]} is damaged: {file} could not be read as a checkpoint (the file is cut off" in damaged
    assert f"{names[1]} holds no LlamaGen" in other
    assert f"{names[2]} holds no weights" in empty
    assert "unknown model" in unknown
    assert output.err.count("\n") == 1
    assert main(["models", "--memory", names[0]]) == 2
    assert capsys.readouterr().out == ""
