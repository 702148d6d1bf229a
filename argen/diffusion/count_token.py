"""A picture with so many things: one text token is optimised until a counter is content (arXiv 2408.11721).

The embedding of a small word of the prompt ("A photo of some 5 apples") is trained through a pipeline of few steps; the token
that comes out is an ordinary textual inversion, which other prompts and seeds can use.

Letters in shape comments: B pictures, H W sides of a picture, D width of a text embedding.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from argen.diffusion.base import StableDiffusion, check_pipeline, frozen
from argen.files import replacing
from argen.words import check_count
from tokenizers_img.checkpoint import read_file

logger = logging.getLogger(__name__)
MOST_NOISES = 64  # pictures that share a token
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0}  # of a pipeline's call, as published
CROP_SIZE = 224  # side of the images that counters read
STATIC_SCALE = 60.0

Density = Callable[[Tensor, str], Tensor]  # pixels [1, 3, 224, 224] in [0, 1], name of the things -> density [1, h, w]
Detector = Callable[[Tensor, str], int]  # pixels [1, 3, H, W] in [0, 1], name -> how many
ImageCounter = Callable[[Tensor, str], float]  # the same, where a part of a thing may count
Relevance = Callable[[Tensor, str], Tensor]  # pixels [1, 3, 224, 224] in [0, 1], name -> cosine


@dataclass(frozen=True)
class CountStep:
    """Result of a step, before it changed the token.

    Attributes:
        image: of each noise, [B, 3, H, W] in [0, 1].
        density: [B, h, w], scaled so that its sum is what was counted.
        vector: the token [D] that drew it.
        counts: things that the counter finds in each image, as it is saved with 8 bits.
        count, count_loss, relevance: of all images, their mean.
        detected: things that the detector found in each, None without one.
        loss: count_loss + the weighted relevance.
        best: no step before had a lower loss.
    """

    index: int
    image: Tensor
    density: Tensor
    vector: Tensor
    counts: tuple[float, ...]
    detected: tuple[int, ...] | None
    count_loss: float
    relevance: float | None
    loss: float
    best: bool

    @property
    def count(self) -> float:
        return sum(self.counts) / len(self.counts)

    def miss(self, count: int) -> float:
        """How far the images are from `count` things, on average."""
        return sum(abs(counted - count) for counted in self.counts) / len(self.counts)

    def is_right(self, count: int) -> bool:
        """Whether each image has `count` things, as the counter's numbers are rounded."""
        return all(abs(counted - count) < 0.5 for counted in self.counts)


@dataclass(frozen=True)
class _ImageLoss:
    """Loss of one image of a step, and its parts."""

    image: Tensor
    shares: Tensor
    counted: float
    detected: int | None
    count_loss: Tensor
    cosine: Tensor | None
    loss: Tensor


def check_noises(noises: int) -> None:
    """Raises:
    ValueError: no picture to optimise for, or more than are looked at in reasonable time.
    """
    if not 1 <= noises <= MOST_NOISES:
        raise ValueError(f"noises is {noises}: expected 1 to {MOST_NOISES}")


def read_token(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """The vector of a saved token [D], and what `CountToken.save` noted; also of the authors' ``token_embeds.pt``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no token.
    """
    path, notes = Path(path), {}
    if not path.is_file():
        raise FileNotFoundError(f"no token at {path}")
    try:
        content = read_file(path)
        vectors = list(content.values()) if isinstance(content, dict) else [content]
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
        (vector,) = vectors
        return vector.detach().float().reshape(-1), notes
    except Exception as error:
        raise ValueError(
            f"{path} holds no token: expected one that `argen count --token` has written ({error})"
        ) from error


def centre_crop(image: Tensor) -> Tensor:
    """Resize and crop an image [1, 3, H, W] to the square in its middle that counters read [1, 3, 224, 224]."""
    height, width = image.shape[2:]
    scale = CROP_SIZE / min(height, width)
    size = round(height * scale), round(width * scale)
    small = F.interpolate(image, size, mode="bilinear", align_corners=False)
    top, left = (size[0] - CROP_SIZE) // 2, (size[1] - CROP_SIZE) // 2
    return small[..., top : top + CROP_SIZE, left : left + CROP_SIZE]


class CountToken:
    """The token of a pipeline, optimised to count.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` that makes a picture in a few steps.
        density: a differentiable counter; without one a token can be used and not optimised.
        detector: counts what the density is scaled by, so that the gradient is the density's and the count the detector's. None
            scales it by a constant.
        counter: says what an image has, to find the best one and for whoever reads the result; it does not change the optimisation. None is
            the detector, or the density where there is none.
        relevance: keeps the picture at what the prompt names.
        placeholder: the word whose embedding is optimised; it has one text token.
        template: of the prompt, with {placeholder}, {count} and {things}.
        settings: of the pipeline's call; one step and no guidance by default.

    Attributes:
        vector: the best one so far [D].

    Raises:
        ValueError: another kind of pipeline; a placeholder of several tokens.
    """

    def __init__(
        self,
        pipe: StableDiffusion,
        density: Density | None = None,
        detector: Detector | None = None,
        relevance: Relevance | None = None,
        counter: ImageCounter | None = None,
        placeholder: str = "some",
        template: str = "A photo of {placeholder} {count} {things}",
        settings: dict | None = None,
    ):
        check_pipeline(pipe, f"{type(pipe).__name__} cannot count")
        ids = pipe.tokenizer(placeholder, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ValueError(f"the placeholder {placeholder!r} has {len(ids)} text tokens: choose a word of one")
        self.pipe, self.density, self.detector = pipe, density, detector
        self.relevance, self.counter = relevance, counter
        self.placeholder, self.id, self.template = placeholder, ids[0], template
        self.settings = ONE_STEP if settings is None else settings
        self.vector = pipe.text_encoder.get_input_embeddings().weight[self.id].detach().float().clone()

    def prompt(self, things: str, count: int) -> str:
        """The prompt that is optimised.

        Raises:
            ValueError: a count that is no whole number from 1 to 25.
        """
        return self.template.format(placeholder=self.placeholder, count=check_count(count), things=things)

    def use(self, vector: Tensor) -> None:
        """Go on with a token that was made before [D], see `read_token`.

        Raises:
            ValueError: it is one of another text encoder.
        """
        if vector.shape != self.vector.shape:
            raise ValueError(
                f"the token has {len(vector)} numbers, and those of this pipeline {len(self.vector)}: it is another pipeline's"
            )
        self.vector = vector.to(self.vector)

    @contextmanager
    def applied(self, vector: Tensor | None = None) -> Iterator[None]:
        """The pipeline with the vector in place of the placeholder's embedding; afterwards it is what it was."""
        vector = self.vector if vector is None else vector

        def replaced(module, args, output):
            return torch.where((args[0] == self.id)[..., None], vector.to(output), output)

        hook = self.pipe.text_encoder.get_input_embeddings().register_forward_hook(replaced)
        try:
            yield
        finally:
            hook.remove()

    def draw(self, things: str, count: int, latents: Tensor, **others) -> Image.Image:
        """The picture of `optimise` with the token as it is.

        Args: see `optimise`.
        """
        kwargs = {**self.settings, **others}
        with self.applied():
            return self.pipe(self.prompt(things, count), latents=latents.clone(), **kwargs).images[0]

    def optimise(
        self,
        things: str,
        count: int,
        latents: Tensor,
        steps: int = 50,
        learning_rate: float = 0.01,
        relevance_scale: float = 5.0,
        scale: float = STATIC_SCALE,
        patience: int = 15,
        **others,
    ) -> Iterator[CountStep]:
        """Improve the token for one image, or for several together, as the authors do; `vector` is that of the lowest loss so far whenever
        it is left. `search` keeps what was counted best instead.

        Args:
            things: what is counted, as "oranges"; counters are asked for its last word.
            count: how many there shall be, 1 to 25.
            latents: unit noise of the picture [1, C, h, w], the same in every step. A token of one picture does little for others;
                of several [B, C, h, w] the mean of their losses counts, which is not the authors' way.
            steps, learning_rate: at most so many, of AdamW.
            relevance_scale: weight of the relevance.
            scale: what the density of one thing sums up to, where there is no detector.
            patience: it ends when so many steps and one more in a row were no better.
            others: of the pipeline's call, beside `settings`.

        Raises:
            ValueError: see `prompt`.
        """
        prompt, word = self.prompt(things, count), things.split()[-1]
        kwargs = {**self.settings, "output_type": "pt", **others}
        vector = self.vector.clone().requires_grad_()
        optimizer = torch.optim.AdamW([vector], lr=learning_rate)
        lowest, remaining = float("inf"), patience
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        with frozen(*modules):
            for index in range(steps):
                results = []
                for noise in latents.split(1):
                    with torch.enable_grad(), self.applied(vector):
                        draw = type(self.pipe).__call__.__wrapped__  # the pipeline's own, without its no_grad
                        image = draw(self.pipe, prompt, latents=noise.clone(), **kwargs).images
                        results.append(self._image_loss(image, word, count, scale, relevance_scale))
                        (results[-1].loss / len(latents)).backward()
                step = self._together(index, results, vector.detach().clone(), lowest)
                if step.best:
                    lowest, remaining, self.vector = step.loss, patience, step.vector
                else:
                    remaining -= 1
                optimizer.step()
                vector.grad = None
                yield step
                if remaining < 0:
                    return

    def search(self, things: str, count: int, latents: Tensor, **arguments) -> Iterator[CountStep]:
        """Run `optimise` until the counter finds `count` things in each image: at once, where it does before anything is optimised.

        The step marked `best` last is that whose images are nearest to `count`, the original ones (step 0) among them; `vector` is its token.

        Args: see `optimise`.
        """
        nearest, vector = (float("inf"), float("inf")), self.vector
        for step in self.optimise(things, count, latents, **arguments):
            rank = step.miss(count), step.loss
            best = rank < nearest
            if best:
                nearest, vector = rank, step.vector
            self.vector = vector
            yield replace(step, best=best)
            if step.is_right(count):
                return

    def _image_loss(self, image: Tensor, word: str, count: int, scale: float, relevance_scale: float) -> "_ImageLoss":
        """Count, relevance and loss of an image [1, 3, H, W]."""
        image = image.float()  # counters are in float32
        crop = centre_crop(image)
        density = self.density(crop, word)
        detected = None if self.detector is None else self.detector(image.detach(), word)
        density_per_object = (
            scale if detected is None else density.sum().detach() / detected if detected else float("inf")
        )
        if detected == 0:
            logger.warning("no %s found: this step has no gradient of the count", word)
        shares = density / density_per_object
        count_loss = (shares.sum() - count).abs()
        cosine = None if self.relevance is None else self.relevance(crop, word).squeeze()
        loss = count_loss if cosine is None else count_loss + relevance_scale * (1 - cosine)
        saved = (255 * image.detach()).round() / 255
        counted = shares.sum().item() if self.counter is None else self.counter(saved, word)
        return _ImageLoss(image.detach(), shares.detach(), counted, detected, count_loss, cosine, loss)

    def _together(self, index: int, results: Sequence["_ImageLoss"], vector: Tensor, lowest: float) -> CountStep:
        """A step of several pictures."""

        def mean(values: Iterable[Tensor]) -> float:
            return torch.stack(list(values)).mean().item()

        return CountStep(
            index,
            torch.cat([result.image for result in results]),
            torch.cat([result.shares for result in results]),
            vector,
            tuple(result.counted for result in results),
            None if self.detector is None else tuple(result.detected for result in results),
            mean(result.count_loss for result in results),
            None if self.relevance is None else mean(result.cosine for result in results),
            loss := mean(result.loss for result in results),
            loss < lowest,
        )

    def save(self, path: str | Path, token: str, **metadata: str) -> None:
        """Write a textual inversion, which ``pipe.load_textual_inversion(path)`` reads: a prompt then has `token` in place of the
        placeholder."""
        notes = {key: str(value) for key, value in metadata.items()}
        with replacing(Path(path)) as file:
            file.write(save({token: self.vector.cpu().contiguous()}, notes))
