"""What the emoji show, by all its names: emojibase's labels, shortcodes and tags in 28 languages (MIT), and everyday names of our own.

`build` writes the two tables that ship beside `aliases.toml`, out of the package `emojibase-data`.
"""

import gzip
import json
import math
import re
import tomllib
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from argen.words import bare_name, singular

PRESETS = ("cldr", "emojibase", "github", "iamcal", "joypixels")  # of shortcodes: what people type
FACES = ("people-body", "smileys-emotion")
TABLES = files("argen.data") / "names"
CONCEPTS, TRANSLATIONS, ALIASES = "concepts.json.gz", "translations.json.gz", "aliases.toml"
LABEL, CODE, HEAD, PART = (
    4.0,
    3.0,
    1.5,
    0.4,
)  # scores of a name that is a label, a shortcode, a label's last word or one of its others
CERTAIN = 1.05  # score above which a word means a concept: a tag alone is not enough
ALIKE = 0.25  # share of the concepts that tags of two languages have in common, of all that either has
LATIN = 0x24F  # the last of its letters: tags of one concept are taken in other scripts alone, where they are no English words
FACE_PENALTY, FLAG_PENALTY, WORD_PENALTY = 0.6, 1.0, 0.1


@dataclass(frozen=True)
class Concept:
    """One emoji without its skin tones.

    Attributes:
        name: as captions have it, "hot beverage".
        label: emojibase's English one.
        group: emojibase's, "food-drink".
        codes, tags: other English names, lower case, words apart.
    """

    name: str
    label: str
    emoji: str
    hexcode: str
    group: str
    codes: tuple[str, ...]
    tags: tuple[str, ...]


class Concepts:
    """The English names of all concepts, and which concept a word most likely means."""

    def __init__(self, concepts: list[Concept], aliases: dict[str, list[str]]):
        self.all, self.aliases = concepts, aliases
        self.by_name = {concept.name: concept for concept in concepts}
        self.names = sorted({*self.by_name, *aliases})  # as they may be typed
        self.by_emoji = {concept.emoji.replace("\ufe0f", ""): concept for concept in concepts}
        self.by_word: dict[str, set[int]] = defaultdict(set)  # any name or word of a label -> numbers of concepts
        self.tagged: dict[str, int] = defaultdict(int)  # tag -> how many concepts have it
        for index, concept in enumerate(concepts):
            for text in (concept.name, *concept.codes, *concept.tags, *concept.name.split()):
                self.by_word[text].add(index)
            for tag in concept.tags:
                self.tagged[tag] += 1

    def score(self, word: str, concept: Concept) -> float:
        """How likely a word or phrase in the singular means a concept; above `CERTAIN` it says so with some certainty."""
        words, score = concept.name.split(), 0.0
        score += LABEL if word == concept.name else 0.0
        score += CODE if word in concept.codes else 0.0
        if word in words:
            score += HEAD if word == words[-1] else PART
        if word in concept.tags:
            score += 1 - math.log(self.tagged[word]) / math.log(len(self.all))
        if concept.group in FACES and score < CODE:
            score -= FACE_PENALTY
        return score - FLAG_PENALTY * (concept.group == "flags") - WORD_PENALTY * (len(words) - 1)

    def ranked(self, word: str) -> list[tuple[float, Concept]]:
        """The concepts that a word or phrase may mean, the most probable one first; an alias of ours before all others."""
        scores = {self.all[i].name: self.score(word, self.all[i]) for i in self.by_word.get(word, ())}
        for place, name in enumerate(self.aliases.get(word, ())):
            scores[name] = 10.0 - place
        ordered = sorted(scores.items(), key=lambda item: -item[1])
        return [(score, self.by_name[name]) for name, score in ordered if name in self.by_name]

    def named(self, name: str) -> Concept | None:
        """The concept whose label a name is, in the singular or the plural."""
        return self.by_name.get(name) or self.by_name.get(singular(name))


def read_aliases() -> dict[str, list[str]]:
    """Everyday names -> the concepts that they stand for, the first of which a prompt is read as."""
    table = tomllib.loads((TABLES / ALIASES).read_text(encoding="utf-8"))
    return {name.replace("_", " "): concepts for name, concepts in table.items()}


@cache
def english() -> Concepts:
    """The shipped table."""
    rows = json.loads(gzip.decompress((TABLES / CONCEPTS).read_bytes()))
    concepts = [Concept(**row | {"codes": tuple(row["codes"]), "tags": tuple(row["tags"])}) for row in rows]
    return Concepts(concepts, read_aliases())


@cache
def names_of(concept: str) -> list[str]:
    """The everyday English names of a concept that mean it before all others: aliases, shortcodes, and tags that hardly any other has."""
    return _names_by_concept().get(concept, [])


@cache
def _names_by_concept() -> dict[str, list[str]]:
    table, names = english(), defaultdict(list)
    for word in (*table.aliases, *table.by_word):
        ranked = table.ranked(word)
        if ranked and ranked[0][0] >= CERTAIN and word not in table.by_name and word not in names[ranked[0][1].name]:
            names[ranked[0][1].name].append(word)
    return dict(names)


@cache
def translations() -> dict[str, dict[str, str]]:
    """Language -> a name in it, as `bare_name` writes it -> the concept's name."""
    names = [concept.name for concept in english().all]
    return {language: {text: names[index] for text, index in table.items()} for language, table in _tables()[0].items()}


@cache
def labels_of(language: str) -> frozenset[str]:
    """Those of `translations` that are a concept's label, and not only a tag."""
    return frozenset(_tables()[1][language])


@cache
def _tables() -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    tables = json.loads(gzip.decompress((TABLES / TRANSLATIONS).read_bytes()))
    both = {language: {**table["labels"], **table["tags"]} for language, table in tables.items()}
    return both, {language: list(table["labels"]) for language, table in tables.items()}


def meanings(rows: list[list[str]], known: Concepts) -> dict[str, dict[str, int]]:
    """Names in another language, "labels" and "tags" -> numbers of the concepts that they mean.

    A label means its concept, and so does a tag of one concept alone. A tag of several means what the English tag does that has most of
    them in common, since both say the same of them; before a label, if that English one has an alias.

    Args:
        rows: label and tags of each concept; empty where the language has none.
    """
    labels = {bare_name(row[0]): index for index, row in reversed([*enumerate(rows)]) if row}
    owners: dict[str, set[int]] = defaultdict(set)
    for index, row in enumerate(rows):
        for text in row[1:]:
            owners[bare_name(text)].add(index)
    english_owners: dict[str, set[int]] = defaultdict(set)
    for index, concept in enumerate(known.all):
        for tag in concept.tags:
            english_owners[tag].add(index)
    numbers = {concept.name: index for index, concept in enumerate(known.all)}
    tags: dict[str, int] = {}
    for text, concepts in owners.items():
        if len(concepts) == 1:
            if text not in labels and any(ord(char) > LATIN for char in text):
                tags[text] = next(iter(concepts))
            continue
        shared = Counter(tag for index in concepts for tag in known.all[index].tags)
        alike, tag = max(
            ((count / len(concepts | english_owners[tag]), tag) for tag, count in shared.items()), default=(0.0, "")
        )
        ranked = known.ranked(tag)
        if alike >= ALIKE and ranked and ranked[0][0] > CERTAIN and (tag in known.aliases or text not in labels):
            labels[text] = numbers[ranked[0][1].name]
    return {"labels": {k: v for k, v in labels.items() if k}, "tags": {k: v for k, v in tags.items() if k}}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("’", "").replace("ñ", "n")).strip("-")


def concept_name(label: str) -> str:
    """A label as captions have it: "T-Rex" -> "t rex"."""
    return slug(label).replace("-", " ")


def build(package: Path, out: Path) -> int:
    """Write both tables out of the unpacked `emojibase-data`; returns the number of concepts.

    Raises:
        FileExistsError: `out` is a file, or a folder that is not empty.
    """
    from argen.data.tables import check_new

    check_new(out)
    groups = {g["order"]: g["key"] for g in json.loads((package / "en/messages.json").read_text())["groups"]}
    presets = [json.loads((package / f"en/shortcodes/{preset}.json").read_text()) for preset in PRESETS]
    records = [
        r
        for r in json.loads((package / "en/data.json").read_text())
        if groups.get(r.get("group"), "component") != "component"
    ]
    records.sort(key=lambda record: record["order"])
    rows = []
    for record in records:
        found = [preset.get(record["hexcode"], []) for preset in presets]
        codes = [code for each in found for code in ([each] if isinstance(each, str) else each)]
        name = concept_name(record["label"])
        tags = dict.fromkeys(bare_name(tag) for tag in record.get("tags", []))
        codes = dict.fromkeys(bare_name(code.replace("_", " ").replace("-", " ")) for code in codes)
        row = {"name": name, "label": record["label"], "emoji": record["emoji"], "hexcode": record["hexcode"]}
        row |= {
            "group": groups[record["group"]],
            "codes": [c for c in codes if c != name],
            "tags": [t for t in tags if t],
        }
        rows.append(row)
    known = Concepts([Concept(**row) for row in rows], read_aliases())
    translated = {}
    for folder in sorted(file.parent for file in package.glob("*/data.json") if file.parent.name != "en"):
        table = {r["hexcode"]: r for r in json.loads((folder / "data.json").read_text())}
        found = [table.get(record["hexcode"]) for record in records]
        translated[folder.name] = meanings([[r["label"], *r.get("tags", [])] if r else [] for r in found], known)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in ((CONCEPTS, rows), (TRANSLATIONS, translated)):
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (out / name).write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return len(rows)
