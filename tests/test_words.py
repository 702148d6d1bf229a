"""What people type: text files, the normal form of prompts, numbers in words, names of concepts."""

import json

import pytest

from argen import words
from argen.cli.main import main
from argen.diffusion import model_settings
from argen.hub.loading import load
from argen.words import check_prompt

ONE_PROMPT = [
    "a red apple, noto style",
    " a  red\tapple,\nnoto style ",
    "a\u00a0red apple,\u2028noto\u0085style",
    "\ufeffa r\u200bed\u2060 apple, no\u00adto style",
    "\uff21 Red APPLE, noto\u3000style",
    "a red\u3164apple\uff0cnoto\u2800style",
    "\u2066a\u2069 r\u034fed apple\U000e0041, noto\u206f style\U000e007f",
    "a red apple\u3001noto style",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load("argen/emoji-clip").tokenizer


def test_what_cannot_be_seen_changes_no_tokens(tokenizer):
    for texts in (
        ONE_PROMPT,
        ["a 't' \"shirt\"", "a \u2018t\u2019 \u201cshirt\u201d"],
        ["it's", "it\u00b4s", "it`s", "it\u2019s", "it\u02bcs", "it\uff07s"],
        ["t-shirt", "t\u2011shirt", "t\u2010shirt", "t\u2013shirt", "t\u2212shirt"],
    ):
        assert len({tuple(tokenizer(text).input_ids) for text in texts}) == 1


def test_captions_keep_their_tokens(tokenizer):
    """The normal form changes nothing of what the networks were trained on."""
    from tokenizers import normalizers

    from argen.eval.run import EMOJI
    from argen.eval.run import np as numpy

    captions = set(numpy.load(EMOJI)["captions"].tobytes().decode().split("\n"))
    before, after = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), words.text_normalizer()
    assert len(captions) > 5000
    assert [text for text in captions if before.normalize_str(text) != after.normalize_str(text)] == []
    assert str(tokenizer.backend_tokenizer.normalizer) == str(after)  # what ships is what the next training has


@pytest.mark.parametrize(
    "text", ["", " \n", "\u200b", "\ufeff\u00ad", "\0", "\u3164", "\U000e0041\u034f", "\u2800 \u2066"]
)
def test_a_prompt_that_shows_nothing_is_refused(text):
    with pytest.raises(ValueError, match="the prompt is empty"):
        check_prompt(text)


def test_text_that_is_none_is_one_line(tmp_path, capsys):
    """Half of a surrogate pair, as it stands in JSON; bytes of an argument that are no UTF-8."""
    out = str(tmp_path / "x.png")
    for broken in ("a red apple \ud83c", "caf\udce9"):
        for command in (
            ["generate", broken, "-o", out],
            ["bind", f"a red {broken}", "-o", out],
            ["count", f"five {broken}", "-o", out],
            ["erase", broken, "-o", str(tmp_path / "d")],
            ["erase", "pizza", "--retain", broken, "-o", str(tmp_path / "d")],
            ["grid", broken, "--x", "seed=1,2", "-o", out],
            ["describe", out, broken],
            ["eval", "clip", "--prompts", out, "--prefix", broken, "--out", str(tmp_path / "d")],
        ):
            assert main(command) == 2, command
            stderr = capsys.readouterr().err
            assert "no UTF-8 text" in stderr, command
            assert stderr.count("\n") == 1
        with pytest.raises(ValueError, match="no UTF-8 text"):
            check_prompt(broken)
    assert not list(tmp_path.iterdir())


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "a red apple\u2028flat\r\n\n  a taxi\x0cnoto\x85  \n"
    for data in (text.encode(), text.encode("utf-8-sig"), text.encode("utf-16")):
        (tmp_path / "p.txt").write_bytes(data)
        assert words.read_prompts(tmp_path / "p.txt") == ["a red apple\u2028flat", "a taxi\x0cnoto"]
    for data, wanted in (
        (b"caf\xe9", "is no text in UTF-8"),
        (b"\n \n", "holds no prompts"),
        (b"a\0b", "is no text file"),
    ):
        (tmp_path / "p.txt").write_bytes(data)
        with pytest.raises(ValueError, match=f"p.txt {wanted}"):
            words.read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("text", "number", "things"),
    [
        ("twenty five oranges", 25, "oranges"),
        ("Twenty-Five cats", 25, "cats"),
        ("\uff12\uff15 cats", 25, "cats"),
        ("a dozen eggs", 12, "eggs"),
        ("two dozen eggs", 24, "eggs"),
        ("half a dozen eggs", 6, "eggs"),
        ("a half-dozen of eggs", 6, "eggs"),
        ("an apple", 1, "apple"),
        ("a single red  apple", 1, "red apple"),
        ("seventeen pears", 17, "pears"),
        ("a pair of shoes", 2, "shoes"),
        ("five tomatoes, noto style", 5, "tomatoes, noto style"),
        ("three four-leaf clovers", 3, "four-leaf clovers"),
        ("three cats or dogs", 3, "cats or dogs"),
        ("a score of apples", 20, "apples"),
        ("a brace of pheasants", 2, "pheasants"),
        ("a trio of cats", 3, "cats"),
        ("three trios of cats", 9, "cats"),
        ("two braces of pheasants", 4, "pheasants"),
        ("a dozen pairs of shoes", 24, "shoes"),
        ("five \U0001f34e", 5, "\U0001f34e"),
        ("two doz eggs", 24, "eggs"),
        ("two doz. eggs", 24, "eggs"),
        ("5 x apples", 5, "apples"),
        ("5\u00d7 apples", 5, "apples"),
        ("twenty\u2011five cats", 25, "cats"),
        ("twenty\u2013five cats", 25, "cats"),
        ("five apples.", 5, "apples"),
        ("five\u200b ap\u2066ples", 5, "apples"),
        ("three 3d robots", 3, "3d robots"),
    ],
)
def test_numbers_are_read(text, number, things):
    assert words.parse_count(text) == (number, things)


@pytest.mark.parametrize("value", range(1, 26))
def test_every_number_is_read(value):
    tens, ones = divmod(value, 10)
    spelled = (
        words.ONES[value] if value < 20 else " ".join([words.TENS[tens - 2], *([words.ONES[ones]] if ones else [])])
    )
    for text in (str(value), spelled, spelled.replace(" ", "-"), spelled.upper()):
        assert words.parse_count(f"{text} cats") == (value, "cats")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("two hundred cars", "count is 200"),
        ("a gross of apples", "count is 144"),
        ("three score apples", "count is 60"),
        ("one " + "million " * 120 + "cars", "count is 10+[.]{3}: expected"),
        ("9" * 900 + " cars", "count is 9+[.]{3}: expected"),
        ("9" * 5000 + " cars", "the prompt has 5,005 characters: expected at most 1,000"),
        ("five" + " million" * 80_000, "expected at most 1,000"),
        ("five apples:1.2", "is a weight or a group"),
        ("five (apples)", "is a weight or a group"),
        ("five apples and three pears", "does not name one number"),
        ("five apples and a pear", "does not name one number"),
        ("five & twenty blackbirds", "does not name one number"),
        ("5 x 3 apples", "does not name one number"),
        ("6 pack of beer", "does not name one number"),
        ("five or more apples", "does not name one number"),
        ("one third of an apple", "does not name one number"),
        ("a photo of five apples", "does not say how many"),
        ("a photo of apples", "does not say how many"),
        ("dozens of eggs", "does not say how many"),
        ("a bunch of bananas", "does not say how many"),
        ("1\u00b2 apples", "does not say how many"),
        ("five \0", "does not say how many"),
        ("five !!!", "does not say how many"),
        ("a hundred cars", "count is 100"),
        ("twenty six cars", "count is 26"),
        ("three dozen cars", "count is 36"),
        ("100 cars", "count is 100"),
        ("zero cars", "count is 0"),
        ("no cars", "count is 0"),
        ("-3 cars", "count is -3"),
        ("minus three cars", "count is -3"),
        ("five to seven cars", "does not name one number"),
        ("5 or 6 cars", "does not name one number"),
        ("5 - 7 cars", "does not name one number"),
        ("a dozen or two eggs", "does not name one number"),
        ("five six cars", "does not name one number"),
        ("two and a half pears", "does not name one number"),
        ("five hundred and two cars", "does not name one number"),
        ("5-7 cars", "does not say how many"),
        ("five-to-seven cars", "does not say how many"),
        ("2.5 pears", "does not say how many"),
        ("1,000 cars", "does not say how many"),
        ("half a pear", "does not say how many"),
        ("a few cars", "does not say how many"),
        ("a lot of cars", "does not say how many"),
        ("about five cars", "does not say how many"),
        ("twenty five", "does not say how many"),
        ("a dozen", "does not say how many"),
        ("\u00b2", "does not say how many"),
        ("", "does not say how many"),
    ],
)
def test_what_is_no_number_is_refused(text, wanted):
    with pytest.raises(ValueError, match=wanted) as error:
        words.parse_count(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["Pizza", "pizzas", "pizza.", "the pizza", " A PIZZA! ", "\u201cPizza\u201d", "some pizzas", "pizza\u200b"]
)
def test_concepts_are_named_as_captions_name_them(text):
    assert model_settings.concepts_of("argen/emoji-sd", [text]) == ["pizza"]
    kwargs = model_settings.erasing("argen/emoji-sd", [text])
    assert kwargs["concepts"] == ["pizza", "a pizza"]
    assert not [kept for kept in kwargs["retained"] if "pizza" in kept]


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["pizza, taxi"], ["pizza", "taxi"]),
        (["Pizzas;taxis", "a pizza"], ["pizza", "taxi"]),
        (["pizza and taxi"], ["pizza", "taxi"]),
        (
            ["tomatoes", "Strawberries", "maple leaves", "Christmas-trees", "T-Shirts", "foxes"],
            ["tomato", "strawberry", "maple leaf", "christmas tree", "t shirt", "fox"],
        ),
        (["the red dragons of night"], ["red dragons of night"]),
        ([" ", "...", "\u3164"], []),
        (["a pizza, noto style"], ["pizza"]),
        (["pizza|taxi"], ["pizza", "taxi"]),
        (["pizza - taxi"], ["pizza", "taxi"]),
        (["buses", "octopuses", "knives", "gloves"], ["bus", "octopus", "knife", "gloves"]),
        (["red boxes", "horseshoes", "ponies", "sunglasses"], ["red box", "horseshoe", "pony", "sunglasses"]),
    ],
)
def test_lists_of_concepts(texts, wanted):
    assert model_settings.concepts_of("argen/emoji-sd", texts) == wanted


def test_published_pipelines_get_concepts_as_they_are_written():
    assert model_settings.concepts_of("somewhere", ["Van Gogh, the Night Watch", "Van Gogh"]) == [
        "Van Gogh",
        "the Night Watch",
    ]


def test_other_names_are_kept():
    """A plural takes its singular with it, but "sunflowers" are no "sun"."""
    kept = model_settings.erasing("argen/emoji-sd", ["red cats", "sunflowers"])["retained"]
    assert "cat" not in kept
    assert {"sun", "dog"} <= set(kept)
    assert not words.same_concept("cat", "car")
    assert not words.same_concept("!", "?")


def test_settings_keep_their_json(tmp_path):
    """Separators of lines inside of JSON strings are no ends of rows."""
    from argen.jobs.tables import read_table

    rows = [{"prompt": "a red apple\u2028flat\x85style", "seed": 1}, {"prompt": "a taxi"}]
    path = tmp_path / "t.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig", newline="")
    assert [request.prompt for request in read_table(path)] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("prompt,seed\r\na taxi,4\r\n,\r\n , \r\n", [{"seed": 4}]),  # Excel keeps rows that were emptied
        ("prompt,seed,top_k\na taxi,4.0,\na taxi,5.,100.0\n", [{"seed": 4}, {"seed": 5, "top_k": 100}]),  # pandas
        (",prompt,seed\n0,a taxi,4\n1,a taxi,5\n", [{"seed": 4}, {"seed": 5}]),  # pandas with its row numbers
        ("sep=;\nPrompt; Seed;guidance_scale\na taxi;4;1,5\n", [{"seed": 4, "guidance_scale": 1.5}]),
        ("prompt\tseed\ra taxi\t4\r", [{"seed": 4}]),
        ("prompt,seed,,\na taxi,4,,,\n", [{"seed": 4}]),
        ('file,prompt,steps\n1.png,a taxi,"(12, 8)"\n2.png,a taxi,6\n', [{"steps": (12, 8)}, {"steps": 6}]),
        ("\n\nprompt,seed\n\na taxi,4", [{"seed": 4}]),
        ("Unnamed: 0,prompt,seed,top_k,model\n0,a taxi,4,NaN,N/A\n1,a taxi,None,7,<NA>\n", [{"seed": 4}, {"top_k": 7}]),
    ],
)
def test_tables_of_other_programs(tmp_path, text, wanted):
    from argen.jobs.tables import read_table

    plain = {"prompt": "a taxi", "model": "argen/emoji-parti", "num_images": 1, "seed": 0, "sampler": "auto"}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        assert [request.explicit_settings() for request in read_table(tmp_path / "t.csv")] == [
            plain | one for one in wanted
        ]


def test_tables_of_tabs_and_of_json_with_words_for_numbers(tmp_path):
    from argen.jobs.tables import read_table

    (tmp_path / "t.tsv").write_text("prompt\tseed\na taxi, flat style\t4\n")
    (tmp_path / "t.jsonl").write_text('{"prompt": "a taxi, flat style", "seed": "4", "top_k": null}\n')
    for name in ("t.tsv", "t.jsonl"):
        (request,) = read_table(tmp_path / name)
        assert (request.prompt, request.seed, request.top_k) == ("a taxi, flat style", 4, None)


def test_what_batch_writes_is_read(tmp_path):
    from argen.jobs.tables import read_table, settings_csv
    from argen.request import Request

    requests = [
        Request('a "red" apple, flat', steps=(12, 8), model="argen/emoji-xar"),
        Request("a\nb", temperature=0.5),
    ]
    (tmp_path / "pictures.csv").write_text(settings_csv(requests, ["1.png", "2.png"]), newline="")
    assert read_table(tmp_path / "pictures.csv") == requests


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("t.csv", "prompt,seed\na,4.5\n", "line 2 of t.csv: seed is '4.5': expected a whole number"),
        ("t.csv", "prompt,seed,seed\na,4,5\n", "names the column seed twice"),
        ("t.csv", 'prompt,seed\n"' + "a" * 200_000, "t.csv is no row of a table"),
        ("t.jsonl", "[" * 100_000, "line 1 of t.jsonl: "),
        ("t.jsonl", '{"prompt": "a", "control": {}}', "unknown setting 'control'"),
        ("t.jsonl", '{"prompt": "a \\ud83c"}', "no UTF-8 text"),
        ("t.jsonl", '{"prompt": "a", "steps": {"a": 1}}', "line 1 of t.jsonl: "),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, text, wanted):
    from argen.jobs.tables import read_table

    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=wanted):
        read_table(tmp_path / name)
