"""Recipe `emoji-judge`: names single objects and their colours, from the training split's icons and scenes alone."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from argen.data.scenes import HUES, Composer
from argen.data.tables import pixels, read_split
from argen.eval import judge as scoring
from argen.eval.reconstruction import reconstruct
from argen.models.judge import Judge
from argen.train.loop import Schedule, Task
from tokenizers_img.vit_vqgan import ViTVQGAN

SCHEDULES = {
    "cpu": Schedule(steps=3000, batch_size=128, learning_rate=2e-3, warmup=100, weight_decay=0.05),
    "gpu": Schedule(steps=10000, batch_size=512, learning_rate=2e-3, weight_decay=0.05),
}
JITTER = 2  # pixels
UNKNOWN = -100  # the colour of an icon that keeps its own


class JudgeTask(Task):
    """Objects as generators of the family draw them: half of the pictures have been through the tokenizer.

    Args:
        data, scenes: folders made by ``argen data emoji`` and ``argen data scenes``.
        tokenizer: folder of `emoji-vitvqgan`.
    """

    def __init__(self, data: Path, scenes: Path, tokenizer: Path):
        icons, composed = read_split(data, "train"), read_split(scenes, "train")
        known = {name for found in Composer(icons, icons[0]["image"].width).icons.values() for name, _ in found}
        self.names, self.colours = sorted(known), list(HUES)
        rows = [place for place, name in enumerate(icons["concept"]) if name in known]
        icons = icons.select(rows)
        real = np.concatenate([pixels(icons), pixels(composed)])
        vq = ViTVQGAN.from_pretrained(tokenizer, torch_dtype=torch.float32).eval()
        with torch.autocast("cpu", torch.bfloat16):
            made, _ = reconstruct(vq, torch.from_numpy(real))
        self.pictures = (real, (made * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())

        self.objects: list[tuple[int, tuple, int, int]] = []  # picture, box, name, colour
        for index, name in enumerate(icons["concept"]):
            found = scoring.boxes(real[index])
            box = scoring.around(found) if found else (0, 0, *real.shape[2:0:-1])
            self.objects.append((index, box, self.names.index(name), UNKNOWN))
        for index, things in enumerate(composed["objects"], len(icons)):
            for thing in json.loads(things):
                colour = self.colours.index(thing["colour"]) if thing["colour"] else UNKNOWN
                self.objects.append((index, tuple(thing["box"]), self.names.index(thing["name"]), colour))
        counts = Counter(name for *_, name, _ in self.objects)
        self.weights = torch.tensor([1 / counts[name] for *_, name, _ in self.objects])

        held_out = read_split(scenes, "validation")
        self.truths, self.scenes = list(scoring.truths_of(held_out)), pixels(held_out)
        for row in read_split(data, "validation").select_columns(["concept", "image"]):
            if row["concept"] in known:
                self.truths.append(scoring.Truth(row["concept"], "single", ((row["concept"], ""),)))
                self.scenes = np.concatenate([self.scenes, np.asarray(row["image"].convert("RGB"))[None]])
        self.networks: dict[str, nn.Module] = {"model": Judge(self.names, self.colours)}

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.multinomial(self.weights, size, generator=generator).tolist()
        jitter = torch.randint(-JITTER, JITTER + 1, (size, 4), generator=generator).tolist()
        through, flip = (torch.rand(2, size, generator=generator) < 0.5).tolist()
        crops, names, colours = [], [], []
        for place, move, made, mirrored in zip(chosen, jitter, through, flip, strict=True):
            index, box, name, colour = self.objects[place]
            left, top, right, bottom = (side + step for side, step in zip(box, move, strict=True))
            picture = self.pictures[int(made)][index]
            crop = scoring.crop(picture, (max(0, left), max(0, top), min(128, right), min(128, bottom)))
            crops.append(crop.flip(2) if mirrored else crop)
            names.append(name)
            colours.append(colour)
        return {"pixels": torch.stack(crops), "names": torch.tensor(names), "colours": torch.tensor(colours)}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        name, colour = self.networks["model"](batch["pixels"])
        by_name = F.cross_entropy(name.float(), batch["names"], label_smoothing=0.05)
        by_colour = F.cross_entropy(colour.float(), batch["colours"], ignore_index=UNKNOWN)
        log |= {"name": by_name.item(), "colour": by_colour.item()}
        yield "model", by_name + by_colour

    def _model(self) -> Judge:
        return getattr(self.networks["model"], "module", self.networks["model"])

    def evaluate(self) -> dict[str, float]:
        """Shares of right answers on real held-out scenes and pictures: what a perfect generator would get."""
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
        model.to(torch.bfloat16).save_pretrained(folder)
