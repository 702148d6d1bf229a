"""Recipe `emoji-judge`: names single objects and their colours, from the training split's icons and scenes alone."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from argen.data.emoji import everyday
from argen.data.scenes import HUES, Composer, boxes
from argen.data.tables import pixels, read_split
from argen.device import autocast
from argen.eval import judge as scoring
from argen.eval.reconstruction import reconstruct
from argen.models.files import load_network
from argen.models.judge import Judge
from argen.train.loop import Recipe, Schedule, Task
from tokenizers_img.vit_vqgan import ViTVQGAN

SCHEDULES = {
    "cpu": Schedule(steps=3000, batch_size=128, learning_rate=2e-3, warmup=100, weight_decay=0.1),
    "gpu": Schedule(steps=10000, batch_size=512, learning_rate=2e-3, weight_decay=0.05),
}
SIDE = 128  # pixels of the pictures that objects are cut from
JITTER = 2  # pixels
SETTLING = 30  # batches after which the norms know the averaged weights
FIT_STEPS, FIT_DECAY = 200, 1e-4  # of the groups
PART = 512  # pictures that go through the tokenizer at a time
UNKNOWN = -100  # the colour of an icon that keeps its own


def varied(images: Tensor, any_colour: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 3, S, S] in [0, 1] turned, stretched, lit and partly hidden by chance; of those in `any_colour` [B] some change
    their colours, too."""

    def chance(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *shape, generator=generator)

    angle, scale = chance(low=-0.3, high=0.3), chance(2, low=0.85, high=1.2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))
    places = torch.cat([turn / scale[:, :, None], chance(2, 1, low=-0.1, high=0.1)], dim=2)
    grid = F.affine_grid(places, list(images.shape), align_corners=False)
    out = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # white comes in
    order = torch.stack([torch.randperm(3, generator=generator) for _ in images])
    order = torch.where((any_colour & (chance() < 0.3))[:, None], order, torch.arange(3))
    out = out.gather(1, order[:, :, None, None].expand_as(out))
    out = 1 - (1 - out) * chance(1, 1, 1, low=0.75, high=1.25)
    cell = torch.arange(images.shape[-1]) / images.shape[-1]
    down, across = ((cell - chance(1, low=-0.3)).abs() < 0.12 for _ in range(2))
    hidden = down[:, None, :, None] & across[:, None, None, :]
    return out.masked_fill(hidden, 1.0).clamp(0, 1)


def seen_through(tokenizer: ViTVQGAN, table) -> np.ndarray:
    """The pictures of a table as the tokenizer gives them back, [N, SIDE, SIDE, 3] uint8."""
    size, parts = tokenizer.config.image_size, []
    for first in range(0, len(table), PART):
        part = table.select(range(first, min(first + PART, len(table))))
        with autocast("cpu"):
            reconstructed, _ = reconstruct(tokenizer, torch.from_numpy(pixels(part, size)))
        small = F.interpolate(reconstructed.float(), (SIDE, SIDE), mode="area") if size != SIDE else reconstructed
        parts.append((small * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


class JudgeTask(Task):
    """Objects as generators of the family draw them: half of the pictures have been through the tokenizer.

    Args:
        data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
        tokenizer: folder of `emoji-vitvqgan`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path):
        icons, composed = read_split(data, "train"), read_split(scenes, "train")
        self.icons = icons
        known_names = {
            name
            for icons_of_style in Composer(icons, icons[0]["image"].width).icons.values()
            for name, _ in icons_of_style
        }
        known_names |= everyday() & set(icons["concept"])
        self.names, self.colours = sorted(known_names), list(HUES)
        rows = [place for place, name in enumerate(icons["concept"]) if name in known_names]
        icons = icons.select(rows)
        vq = load_network(ViTVQGAN, tokenizer)
        tables, scale = (icons, composed), SIDE / composed[0]["image"].width
        real = np.concatenate([pixels(table, SIDE) for table in tables])
        self.images = (real, np.concatenate([seen_through(vq, table) for table in tables]))

        self.objects: list[tuple[int, tuple, int, int]] = []  # picture, box, name, colour
        for index, name in enumerate(icons["concept"]):
            parts = boxes(real[index])
            box = scoring.around(parts) if parts else (0, 0, *real.shape[2:0:-1])
            self.objects.append((index, box, self.names.index(name), UNKNOWN))
        for index, things in enumerate(composed["objects"], len(icons)):
            for thing in json.loads(things):
                colour = self.colours.index(thing["colour"]) if thing["colour"] else UNKNOWN
                self.objects.append(
                    (
                        index,
                        tuple(round(scale * side) for side in thing["box"]),
                        self.names.index(thing["name"]),
                        colour,
                    )
                )
        counts = Counter(name for *_, name, _ in self.objects)
        self.weights = torch.tensor([1 / counts[name] for *_, name, _ in self.objects])

        composed = read_split(scenes, "validation")
        self.truths, self.scenes = list(scoring.truths_of(composed)), list(pixels(composed, SIDE))
        prompts = [truth for truth in scoring.read_prompts(scoring.EVERYDAY_PROMPTS) if not truth.objects[0][1]]
        held_out = read_split(data, "validation")
        for name, image in zip(held_out["concept"], pixels(held_out, SIDE), strict=True):
            wanted = [truth for truth in prompts if name in (truth.objects[0][0], *truth.accepted)]
            wanted += [scoring.Truth(name, "single", ((name, ""),))] if name in known_names else []
            self.truths += wanted
            self.scenes += [image] * len(wanted)
        model = Judge(self.names, self.colours).to(memory_format=torch.channels_last)  # a third faster on a CPU
        self.networks: dict[str, nn.Module] = {"model": model}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices = torch.multinomial(self.weights, size, generator=generator).tolist()
        jitter = torch.randint(-JITTER, JITTER + 1, (size, 4), generator=generator).tolist()
        through, flip = (torch.rand(2, size, generator=generator) < 0.5).tolist()
        crops, names, colours = [], [], []
        for index, move, reconstructed, mirrored in zip(indices, jitter, through, flip, strict=True):
            image_index, box, name, colour = self.objects[index]
            left, top, right, bottom = (side + step for side, step in zip(box, move, strict=True))
            image = self.images[int(reconstructed)][image_index]
            crop = scoring.crop(image, (max(0, left), max(0, top), min(SIDE, right), min(SIDE, bottom)))
            crops.append(crop.flip(2) if mirrored else crop)
            names.append(name)
            colours.append(colour)
        labels = {"names": torch.tensor(names), "colours": torch.tensor(colours)}
        return {"pixels": varied(torch.stack(crops), labels["colours"] == UNKNOWN, generator), **labels}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        name, colour = self.networks["model"](batch["pixels"].contiguous(memory_format=torch.channels_last))
        by_name = F.cross_entropy(name.float(), batch["names"], label_smoothing=0.05)
        by_colour = F.cross_entropy(colour.float(), batch["colours"], ignore_index=UNKNOWN)
        log |= {"name": by_name.item(), "colour": by_colour.item()}
        yield "model", by_name + by_colour

    def evaluate(self) -> dict[str, float]:
        """Shares of right answers on real held-out scenes and pictures: what a perfect generator would get."""
        batches = (self.batch(64, torch.Generator().manual_seed(number))["pixels"] for number in range(SETTLING))
        settle(self._model(), batches)
        scores = scoring.evaluate(self._model(), self.scenes, self.truths)
        self.accuracy = {name: round(entry["value"], 4) for name, entry in scores.items()}
        return self.accuracy

    def sample(self) -> Image.Image:
        """32 objects of training, as they are seen."""
        crops = self.batch(32, torch.Generator().manual_seed(0))["pixels"]
        sheet = torch.cat([torch.cat(list(row), dim=2) for row in crops.split(8)], dim=1)
        return Image.fromarray((sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def save(self, folder: Path) -> None:
        model = self._model()
        model.register_to_config(accuracy=self.accuracy)
        fit_groups(model.cpu(), self.icons)
        model.to(torch.bfloat16).save_pretrained(folder)


@torch.no_grad()
def settle(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the statistics of the norms anew, for averaged weights, and set the network to evaluation.

    Args:
        batches: what it reads in training.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    device = next(model.parameters()).device
    for batch in batches:
        model(batch.to(device))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def fit_groups(judge: Judge, icons) -> None:
    """Fit the group classifier on the features that were learned from names.

    Args:
        icons: training split of a set made by ``argen data emoji``.
    """
    groups = sorted(set(icons["group"]))
    crops = torch.stack([scoring.subject(image) for image in pixels(icons)])
    with torch.no_grad():
        features = torch.cat([judge.hints(part) for part in crops.split(256)])
    judge.group = logistic(features, torch.tensor([groups.index(group) for group in icons["group"]]))
    judge.register_to_config(groups=groups)


def logistic(features: Tensor, labels: Tensor) -> nn.Linear:
    """Fit a logistic regression of class labels [N] on features [N, F]."""
    head = nn.Linear(features.shape[1], int(labels.max()) + 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), labels) + FIT_DECAY * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


RECIPE = Recipe(JudgeTask, SCHEDULES, takes=("scenes", "tokenizer"))
