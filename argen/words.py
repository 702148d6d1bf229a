"""What people type, read in one way: text files, the normal form of a prompt, numbers in words, and names of concepts."""

import math
import re
import unicodedata
from collections.abc import Collection, Iterable
from pathlib import Path

from tokenizers import Regex, normalizers

from samplers.errors import InvalidValue

MAX_PROMPT = 1000  # characters
MOST_COUNTED = 25  # things, the range of the count tokens' authors
ONES: tuple[str, ...] = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
ONES += ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
VALUES = dict(zip(ONES, range(20), strict=True)) | dict(zip(TENS, range(20, 100, 10), strict=True))
UNITS = {"dozen": 12, "dozens": 12, "doz": 12, "score": 20, "gross": 144}
UNITS |= {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
GROUPS = {"pair": 2, "couple": 2, "duo": 2, "brace": 2, "trio": 3, "quartet": 4, "quintet": 5, "sextet": 6, "septet": 7}
GROUPS |= {"octet": 8, "score": 20, "gross": 144}
AMOUNT = re.compile(
    rf"""(?:(?:exactly|just|only)\ )?
    (?P<sign>[-−]|minus\ |negative\ )?
    (?:(?P<digits>\d+)
      |(?P<tens>{"|".join(TENS)})(?:[ -](?P<ones>{"|".join(ONES[1:10])}))?
      |(?P<small>{"|".join(ONES)}|no)
      |(?P<half>half\ an?|an?\ half|half)(?=[ -]dozen)
      |an?\ (?P<group>{"|".join(GROUPS)})(?=\ of\ )
      |(?P<one>(?:an?\ )?single|an?)
      |(?=dozen\b))
    (?P<units>(?:[ -]?(?:{"|".join(UNITS)})(?!\w)\.?)*(?:\ of(?!\w))?)
    (?:\ (?P<sets>{"|".join(GROUPS)})s?\ of(?!\w))?
    (?:\ ?[x×])?
    (?!\S)""",
    re.VERBOSE | re.IGNORECASE,
)
VAGUE = re.compile(
    r"(few|lots?|number|handful|couple|pair|half|third|quarter|several|score|gross|bit|plenty)(?!\w)"
    r"|(bunch|group|flock|herd|pack|pile|heap|stack|set|crowd|swarm|variety|collection|host|array|tons?|myriad|multitude)\ of(?!\w)"
    r"|([\w-]+\ )*(photo(graph)?|picture|image|painting|drawing|illustration|sketch|portrait)s?\ of(?!\w)",
    re.IGNORECASE,
)
FRACTION = re.compile(
    r"(and\ a\ half|hal(f|ves)|thirds?|quarters?|(fif|six|seven|eigh|nin|ten)ths?|percent|%|[-/.])(?!\w)", re.IGNORECASE
)
NO_THING = re.compile(
    r"(of|and|or|to|x|×|&|\+|plus|minus|times|packs?|by|out|more|less|fewer|per|point|odd)(?!\w)|[-,.;:/!?&+*=<>~^|@#%]",
    re.IGNORECASE,
)
NUMBER = rf"\d+|(?:{'|'.join([*ONES, *TENS, *(UNITS.keys() - {'score', 'gross'})])})(?:-(?:{'|'.join(ONES[1:10])}))?"
SECOND = r"(?:\b(?:and|plus)|[&+,])\ +(?:an?|another|some)\ "
ANOTHER = re.compile(rf"(?<![\w'-])(?:{NUMBER})(?![\w'-])|{SECOND}", re.IGNORECASE)  # a range, a sum, a second thing
WEIGHTED = re.compile(r"[(\[{<].*[)\]}>]|(?<!\d):\s*\d|:\s*\d+\.\d")  # "12:30" is none
INVISIBLE = "\u00ad\u034f\u061c\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\ufffb\U000e0000-\U000e0fff"
BLANK = r"\s\u0000-\u001f\u007f-\u009f\u115f\u1160\u2800\u3164\uffa0"  # what looks like a space, or like nothing between words
APOSTROPHES = r"`\u00b4\u02b9\u02bb-\u02bd\u02c8\u02ca\u02cb\u055a\u1fbf\u2018-\u201b\u2032\u2035\ua78c\uff07\uff40"
HYPHENS = r"\u00ad\u2010-\u2015\u2212\ufe58\ufe63\uff0d"
ARTICLES = ("a", "an", "the", "one", "some")
IRREGULAR = {"mice": "mouse", "geese": "goose", "men": "man", "women": "woman", "children": "child", "people": "person"}
IRREGULAR |= {
    "teeth": "tooth",
    "feet": "foot",
    "oxen": "ox",
    "dice": "die",
    "lice": "louse",
    "cacti": "cactus",
    "fungi": "fungus",
}
IRREGULAR |= {
    f"{stem}ves": f"{stem}f"
    for stem in ("lea", "loa", "wol", "shel", "el", "hal", "cal", "thie", "scar", "hoo", "dwar", "shea")
}
IRREGULAR |= {f"{stem}ves": f"{stem}fe" for stem in ("kni", "wi", "li", "housewi", "midwi")} | {
    "quizzes": "quiz",
    "pies": "pie",
    "ties": "tie",
}
IRREGULAR |= {f"{word}es": word for word in ("lens", "iris", "atlas", "gas", "canvas", "trellis", "waltz")}
IRREGULAR |= {
    f"{word}s": word
    for word in ("shoe", "horseshoe", "toe", "canoe", "oboe", "hoe", "muse", "fuse", "axe", "quiche", "mustache")
}
NO_PLURAL = {"lens", "gas", "atlas", "canvas", "christmas", "texas"}  # which look like one
ALWAYS_PLURAL = NO_PLURAL | {  # or no plural at all
    "scissors", "trousers", "jeans", "pants", "shorts", "glasses", "sunglasses", "binoculars", "goggles", "headphones", "clothes", "pajamas",
    "pyjamas", "leggings", "tights", "pliers", "stairs", "news", "series", "species",
}  # fmt: skip


def check_text(text: str, what: str) -> str:
    """Raises:
    ValueError: the text cannot be written as UTF-8: it came from bytes that are none, or holds half of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds bytes that are no UTF-8 text: type it again, or save it as UTF-8") from None
    return text


def check_prompt(prompt: str) -> None:
    """Raises:
    ValueError: the prompt is empty, longer than `MAX_PROMPT` characters, or no text that UTF-8 can hold.
    """
    if not isinstance(prompt, str) or not visible(prompt):
        message = 'the prompt is empty: say what to draw, for example "a red apple"'
        raise InvalidValue(message, "prompt", "string_below_min_length")
    check_length(prompt, "the prompt")


def check_length(text: str, what: str) -> str:
    """Raises:
    ValueError: the text is longer than `MAX_PROMPT` characters, or see `check_text`.
    """
    if len(text) > MAX_PROMPT:
        message = f"{what} has {len(text):,} characters: expected at most {MAX_PROMPT:,}"
        raise InvalidValue(message, what.removeprefix("the "), "string_above_max_length")
    return check_text(text, what)


def cut(value: object) -> str:
    """A value as an error shows it, not longer than 60 characters."""
    try:
        text = str(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        if not isinstance(value, int):  # a list of them, say
            return f"a {type(value).__name__} with a very long number"
        return f"a number of about {int(value.bit_length() * math.log10(2)):,} digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def number_of(count: int, noun: str) -> str:
    """ "1 image", "1,200 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def visible(text: str) -> bool:
    """Whether a text holds anything but white space and invisible characters."""
    return re.fullmatch(f"[{BLANK}{INVISIBLE}]*", text) is None


def without_invisible(text: str) -> str:
    """A text without the characters that nobody sees, and with single spaces."""
    return re.sub(f"[{BLANK}]+", " ", re.sub(f"[{INVISIBLE}]", "", text)).strip()


def text_normalizer() -> normalizers.Normalizer:
    """What the shipped text encoder's tokenizer does to a prompt first: NFKC, plain quotes and hyphens, no invisible characters,
    single spaces, lower case."""
    parts = [
        normalizers.Replace(Regex(f"[{APOSTROPHES}]"), "'"),  # before NFKC, which makes spaces with accents of some
        normalizers.Replace(Regex(r"[\uff0c\u3001]"), ", "),  # these have their space within
        normalizers.NFKC(),
        normalizers.Replace(Regex(f"[{INVISIBLE}]"), ""),
        normalizers.Replace(Regex(r"[\u201c-\u201f\u2033]"), '"'),
        normalizers.Replace(Regex(r"[\u2010-\u2015\u2212]"), "-"),
        normalizers.Replace(Regex(f"[{BLANK}]+"), " "),
        normalizers.Strip(),
        normalizers.Lowercase(),
    ]
    return normalizers.Sequence(parts)


def read_text(data: bytes, name: str) -> str:
    """The text of a file: UTF-8, with or without a byte order mark, or UTF-16 with one, as Excel writes it.

    Raises:
        ValueError: it is neither; says which file.
    """
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise ValueError(f"{name} is no text in UTF-8: save it as such") from None
    if "\0" in text:
        raise ValueError(f"{name} is no text file: it holds zero bytes")
    return text


def read_lines(data: bytes, name: str) -> list[tuple[int, str]]:
    """(number, text) of the lines of a text file that are not empty; a line ends at a line feed and nowhere else.

    Raises:
        ValueError: see `read_text`.
    """
    lines = enumerate(read_text(data, name).split("\n"), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line.

    Raises:
        ValueError: it cannot be read, is no text, holds none, or one that `check_prompt` refuses; says which line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ValueError(f"no prompts can be read from {path} ({reason}): expected a text file, one a line") from error
    lines = read_lines(data, str(path))
    for number, line in lines:
        try:
            check_prompt(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path}: {error}") from None
    if not lines:
        raise ValueError(f"{path} holds no prompts: expected one a line")
    return [line for _, line in lines]


def check_count(count: int) -> int:
    """Raises:
    ValueError: a count that is no whole number from 1 to 25.
    """
    if not isinstance(count, int) or not 1 <= count <= MOST_COUNTED:
        raise ValueError(f"count is {cut(count)}: expected a whole number from 1 to {MOST_COUNTED}")
    return count


def check_unweighted(prompt: str) -> None:
    """Raises:
    ValueError: the prompt holds a weight or a group, as other programs read them.
    """
    if weight := WEIGHTED.search(prompt):
        raise ValueError(
            f"{cut(weight[0])!r} is a weight or a group, which is not read: write the words alone, as in 'a red apple'"
        )


def parse_count(prompt: str) -> tuple[int, str]:
    """ "five apples", "5 apples", "twenty-five apples", "two dozen apples" or "an apple" -> how many, and "apples".

    Raises:
        ValueError: no number at the beginning, a second one, a range, a fraction, or one that is not from 1 to 25; nothing that is
            counted, or weights.
    """
    check_length(prompt, "the prompt")
    check_unweighted(prompt)
    text = unicodedata.normalize("NFKC", re.sub(f"[{HYPHENS}]", "-", without_invisible(prompt)))
    match = AMOUNT.match(text)
    things = text[match.end() :].strip().rstrip(" .!?") if match else ""
    exponent = any(unicodedata.decomposition(char).startswith(("<super>", "<sub>")) for char in prompt)
    vague = match and match["one"] and VAGUE.match(things)
    has_things = any(unicodedata.category(char)[0] == "L" or unicodedata.category(char) == "So" for char in things)
    if match is None or not has_things or vague or exponent:
        raise ValueError(
            f"{cut(prompt)!r} does not say how many of what: begin with a number from 1 to {MOST_COUNTED}, as in 'five apples'"
        )
    if FRACTION.match(things) or NO_THING.match(things) or ANOTHER.search(things):
        raise ValueError(f"{cut(prompt)!r} does not name one number: expected one whole number, as in 'five apples'")
    return check_count(_amount(match)), things


def _amount(match: re.Match) -> int:
    parts = {name: (value or "").lower() for name, value in match.groupdict().items()}
    number = int(parts["digits"]) if parts["digits"] else GROUPS.get(parts["group"], 1)
    for name in ("tens", "small"):
        if parts[name]:
            number = VALUES.get(parts[name], 0) + VALUES.get(parts["ones"], 0)
    units = [UNITS[word] for word in re.findall("|".join(UNITS), parts["units"])]
    number = math.prod([number, *units]) // (2 if parts["half"] else 1)
    return (-1 if parts["sign"] else 1) * number * GROUPS.get(parts["sets"], 1)


def split_names(texts: Iterable[str]) -> list[str]:
    """Names that were given each alone, or several with commas, semicolons, bars or line breaks between.

    Raises:
        ValueError: one is longer than `MAX_PROMPT` characters.
    """
    parts = [part.strip() for text in texts for part in re.split(r"[,;|\n\r\t、，；｜]", text)]
    return [check_length(part, "a name") for part in parts if visible(part)]


def bare_name(text: str) -> str:
    """A name as captions have it: lower case, no article, no punctuation around words; "The Palm-Tree!" -> "palm tree"."""
    text = unicodedata.normalize("NFKC", re.sub(f"[{APOSTROPHES}]", "'", without_invisible(text))).lower()
    words = [word.strip("'") for word in re.findall(r"[\w']+", text)]
    words = [word.removesuffix("'s") for word in words if word.removesuffix("'s")]
    while len(words) > 1 and words[0] in ARTICLES:
        words = words[1:]
    return " ".join(words)


def singular(name: str) -> str:
    """A bare name with its last word in the singular; "red buses" -> "red bus"."""
    *others, last = name.split() or [""]
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith("s") and not last.endswith(("ss", "us", "is")) and last not in ALWAYS_PLURAL and len(last) > 3:
        if (
            last.endswith("ies")
            and len(last) > 4
            and last not in ("cookies", "brownies", "movies", "smoothies", "zombies", "genies")
        ):
            last = f"{last[:-3]}y"
        elif last.endswith(("sses", "ches", "shes", "xes", "oes")) or (
            last.endswith("uses") and not last.endswith("ouses")
        ):
            last = last[:-2]
        else:
            last = last[:-1]
    return " ".join([*others, last])


def is_plural(name: str) -> bool:
    """Whether the last word of a bare name is in the plural: "glasses" and "red apples", and neither "bus" nor "tennis"."""
    return name.split()[-1] in ALWAYS_PLURAL - NO_PLURAL or singular(name) != name


def _keys(text: str) -> set[str]:
    """What a name may be in the singular."""
    *others, last = bare_name(text).split() or [""]
    forms = {last, singular(last)}
    if last.endswith("s") and not last.endswith("ss") and len(last) > 2:
        forms.add(last[:-1])
        for ending, single in (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", "")):
            if last.endswith(ending) and len(last) > len(ending) + 1:
                forms.add(last.removesuffix(ending) + single)
    return {" ".join([*others, word]) for word in forms}


def same_concept(first: str, second: str) -> bool:
    """Whether two names mean the same but for case, article, number and punctuation."""
    keys = _keys(first) & _keys(second)
    return bool(keys - {""})


def mentions(text: str, name: str) -> bool:
    """Whether all words of a name stand in a text, in the singular or the plural."""
    words = {key for word in bare_name(text).split() for key in _keys(word)}
    return set(name.split()) <= words


def caption_names(text: str, known: Collection[str]) -> list[str]:
    """What a text names: one of the known names, several of them between "and", or what it says without article."""
    if name := known_name(text, known):
        return [name]
    parts = [part for part in re.split(r"\s+(?:and|or|plus|[-–—])\s+|\s*[&+/]\s*", text) if part]
    names = [name for part in parts if (name := known_name(part, known))]
    if len(parts) > 1 and len(names) == len(parts):
        return names
    return [bare] if (bare := singular(bare_name(text))) else []


def known_name(text: str, known: Collection[str]) -> str | None:
    """The one of some names that a text means, None for none; the very same one first."""
    bare = bare_name(text)
    if bare in known:
        return bare
    return next((name for name in known if same_concept(name, text)), None)
