"""A small grammar of prompts for where no English pipeline is installed: it finds objects and their attributes, and refuses what it
does not understand."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

# fmt: off
DETERMINERS = {
    "a", "an", "the", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "some", "many",
    "several", "few", "all", "both", "each", "every", "another", "this", "these", "those", "my", "your", "his", "her", "its", "our", "their",
}
BETWEEN = (  # objects
    "to the left of", "to the right of", "in front of", "on top of", "as well as", "next to", "left of", "right of", "along with",
    "together with", "instead of", "rather than", "close to", "that has", "that have", "which has", "which have", "has", "have",
    "and", "or", "but", "plus", "while", "then", "versus", "vs", "on", "onto", "upon", "in", "into", "inside", "within", "outside", "under",
    "underneath", "beneath", "above", "below", "over", "atop", "beside", "besides", "behind", "before", "after", "near", "at", "between",
    "among", "amid", "around", "across", "through", "along", "against", "opposite", "toward", "towards", "from", "to", "of", "off", "by",
    "for", "like", "as", "than", "without", "up", "down", ",", ";", "&", "+", "/", "|", "、", "-", ":", ".", "!", "?", "。", "·", "•",
)
JOINING = {"and", "&", ","}  # which stand between the attributes of one object, too: "a red, shiny apple"
COLOURS = {
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "black", "white", "grey", "gray", "cyan", "teal",
    "turquoise", "magenta", "beige", "maroon", "navy", "gold", "golden", "silver", "crimson", "scarlet", "lavender", "tan", "ivory",
}
ATTRIBUTES = COLOURS | {
    "dark", "light", "bright", "pale", "vivid", "neon", "big", "small", "large", "little", "tiny", "huge", "giant", "tall", "short",
    "long", "wide", "thin", "thick", "fat", "old", "young", "new", "round", "square", "flat", "hot", "cold", "wet", "dry", "soft", "hard",
    "clean", "fresh", "sweet", "cute", "happy", "sad", "angry", "very", "shiny", "fluffy", "furry", "fuzzy", "hairy", "rusty", "dirty",
    "dusty", "muddy", "snowy", "sunny", "sleepy", "silly", "funny", "scary", "tasty", "pretty", "ugly", "heavy", "empty", "wooden",
    "metallic", "plastic", "leather", "wool", "woolen", "metal", "striped", "spotted", "dotted", "checkered", "transparent", "colorful",
    "colourful", "beautiful", "smooth", "rough", "strong", "weak", "lovely", "friendly", "elegant", "ancient", "modern", "broken",
    "frozen", "stolen", "worn", "torn", "hidden", "fallen", "woven", "eaten", "ridden", "driven", "written", "drawn", "thrown",
}
OBJECTS_TOO = {"orange", "violet", "gold", "silver", "lavender", "square", "light", "giant", "plastic", "leather", "wool", "metal"}
NO_PARTICIPLES = {
    "building", "ring", "king", "wing", "string", "painting", "drawing", "ceiling", "earring", "wedding", "clothing", "spring", "pudding",
    "sling", "swing", "darling", "duckling", "gosling", "dumpling", "herring", "railing", "sibling", "seedling", "stocking", "awning",
    "icing", "frosting", "piercing", "thing", "morning", "evening", "lightning", "viking", "bed", "shed", "sled", "seed", "weed", "reed",
    "speed", "steed", "moped", "biped", "breed", "feed",
}
NOT_READ = {
    "is", "are", "was", "were", "be", "been", "being", "am", "do", "does", "did", "can", "could", "will", "would", "not", "no", "nor", "none",
    "who", "whom", "whose", "that", "which", "where", "when", "what", "it", "he", "she", "they", "them", "him", "i", "we", "you", "there",
    "here", "with", "so", "if", "because", "had", "sat", "ate", "ran", "stood", "rode", "held", "lay", "fell", "flew", "swam", "wore", "saw",
    "took", "sang", "slept", "met", "drove", "drew", "threw", "caught", "hid", "got", "went", "came", "respectively", "same",
    "colored", "coloured", "wearing", "holding", "carrying",
    "alone", "together", "asleep", "awake", "nearby", "everywhere", "again", "too", "also", "only", "apart", "away", "indoors", "outdoors",
}
NO_OBJECTS = {"style", "quality", "resolution", "lighting", "masterpiece", "artstation"}  # but how the image looks
# fmt: on
HOLDING = ("wearing", "holding", "carrying", "with")  # things, which may have attributes of their own
BEING = ("that is", "that are", "which is", "which are", "is", "are", "painted", "colored", "coloured", "dyed")
LINKS = (*BEING, "made of", *HOLDING)
FRAMES = {
    "photo",
    "photograph",
    "picture",
    "image",
    "painting",
    "drawing",
    "illustration",
    "sketch",
    "side",
    "view",
}  # of ...
ADJECTIVE_ENDINGS = ("y", "ed", "ish", "en", "ful", "less", "ous", "able", "ic", "ing", "ive")  # of some nouns, too


def is_determiner(word: str) -> bool:
    """Whether a word says how many or which, and nothing of what an object is like."""
    return word.lower() in DETERMINERS or word[:1].isdigit()


def normal(word: str) -> str:
    """A word or a punctuation mark in lower case, with plain dashes and stops."""
    word = unicodedata.normalize("NFKC", word).lower()
    if word and all(unicodedata.category(char) == "Pd" or char == "\u2212" for char in word):
        return "-"
    return "." if word.strip(".") == "" else word.rstrip("'-") or word


def by_rules(words: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Noun and modifiers of each object, as numbers of words; none of what is no object.

    Raises:
        ValueError: the words may be read in several ways, or in none.
    """
    low = [normal(word) for word in words]
    return [_group(low, segment) for segment in _segments(low)]


def unclear(low: Sequence[str], part: Iterable[int]) -> ValueError:
    """The refusal of some words of a prompt."""
    text = " ".join(low[index] for index in part)
    text = text if len(text) <= 60 else f"{text[:60]}..."
    return ValueError(
        f"cannot tell what belongs to what in {text!r}: name each object with its words, --bind OBJECT=WORDS, e.g. --bind robot=blue"
    )


def _phrase(low: Sequence[str], index: int, phrases: Iterable[str]) -> list[str]:
    """The first of some phrases that stands at a word; no words for none."""
    split = (phrase.split() for phrase in phrases)
    return next((parts for parts in split if list(low[index : index + len(parts)]) == parts), [])


def _segments(low: Sequence[str]) -> Iterator[list[int]]:
    """The parts of a prompt that speak of one object each."""
    segment: list[int] = []
    index = 0
    while index < len(low):
        link, rest = _phrase(low, index, LINKS), _phrase(low, index, BETWEEN)
        acting = not link and _acts(low, segment, index)
        if link and not (link[0] in HOLDING and _own_attributes(low, index + 1)):
            segment, index = [*segment, *range(index, index + len(link))], index + len(link)
            continue
        if not (link or rest or acting):
            segment, index = [*segment, index], index + 1
            continue
        after = index + len(link or rest or "1")
        joining = bool(segment) and bool(rest) and rest[0] in JOINING
        if joining and (_phrase(low, after, LINKS) or _more_attributes(low, segment, after)):
            index = after  # "a bear, wearing a hat"; "a red, shiny apple"
            continue
        if acting and low[segment[-1]] in ("is", "are"):
            segment = segment[: -2 if low[segment[-2]] in ("that", "which") else -1]
        framed = rest == ["of"] and segment and low[segment[-1]] in FRAMES  # "a photo of" is no object
        if not framed:
            yield segment
        segment, index = [], after
    yield segment


def _participle(word: str) -> bool:
    return len(word) > 4 and word.endswith(("ing", "ed")) and word not in NO_PARTICIPLES | ATTRIBUTES


def _acts(low: Sequence[str], segment: Sequence[int], index: int) -> bool:
    """Whether a word says what the object before it does, to the object behind it: "a robot eating a pizza"."""
    if not segment or not low[index].endswith("ing") or not _participle(low[index]):
        return False
    before, following = low[segment[-1]], low[index + 1] if index + 1 < len(low) else "a"
    if before in ATTRIBUTES or is_determiner(before):
        return False
    return is_determiner(following) or not before.endswith(ADJECTIVE_ENDINGS)


def _more_attributes(low: Sequence[str], segment: Sequence[int], after: int) -> bool:
    """Whether what stands behind a comma or an "and" belongs to an object that is still to come.

    Raises:
        ValueError: a word may be an attribute or an object.
    """
    words = [low[index] for index in segment if not is_determiner(low[index])]
    if not words or after >= len(low) or is_determiner(low[after]):
        return False
    if all(word in ATTRIBUTES for word in words):
        return True
    following = next((index for index in range(after, len(low)) if _phrase(low, index, BETWEEN)), len(low))
    open_ended = words[-1].endswith(ADJECTIVE_ENDINGS) and all(word in ATTRIBUTES for word in words[:-1])
    if open_ended and following > after and low[following - 1] not in NO_OBJECTS:
        raise unclear(low, [*segment, *range(segment[-1] + 1, following)])
    return False


def _own_attributes(low: Sequence[str], start: int) -> bool:
    """Whether what stands behind a "with" is an object with attributes of its own: "with a green hat", but not "with glasses"."""
    ends = (
        index for index in range(start, len(low)) if _phrase(low, index, (*BETWEEN, *LINKS)) or _participle(low[index])
    )
    return len([word for word in low[start : next(ends, len(low))] if not is_determiner(word)]) > 1


def _group(low: Sequence[str], segment: list[int]) -> tuple[list[int], list[int]]:
    """Noun and modifiers of a part of a prompt: "a NOUN", "a MODIFIER ... NOUN", "a NOUN with MODIFIERS", "the NOUN is ..."."""
    starts = [place for place, index in enumerate(segment) if _is_link(low, segment[:place], index)]
    if not starts:
        return _noun_phrase(low, segment)
    noun, modifiers = _noun_phrase(low, segment[: starts[0]])
    if not noun:
        raise unclear(low, segment)
    for start, stop in zip(starts, [*starts[1:], len(segment)], strict=True):
        _check_linked(low, segment[start:stop])
    return noun, modifiers + segment[starts[0] :]


def _is_link(low: Sequence[str], before: Sequence[int], index: int) -> bool:
    """Whether a link to the noun stands there; "painted" is one behind the noun alone."""
    link = " ".join(_phrase(low, index, LINKS))
    inside = link == "is" and before and low[before[-1]] in ("that", "which")
    behind = not link.endswith("ed") or any(
        low[position] not in ATTRIBUTES and not is_determiner(low[position]) for position in before
    )
    return bool(link) and not inside and behind


def _check_linked(low: Sequence[str], part: list[int]) -> None:
    """Raises:
    ValueError: behind a link stands more than attributes, or than one thing.
    """
    link = _phrase(low, part[0], LINKS)
    words = [low[index] for index in part[len(link) :]]
    if " ".join(link) not in BEING:
        words = words[next((place for place, word in enumerate(words) if not is_determiner(word)), len(words)) :]
    *first, last = words or ["that"]
    if any(word not in ATTRIBUTES for word in first) or _unread(last) or is_determiner(last):
        raise unclear(low, part)


def _unread(word: str) -> bool:
    return word in NOT_READ or not word[0].isalnum() or word.endswith(("'s", "s'"))


def _noun_phrase(low: Sequence[str], part: list[int]) -> tuple[list[int], list[int]]:
    """The noun and the words before it: attributes, then at most one that is none that is known ("a red palm tree")."""
    body = part[next((place for place, index in enumerate(part) if not is_determiner(low[index])), len(part)) :]
    if not body or low[body[-1]] in NO_OBJECTS:
        return [], []
    *before, head = (low[index] for index in body)
    unknown = [place for place, word in enumerate(before) if word not in ATTRIBUTES and not _participle(word)]
    singular = len(body) < len(part) and low[part[0]] in ("a", "an", "one", "this", "another", "each", "every")
    verb = head.endswith("s") and not head.endswith(("ss", "us", "is", "as", "ens"))  # "a cat eats"
    wrong = any(_unread(word) or is_determiner(word) for word in (*before, head))
    last = _participle(head) or head.endswith("ly") or (singular and verb)  # is no noun
    wrong |= bool(unknown) and (unknown != [len(before) - 1] or last)
    wrong |= head in ATTRIBUTES - OBJECTS_TOO
    wrong |= head in COLOURS and (len(body) == len(part) or bool(COLOURS & set(before)))
    if wrong:
        raise unclear(low, part)
    return body[-1:], body[:-1]
