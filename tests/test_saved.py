"""Every shipped generator comes back from a folder that it was saved in."""

import inspect
import json
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import argen
import argen.pipelines
from argen.files import WEIGHTS
from argen.hub.cards import list_models
from argen.hub.quantized import quantized
from argen.metadata import differences, save_images
from argen.models.files import FILE, load_network, save_small
from argen.models.judge import Judge
from argen.models.parti import Parti
from argen.pipelines.base import TokenPipeline
from argen.registry import pipelines
from argen.request import Request
from tokenizers_img.vit_vqgan import ViTVQGAN


def test_every_pipeline_can_be_loaded_by_its_name():
    modules = [import_module(f"argen.pipelines.{module.name}") for module in iter_modules(argen.pipelines.__path__)]
    classes = {value for module in modules for value in vars(module).values() if inspect.isclass(value)}
    names = {cls.__name__ for cls in classes if issubclass(cls, TokenPipeline)}
    assert names - {"TokenPipeline"} <= set(pipelines)


@pytest.mark.parametrize("model", [card.id for card in list_models("generator") if card.ships])
def test_a_saved_generator_draws_the_same(model, tmp_path, capfd, caplog):
    pipe = argen.load(model)
    pipe.save_pretrained(tmp_path / "saved")
    assert "cannot be saved" not in capfd.readouterr().err + caplog.text
    again = argen.load(tmp_path / "saved")
    assert type(again) is type(pipe)
    control = {"control_image": torch_image()} if "control" in pipe.card.takes else {}
    images = [
        one("a red apple", generator=torch.Generator().manual_seed(3), **control).images[0].tobytes()
        for one in (pipe, again)
    ]
    assert images[0] == images[1]


def test_a_folder_of_an_earlier_release_is_read(tmp_path):
    pipe = argen.load("argen/emoji-llamagen")
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("argen.models.drafter", "argen.models.draft"))
    again = argen.load(tmp_path)
    assert torch.equal(next(again.drafter.parameters()), next(pipe.drafter.parameters()))


@pytest.mark.parametrize("model", ["argen/emoji-parti", "argen/emoji-seed-lm"])
def test_a_quantized_folder_is_read_as_diffusers_does(model, tmp_path):
    folder = tmp_path / "saved"
    argen.load(model, quantize="int8").save_pretrained(folder)
    pipe = argen.load(folder)
    again = type(pipe).from_pretrained(folder)
    assert again.defaults == pipe.defaults
    assert quantized(again)
    images = [
        one("a red apple", generator=torch.Generator().manual_seed(3)).images[0].tobytes() for one in (pipe, again)
    ]
    assert images[0] == images[1]
    half = type(pipe).from_pretrained(folder, dtype=torch.bfloat16)
    assert (half.transformer.dtype, quantized(half)) == (torch.bfloat16, True)
    half("a red apple")


@pytest.mark.parametrize("subfolder", [None, "transformer"])
def test_the_network_of_a_quantized_folder_alone_is_refused(subfolder, tmp_path):
    pipe = argen.load("argen/emoji-parti", quantize="int8")
    pipe.save_pretrained(tmp_path)
    path = tmp_path / ("" if subfolder else "transformer")
    with pytest.raises(ValueError, match=r"is the network of a quantized pipeline: load that with argen.load\('"):
        type(pipe.transformer).from_pretrained(path, subfolder=subfolder)


def torch_image():
    from tokenizers_img.pixels import to_pil

    return to_pil(torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("name", "cls"), [("emoji-parti", Parti), ("emoji-judge", Judge), ("emoji-vae", AutoencoderKL)]
)
def test_a_small_file_has_half_the_bytes_and_nearly_the_weights(tmp_path, name, cls):
    network = load_network(cls, WEIGHTS / name)
    save_small(network, tmp_path)
    again = load_network(cls, tmp_path)
    stored = sum(2 * weight.numel() for weight in network.state_dict().values())
    assert (tmp_path / FILE).stat().st_size < 0.62 * stored
    assert "_name_or_path" not in (tmp_path / "config.json").read_text()
    assert all(again.config[key] == value for key, value in network.config.items() if not key.startswith("_"))
    for key, weight in network.state_dict().items():
        step = weight.flatten(1).abs().amax(dim=1) / 127 if weight.ndim > 1 else weight.abs() / 127
        error = (again.state_dict()[key] - weight).abs()
        assert (
            (error.flatten(1).amax(dim=1) <= 0.51 * step + 1e-6).all() if weight.ndim > 1 else (error <= step).all()
        ), key


def test_the_codes_of_a_small_tokenizer_are_the_same(tmp_path):
    network = load_network(ViTVQGAN, WEIGHTS / "emoji-vitvqgan")
    save_small(network, tmp_path)
    assert torch.equal(load_network(ViTVQGAN, tmp_path).codebook, network.codebook)


def test_a_small_file_that_lacks_a_tensor_is_refused(tmp_path):
    save_small(load_network(Judge, WEIGHTS / "emoji-judge"), tmp_path)
    state = load_file(tmp_path / FILE)
    save_file({key: value for key, value in state.items() if key != "colour.bias"}, tmp_path / FILE)
    with pytest.raises(ValueError, match="does not fit Judge: missing colour.bias"):
        load_network(Judge, tmp_path)


def test_a_folder_that_cannot_be_written_whole_is_removed(tmp_path, monkeypatch):
    pipe = argen.load("argen/emoji-parti")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("argen.pipelines.saving.write_card", full)
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(OSError, match="No space left"):
        pipe.save_pretrained(tmp_path / "old")
    assert (tmp_path / "old").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"heads": 3}, "heads is 3: expected a divisor of the width 256"),
        ({"heads": 0}, "division|modulo|heads is 0"),
        ({"multiple_of": 0}, "division|modulo"),
        ({"grid": 9}, "the generator writes 9 x 9 tokens, the image tokenizer reads 8 x 8"),
    ],
)
def test_a_folder_with_other_settings_than_its_weights_is_refused(setting, message, tmp_path):
    argen.load("argen/emoji-llamagen", quantize="int8").save_pretrained(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(ValueError, match=message):
        argen.load(tmp_path)


@pytest.mark.parametrize("model", ["argen/emoji-llamagen", "argen/emoji-parti", "argen/emoji-xar"])
def test_weights_that_give_no_numbers_draw_nothing(model):
    pipe = argen.load(model)
    with torch.no_grad():
        next(value for name, value in pipe.transformer.named_parameters() if "norm" in name)[0] = torch.nan
    with pytest.raises(ValueError, match="numbers that are not finite"):
        pipe("a pizza", generator=torch.Generator().manual_seed(0))


def test_a_file_says_how_its_model_was_quantized(tmp_path):
    request = Request("a pizza", seed=1)
    plain, small = argen.load("argen/emoji-parti"), argen.load("argen/emoji-parti", quantize="int8")
    for pipe, other, word in ((plain, small, "quantize none, not int8"), (small, plain, "quantize int8, not none")):
        save_images([(pipe("a pizza").images[0], request)], [tmp_path / "a.png"])
        said = f"{tmp_path / 'a.png'} was made by {word}: the image may differ"
        assert differences(tmp_path / "a.png", other) == said
        assert differences(tmp_path / "a.png", pipe) is None
