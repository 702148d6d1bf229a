"""Everyday prompts, in many languages, are read in the names that the emoji family learned; every front end says so, and can be told not to."""

import json

import pytest

import argen
from argen.cli.main import main
from argen.data.concepts import english, names_of, read_aliases, translations
from argen.data.reading import languages, read
from argen.hub.cards import all_cards, reading_of
from argen.request import Request

EVERYDAY = {
    "a car": "an automobile",
    "a red car": "a red automobile",
    "heart": "red heart",
    "a blue heart": "a blue heart",
    "a cup of coffee": "a hot beverage",
    "a slice of pizza": "a pizza",
    "a green apple": "a green apple",
    "an apple": "a red apple",
    "an orange": "a tangerine",
    "an orange cat": "an orange cat",
    "three cars": "three automobiles",
    "2 dogs": "two dogs",
    "a bus": "a bus",
    "a pair of glasses": "glasses",
    "a photo of a big red car": "a red automobile",
    "a cute kitten in a hat": "a cat face",
    "Draw me a picture of a teddy!": "a teddy bear",
    "two dogs under a tree": "two dogs below a deciduous tree",
    "a cat on the left of a pizza": "a cat to the left of a pizza",
    "bow and arrow": "bow and arrow",
    "a blue robot and a green pizza": "a blue robot and a green pizza",
    "an elephnat": "an elephant",
    "a 🐱 and a 🍎, noto style": "a cat face and a red apple, noto style",
    "👍🏽": "thumbs up",
    "gray mouse": "grey mouse",
    "a black and white dog": "a black white dog",
    "a fire truck": "a fire engine",
    "a heart in blue": "a blue heart",
    "draw me a dragon please": "a dragon",
    "a cat sitting on a chair": "a cat",
    "🐱🐶": "cat face and dog face",
    "flag of germany": "flag germany",
    "two mice": "two mice",
    "a unicorn": "a unicorn",
}
FOREIGN = {
    "ein rotes Auto": "a red automobile",
    "zwei Hunde": "two dogs",
    "une voiture rouge": "a red automobile",
    "un chat et un chien": "a cat and a dog",
    "une pomme verte": "a green apple",
    "tres gatos negros": "three black cats",
    "una casa": "a house",
    "un cuore": "a red heart",
    "um carro azul": "a blue automobile",
    "een fiets": "a bicycle",
    "en röd bil": "a red automobile",
    "czerwony samochód": "a red automobile",
    "красное яблоко": "a red apple",
    "собака": "a dog",
    "солнце": "a sun",
    "犬": "a dog",
    "赤いりんご": "a red apple",
    "三只猫": "three cats",
    "红色的汽车": "a red automobile",
    "개": "a dog",
}


@pytest.mark.parametrize(("prompt", "text"), (EVERYDAY | FOREIGN).items())
def test_prompts_are_read_in_known_names(prompt, text):
    reading = read(prompt)
    assert (reading.text, reading.known, reading.prompt) == (text, True, prompt)


def test_what_is_read_is_read_as_itself():
    for prompt in (EVERYDAY | FOREIGN).values():
        assert read(prompt).text == prompt
        assert read(prompt).notes == []


def test_what_a_table_asks_for_is_said(tmp_path, capsys):
    (tmp_path / "table.csv").write_text("prompt\nein Hund\nqwzzk\n")
    assert main(["batch", str(tmp_path / "table.csv"), "-o", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err
    assert "argen batch: read as: a dog" in err
    assert "no name in 'qwzzk' is known" in err


def test_what_nobody_thought_up_is_taken_word_for_word():
    for text in (
        ",",
        "x,",
        ". ",
        "🍎, ",
        "cat and ",
    ):  # whose many parts took half a minute to put together in all ways
        prompt = (text * 1000)[:1000]
        assert (read(prompt).text, read(prompt).notes) == (prompt, [])
    assert read("\ufdfa" * 1000).prompt == "\ufdfa" * 1000  # 18 times longer when it is normalised


def test_what_is_unknown_stays_and_is_said():
    reading = read("a qwzzk")
    assert (reading.text, reading.known) == ("a qwzzk", False)
    assert reading.notes[0].startswith("no name in 'a qwzzk' is known to this model")
    assert read("hippopotomous thing").notes  # says something, and breaks at nothing
    for odd in (
        "",
        ",,,",
        "and and and",
        "🦄" * 50,
        "a " * 300,
        "\u200b",
        "of of of",
        "(((cat:1.3)))",
        "class:food-drink",
    ):
        assert read(odd).prompt == odd
    near = read("skatebord tricks")
    assert near.known or "skateboard" in near.nearest


def test_every_alias_names_a_concept_and_languages_have_their_words():
    names = set(english().by_name)
    assert all(set(concepts) <= names for concepts in read_aliases().values())
    assert len(translations()) == 27
    assert {language.code for language in languages()} <= set(translations())
    assert len(languages()) >= 12
    assert all(len(language.numbers) == 6 and len(set(language.colours.values())) >= 10 for language in languages())
    assert "car" in names_of("automobile")
    assert "sunflower" not in names_of("automobile")


def test_labels_of_all_languages_mean_their_concept():
    """Of ten labels of each language at least nine, as read with an article or without: the rest are equal names of two things."""
    known = translations()
    for language in languages():
        names = list(known[language.code].items())[:: len(known[language.code]) // 60]
        right = sum(read(text).text.endswith(name) or name.endswith("s") for text, name in names)
        assert right / len(names) > 0.6, language.code


def test_all_emoji_generators_read_so_and_no_published_one():
    for card in all_cards().values():
        if card.kind == "generator":
            assert (card.read("a car").text == "an automobile") == card.id.startswith("argen/emoji-"), card.id
    assert reading_of("argen/emoji-parti", "a car", literal=True).text == "a car"


def test_a_pipeline_draws_what_it_reads():
    pipe = argen.load("argen/emoji-parti")
    pipe.set_progress_bar_config(disable=True)

    def tokens(prompt: str, **settings):
        import torch

        return pipe(
            prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **settings
        ).tokens.tolist()

    assert tokens("ein Auto") == tokens("an automobile") != tokens("ein Auto", literal=True)
    job = next(iter(pipe.run(Request("a car"))))
    assert job.request.prompt == "a car"  # as typed


def test_the_command_line_says_how_a_prompt_is_read(tmp_path, capsys):
    out = tmp_path / "car.png"
    assert main(["generate", "ein rotes Auto", "-o", str(out), "--json"]) == 0
    written = capsys.readouterr()
    assert "argen generate: read as: a red automobile" in written.err
    assert json.loads(written.out)["revised_prompt"] == "a red automobile"
    assert main(["generate", "--from", str(out), "-o", str(tmp_path / "again.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["prompt"] == "ein rotes Auto"
    assert main(["generate", "ein rotes Auto", "--literal", "-o", str(tmp_path / "plain.png")]) == 0
    assert "read as" not in capsys.readouterr().err
    assert main(["generate", "qwzzk", "-o", str(tmp_path / "none.png")]) == 0
    assert "no name in 'qwzzk' is known to this model" in capsys.readouterr().err
