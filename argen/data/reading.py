"""Everyday prompts in the words that the emoji family has learned: "ein rotes Auto" is read as "a red automobile".

A prompt is cut into parts at commas, "and" and relations; of each part the number, the colours and the longest known name stay. What
nothing is known of stays as it was typed.
"""

import difflib
import re
import tomllib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

from argen.data.concepts import CERTAIN, TABLES, Concept, english, labels_of, translations
from argen.words import ARTICLES, MAX_PROMPT, ONES, bare_name, is_plural, singular

RELATIONS = {  # as they are typed, and as scenes name them
    "to the left of": "to the left of", "on the left of": "to the left of", "left of": "to the left of",
    "to the right of": "to the right of", "on the right of": "to the right of", "right of": "to the right of",
    "on top of": "above", "above": "above", "over": "above", "below": "below", "underneath": "below", "beneath": "below", "under": "below",
}  # fmt: skip
JOINTS = {"and": "and", "&": "and", "+": "and", "plus": "and", "next to": "and", "beside": "and"} | RELATIONS
SEPARATOR = re.compile(rf"\s*(,|;|\.(?=\s|$))\s*|\s+({'|'.join(map(re.escape, JOINTS))})\s+", re.IGNORECASE)
OPENING = re.compile(
    r"^(?:please\s+|i\s+(?:want|need)\s+|i(?:'d|\s+would)\s+like\s+|(?:can|could)\s+you\s+)*(?:(?:draw|paint|show|make|create|generate|give)\s+(?:me\s+)?)?"
    r"(?:(?:a|an|the)?\s*(?:\w+\s+)?(?:picture|image|photo|photograph|drawing|painting|illustration|sketch|icon|emoji|sticker|symbol)s?\s+of\s+)?",
    re.IGNORECASE,
)
CLOSING = re.compile(r"[\s,]*\bplease\b[\s.!?]*$", re.IGNORECASE)
MEASURE = r"(?:slice|piece|cup|mug|glass|bowl|bottle|plate|pot|bunch|pair|pile|bag|box|loaf|scoop|can|jar|portion|bar|head|ear|stick)s?"
VERBS = "wearing|holding|sitting|standing|riding|driving|drinking|eating|kicking|playing|running|walking|sleeping|jumping|swimming"
PREPOSITION = re.compile(
    rf"\s+(?:in|on|with|without|at|from|by|for|near|behind|inside|into|that|which|who|is|are|of|{VERBS})\s+"
)
MOST_PARTS = 12  # of a prompt that is read
MOST_JOINED = 4  # parts of a name, as of "bow and arrow"
MOST_LETTERS = 60  # of a name whose spelling is looked at
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white", "brown", "grey")
SPELLINGS = {
    "gray": "grey",
    "violet": "purple",
    "lilac": "purple",
    "cyan": "blue",
    "turquoise": "blue",
    "navy": "blue",
    "golden": "yellow",
}
SPELLINGS |= {"magenta": "pink", "crimson": "red", "scarlet": "red", "beige": "brown", "silver": "grey"}
COLOUR = "|".join((*COLOURS, *SPELLINGS))
BOTH = re.compile(rf"\b({COLOUR})(?:\s*,\s*|\s+and\s+)(?=(?:{COLOUR})\s+\w)", re.IGNORECASE)  # "black and white dog"
# "a heart in blue"
AFTER = re.compile(rf"^(.+?)\s+(?:in|that is|that's|which is|coloured|colored|painted)\s+({COLOUR})$")
COUNTS = {word: count for count, word in enumerate(ONES) if count} | {"twenty": 20, "dozen": 12, "couple": 2}
PASSED_OVER = (  # English words that are in no name, and tell nothing of what language a prompt is in
    "of", "a", "an", "the", "in", "on", "with", "and", "my", "your", "his", "her", "our", "their", "this", "that", "some", "big", "small",
    "little", "cute", "nice", "new", "very",
)  # fmt: skip
TAG = 0.5  # what a name that is no label of a language counts as badly read
NEAR, NEAREST = 0.84, 3  # likeness of a misspelt name that is corrected; names that are offered


@dataclass(frozen=True)
class Reading:
    """How a prompt is read.

    Attributes:
        prompt: as it was typed.
        text: what the generator gets.
        known: whether any name in it is known.
        nearest: known names like it, where none is.
    """

    prompt: str
    text: str
    known: bool = True
    nearest: tuple[str, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What the user should know of it, a line each."""
        if not self.known:
            near = f": did you mean {', '.join(self.nearest)}?" if self.nearest else ""
            return [f"no name in {self.prompt!r} is known to this model{near}"]
        return [f"read as: {self.text}"] if plain(self.text) != plain(self.prompt) else []


def plain(text: str) -> str:
    """A text without case, articles, punctuation and the number of spaces, for comparing two."""
    return " ".join(word for word in bare_name(text).split() if word not in ARTICLES)


def read(prompt: str) -> Reading:
    """Read a prompt, in English or, where no name in it is English, in one of the languages of emojibase."""
    text, style = split_style(CLOSING.sub("", unicodedata.normalize("NFKC", prompt)[:MAX_PROMPT]))
    if text.lower().startswith("class:"):
        return Reading(prompt, prompt)
    phrases = with_names_of_emoji(text).strip()
    if len(SEPARATOR.findall(phrases)) >= MOST_PARTS:  # no prompt that somebody thought up
        return Reading(prompt, prompt)
    parts = read_parts(BOTH.sub(r"\1 ", OPENING.sub("", phrases)), SEPARATOR, read_english)
    if unread(parts):
        others = (
            read_parts(phrases, language.separator, partial(read_foreign, language=language))
            for language in languages()
        )
        parts = min([parts, *others], key=unread)
    if not any(part.concept for part in parts):
        parts = [corrected_part(part) for part in parts]
    if not any(part.concept for part in parts):
        typed = plain(text)[:MOST_LETTERS]
        near = difflib.get_close_matches(typed, english().names, NEAREST, 0.6)
        return Reading(prompt, prompt, False, tuple(near))
    revised = "".join(part.before + part.text() for part in parts)
    return Reading(prompt, f"{revised}{style}")


@dataclass(frozen=True)
class Part:
    """One of the things that a prompt names.

    Attributes:
        typed: what was typed.
        before: what joins it to the part before, "" for the first.
        concept: what it means; None for something unknown.
        number: 1 to 6, or more.
        article: whether it had one.
        unread: words of it that are not read.
    """

    typed: str
    before: str = ""
    concept: Concept | None = None
    number: int = 1
    colours: tuple[str, ...] = ()
    article: bool = False
    unread: float = 0

    def text(self) -> str:
        """The part in the words of captions."""
        if self.concept is None:
            return self.typed
        from argen.data.emoji import with_article
        from argen.data.scenes import plural

        colours = [colour for colour in self.colours if colour not in self.concept.name.split()]
        name = " ".join([*colours, self.concept.name])
        if self.number > 1:
            return f"{ONES[self.number] if self.number < len(ONES) else self.number} {name if is_plural(name) else plural(name)}"
        return with_article(name) if self.article else name


def unread(parts: list[Part]) -> float:
    """How badly parts are read: parts without a known name count more than single words."""
    return sum(part.unread + 2 * (part.concept is None) for part in parts) / max(1, len(parts))


def split_style(text: str) -> tuple[str, str]:
    """ "a cat, noto style" -> "a cat" and ", noto style"."""
    match = re.search(r"\s*,\s*[\w ]+ style\s*$", text, re.IGNORECASE)
    return (text[: match.start()], f", {match[0].strip(' ,').lower()}") if match else (text, "")


def with_names_of_emoji(text: str) -> str:
    """The same with every emoji replaced by its name, without its skin tone."""
    text = re.sub("[\U0001f3fb-\U0001f3ff\ufe0f]", "", text)
    known = english().by_emoji
    if not any(ord(char) > 0x2000 for char in text):
        return text
    found = sorted((emoji for emoji in known if emoji in text and ord(emoji[0]) > 0x7F), key=len, reverse=True)
    for emoji in found:
        text = text.replace(emoji, f"\x01{known[emoji].name}\x02")
    text = re.sub("\x02\\s*\x01", " and ", text)  # one after the other
    return " ".join(re.sub("[\x01\x02]", " ", text).split())


def read_parts(text: str, separator: re.Pattern, read_part: Callable[[str], Part]) -> list[Part]:
    """Read a text part by part; several of them are one where they are a name together, as "bow and arrow"."""
    pieces = separator.split(text, maxsplit=MOST_PARTS)  # part, mark, word, part, ...
    typed = pieces[0::3]
    joints = [
        f" {JOINTS.get(word.lower(), 'and')} " if word else f"{mark} "
        for mark, word in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    parts: list[Part] = []
    index = 0
    while index < len(typed):
        joined = {
            end: typed[index] + "".join(map("".join, zip(joints[index:end], typed[index + 1 : end + 1], strict=True)))
            for end in range(index, min(index + MOST_JOINED, len(typed)))
        }
        end = next((end for end in sorted(joined, reverse=True) if is_name(bare_name(joined[end]))), index)
        if joined[end].strip():
            before = joints[index - 1] if parts else ""
            parts.append(replace(read_part(joined[end].strip()), before=before))
        index = end + 1
    return parts


def is_name(name: str) -> bool:
    """Whether something has this English name."""
    return english().named(name) is not None or name in english().aliases


def read_english(typed: str) -> Part:
    """Read one part in English."""
    text = " ".join(re.findall(r"[\w'-]+", typed.lower().replace("’", "'")))
    article = text.split(" ")[0] in ARTICLES
    text = AFTER.sub(r"\2 \1", re.sub(r"^(?:an?|the) ", "", text))
    words = [SPELLINGS.get(word, word) for word in text.split()]
    words = words[1:] if len(words) > 1 and words[0] in ARTICLES else words
    number = 1
    if len(words) > 1 and (words[0] in COUNTS or words[0].isdecimal()):
        number = COUNTS[words[0]] if words[0] in COUNTS else int(words[0])
        words = words[2:] if words[1] == "of" and len(words) > 2 else words[1:]
    if not set(words) - {*COLOURS, *ARTICLES} and words != ["orange"]:
        return Part(typed, unread=len(words))
    for phrase, whole in phrases_of(" ".join(words)):
        rest = phrase.split()
        for start in range(1 if whole else len(rest)):
            concept, colour = meaning_of(rest[start:], rest[:start])
            if concept is not None:
                colours = tuple(word for word in rest[:start] if word in COLOURS and word != colour)
                understood = COLOURS, PASSED_OVER, rest[start:], english().by_word
                unread = sum(not any(word in each for each in understood) for word in words)
                return Part(typed, "", concept, number, colours, article, unread)
    return Part(typed, number=number, article=article, unread=len(words))


def phrases_of(text: str) -> Iterator[tuple[str, bool]]:
    """What a name may be found in, and whether it must be all of it: the phrase as a whole, then without its measure ("slice of pizza" ->
    "pizza"), what stands before its first preposition, and any end of it."""
    yield text, True
    if match := re.match(rf"(?:.*\s)?{MEASURE} of (?:a |an |the )?(.+)", text):
        yield match[1], False
    yield PREPOSITION.split(text, maxsplit=1)[0], False
    yield text, False


def meaning_of(words: list[str], before: list[str]) -> tuple[Concept | None, str]:
    """The concept that words mean certainly, and the colour before them that belongs to its name ("green", "apple" -> green apple)."""
    table, bare = english(), bare_name(" ".join(words))
    flag = re.fullmatch(r"flag of (?:the )?(.+)|(.+) flag", bare)
    if flag and (flagged := table.by_name.get(f"flag {flag[1] or flag[2]}")):
        return flagged, ""
    for text in dict.fromkeys((" ".join(words), bare, singular(bare))):
        for name in (text, *table.aliases.get(text, ())):
            for colour in (word for word in before[::-1] if word in COLOURS):
                if one := in_colour(name, colour):
                    return one, colour
        if text in table.by_name:
            return table.by_name[text], ""
        ranked = table.ranked(text)
        if ranked and ranked[0][0] >= CERTAIN and not (len(words) > 1 and set(words) & set(COLOURS)):
            return ranked[0][1], ""
    return None, ""


@dataclass(frozen=True)
class Language:
    """Names and small words of a language, see `names/languages.toml`.

    Attributes:
        spaced: whether it writes spaces between words.
    """

    code: str
    articles: tuple[str, ...]
    colours: dict[str, str]  # first letters -> colour, longest first
    numbers: dict[str, int]
    separator: re.Pattern
    spaced: bool


@cache
def languages() -> tuple[Language, ...]:
    """Those that prompts are read in, beside English, in the order in which they are tried."""
    table = tomllib.loads((TABLES / "languages.toml").read_text(encoding="utf-8"))
    found = []
    for code, words in table.items():
        colours = {stem: colour for colour, stems in words["colours"].items() for stem in stems.split()}
        ordered = dict(sorted(colours.items(), key=lambda item: -len(item[0])))
        numbers = {word: index for index, word in enumerate(words["numbers"], 1)}
        spaced = code not in ("ja", "zh", "zh-hant", "th")
        joint, space = f"({'|'.join(words['and'])})", r"\s+" if spaced else ""
        separator = re.compile(rf"\s*([,;、，])\s*|{space}{joint}{space}", re.IGNORECASE)
        found.append(Language(code, tuple(words["articles"]), ordered, numbers, separator, spaced))
    return tuple(found)


def read_foreign(typed: str, language: Language) -> Part:
    """Read one part in another language."""
    names = translations()[language.code]
    whole = bare_name(typed)
    if whole in names:
        return Part(
            typed,
            "",
            english().by_name[names[whole]],
            article=True,
            unread=TAG * (whole not in labels_of(language.code)),
        )
    if not language.spaced:
        return read_unspaced(typed, language, names)
    number, colours, rest = 1, [], []
    for word in whole.replace("'", " ").split():
        colour = next(
            (
                colour
                for stem, colour in language.colours.items()
                if word.startswith(stem) and len(word) <= len(stem) + 3
            ),
            None,
        )
        if word in language.articles and not rest:
            continue
        if word in language.numbers and not rest:
            number = language.numbers[word]
        elif word.isdecimal() and not rest:
            number = int(word)
        elif colour:
            colours.append(colour)
        else:
            rest.append(word)
    known = next((text for text in stems_of(" ".join(rest)) if text in names), None)
    if known is None:
        return Part(typed, unread=len(whole.split()))
    guessed = TAG * (known not in labels_of(language.code))
    return Part(typed, "", coloured(names[known], colours), number, tuple(colours), True, guessed)


def stems_of(text: str) -> Iterator[str]:
    """A name, then with a ligature, then without the usual endings of a plural."""
    if "oe" in text:
        yield text.replace("oe", "œ")
    yield text
    for ending in ("en", "er", "es", "s", "n", "e"):
        if text.endswith(ending) and len(text) > len(ending) + 2:
            yield text.removesuffix(ending)


def read_unspaced(typed: str, language: Language, names: dict[str, str]) -> Part:
    """Read a part in a language that writes no spaces: numbers and colours stand before the name, in Thai behind it."""
    text, number, colours = "".join(typed.split()), 1, []
    for word, value in language.numbers.items():
        if text.startswith(word) and len(text) > len(word):
            text, number = text.removeprefix(word), value
            text = next((text.removeprefix(each) for each in language.articles if text.startswith(each)), text)
            break
    for word, colour in language.colours.items():
        bare = text.removeprefix(word).removesuffix(word)
        if bare != text and bare_name(bare) in names:
            text, colours = bare, [colour]
            break
    name = names.get(bare_name(text))
    if name is None:
        return Part(typed, unread=len(typed.split()))
    return Part(typed, "", coloured(name, colours), number, tuple(colours), True)


def in_colour(name: str, colour: str) -> Concept | None:
    """The concept of a name in a colour, where there is one of its own: "red apple", green -> green apple."""
    base = " ".join(word for word in name.split() if word not in COLOURS)
    return english().by_name.get(f"{colour} {base}")


def coloured(name: str, colours: list[str]) -> Concept:
    """The concept of a name, or the one of one of the colours where there is one."""
    variants = (in_colour(name, colour) for colour in colours)
    return next(filter(None, variants), english().by_name[name])


def corrected_part(part: Part) -> Part:
    """A part whose name is unknown, with the known name that is spelt almost so."""
    words = [word for word in bare_name(part.typed).split() if word not in COLOURS]
    name = singular(" ".join(words))
    near = difflib.get_close_matches(name, english().names, 1, NEAR) if 4 < len(name) <= MOST_LETTERS else []
    return read_english(part.typed.lower().replace(" ".join(words), near[0])) if near else part
