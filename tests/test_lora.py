"""LoRA: trained factors beside a frozen network, added to weights when a model is loaded, and on a pipeline as in diffusers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import argen
from argen.cli.main import main
from argen.hub.cards import ADAPTED, find_card, write_card
from argen.models.lora import CONFIG, FILE, digest_of, parse
from argen.train import lora
from samplers.errors import InvalidValue

MODEL = "argen/emoji-llamagen"


def drawn(pipe, prompt="a red apple"):
    return pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LoRA of emoji-llamagen whose factors are large."""
    pipe, path = argen.load(MODEL), tmp_path_factory.mktemp("lora") / "style"
    before, digest = drawn(pipe), digest_of(pipe.transformer)
    config = lora.inject(pipe.transformer, 4)
    assert torch.equal(drawn(pipe), before)  # it begins as the network
    trained = [name for name, value in pipe.transformer.named_parameters() if value.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    generator = torch.Generator().manual_seed(0)
    for name, value in pipe.transformer.named_parameters():
        if "lora_" in name:
            value.data = (0.2 * torch.randn(value.shape, generator=generator)).bfloat16().float()
    lora.save(pipe.transformer, config, MODEL, digest, path)
    torch.save(drawn(pipe), path / "drawn.pt")
    return path


def test_a_loaded_lora_draws_as_the_trained_network(folder):
    expected = torch.load(folder / "drawn.pt")
    plain = drawn(argen.load(MODEL))
    assert not torch.equal(plain, expected)
    assert (drawn(argen.load(MODEL, lora=str(folder))) == expected).float().mean() > 0.9  # sums are ordered otherwise
    assert torch.equal(drawn(argen.load(MODEL, lora=f"{folder}:0")), plain)


def test_adapters_come_and_go_on_a_pipeline(folder):
    pipe = argen.load(MODEL)
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(folder, adapter_name="style")
    assert pipe.get_active_adapters() == ["style"]
    full = pipe.transformer.layers[0].attention.wqkv.weight - weights["layers.0.attention.wqkv.weight"]
    pipe.set_adapters(["style"], [0.5])
    half = pipe.transformer.layers[0].attention.wqkv.weight - weights["layers.0.attention.wqkv.weight"]
    torch.testing.assert_close(half, full / 2, atol=1e-6, rtol=1e-4)
    pipe.load_lora_weights(f"{folder}:0.5")
    pipe.set_adapters(["style", "default_1"], 0.5)
    both = pipe.transformer.layers[0].attention.wqkv.weight - weights["layers.0.attention.wqkv.weight"]
    torch.testing.assert_close(both, full, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="there is no LoRA called cats: expected some of style, default_1"):
        pipe.set_adapters("cats")
    pipe.unload_lora_weights()
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())


def test_adapters_are_fused_and_unfused(folder):
    pipe, name = argen.load(MODEL), "layers.0.attention.wqkv.weight"
    before = pipe.transformer.state_dict()[name].clone()
    with pytest.raises(ValueError, match="there is no LoRA to fuse: add one with load_lora_weights first"):
        pipe.fuse_lora()
    pipe.load_lora_weights(folder, adapter_name="style")
    full = pipe.transformer.state_dict()[name] - before
    pipe.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(pipe.transformer.state_dict()[name] - before, full / 2, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match=r"the LoRA style is a part of the weights: call unfuse_lora\(\) first"):
        pipe.set_adapters("style", 2.0)
    pipe.load_lora_weights(folder, adapter_name="more")  # it is checked against the weights without adapters
    torch.testing.assert_close(pipe.transformer.state_dict()[name] - before, 1.5 * full, atol=1e-6, rtol=1e-4)
    pipe.set_adapters("more", 0.0)
    pipe.unfuse_lora()
    assert pipe.get_active_adapters() == ["style"]
    torch.testing.assert_close(pipe.transformer.state_dict()[name] - before, full, atol=1e-6, rtol=1e-4)
    pipe.fuse_lora(adapter_names=["style"])
    pipe.unload_lora_weights()
    assert pipe.get_active_adapters() == []
    torch.testing.assert_close(pipe.transformer.state_dict()[name] - before, full, atol=1e-6, rtol=1e-4)


def test_a_merged_folder_draws_as_the_model_with_its_lora(folder, tmp_path, capsys):
    both = ["--lora", f"{folder}:0.5", "--lora", f"{folder}:0.25"]
    assert main(["merge", MODEL, *both, "-o", str(tmp_path / "merged")]) == 0
    assert f"{MODEL} with the LoRA {folder}:0.5, {folder}:0.25" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"merged"}
    pipe = argen.load(tmp_path / "merged")
    assert torch.equal(drawn(pipe), drawn(argen.load(MODEL, lora=f"{folder}:0.5,{folder}:0.25")))
    assert pipe.card.defaults == argen.load(MODEL).card.defaults
    assert not list((tmp_path / "merged").rglob("adapter*"))
    write_card(
        replace(find_card(MODEL), target=ADAPTED, arguments={"base": MODEL}), folder
    )  # as `argen train` writes it
    assert main(["merge", str(folder), "-o", str(tmp_path / "itself"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base"] == MODEL
    assert torch.equal(drawn(argen.load(tmp_path / "itself")), drawn(argen.load(MODEL, lora=str(folder))))


def test_what_cannot_be_merged(folder, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ([MODEL, "-o", "new"], "lora is missing: name what is merged"),
        ([MODEL, "--lora", str(folder), "-o", "there"], "is there already: choose another --out"),
        ([MODEL, "--lora", "none", "-o", "new"], "lora is none: expected a folder with adapter_config.json"),
        (["argen/emoji-parti", "--lora", str(folder), "-o", "new"], "which was trained on argen/emoji-llamagen"),
        (["argen/emoji-vitvqgan", "--lora", str(folder), "-o", "new"], "is a tokenizer, expected a generator"),
    ):
        assert main(["merge", *arguments[:-1], str(tmp_path / arguments[-1])]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


def test_peft_reads_the_folder(folder):
    from peft import PeftModel

    network = argen.load(MODEL).transformer
    expected = argen.load(MODEL, lora=str(folder)).transformer.layers[2].feed_forward.w2.weight
    merged = PeftModel.from_pretrained(network, folder).merge_and_unload()
    torch.testing.assert_close(merged.layers[2].feed_forward.w2.weight, expected, atol=1e-5, rtol=0)


def test_quantized_and_compiled_networks_have_it(folder):
    expected = drawn(argen.load(MODEL, lora=str(folder)))
    assert (drawn(argen.load(MODEL, lora=str(folder), compile=True)) == expected).float().mean() > 0.9
    rounded = argen.load(MODEL, lora=str(folder), quantize="int8").transformer.layers[0].attention.wqkv
    merged = argen.load(MODEL, lora=str(folder)).transformer.layers[0].attention.wqkv.weight
    assert ((rounded.dequantized() - merged).abs() <= 0.51 * rounded.scales).all()
    pipe = argen.load(MODEL, quantize="int8")
    with pytest.raises(ValueError, match="the model is quantized: load it with lora="):
        pipe.load_lora_weights(folder)


def test_what_is_refused(folder, tmp_path, capsys):
    assert parse("runs/style:0.5")[1] == 0.5
    with pytest.raises(InvalidValue, match="lora has the weight 9: expected -8 to 8"):
        parse("runs/style:9")
    assert (
        main(["generate", "a pizza", "--model", MODEL, "--lora", str(tmp_path / "none"), "-o", str(tmp_path / "x.png")])
        == 2
    )
    assert "expected a folder with adapter_config.json and adapter_model.safetensors" in capsys.readouterr().err
    for model, message in (
        (
            "argen/emoji-parti",
            "which was trained on argen/emoji-llamagen, changes layers.0.attention.w.*has no such layer",
        ),
        ("argen/emoji-vitvqgan", "lora is for generators, not for a ViTVQGAN"),
        ("argen/emoji-control", "but was trained on other weights|but this ControlAR has"),
    ):
        with pytest.raises(ValueError, match=message):
            argen.load(model, lora=str(folder))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / CONFIG).write_text((folder / CONFIG).read_text())
    state = load_file(folder / FILE)
    save_file({key: value for key, value in state.items() if "layers.1.attention.wo.lora_A" not in key}, damaged / FILE)
    with pytest.raises(ValueError, match="factors of layers.1.attention.wo that do not fit each other"):
        argen.load(MODEL, lora=str(damaged))
    config = json.loads((folder / CONFIG).read_text())
    (damaged / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="with use_dora: expected a plain LoRA"):
        argen.load(MODEL, lora=str(damaged))
