"""Cards: what ships is read, what is saved is read again, a bad one is one line."""

import shutil
from dataclasses import replace

import pytest
import torch

import argen
from argen.command import check_model
from argen.files import WEIGHTS
from argen.hub.cards import CARD_FILE, FOLDER, Card, all_cards, find_card, read_card, write_card
from argen.hub.loading import load, networks_of
from argen.registry import Registry, cards, register, resolve
from argen.train.recipes import write_card_of

SAVED = 'id = "a"\nkind = "generator"\nabout = "x"\ntarget = "argen.hub.loading:load"\n'


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a saved pipeline."""
    folder = tmp_path_factory.mktemp("saved") / "parti"
    argen.load("argen/emoji-parti").save_pretrained(folder)
    return folder


def test_every_card_names_a_reader_and_says_what_it_is():
    assert len(all_cards()) == len(list(FOLDER.glob("*.toml")))  # no id twice
    for card in all_cards().values():
        assert callable(resolve(card.target)), card.id
        assert card.parameters > 0, card.id
        assert card.licence != "unknown", card.id
        assert card.ships or card.files, card.id


def numbers(model) -> dict[int, int]:
    """Tensors of a model, the decoder of an image tokenizer among them -> how many numbers each has."""
    parts = [model, *getattr(model, "components", {}).values()]
    parts += [part.decoder for part in parts if hasattr(getattr(part, "decoder", None), "components")]
    networks = [network for part in parts for network in networks_of(part)]
    return {id(tensor): tensor.numel() for network in networks for tensor in network.parameters()}


@pytest.mark.parametrize("id", [card.id for card in all_cards().values() if card.ships and card.kind != "encoder"])
def test_a_card_says_how_many_parameters_are_loaded(id):
    assert sum(numbers(argen.load(id)).values()) / 1e6 == pytest.approx(all_cards()[id].parameters, abs=0.06)


def test_a_card_is_written_and_read_again(tmp_path):
    shipped = find_card("argen/emoji-sd")
    assert shipped.training["recipe"].startswith("`emoji-sd`")
    card = replace(shipped, id="mine", training={})  # of other weights
    write_card(card, tmp_path)
    assert read_card(tmp_path / CARD_FILE) == card
    assert find_card(str(tmp_path)) == card


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id = ", "is no card"),
        ('id = "a"\nkind = "zebra"\nabout = ""\ntarget = ""', "expected one of generator"),
        ('id = "a"\nkind = "judge"\nabout = ""\ntarget = ""\ncolour = 1', "colour"),
        ("\xff", "is no card"),
    ],
)
def test_a_bad_card_is_one_line(tmp_path, text, message):
    (tmp_path / CARD_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        find_card(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean argen/emoji-parti"):
        argen.load("argen/emoji-partie")


def test_a_saved_pipeline_keeps_its_defaults(tmp_path):
    pipe = argen.load("argen/emoji-llamagen")
    pipe.save_pretrained(tmp_path / "mine")
    again = argen.load(tmp_path / "mine")
    assert again.defaults == pipe.defaults
    assert again.defaults.temperature == 0.6  # which its class has not
    assert again.card.takes == ("text", "class")


@pytest.mark.parametrize("module", ["tokenizers_img.flextok.network", "tokenizers_img.flextok"])
def test_a_folder_of_an_earlier_release_is_read(tmp_path, module):
    pipe = argen.load("argen/emoji-flextok-ar")
    pipe.save_pretrained(tmp_path / "old")
    index = tmp_path / "old/model_index.json"
    text = index.read_text()
    assert '"tokenizers_img.flextok.network"' in text
    index.write_text(text.replace("tokenizers_img.flextok.network", module))
    again = argen.load(tmp_path / "old")
    assert again.defaults == pipe.defaults
    drawn = [one("a cat", generator=torch.Generator().manual_seed(1)).tokens for one in (pipe, again)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model_index.json", "null", "names no class of a pipeline"),
        ("model_index.json", '{"_class_name": "Foo"}', "names a Foo, expected one of PartiPipeline"),
        ("model_index.json", '{"_class_name": "PartiPipeline", "clip": ["os", "system"]}', "is of the library os"),
        ("model_index.json", '{"_class_name": "PartiPipeline", "clip": 5}', "its part clip is '5'"),
        (
            CARD_FILE,
            'id = "a"\nkind = "tokenizer"\nabout = "x"\ntarget = "argen.hub.loading:load"',
            "that of a generator",
        ),
        (CARD_FILE, SAVED + "[defaults]\nfoo = 1", "defaults has 'foo': expected some of guidance_scale"),
        (CARD_FILE, SAVED + "defaults = 3", "defaults is 3: expected a table"),
        (CARD_FILE, SAVED + "[defaults]\ntemperature = nan", "temperature is nan"),
        (CARD_FILE, SAVED + "[defaults]\ntop_p = 7", "top_p is 7"),
        (CARD_FILE, "a = " + "[" * 3000 + "]" * 3000, "is no card"),
        (CARD_FILE, "", "it lacks id, kind, about, target"),
        (CARD_FILE, "#" * 1_000_001, "more than 1,000,000 bytes"),
        (CARD_FILE, None, "is no card"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path, saved, name, text, message):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / name).unlink()
    if text is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        argen.load(folder)
    assert "\n" not in str(error.value)


def test_a_card_that_links_to_itself_is_one_line(tmp_path, saved):
    (tmp_path / CARD_FILE).symlink_to(CARD_FILE)
    with pytest.raises(ValueError, match="is no card"):
        argen.load(tmp_path)


def test_a_saved_pipeline_is_no_tokenizer(saved):
    with pytest.raises(ValueError, match="is a generator, expected a tokenizer"):
        check_model(str(saved), "tokenizer")


def test_a_program_registers_a_card(monkeypatch):
    monkeypatch.setattr(cards, "added", {})
    card = Card("mine/judge", "judge", "a test", "argen.models.files:read_network", arguments={"network": "x"})
    register("card", card.id, card)
    assert card in argen.list_models("judge")
    with pytest.raises(ValueError, match="is taken"):
        register("card", card.id, card)
    with pytest.raises(ValueError, match="unknown kind 'zebra'"):
        register("zebra", "x", card)


def test_a_registry_imports_on_first_use():
    registry = Registry("thing", {"tensor": "torch:Tensor", "lost": "torch:NoSuchThing"})
    assert list(registry) == ["tensor", "lost"]
    assert registry["tensor"] is torch.Tensor
    with pytest.raises(ValueError, match="unknown thing 'tensro': expected one of tensor, lost; did you mean tensor"):
        registry["tensro"]


def test_the_public_names_are_shown():
    assert {"load", "list_models", "register"} <= set(dir(argen))
    assert argen.load is load


def test_a_trained_folder_loads_by_path(tmp_path):
    for recipe, model in (("emoji-parti-second", "emoji-parti"), ("emoji-judge", "emoji-judge")):
        final = tmp_path / recipe
        shutil.copytree(WEIGHTS / model, final)
        write_card_of(recipe, final)
        loaded = argen.load(final)
        assert type(loaded) is type(argen.load(f"argen/{model}"))
    assert loaded.config.names
    assert argen.load(tmp_path / "emoji-parti-second").defaults.temperature == 0.6
    write_card_of("emoji-seed-contrastive", tmp_path)
    assert not (tmp_path / CARD_FILE).exists()
