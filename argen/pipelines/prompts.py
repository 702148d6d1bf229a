"""Prompts and random numbers of a batch: which texts are encoded, and which generator each image has."""

import torch

from argen.data.imagenet import class_id


def distinct(prompts: list[str], guided: bool) -> tuple[list[str], list[int]]:
    """Return the distinct texts to encode, the empty one among them, and the index of the text of each row: of the prompts, then
    (`guided`) the empty text as often."""
    texts = list(dict.fromkeys([*prompts, ""]))
    rows = [texts.index(prompt) for prompt in prompts]
    return texts, rows + ([texts.index("")] * len(prompts) if guided else [])


def image_generators(generator: torch.Generator | None, count: int) -> list[torch.Generator]:
    """Return a generator for each image: `generator` itself for the first one, and new ones with seeds from it for the others; the
    first n do not depend on how many follow."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if count == 1:
        return [generator]
    first = torch.Generator(generator.device)
    first.set_state(generator.get_state())
    seeds = [int(torch.randint(2**62, (1,), generator=generator, device=generator.device)) for _ in range(count - 1)]
    return [first, *(torch.Generator().manual_seed(seed) for seed in seeds)]


def group_caption(prompt: str, groups: list[str] | None) -> str:
    """Convert "class:food-drink" to the caption of the group; any other prompt is returned unchanged.

    Raises:
        ValueError: there is no such group.
    """
    if groups is None or not prompt.strip().lower().startswith("class:"):
        return prompt
    return f"class {groups[class_id(prompt, groups)].replace('-', ' ')}"
