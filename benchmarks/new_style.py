"""A LoRA on a style that no shipped model has seen: black and white icons of 200 things for training and of others to look at.

Beside them the model's own images of the same 200 things are trained on, without the words of the style, so that it does not forget how it
draws without these words (the prior preservation of DreamBooth, arXiv 2208.12242).

    pip install ".[train]"
    python benchmarks/new_style.py images icons/
    argen train llamagen --images icons/train --init argen/emoji-llamagen --lora 16 --steps 400 --batch-size 32 --learning-rate 1e-3 --out runs/icons
    python benchmarks/new_style.py score --images icons/ --lora runs/icons/final --sheet icons.png

The icons are Microsoft's Fluent emoji in high contrast (MIT), fetched with npm. `score` asks for things that were not trained on, with the
words of the style, and tells the new style from the old by the features of `argen/emoji-clip`, with a linear rule that tells the icons trained
on from the model's own. What is forgotten is read off the 60 everyday prompts, which do not name the style.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from argen.command import Parser, guarded, load_model
from tokenizers_img.pixels import from_pil

PACKAGE, VERSION = "@iconify-json/fluent-emoji-high-contrast", "1.2.6"
STYLE = "black and white style"
TRAINED, SIZE = 200, 256


def make_images(args: argparse.Namespace) -> None:
    """Write `train` with a table of captions, and `other`: things of the same groups that are not trained on."""
    from argen.data.emoji import NAMES_PACKAGE, THINGS, cache_folder, fetch_package, named, render, with_article

    cache = args.icons or cache_folder()
    known = named(fetch_package(*NAMES_PACKAGE, cache))
    icons = json.loads((fetch_package(PACKAGE, VERSION, cache) / "icons.json").read_text())
    things = [icon for icon in sorted(icons["icons"]) if known.get(icon, {"group": ""})["group"] in THINGS]
    chosen = np.random.default_rng(0).permutation(things)
    names = {icon: with_article(icon.replace("-", " ")) for icon in chosen}
    for folder, part in (("train", chosen[:TRAINED]), ("other", chosen[TRAINED : TRAINED + 100])):
        images = {}
        for icon in part:
            body, side = icons["icons"][icon]["body"], icons["height"]
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" width="{side}" height="{side}">{body}</svg>'
            images[f"{icon}.png"] = f"{names[icon]}, {STYLE}", Image.open(BytesIO(render(svg, SIZE)))
        if folder == "train":
            prompts = list(names.values())[:TRAINED]
            own = draw(load_model(args.model, None), prompts)
            images |= {f"{icon}-own.png": pair for icon, pair in zip(part, zip(prompts, own, strict=True), strict=True)}
        (args.out / folder).mkdir(parents=True)
        with (args.out / folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "text"])
            for name, (caption, image) in images.items():
                image.save(args.out / folder / name)
                table.writerow([name, caption])
    print(f"{TRAINED} images to train on, as many of the model's own, and 100 others in {args.out}")


def read_images(folder: Path, new: bool = True) -> tuple[list[str], list[Image.Image]]:
    """Captions and images of a folder that `make_images` wrote: those in the new style, or the others."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["text"].endswith(STYLE) == new]
    return [row["text"] for row in rows], [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]


@torch.no_grad()
def features(encoder, images: list[Image.Image]) -> Tensor:
    """Unit features [B, E]."""
    side = encoder.clip.config.vision_config.image_size
    return encoder.embed_pixels(torch.stack([from_pil(image, side) for image in images]))


def told_by(styles: list[Tensor]) -> Callable[[Tensor], float]:
    """By features [n, E] of images of the new style and of the old -> what says the share of others that is of the new one: the sign of a ridge
    regression."""
    rows = torch.cat(styles).double()
    middle = rows.mean(dim=0)
    wanted = torch.cat(
        [torch.full((len(part),), sign) for part, sign in zip(styles, (1.0, -1.0), strict=True)]
    ).double()
    spread = (rows - middle).T @ (rows - middle)
    ridge = 0.01 * spread.trace() / len(spread) * torch.eye(len(spread), dtype=torch.double)
    weights = torch.linalg.solve(spread + ridge, (rows - middle).T @ wanted)
    return lambda other: ((other.double() - middle) @ weights > 0).double().mean().item()


def draw(pipe, prompts: list[str]) -> list[Image.Image]:
    """One image of each prompt, whose seed is its number."""
    images: list[Image.Image] = []
    for first in range(0, len(prompts), 16):
        part = prompts[first : first + 16]
        generators = [torch.Generator().manual_seed(first + index) for index in range(len(part))]
        images += pipe(part, generator=generators).images
    return images


def everyday(pipe, judge) -> float:
    """Share of the everyday prompts whose thing is among the judge's five most probable names."""
    from argen.eval.judge import EVERYDAY_PROMPTS, read_prompts, verdict

    truths = read_prompts(EVERYDAY_PROMPTS)
    images = draw(pipe, [truth.prompt for truth in truths])
    scores = [verdict(judge, np.asarray(image), truth)["identity"] for image, truth in zip(images, truths, strict=True)]
    return sum(scores) / len(scores)


def score(args: argparse.Namespace) -> None:
    """Print the shares, and write a sheet: real icons that were not trained on, with the LoRA, without."""
    pipe, encoder, judge = (load_model(name, None) for name in (args.model, "argen/emoji-clip", "argen/emoji-judge"))
    styles = [read_images(args.images / "train", new)[1] for new in (True, False)]
    prompts, real = (part[: args.num] for part in read_images(args.images / "other"))
    old = draw(pipe, [prompt.removesuffix(f", {STYLE}") for prompt in prompts])
    before = everyday(pipe, judge)
    pipe.load_lora_weights(args.lora)
    new = draw(pipe, prompts)
    told = told_by([features(encoder, images) for images in styles])
    for name, images in (("real icons", real), ("with the LoRA", new), ("without", old)):
        print(f"{name}, {len(images)}: {told(features(encoder, images)):.0%} of the new style")
    print(f"everyday prompts: {before:.0%} without, {everyday(pipe, judge):.0%} with the LoRA")
    if args.sheet:
        columns = list(zip(real, new, old, strict=True))[:10]
        sheet = Image.new("RGB", (len(columns) * 128, 3 * 128), "white")
        for x, column in enumerate(columns):
            for y, image in enumerate(column):
                sheet.paste(image.resize((128, 128), Image.Resampling.LANCZOS), (128 * x, 128 * y))
        sheet.save(args.sheet)


def main() -> int:
    parser = Parser(prog="python benchmarks/new_style.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("images", help="write the icons")
    command.add_argument("out", type=Path, help="new folder")
    command.add_argument("--icons", type=Path, metavar="DIR", help="where npm packages are kept")
    command.add_argument("--model", default="argen/emoji-llamagen", metavar="ID", help="that the LoRA will change")
    command.set_defaults(run=make_images)
    command = commands.add_parser("score", help="draw with and without a LoRA")
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help="what `images` wrote")
    command.add_argument("--lora", required=True, metavar="DIR")
    command.add_argument("--model", default="argen/emoji-llamagen", metavar="ID")
    command.add_argument("--num", type=int, default=40, help="prompts (default: 40, at most 100)")
    command.add_argument("--sheet", type=Path, metavar="PNG", help="where images go to be looked at")
    command.set_defaults(run=score)
    args = parser.parse_args()
    return guarded("benchmarks/new_style.py", args.run, args)


if __name__ == "__main__":
    sys.exit(main())
