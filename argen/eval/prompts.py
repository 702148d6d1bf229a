"""How well pictures fit their prompts: ranks by the text/picture encoder, and a labelled grid to look at.

Two sets of prompts: 200 captions of held-out combinations (a style and a concept that training saw apart, never
together) and `COMMON`, what people would type first (of concepts that are not held out as a whole).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from argen.data.tables import read_split
from argen.metadata import save_images
from argen.models.clip import TextImageEncoder
from argen.request import Job, Request

COMMON = [  # fmt: skip
    "a red apple", "a pizza", "a hamburger", "a birthday cake", "an ice cream", "a strawberry", "a banana",
    "a watermelon", "a cookie", "a hot beverage", "a dog face", "a cat face", "a panda", "a monkey", "a tiger face",
    "a penguin", "an octopus", "a butterfly", "a fish", "a turtle", "a whale", "a rabbit face", "a frog", "a bear",
    "a unicorn", "a sunflower", "a rose", "a cactus", "a palm tree", "a red heart", "a rocket", "a bicycle",
    "an airplane", "a police car", "a bus", "a sailboat", "a house", "a castle", "a robot", "a ghost",
    "an alien", "a smiling face with sunglasses", "a guitar", "a soccer ball", "a basketball", "an umbrella",
    "a cloud", "a full moon", "a snowman", "a gem stone",
]  # fmt: skip
HELD_OUT, AMONG = 200, 100


class Generator(Protocol):
    """Pipeline that is scored: runs a request, and can embed prompts and images (`argen.pipelines.base.TokenPipeline`)."""

    text_image_encoder: TextImageEncoder | None

    def run(self, request: Request) -> Iterator[Job]: ...


def held_out_captions(data: Path) -> list[str]:
    """`HELD_OUT` captions of combinations of style and concept that training never saw, those without skin tones first."""
    rows = read_split(data, "validation").remove_columns("image").to_list()
    rows.sort(key=lambda row: bool(row["skin_tone"]))
    return list(dict.fromkeys(row["caption"] for row in rows))[:HELD_OUT]


def ranks(encoder: TextImageEncoder, prompts: list[str], images: list[Image.Image], others: list[str]) -> Tensor:
    """Rank [B] of each picture's own prompt (1 is best) among itself and `AMONG` - 1 of `others`."""
    text, embeds = encoder.embed([*prompts, *others], images)
    matching = (embeds * text[: len(prompts)]).sum(dim=1, keepdim=True)
    result = []
    for index, row in enumerate(embeds @ text[len(prompts) :].T):
        different = [place for place, other in enumerate(others) if other != prompts[index]][: AMONG - 1]
        result.append(1 + (row[different] > matching[index]).sum())
    return torch.stack(result)


def summary(name: str, prompt_ranks: Tensor) -> dict[str, float]:
    return {
        f"{name}: mean rank of {AMONG}": prompt_ranks.float().mean().item(),
        f"{name}: first": (prompt_ranks == 1).float().mean().item(),
        f"{name}: among the first five": (prompt_ranks <= 5).float().mean().item(),
    }


def evaluate(pipe: Generator, data: Path, num_candidates: int, seed: int, grid: Path | None) -> dict[str, float]:
    """Draw every prompt once, and once more as the best of `num_candidates`; rank the prompts by the pictures.

    The judge is the encoder that also re-ranks, so the second number says what re-ranking gains in its own eyes.

    Args:
        data: folder made by ``argen data emoji``.
        grid: also write 32 of the re-ranked pictures, with their prompts, to this PNG file.

    Raises:
        ValueError: the generator has no encoder to judge with.
    """
    if pipe.text_image_encoder is None:
        raise ValueError(
            f"{pipe.name} has no text and image encoder to judge with: expected a model that ranks, e.g. argen/emoji-parti"
        )
    held_out = held_out_captions(data)
    prompts = [*held_out, *COMMON]
    distractors = list(
        dict.fromkeys(row["caption"] for row in read_split(data, "train").remove_columns("image").to_list())
    )
    order = torch.randperm(len(distractors), generator=torch.Generator().manual_seed(seed)).tolist()
    distractors = [distractors[index] for index in order[: 2 * AMONG]]

    first, best = [], []
    for index, prompt in enumerate(tqdm(prompts, desc="draw", disable=None)):
        request = Request(prompt, seed=seed + 1000 * index, num_candidates=num_candidates)
        *_, job = pipe.run(request)
        best.append(job.images[0])
        if job.requests[0].seed == request.seed:
            first.append(job.images[0])
        else:
            *_, job = pipe.run(request.for_image(0))
            first.append(job.images[0])
    scores: dict[str, float] = {}
    half = len(held_out)
    for name, images in (("one image", first), (f"best of {num_candidates}", best)):
        parts = slice(half), slice(half, None)
        encoder = pipe.text_image_encoder
        prompt_ranks = torch.cat([ranks(encoder, prompts[part], images[part], distractors) for part in parts])
        scores |= summary(f"held-out combinations, {name}", prompt_ranks[:half])
        scores |= summary(f"common prompts, {name}", prompt_ranks[half:])
    if grid:
        indices = [*range(0, half, max(1, half // 16))][:16] + [half + i for i in range(0, len(COMMON), 3)][:16]
        save_images([(sheet([(prompts[i], best[i]) for i in indices]), None)], [grid])
    return scores


def sheet(labelled: list[tuple[str, Image.Image]], columns: int = 8) -> Image.Image:
    """Pictures in rows, each with its prompt below."""
    font = ImageFont.load_default(11)
    width, height = labelled[0][1].width, labelled[0][1].height + 30
    lines = -(-len(labelled) // columns)
    page = Image.new("RGB", (columns * (width + 8), lines * (height + 8)), "white")
    pen = ImageDraw.Draw(page)
    for index, (prompt, image) in enumerate(labelled):
        left, top = index % columns * (width + 8) + 4, index // columns * (height + 8) + 4
        page.paste(image, (left, top))
        rows = [""]
        for word in prompt.split():
            if pen.textlength(f"{rows[-1]} {word}", font=font) > width:
                rows.append("")
            rows[-1] = f"{rows[-1]} {word}".strip()
        for number, row in enumerate(rows[:2]):
            pen.text(
                (left + width / 2, top + image.height + 2 + 13 * number), row, fill="black", font=font, anchor="ma"
            )
    return page
