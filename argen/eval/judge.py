"""The judge of the emoji family: what a picture shows, held against prompts whose truth is known exactly.

Objects are the connected components of what is not white; `argen.models.judge.Judge` names each and its colour. 500 prompts
of four kinds are fixed in `argen/data/judge_prompts.jsonl`, and 60 in everyday words in `argen/data/everyday_prompts.jsonl`.
"""

import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from argen.data import scenes
from argen.data.emoji import STYLES, with_article
from argen.eval.images import ImageArray, ImageSet
from argen.models.judge import SIZE, Judge
from tokenizers_img.pixels import from_pil

PROMPTS = Path(scenes.__file__).with_name("judge_prompts.jsonl")
COMMON_PROMPTS = PROMPTS.with_name("judge_prompts_common.jsonl")  # as many, of `argen.data.scenes.COMMON`
EVERYDAY_PROMPTS = PROMPTS.with_name("everyday_prompts.jsonl")
AT_MOST = 8  # objects that are looked at
AMONG = 5  # an object is what it should be if that is among so many of the judge's most probable names
SHARES = {"single": 100, "colour": 50, "pair": 125, "count": 125, "relation": 100}  # of the 500 prompts


@dataclass(frozen=True)
class Truth:
    """A prompt and what its picture must show.

    Attributes:
        kind: "single", "colour", "count", "pair", "relation" or "everyday".
        objects: (name, colour) of each; "" where no colour is asked for.
        relation: of the first to the second object, or "".
        accepted: other names that are as right for a single object: "a boat" may be a sailboat or a canoe.
    """

    prompt: str
    kind: str
    objects: tuple[tuple[str, str], ...]
    relation: str = ""
    accepted: tuple[str, ...] = ()


def read_prompts(path: Path = PROMPTS) -> list[Truth]:
    """The fixed prompts."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Truth(**row | {"objects": tuple(map(tuple, row["objects"])), "accepted": tuple(row.get("accepted", ()))})
        for row in rows
    ]


def around(boxes: Sequence[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:
    """The box around all of some boxes."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def crop(image: ImageArray, box: tuple[int, int, int, int]) -> Tensor:
    """The object in a box -> [3, 64, 64] in [0, 1], padded to a square."""
    return from_pil(Image.fromarray(image).crop(box), SIZE)


def subject(image: ImageArray) -> Tensor:
    """Crop of all the ink of an image -> [3, 64, 64] in [0, 1]: an icon may have several parts."""
    boxes = scenes.boxes(image)[:AT_MOST]
    return crop(image, around(boxes) if boxes else (0, 0, image.shape[1], image.shape[0]))


def verdict(judge: Judge, image: ImageArray, truth: Truth) -> dict[str, float]:
    """Scores of an image: {question: 0 to 1}, the questions being those of the truth's kind.

    "identity" is the share of the objects that are what they should be: among the judge's `AMONG` most probable names; "name" is
    that of single objects whose most probable name is right.
    """
    boxes = scenes.boxes(image)[:AT_MOST]
    crops = torch.stack([crop(image, box) for box in boxes]) if boxes else None
    names, colours = judge.answers(crops, AMONG) if boxes else ([], [])
    if truth.kind in ("single", "colour", "everyday"):  # an icon may have several parts
        icon = crop(image, around(boxes))[None] if boxes else None
        (likely,), (colour,) = judge.answers(icon, AMONG) if boxes else ([[""]], [""])
        expected_name, expected_colour = truth.objects[0]
        accepted = {expected_name, *truth.accepted}
        scores = {"identity": float(not accepted.isdisjoint(likely)), "name": float(likely[0] in accepted)}
        return scores | ({"colour": float(colour == expected_colour)} if expected_colour else {})
    if truth.kind == "count":
        correct = [truth.objects[0][0] in likely for likely in names]
        return {"count": float(len(boxes) == len(truth.objects)), "identity": sum(correct) / max(1, len(correct))}
    best = {"identity": 0.0, "colour": 0.0, "both": 0.0}
    if len(boxes) >= 2:
        best = max((_match(truth, names, colours, order) for order in permutations(range(len(boxes)), 2)), key=_rank)
    if truth.kind == "pair":
        return {"identity": best["identity"], "colour": best["colour"], "binding": best["both"]}
    matched = best.get("order")
    holds = best["identity"] == 1 and _holds(truth.relation, boxes[matched[0]], boxes[matched[1]])
    return {"identity": best["identity"], "relation": float(holds)}


def _match(truth: Truth, names: Sequence[str], colours: Sequence[str], order: tuple[int, int]) -> dict:
    same = [name in names[i] for i, (name, _) in zip(order, truth.objects, strict=True)]
    tinted = [colours[i] == colour for i, (_, colour) in zip(order, truth.objects, strict=True)]
    both = all(same) and all(tinted)
    return {"identity": sum(same) / 2, "colour": sum(tinted) / 2, "both": float(both), "order": order}


def _rank(match: dict) -> tuple:
    return match["both"], match["identity"], match["colour"]


def _holds(relation: str, first: tuple, second: tuple) -> bool:
    """Whether the middle of one box lies as `relation` says to the other's."""
    x, y = ((first[0] + first[2]) - (second[0] + second[2]), (first[1] + first[3]) - (second[1] + second[3]))
    sideways = abs(x) > abs(y)
    return {
        "to the left of": x < 0 and sideways,
        "to the right of": x > 0 and sideways,
        "above": y < 0 and not sideways,
        "below": y > 0 and not sideways,
    }[relation]


def evaluate(judge: Judge, images: ImageSet, truths: Sequence[Truth]) -> dict[str, dict]:
    """Shares of right answers over pictures, picture i being of prompt ``i % len(truths)``: {"kind: question": ...}."""
    sums: dict[str, list[float]] = {}
    for index in range(len(images)):
        truth = truths[index % len(truths)]
        for question, score in verdict(judge, images[index], truth).items():
            sums.setdefault(f"{truth.kind}: {question}", []).append(score)
    accuracy = judge.config.accuracy or {}
    return {
        name: {"value": sum(values) / len(values), "n": len(values), "judge_on_real": accuracy.get(name)}
        for name, values in sorted(sums.items())
    }


def recognised(judge: Judge, generated: ImageSet, real: ImageSet, icons) -> dict[str, dict]:
    """Shares of pictures of icons whose group the judge tells and, where it knows the name, whose name is among its `AMONG`
    most probable; beside each that of the real pictures.

    Args:
        icons: table made by ``argen data emoji`` with the pictures of `real`, in its order.
    """
    is_known = [name in judge.config.names for name in icons["concept"]]
    shares: dict[str, list[float]] = {"judge: group": [], "judge: identity": []}
    for images in (generated, real):
        crops = torch.stack([subject(image) for image in images])
        correct = [predicted == group for predicted, group in zip(judge.group_of(crops), icons["group"], strict=True)]
        shares["judge: group"].append(sum(correct) / len(correct))
        if any(is_known):
            names, _ = judge.answers(crops[torch.tensor(is_known)], AMONG)
            expected_names = [name for name, flag in zip(icons["concept"], is_known, strict=True) if flag]
            correct_names = [name in likely for name, likely in zip(expected_names, names, strict=True)]
            shares["judge: identity"].append(sum(correct_names) / len(correct_names))
    counts = {"judge: group": len(is_known), "judge: identity": sum(is_known)}
    return {
        question: {"value": share[0], "n": counts[question], "judge_on_real": share[1]}
        for question, share in shares.items()
        if share
    }


def truths_of(table) -> Iterator[Truth]:
    """What the scenes of a table made by ``argen data scenes`` show."""
    for row in table:
        objects = tuple((thing["name"], thing["colour"]) for thing in json.loads(row["objects"]))
        yield Truth(row["caption"], row["kind"], objects, row["relation"])


def draw_prompts(table, seed: int = 0, only: Collection[str] | None = None) -> list[Truth]:
    """The prompts of `PROMPTS`, drawn anew, or with `only` those of `COMMON_PROMPTS`.

    Args:
        table: training split of a set made by ``argen data emoji``.
        only: of these things alone; for `COMMON_PROMPTS` those of `argen.data.scenes.COMMON` that the judge knows.
    """
    composer, rng = scenes.Composer(table, table[0]["image"].width, only), random.Random(f"judge/{seed}")
    truths: dict[str, Truth] = {}
    remaining = dict(SHARES)
    while remaining["single"]:
        style = rng.choice(composer.styles)
        name = rng.choice(composer.icons[style])[0]
        prompt = f"{with_article(name)}, {STYLES[style].prompt}"
        remaining["single"] -= prompt not in truths
        truths[prompt] = Truth(prompt, "single", ((name, ""),))
    while any(remaining.values()):
        scene, _ = composer.scene(rng)
        if remaining[scene.kind] and scene.caption not in truths:
            remaining[scene.kind] -= 1
            objects = tuple((thing.name, thing.colour) for thing in scene.objects)
            truths[scene.caption] = Truth(scene.caption, scene.kind, objects, scene.relation)
    return sorted(truths.values(), key=lambda truth: list(SHARES).index(truth.kind))


def write_prompts(truths: Sequence[Truth], path: Path = PROMPTS) -> None:
    """One JSON object a line, as `read_prompts` reads them."""
    path.write_text("".join(json.dumps(asdict(truth)) + "\n" for truth in truths), encoding="utf-8")
