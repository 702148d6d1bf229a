"""Recipes `emoji-vitvqgan` and `emoji-vitvqgan-decoder`: ViT-VQGAN on the emoji pictures (arXiv 2110.04627, section 3).

The paper's losses in two stages: the first trains everything on the codebook, L2 and L1 terms, and at its end moves the
codes to where the vectors are; the second keeps encoder and codes, so that ids keep their meaning, and trains the decoder
on edges and features of a classifier too, and at its end with the adversarial term.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from argen.data.tables import pixels, read_split
from argen.device import autocast
from argen.eval import reconstruction
from argen.models.files import load_network
from argen.models.judge import Judge
from argen.train.loop import Recipe, Schedule, Task
from tokenizers_img.kl_vae import KLVAE
from tokenizers_img.pixels import from_uint8
from tokenizers_img.quantize import revive
from tokenizers_img.vit_vqgan import ViTVQGAN

SCHEDULES = {
    "cpu": Schedule(steps=4000, batch_size=32, learning_rate=6e-4, warmup=200),
    "gpu": Schedule(steps=40000, batch_size=256, learning_rate=8e-4),
}
DECODER_SCHEDULES = {
    "cpu": Schedule(steps=6000, batch_size=16, learning_rate=1.5e-3, warmup=100, muon=True),
    "gpu": Schedule(steps=20000, batch_size=256, learning_rate=2e-4),
}
L1, L2 = 0.2, 1.0
EDGES, FEATURES, ADVERSARIAL = 0.4, 0.05, 0.25  # the last relative to the gradient of the other terms
SHARPEN_FROM = 0.4  # share of the decoder's schedule after which the adversarial term joins
SMOOTHNESS, SHAKE = 20.0, 0.05  # weight of the discriminator's penalty, and the noise that it must not notice
REVIVE_EVERY, REVIVE_UNTIL = 50, 0.8  # steps; share of the schedule
NOISE = 0.15  # standard deviation, of the size of the quantization error of 4096 codes on the unit sphere
NOISE_ONLY, NOISE_UNTIL = 0.06, 0.2  # shares of the schedule: no picture quantized before, every picture after


def network() -> ViTVQGAN:
    return ViTVQGAN(
        image_size=256,
        patch_size=32,
        encoder_size={"dim": 192, "depth": 4, "heads": 3, "dim_head": 64, "mlp_dim": 768},
        decoder_size={"dim": 256, "depth": 5, "heads": 4, "dim_head": 64, "mlp_dim": 1024},
        embed_dim=16,
        n_embed=4096,
        conv_channels=[32, 64, 128, 192],
        encoder_scale=2,
        pyramid=[32, 64, 128],
    )


class PatchDiscriminator(nn.Sequential):
    """Real or generated, for overlapping squares of 46 pixels: pixels [B, 3, H, W] -> logits [B, 1, H/8, W/8]."""

    def __init__(self, width: int = 32):
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in ((width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift by up to a sixteenth, now and then four pictures in one or other colours; [B, H, W, 3] uint8."""
    height, width = images.shape[1:3]
    most = height // 16
    flip, mosaic, recolour = (torch.rand(len(images), generator=generator) for _ in range(3))
    out = torch.where(flip[:, None, None, None] < 0.5, images, images.flip(2))
    starts = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    padded = F.pad(out, (0, 0, most, most, most, most), value=255)
    out = torch.stack([p[y : y + height, x : x + width] for p, (y, x) in zip(padded, starts, strict=True)])
    for index in (mosaic < 0.12).nonzero().flatten().tolist():
        four = out[torch.randint(len(out), (4,), generator=generator)]
        small = F.avg_pool2d(four.permute(0, 3, 1, 2).float(), 2).round().to(torch.uint8)
        out[index] = rearrange(small, "(r c) d h w -> (r h) (c w) d", r=2)
    for index in (recolour < 0.1).nonzero().flatten().tolist():
        out[index] = out[index][..., torch.randperm(3, generator=generator)]
    return out


class FeatureDistance(nn.Module):
    """Distance between images in what the first layers of `emoji-judge` see of them, each place normalised (as in LPIPS)."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.judge = judge.requires_grad_(False).eval()

    def states(self, pixels: Tensor) -> Iterator[Tensor]:
        x = self.judge.stem(F.interpolate(2 * pixels - 1, scale_factor=0.5, mode="area"))
        for block in self.judge.blocks:
            yield F.normalize(x, dim=1)
            x = block(x)

    def forward(self, generated: Tensor, real: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1], twice -> scalar."""
        pairs = zip(self.states(generated), self.states(real), strict=True)
        return torch.stack([(a - b).float().square().sum(dim=1).mean() for a, b in pairs]).mean()


def edge_distance(generated: Tensor, real: Tensor) -> Tensor:
    """Mean difference between neighbours' differences of [B, 3, H, W], at three resolutions -> scalar."""
    error, distance = generated - real, generated.new_zeros(())
    for _ in range(3):
        distance = distance + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        error = F.avg_pool2d(error, 2)
    return distance


class Reconstruction(Task):
    """Base of both stages: images in, images out, compared on held-out concepts.

    Args:
        model: the tokenizer that is trained.
        data: folder made by ``argen data emoji``.
    """

    def __init__(self, model: ViTVQGAN | KLVAE, data: Path):
        self.train, self.test = (
            torch.from_numpy(pixels(read_split(data, s), model.config.image_size)) for s in ("train", "test")
        )
        self.networks: dict[str, nn.Module] = {"model": model}
        model.to(memory_format=torch.channels_last)

    def evaluate(self) -> dict[str, float]:
        """Scores on held-out concepts."""
        return reconstruction.evaluate(self._model(), self.test)

    def sample(self) -> Image.Image:
        """32 held-out pictures, each above its reconstruction."""
        images = self.test[:: max(1, len(self.test) // 32)][:32]
        decoded, _ = reconstruction.reconstruct(self._model(), images)
        pairs = torch.stack([from_uint8(images), decoded], dim=1)
        grid = rearrange(pairs, "(r c) two d h w -> (r two h) (c w) d", c=8)
        return Image.fromarray((grid * 255).round().to(torch.uint8).numpy())

    def save(self, folder: Path) -> None:
        self._model().to(torch.bfloat16).save_pretrained(folder)


class CodeUsage(nn.Module):
    """Number of times each code was used since dead ones were last revived; saved in the checkpoint."""

    def __init__(self, codes: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(codes, dtype=torch.int64))


class ViTVQGANTask(Reconstruction):
    """The first stage: everything, from scratch.

    Args:
        total: steps of the schedule, which the noise and the revival of dead codes follow.
    """

    def __init__(self, data: Path, total: int):
        super().__init__(network(), data)
        self.total = total
        self.usage = CodeUsage(self._model().config.n_embed)
        self.extra_state = (self.usage,)

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        config = self._model().config
        indices = torch.randint(len(self.train), (size,), generator=generator)
        noise = NOISE * torch.randn(size, self._model().grid ** 2, config.embed_dim, generator=generator)
        images = from_uint8(augment(self.train[indices], generator))
        return {"pixels": images, "noise": noise, "uniform": torch.rand(size, 1, 1, generator=generator)}

    def save(self, folder: Path) -> None:
        refit_codes(self._model(), self.train)
        super().save(folder)

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        real = batch["pixels"]
        skipping = (NOISE_UNTIL - step / self.total) / (NOISE_UNTIL - NOISE_ONLY)  # probability, falls from 1 to 0
        noise = batch["noise"] * (batch["uniform"] < skipping) if skipping > 0 else None
        decoded, quantization, ids = self.networks["model"](real, noise)
        error = decoded.float() - real
        log |= {"l2": error.square().mean().item(), "vq": quantization.item()}
        yield "model", L2 * error.square().mean() + L1 * error.abs().mean() + quantization
        self._revive(ids, real, step)

    @torch.no_grad()
    def _revive(self, ids: Tensor, real: Tensor, step: int) -> None:
        count = self.usage.count
        count += torch.bincount(ids.flatten().cpu(), minlength=len(count))
        if step % REVIVE_EVERY or step > REVIVE_UNTIL * self.total:
            return
        model = self._model()
        z = model.encode_vectors(real).flatten(0, 1)
        revive(model.quantizer.embedding.weight, (count < 2).to(z.device), z)
        count.zero_()


@torch.no_grad()
def refit_codes(model: ViTVQGAN, images: Tensor, rounds: int = 12) -> float:
    """Move each code to the middle of the vectors that choose it, by spherical k-means from the learned codes.

    Codes that nothing chooses take the place of the vectors that are served worst.

    Args:
        images: [B, H, W, 3] uint8.

    Returns:
        The mean cosine of the vectors to their codes.
    """
    with autocast(model.device):
        parts = [model.encode_vectors(from_uint8(p).to(model.device)).float() for p in images.split(64)]
    z = F.normalize(torch.cat(parts).flatten(0, 1), dim=-1)  # [M, C]
    codes = F.normalize(model.quantizer.embedding.weight.float(), dim=-1)
    for round_ in range(rounds + 1):
        best = [(part @ codes.T).max(dim=1) for part in z.split(16384)]
        cosine, ids = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
        if round_ < rounds:
            dead = torch.bincount(ids, minlength=len(codes)) == 0
            moved = F.normalize(torch.zeros_like(codes).index_add_(0, ids, z), dim=-1)
            codes = torch.where(dead[:, None], codes, moved)
            worst = cosine.topk(min(int(dead.sum()), len(z)), largest=False).indices
            codes[dead.nonzero().flatten()[: len(worst)]] = z[worst]
    model.quantizer.embedding.weight.copy_(codes)
    return cosine.mean().item()


class DecoderTask(Reconstruction):
    """The second stage: the decoder alone, at its end with the adversarial term.

    Args:
        tokenizer, judge: folders of the tokenizer after the first stage, and of `emoji-judge`.
        total: steps of the schedule, which says when the adversarial term joins.
    """

    def __init__(self, data: Path, tokenizer: Path, judge: Path, total: int):
        model, frozen = self.start(tokenizer)
        for part in frozen:
            part.requires_grad_(False)
        super().__init__(model, data)
        self.networks["discriminator"] = PatchDiscriminator().to(memory_format=torch.channels_last)
        self.feature_distance = FeatureDistance(load_network(Judge, judge))
        self.total = total

    def start(self, tokenizer: Path) -> tuple[ViTVQGAN, list[nn.Module]]:
        """Return the tokenizer, and its parts that are frozen."""
        trained = load_network(ViTVQGAN, tokenizer).state_dict()
        model = network()
        fresh = model.state_dict()  # a tokenizer with another head gives what fits
        model.load_state_dict(
            {
                key: trained[key]
                if trained.get(key, fresh[key]).shape == fresh[key].shape and key in trained
                else fresh[key]
                for key in fresh
            }
        )
        return model, [model.encoder, model.pre_quant, model.quantizer]

    def batch(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        indices = torch.randint(len(self.train), (size,), generator=generator)
        images = from_uint8(augment(self.train[indices], generator))
        return {"pixels": images, "noise": torch.randn(images.shape, generator=generator)}

    def losses(self, batch: dict[str, Tensor], step: int, log: dict[str, float]) -> Iterator[tuple[str, Tensor]]:
        real, discriminator = batch["pixels"], self.networks["discriminator"]
        decoded = self.networks["model"](real)[0].float()
        error = decoded - real
        edges, features = edge_distance(decoded, real), self.feature_distance.to(real.device)(decoded, real)
        loss = L2 * error.square().mean() + L1 * error.abs().mean() + EDGES * edges + FEATURES * features
        log |= {"l2": error.square().mean().item(), "edges": edges.item(), "features": features.item()}
        if step < SHARPEN_FROM * self.total:
            yield "model", loss
            return

        discriminator.requires_grad_(False)
        fooled = -discriminator(decoded).float().mean()
        discriminator.requires_grad_(True)
        log |= {"fooled": fooled.item()}
        yield "model", loss + ADVERSARIAL * adaptive_weight(loss, fooled, decoded) * fooled

        real_logits, fake_logits = discriminator(real).float(), discriminator(decoded.detach()).float()
        hinge = F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
        shaken = discriminator(real + SHAKE * batch["noise"]).float()
        penalty = (shaken - real_logits).square().mean()  # R1 by finite differences (arXiv 2501.08316, section 3.3)
        log |= {"discriminator": hinge.item(), "penalty": penalty.item()}
        yield "discriminator", hinge + SMOOTHNESS * penalty


def adaptive_weight(loss: Tensor, fooled: Tensor, decoded: Tensor) -> Tensor:
    """Weight that scales the adversarial gradient to the size of the others' at the pixels (VQGAN, arXiv 2012.09841, eq. 7)."""
    (loss_grad,) = torch.autograd.grad(loss, decoded, retain_graph=True)
    (adversarial_grad,) = torch.autograd.grad(fooled, decoded, retain_graph=True)
    return (loss_grad.norm() / (adversarial_grad.norm() + 1e-8)).clamp(max=1e4).detach()


RECIPE = Recipe(ViTVQGANTask, SCHEDULES, takes=("total",))
DECODER_RECIPE = Recipe(DecoderTask, DECODER_SCHEDULES, takes=("tokenizer", "judge", "total"))
