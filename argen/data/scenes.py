"""Pictures composed of emoji with exact truth: how many, which objects, which colours, where.

Four kinds: ``count`` ("three red apples"), ``colour`` ("a blue robot"), ``pair`` ("a blue robot and a green pizza") and
``relation`` ("a cat to the left of a pizza"). Each split is composed from the pictures of the same split of the
single-picture set, so held-out concepts stay held out.
"""

import json
import random
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from argen.data.emoji import SPLITS, STYLES, THINGS, with_article
from argen.data.tables import check_new, read_split, write_splits
from argen.words import IRREGULAR
from tokenizers_img.pixels import opaque

HUES = {"red": 0, "orange": 20, "yellow": 42, "green": 88, "blue": 155, "purple": 195, "pink": 230}  # of 256
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
RELATIONS = ("to the left of", "to the right of", "above", "below")
KINDS = {"count": 0.35, "colour": 0.15, "pair": 0.25, "relation": 0.25}
PALETTE = ((230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240))  # of segments
AS_IT_COMES = 0.75  # share of the single things that keep the place and the size of their icon
INK = 245  # what is darker in some channel is no ground
AREA = 100  # pixels of 128 x 128 that an object has at least
COMMON = (  # fmt: skip; things that a model too small for all of them learns, and can then draw
    "apple", "avocado", "banana", "bread", "carrot", "cookie", "croissant", "cupcake", "hamburger", "lemon", "pear",
    "pineapple", "pizza", "pretzel", "strawberry", "tomato", "bird", "cat", "crab", "dog", "fish", "flamingo", "fox",
    "frog", "mushroom", "parrot", "pig", "rose", "snake", "sunflower", "tulip", "turtle", "whale", "palm tree",
    "maple leaf", "christmas tree", "automobile", "helicopter", "house", "sailboat", "taxi", "tent", "umbrella",
    "rocket", "star", "sun", "crescent moon", "backpack", "bell", "crown", "pencil", "door", "telephone", "bucket",
    "trumpet", "gem stone", "t shirt", "robot", "heart", "balloon", "basketball", "kite", "trophy", "teddy bear",
    "wrapped gift",
)  # fmt: skip
PLURALS = {single: several for several, single in IRREGULAR.items()}
LAYOUTS = {1: [(1, 1)], 2: [(1, 2), (2, 1)], 3: [(2, 2), (1, 3)], 4: [(2, 2)], 5: [(2, 3), (3, 2)], 6: [(2, 3), (3, 2)]}


@dataclass
class Thing:
    """One object of a scene; `box` is (left, top, right, bottom) in pixels, tight around what is not white."""

    name: str
    colour: str  # "" where the icon keeps its own
    box: tuple[int, int, int, int]


@dataclass
class Scene:
    caption: str
    kind: str
    style: str
    count: int
    relation: str  # of the first object to the second, "" if the caption names none
    objects: list[Thing]


def plural(name: str) -> str:
    *others, last = name.split()
    if last in PLURALS:
        return " ".join([*others, PLURALS[last]])
    if name.endswith(("ch", "sh", "x", "s")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def recolour(image: np.ndarray, colour: str) -> np.ndarray:
    """Turn every coloured pixel of [H, W, 3] uint8 to one hue; greys, white and black stay."""
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] = np.where(hsv[..., 1] > 30, HUES[colour], hsv[..., 0])
    return np.array(Image.fromarray(hsv, "HSV").convert("RGB"))


def _simple(name: str) -> bool:
    return len(name.split()) <= 2 and not name.endswith("s") and not any(c.isdigit() for c in name)


def _colourful(image: np.ndarray) -> bool:
    ink = (image < INK).any(-1)
    saturated = (image.max(-1).astype(int) - image.min(-1)) > 70
    return bool(ink.any()) and saturated[ink].mean() > 0.6


def boxes(image: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of each connected component of the ink of [H, W, 3] uint8, largest first."""
    ink = torch.from_numpy(image.min(axis=2) < INK)
    places = torch.arange(1.0, ink.numel() + 1).reshape(
        ink.shape
    )  # a component has the largest of its places as its label
    labels, before = torch.where(ink, places, 0.0), None
    while before is None or not torch.equal(labels, before):
        before, labels = labels, torch.where(ink, F.max_pool2d(labels[None], 3, 1, 1)[0], 0.0)
        labels = torch.where(
            ink, labels.flatten()[(labels.long() - 1).clamp(min=0)], 0.0
        )  # and that of the place it names
    least = AREA * ink.numel() / 128**2
    ids, areas = labels[ink].unique(return_counts=True)
    components = []
    for label in ids[areas.argsort(descending=True)][: int((areas >= least).sum())]:
        rows, columns = (labels == label).nonzero(as_tuple=True)
        components.append((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    return components


def segments(image: np.ndarray, boxes: list[tuple[int, int, int, int]]) -> np.ndarray:
    """The map of the objects of [H, W, 3] uint8: the ink inside each box in its colour of `PALETTE`, on black."""
    segment_map = np.zeros_like(image)
    for (left, top, right, bottom), colour in zip(boxes, cycle(PALETTE), strict=False):
        ink = (image[top:bottom, left:right] < INK).any(-1)
        segment_map[top:bottom, left:right][ink] = colour
    return segment_map


def thing_of(concept: str, only: Collection[str]) -> str:
    """Which of some things a concept is, as it is or in a colour ("red apple" is "apple"); "" for none."""
    bare = " ".join(word for word in concept.split() if word not in HUES)
    return next((name for name in (concept, bare) if name in only), "")


class Composer:
    """Draws scenes from one split of the single pictures.

    Args:
        only: draw these things alone, see `thing_of`; None for all that are simple.
        kinds: share of each kind.
    """

    def __init__(self, table, size: int, only: Collection[str] | None = None, kinds: Mapping[str, float] = KINDS):
        self.size, self.kinds = size, kinds
        self.icons: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)  # style -> (name, picture)
        self.colourful: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)
        for row in table:
            name = row["concept"]
            if only is not None:
                name = thing_of(name, only)
            elif row["group"] not in THINGS or not _simple(name):
                name = ""
            if not name:
                continue
            image = np.asarray(opaque(row["image"]))
            self.icons[row["style"]].append((name, image))
            if not any(word in HUES for word in name.split()) and _colourful(image):
                self.colourful[row["style"]].append((name, image))
        self.styles = sorted(style for style, images in self.icons.items() if len(images) >= 2)
        if not self.styles:
            raise ValueError(
                "too few images to compose scenes: expected at least two things of one style in each split"
            )

    def scene(self, rng: random.Random) -> tuple[Scene, Image.Image]:
        kind = rng.choices(list(self.kinds), self.kinds.values())[0]
        style = rng.choice(self.styles)
        few = len(self.colourful[style]) < 2  # then no scene of this style names a colour
        kind = {"colour": "count", "pair": "relation"}.get(kind, kind) if few else kind
        relation = rng.choice(RELATIONS) if kind == "relation" else ""
        coloured = {"count": rng.random() < 0.5 and not few, "relation": False}.get(kind, True)
        pool = self.colourful[style] if coloured else self.icons[style]
        icons = rng.sample(pool, 2 if kind in ("pair", "relation") else 1)
        colours = rng.sample(sorted(HUES), len(icons)) if coloured else [""] * len(icons)
        count = {"count": rng.randint(1, 6), "colour": 1}.get(kind, 2)
        if kind == "count":
            icons, colours = icons * count, colours * count
        layout = {"to": (1, 2), "ab": (2, 1), "be": (2, 1)}.get(relation[:2]) or rng.choice(LAYOUTS[count])
        cells = sorted(rng.sample(range(layout[0] * layout[1]), count))
        if relation in ("to the right of", "below"):
            cells.reverse()

        canvas = np.full((self.size, self.size, 3), 255, dtype=np.uint8)
        things = []
        for (name, image), colour, cell in zip(icons, colours, cells, strict=True):
            icon = recolour(image, colour) if colour else image
            things.append(Thing(name, colour, self._paste(canvas, icon, divmod(cell, layout[1]), layout, rng)))
        scene = Scene(self._caption(things, kind, relation), kind, style, count, relation, things)
        if rng.random() < 0.75:
            scene.caption += f", {STYLES[style].prompt}"
        return scene, Image.fromarray(canvas)

    def _paste(self, canvas, image, cell, layout, rng) -> tuple[int, int, int, int]:
        """Put `image` somewhere inside its cell of the layout, where it is alone often as it comes; returns the box of its ink."""
        if layout == (1, 1) and rng.random() < AS_IT_COMES:
            side, top, left = self.size, 0, 0
        else:
            side = int(self.size // max(layout) * rng.uniform(0.78, 0.92))
            extent = [self.size // n for n in layout]
            top, left = (cell[axis] * extent[axis] + rng.randint(1, extent[axis] - side - 1) for axis in (0, 1))
        small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
        canvas[top : top + side, left : left + side] = small
        rows, columns = np.nonzero((small < INK).any(-1))
        return (
            left + int(columns.min()),
            top + int(rows.min()),
            left + int(columns.max()) + 1,
            top + int(rows.max()) + 1,
        )

    @staticmethod
    def _caption(things: list[Thing], kind: str, relation: str) -> str:
        names = [f"{thing.colour} {thing.name}".strip() for thing in things]
        if kind == "count":
            return f"{NUMBERS[len(things)]} {plural(names[0]) if len(things) > 1 else names[0]}"
        joint = {"relation": f" {relation} "}.get(kind, " and ")
        return joint.join(with_article(name) for name in names)


def build(
    emoji: Path, out: Path, num: int = 12000, seed: int = 0, common: bool = False, kind: str | None = None
) -> dict[str, int]:
    """Compose `num` training scenes (and a tenth of that for each other split) into `out`.

    Args:
        emoji: folder made by ``argen data emoji``.
        seed: the same seed gives the same scenes.
        common: of the things in `COMMON` alone; without a test split, as none of them is held out in every style.
        kind: of this kind alone; None for all.
    """
    check_new(out)
    if num < 10:
        raise ValueError(f"num is {num}: expected at least 10, so that no split is empty")
    rows: dict[str, list[dict]] = {}
    for split in SPLITS[:2] if common else SPLITS:
        table = read_split(emoji, split)
        composer = Composer(table, table[0]["image"].width, COMMON if common else None, {kind: 1.0} if kind else KINDS)
        rng = random.Random(f"{seed}/{split}")
        rows[split] = []
        for _ in tqdm(range(num if split == "train" else num // 10), desc=f"compose {split}"):
            scene, image = composer.scene(rng)
            buffer = BytesIO()
            image.save(buffer, "PNG")
            rows[split].append(
                {"image": buffer.getvalue(), **asdict(scene), "objects": json.dumps([asdict(t) for t in scene.objects])}
            )
    write_splits(out, rows)
    return {split: len(part) for split, part in rows.items()}
