"""Which words of a prompt belong together: its objects, what is said of each, and where their text tokens stand."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from argen.diffusion.noun_phrases import JOINING, by_rules, is_determiner, normal
from argen.words import check_prompt, check_unweighted, without_invisible

SPACY = ("en_core_web_trf", "en_core_web_lg", "en_core_web_md", "en_core_web_sm")
MODIFIERS = ("amod", "nmod", "compound", "npadvmod", "advmod", "acomp")  # dependencies, those of the authors' rules
OBJECTS = ("dobj", "obj")


@dataclass(frozen=True)
class Group:
    """An object and what belongs to it.

    Attributes:
        noun, modifiers: numbers of words of the prompt.
        anchor: a prompt with this object alone.
    """

    noun: tuple[int, ...]
    modifiers: tuple[int, ...]
    anchor: str


@dataclass(frozen=True)
class Binding:
    """A prompt as it was understood. Make it anew with `dataclasses.replace` to correct it.

    Attributes:
        merged: the prompt without modifiers.
        positions: of the text tokens of each group's noun and modifiers, where those of the words will not do.
        length: of the prompt in text tokens, without start and end; the same.
    """

    prompt: str
    groups: tuple[Group, ...]
    merged: str
    positions: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] | None = None
    length: int | None = None

    def __str__(self) -> str:
        words = words_of(self.prompt)
        lines = [
            f"{' '.join(words[index] for index in group.noun)} <- {' '.join(words[index] for index in group.modifiers)}"
            for group in self.groups
        ]
        return f"{'; '.join(lines)}; merged: {self.merged}"


def _spans(prompt: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\d+(?:[.:]\d+)+|\w[\w'-]*|[^\w\s]", prompt)]


def words_of(prompt: str) -> list[str]:
    """Words and punctuation marks."""
    return [prompt[first:last] for first, last in _spans(prompt)]


def _find_words(words: Sequence[str], phrase: str, used: set[int], near: int = 0) -> list[int]:
    """Numbers of the words of a phrase, where it stands nearest to word `near` and is not yet used.

    Raises:
        ValueError: it does not stand there.
    """
    phrase_words, low = words_of(phrase.lower()), [word.lower() for word in words]
    starts = [
        start
        for start in range(len(low) - len(phrase_words) + 1)
        if low[start : start + len(phrase_words)] == phrase_words
        and not used & set(range(start, start + len(phrase_words)))
    ]
    if not phrase_words or not starts:
        raise ValueError(f"{phrase!r} is not in the prompt {' '.join(words)!r}: give words that stand there")
    start = min(starts, key=lambda index: abs(index - near))
    return list(range(start, start + len(phrase_words)))


@cache
def spacy_pipeline() -> Callable | None:
    """The best English pipeline of spaCy that is installed, or None."""
    try:
        import spacy
    except ModuleNotFoundError:
        return None
    installed = spacy.util.get_installed_models()
    return next((spacy.load(name) for name in SPACY if name in installed), None)


def by_grammar(prompt: str, tokens: Sequence) -> list[tuple[list[int], list[int]]]:
    """`by_rules` of a sentence that was analysed.

    Args:
        tokens: with `idx`, `text`, `pos_`, `dep_`, `head` and `i`, as spaCy has them.
    """
    dep, pos = [token.dep_ for token in tokens], [token.pos_ for token in tokens]
    children = [[c.i for c in tokens if c.head.i == token.i and c.i != token.i] for token in tokens]
    spans = _spans(prompt)

    def words(members: set[int]) -> list[int]:
        of = [(tokens[i].idx, tokens[i].idx + len(tokens[i].text)) for i in members]
        return [n for n, (first, last) in enumerate(spans) if any(first < stop and start < last for start, stop in of)]

    def below(token: int, kinds: Sequence[str]) -> set[int]:
        matches = [child for child in children[token] if dep[child] in kinds]
        return set(matches).union(*(below(child, (*MODIFIERS, "conj")) for child in matches))

    groups = []
    for token, kind in enumerate(dep):
        if pos[token] not in ("NOUN", "PROPN") or kind in MODIFIERS:
            continue
        modifiers = below(token, MODIFIERS)
        parent = tokens[token].head.i
        if kind == "nsubj" and pos[parent] == "AUX":  # "the car is blue"
            modifiers |= below(parent, MODIFIERS)
        for child in children[token]:
            if dep[child] == "relcl" and pos[child] == "AUX":  # "a dog that is red"
                modifiers |= below(child, MODIFIERS)
            elif dep[child] == "acl":  # "a cat wearing a red hat"
                things = [grandchild for grandchild in children[child] if dep[grandchild] in OBJECTS]
                modifiers |= {child, *things}.union(*(below(grandchild, ("det", *MODIFIERS)) for grandchild in things))
        groups.append((words({token}), words(modifiers - {token})))
    modifier_words = {word for _, modifiers in groups for word in modifiers}
    return [(noun, modifiers) for noun, modifiers in groups if not modifier_words & set(noun)]


def merged_prompt(prompt: str, groups: Sequence[Group]) -> str:
    """The prompt without the modifiers of its groups; "an orange cat" becomes "a cat"."""
    words, removed = words_of(prompt), {index for group in groups for index in group.modifiers}
    between: set[int] = set()  # what stands between two modifiers of one object goes with them
    for index, word in enumerate(words):
        following = next(
            (after for after in range(index, len(words)) if normal(words[after]) not in JOINING), len(words)
        )
        if normal(word) in JOINING and any({index - 1, following} <= {*group.modifiers, *between} for group in groups):
            between.add(index)
    removed |= between
    indices, text = [index for index in range(len(words)) if index not in removed], ""
    for place, index in enumerate(indices):
        word = words[index]
        if word.lower() in ("a", "an") and index + 1 in removed and place + 1 < len(indices):
            word = "an" if words[indices[place + 1]][0].lower() in "aeiou" else "a"
        text += word if not text or normal(word) in ",.;:!?" else f" {word}"
    return text


def _anchor(prompt: str, members: Sequence[int]) -> str:
    spans, words = _spans(prompt), words_of(prompt)
    first = min(members)
    while first and is_determiner(words[first - 1]):
        first -= 1
    return prompt[spans[first][0] : spans[max(members)][1]]


def parse(prompt: str, bind: Mapping[str, str | Sequence[str]] | None = None) -> Binding:
    """Parse which words of a prompt belong together.

    Args:
        bind: object -> its modifiers, as they stand in the prompt: {"robot": "blue", "cat": ["wearing sunglasses"]}. None
            finds them: by the grammar of spaCy where an English pipeline of it is installed, else by `by_rules`: objects stand
            between "and", punctuation and prepositions, modifiers before the last word or after "with", "wearing", "is"; attributes
            in a row may have commas or "and" between.

    Raises:
        ValueError: there is nothing to bind, a word is not in the prompt, or the prompt is not understood.
    """
    check_prompt(prompt)
    prompt = without_invisible(prompt)
    words = words_of(prompt)
    check_unweighted(prompt)
    if bind is None:
        analyse = spacy_pipeline()
        pairs = by_rules(words) if analyse is None else by_grammar(prompt, analyse(prompt))
    else:
        used: set[int] = set()
        pairs = []
        for noun, modifiers in bind.items():
            indices = _find_words(words, noun, used)
            used |= set(indices)
            modifier_indices: list[int] = []
            for phrase in [modifiers] if isinstance(modifiers, str) else modifiers:
                modifier_indices += _find_words(words, phrase, used, indices[0])
                used |= set(modifier_indices)
            pairs.append((indices, modifier_indices))
    groups = tuple(
        Group(tuple(noun), tuple(modifiers), _anchor(prompt, [*noun, *modifiers]))
        for noun, modifiers in pairs
        if modifiers
    )
    if not groups:
        raise ValueError(
            f"there is nothing to bind in {prompt!r}: name objects with their attributes, as in 'a blue robot and a green pizza'"
        )
    return Binding(prompt, groups, merged_prompt(prompt, groups))


def token_positions(tokenizer, prompt: str, words: Sequence[int]) -> tuple[int, ...]:
    """Positions of the pieces of some words of a prompt; the start token has position 0."""
    spans, positions = _spans(prompt), []
    for word in words:
        first, last = (len(tokenizer(prompt[:stop].rstrip(), truncation=False).input_ids) - 1 for stop in spans[word])
        positions += range(first, last)
    return tuple(positions)
