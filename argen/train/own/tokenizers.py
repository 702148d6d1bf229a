"""What the recipes of image tokenizers share: crops of one's own images, the terms of the loss, dead codes, scores, what is written.

Images are read when a step needs them. Two networks learn on the same batch: the tokenizer, and a discriminator that tells its
reconstructions from the images. The perceptual term is the distance in what `emoji-judge`, which ships, sees of them, in the place of LPIPS.

Letters in shape comments: B samples, S side of the crops in pixels, N tokens of an image, C width of a code, K codes.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, reduce
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor, nn

from argen.eval import reconstruction
from argen.eval.features import Extractor, encoder_features
from argen.eval.images import crop_adm, shrunk
from argen.eval.metrics import Moments, frechet_distance, psnr
from argen.hub.loading import load
from argen.processes import processes
from argen.train.loop import Task
from argen.train.own.options import OwnOptions
from argen.train.sources import Source
from argen.train.vit_vqgan import CodeUsage, FeatureDistance, PatchDiscriminator
from samplers.errors import InvalidValue
from tokenizers_img.llamagen_vq import LlamaGenVQ
from tokenizers_img.pixels import from_uint8
from tokenizers_img.quantize import revive
from tokenizers_img.vit_vqgan import ViTVQGAN

Tokenizer = LlamaGenVQ | ViTVQGAN
CROPS = ("random", "center", "flip")
SMALLEST = 0.8  # side of a random crop, of the shorter side of its image
REVIVE_EVERY, REVIVE_UNTIL = 50, 0.8  # steps; share of the schedule
SEEN = 8  # tokens for each code, before those that hardly any has chosen count as dead
SCORED, AT_ONCE, SHOWN = 1024, 64, 16  # held-out images: at most, at a time, on the sample sheet


@dataclass(frozen=True)
class Terms:
    """Weights of the terms of the loss; that of the codebook is 1.

    Attributes:
        signed: errors and the discriminator are of pixels in [-1, 1], as in LlamaGen's code, instead of [0, 1].
        adversarial: "hinge" or "logistic".
        fooled: weight of the adversarial term in the tokenizer's loss.
        judged: of the discriminator's own loss.
        start: step from which on there are both.
        smoothness: R1's gamma, of the penalty on the discriminator's gradient at real images (arXiv 1801.04406), in every
            `smooth_every`-th step; 0 for none.
    """

    l1: float
    l2: float
    perceptual: float
    adversarial: Literal["hinge", "logistic"]
    fooled: float
    judged: float = 1.0
    start: int = 0
    smoothness: float = 0.0
    smooth_every: int = 16
    signed: bool = False

    def fooling(self, generated: Tensor) -> Tensor:
        """What the tokenizer makes small, of the discriminator's logits."""
        return -generated.mean() if self.adversarial == "hinge" else F.softplus(-generated).mean()

    def judging(self, real: Tensor, generated: Tensor) -> Tensor:
        """What the discriminator makes small, of its logits."""
        if self.adversarial == "hinge":
            return (F.relu(1 - real).mean() + F.relu(1 + generated).mean()) / 2
        return (F.softplus(-real).mean() + F.softplus(generated).mean()) / 2


class Discriminator(PatchDiscriminator):
    def compile(self, *args, **kwargs) -> None:
        """Stay as it is: the penalty is a second derivative, which compiled networks have none of."""


class OwnTokenizerTask(Task):
    """Args:
    model: the tokenizer.
    codes: its table [K, C].
    size: S.
    source, held_out: images to train on, and others.
    width: channels of the discriminator's first layer.
    """

    def __init__(
        self,
        model: Tokenizer,
        codes: Tensor,
        terms: Terms,
        size: int,
        source: Source,
        held_out: Source,
        options: OwnOptions,
        width: int = 64,
    ):
        self.codes, self.terms, self.size, self.source, self.held_out = codes, terms, size, source, held_out
        self.crops = options.crops or "random"
        if self.crops not in CROPS:
            raise InvalidValue(f"crops is {self.crops}: expected center or flip, or none for random ones", "crops")
        self.networks: dict[str, nn.Module] = {"model": model.train(), "discriminator": Discriminator(width)}
        self.features = FeatureDistance(load("argen/emoji-judge", dtype="fp32"))
        self.usage = CodeUsage(len(codes))
        self.extra_state = (self.usage,)
        self.counts: list[Tensor] = []  # of this step's parts
        self.vectors: list[Tensor] = []
        self.options = {name: str(getattr(options, name)) for name in ("init", "size", "crops")}
        self.options |= {"image_size": str(size), "images": source.identity}
        if processes().is_main_process:
            print(source.report(size=size))

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Which images [B], and where they are cropped [B, 4]: see `crop`."""
        images = torch.randint(len(self.source), (size,), generator=generator)
        return {"image": images, "chance": torch.rand(size, 4, generator=generator)}

    def read(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pixels [B, 3, S, S] in [0, 1] of a drawn batch."""

        def pixels(place: tuple[int, list[float]]) -> np.ndarray:
            return np.asarray(crop(self.source.image(place[0]), self.size, self.crops, *place[1]))

        places = zip(batch["image"].tolist(), batch["chance"].tolist(), strict=True)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = np.stack(list(pool.map(pixels, places)))
        return {"pixels": from_uint8(torch.from_numpy(images)).contiguous()}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        real, terms = batch["pixels"], self.terms
        decoded, quantization, ids = self.networks["model"](real)
        self.note(ids, real, step)
        decoded = decoded.float()
        loss = self.distance(decoded, real, log) + quantization
        log["vq"] = quantization.item()
        adversarial = step + 1 >= terms.start
        if adversarial:
            judge = getattr(self.networks["discriminator"], "module", self.networks["discriminator"])
            judge.requires_grad_(False)
            fooling = terms.fooling(judge(self.ranged(decoded)).float())
            judge.requires_grad_(True)
            loss = loss + terms.fooled * fooling
            log["fooling"] = fooling.item()
        yield "model", loss
        if adversarial:
            yield "discriminator", self.judged(real, decoded.detach(), step, log)
        self.revive(step)

    def ranged(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] -> in the range that the terms are of."""
        return 2 * pixels - 1 if self.terms.signed else pixels

    def distance(self, decoded: Tensor, real: Tensor, log: dict[str, float]) -> Tensor:
        """The terms that compare pixels [B, 3, S, S] in [0, 1] with the real ones."""
        terms, error = self.terms, self.ranged(decoded) - self.ranged(real)
        l2, perceptual = error.square().mean(), self.features.to(real.device)(decoded, real)
        log |= {"l2": l2.item(), "perceptual": perceptual.item()}
        return terms.l1 * error.abs().mean() + terms.l2 * l2 + terms.perceptual * perceptual

    def judged(self, real: Tensor, decoded: Tensor, step: int, log: dict[str, float]) -> Tensor:
        """The discriminator's loss on images and reconstructions [B, 3, S, S] in [0, 1]."""
        terms = self.terms
        smooth = terms.smoothness > 0 and step % terms.smooth_every == 0
        real = self.ranged(real).detach().requires_grad_(smooth)
        logits = self.networks["discriminator"](torch.cat([real, self.ranged(decoded)])).float()
        of_real, of_decoded = logits.chunk(2)
        loss = terms.judged * terms.judging(of_real, of_decoded)
        log["judging"] = loss.item()
        if smooth:
            (gradient,) = torch.autograd.grad(of_real.mean(dim=(1, 2, 3)).sum(), real, create_graph=True)
            loss = loss + terms.smoothness / 2 * gradient.float().square().sum(dim=(1, 2, 3)).mean()
        return loss

    def due(self, step: int) -> bool:
        """Whether dead codes are revived in a step."""
        count = self.usage.count
        return step % REVIVE_EVERY == 0 and step <= REVIVE_UNTIL * self.total and count.sum() >= SEEN * len(count)

    @torch.no_grad()
    def note(self, ids: Tensor, real: Tensor, step: int) -> None:
        """Keep which codes a part of a batch has chosen, and the vectors that dead ones may move to."""
        self.counts.append(torch.bincount(ids.flatten(), minlength=len(self.codes)))
        if self.due(step):
            self.vectors.append(self._model().encode_vectors(real).flatten(0, 1).float().cpu())

    @torch.no_grad()
    def revive(self, step: int) -> None:
        """Move codes that hardly any token has chosen onto vectors of the step's images, the same ones in all processes."""
        due, count = self.due(step), self.usage.count
        chosen = reduce(torch.stack(self.counts).sum(dim=0), "sum")
        self.counts.clear()
        count += chosen.cpu()
        if not due:
            return
        vectors = torch.cat(gather_object([torch.cat(self.vectors)]))
        self.vectors.clear()
        chance = torch.Generator().manual_seed(step)
        revive(self.codes, (count < 2).to(self.codes.device), vectors.to(self.codes.device), chance)
        count.zero_()

    def held(self, indices: range) -> Tensor:
        """Centre crops of held-out images [B, S, S, 3] uint8."""
        crops = [np.asarray(crop_adm(self.held_out.image(index), self.size)) for index in indices]
        return torch.from_numpy(np.stack(crops))

    @cached_property
    def extractor(self) -> Extractor:
        """Features of `emoji-clip`, which ships."""
        encoder = load("argen/emoji-clip", dtype="fp32")
        encoder.clip.to(self._model().device)
        return encoder_features("emoji", encoder)

    @torch.no_grad()
    def looked_at(self, images: Tensor) -> Moments:
        """The moments of the features of images [B, S, S, 3] uint8."""
        inputs = torch.stack([self.extractor.prepare(image) for image in images.numpy()])
        return Moments.of(self.extractor.look(inputs)["features"])

    def evaluate(self) -> dict[str, float]:
        """PSNR in dB, the share of codes in use and rFID-emoji of at most `SCORED` held-out images."""
        self.settle()
        count, total, used = min(SCORED, len(self.held_out)), 0.0, set()
        moments: list[tuple[Moments, Moments]] = []
        for first in range(0, count, AT_ONCE):
            images = self.held(range(first, min(first + AT_ONCE, count)))
            decoded, ids = reconstruction.reconstruct(self._model(), images)
            total += psnr(decoded, from_uint8(images)).sum().item()
            used |= set(ids.unique().tolist())
            shown = rearrange((decoded * 255).round().to(torch.uint8), "b d h w -> b h w d").contiguous()
            moments.append((self.looked_at(images), self.looked_at(shown)))
        scores = {"PSNR (dB)": total / count, "codes used": len(used) / len(self.codes)}
        if count > 1:
            real, made = (sum(rest, first) for first, *rest in zip(*moments, strict=True))
            distance = frechet_distance(real.mean, real.covariance, made.mean, made.covariance)
            scores[f"r{self.extractor.called('FID')}"] = distance
        return scores

    def settle(self) -> None:
        """Bring the codes to unit length, as the tokenizers read them; of the averaged weights."""
        self.codes.data.copy_(F.normalize(self.codes.data, dim=-1))

    def sample(self) -> Image.Image:
        """Held-out images, each above its reconstruction, eight in a row."""
        images = self.held(range(min(SHOWN, len(self.held_out))))
        decoded, _ = reconstruction.reconstruct(self._model(), images)
        pairs = torch.stack([from_uint8(images), decoded], dim=1)
        columns = min(8, len(pairs))
        pairs = torch.cat([pairs, torch.ones(-len(pairs) % columns, *pairs.shape[1:])])
        sheet = rearrange(pairs, "(r c) two d h w -> (r two h) (c w) d", c=columns)
        return Image.fromarray((sheet * 255).round().to(torch.uint8).numpy())

    def save(self, folder: Path) -> None:
        """Write a folder that `argen.load` reads."""
        raise NotImplementedError

    def about(self, name: str) -> str:
        """One line, for the card."""
        side = self.size // self._model().stride
        return f"{name}, {self.size} x {self.size} <-> {side} x {side} ids of {len(self.codes)}"

    def millions(self) -> float:
        """Parameters of the tokenizer."""
        return round(sum(part.numel() for part in self._model().parameters()) / 1e6, 1)


def crop(image: Image.Image, size: int, how: str, scale: float, left: float, top: float, mirror: float) -> Image.Image:
    """A square of an image, RGB, `size` pixels wide; images that are smaller are enlarged.

    Args:
        how: "random", with its side 0.8 to 1 times the shorter side of the image and its place anywhere (LlamaGen), or "center"; both
            but "center" are mirrored in half of the cases.
        scale, left, top, mirror: chances in [0, 1).
    """
    if how == "random":
        image = shrunk(image, size + int(scale * (ceil(size / SMALLEST) - size + 1)))
        x, y = int(left * (image.width - size + 1)), int(top * (image.height - size + 1))
        image = image.crop((x, y, x + size, y + size))
    else:
        image = crop_adm(image, size)
    return ImageOps.mirror(image) if how != "center" and mirror < 0.5 else image


def check_options(options: OwnOptions, reads_vae: bool = False) -> None:
    """Args:
        reads_vae: a new network reads another tokenizer.

    Raises:
        InvalidValue: something that a tokenizer has no use for, or that of a new network beside a model to start from.
    """
    for name in ("text_encoder",) if reads_vae else ("tokenizer", "text_encoder"):
        if getattr(options, name) is not None:
            raise InvalidValue(
                f"{name} is for generators, and this recipe trains a tokenizer: leave it out; --init names the one to start from",
                name,
            )
    for name in ("size", "tokenizer"):
        if options.init is not None and getattr(options, name) is not None:
            raise InvalidValue(
                f"{name} is for a new network, and {options.init} has its own: leave one of them out", name
            )


def started(init: str, kind: type[Tokenizer], name: str) -> Tokenizer:
    """The tokenizer that a training starts from.

    Raises:
        InvalidValue: it is of another kind.
    """
    model = load(init, dtype="fp32")
    if not isinstance(model, kind):
        raise InvalidValue(f"{init} is no {name}: expected one to start from", "init")
    return model.requires_grad_(True)


def check_side(side: int, stride: int) -> int:
    """Raises:
    InvalidValue: a side of images in pixels that the side of a token's square does not divide.
    """
    if side % stride:
        raise InvalidValue(f"image_size is {side}: expected a multiple of {stride}, the side of a token", "image_size")
    return side
