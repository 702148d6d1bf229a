"""Base of the pipelines: prompts in, a grid of tokens filled step by step, images out.

Letters in shape comments: B images, h w token grid, N = h*w cells of an image (row-major), H W pixels.
"""

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput, numpy_to_pil
from einops import rearrange
from PIL import Image
from torch import Tensor

from argen.bounds import check
from argen.data.imagenet import class_id
from argen.data.reading import Reading
from argen.hub.cards import Card
from argen.hub.memory import images_at_once
from argen.metadata import MADE_BY, TOKENS, made_by
from argen.pipelines.adapting import Adapting
from argen.pipelines.arguments import check_call, check_prompts, check_sampling, check_unknown
from argen.pipelines.canvas import TokenGrid
from argen.pipelines.editing import Editing
from argen.pipelines.prompts import group_caption, image_generators
from argen.pipelines.ranking import Ranking
from argen.pipelines.running import Running
from argen.pipelines.saving import Saving
from argen.registry import draws_of, samplers, samplers_of
from argen.request import Control, parse_sampler
from argen.words import cut, number_of
from samplers.errors import InvalidValue
from samplers.logits import Gumbel, Sampling, keys_of
from samplers.settings import make
from samplers.steps import GuidanceScale, Origin, Sampler, Session, Step

Prompts = str | list[str]
Images = TypeVar("Images")  # list[Image.Image], np.ndarray or Tensor
TEXT_CELLS, LOGITS = 120, 8  # of an image, for planning: text tokens in its cache, and copies of its logits
UNDECIDED = 230 / 255  # brightness of undecided cells


@dataclass(frozen=True)
class Defaults:
    """Default sampling settings of a generator; each can be overridden in a call."""

    guidance_scale: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    steps: int | None = None  # of a flow

    def __post_init__(self):
        for item in fields(self):
            check(item.name, getattr(self, item.name))


@dataclass
class TokenPipelineOutput(BaseOutput, Generic[Images]):
    """Args:
    images: in the format of `output_type`.
    tokens: [B, N] int64, the ids of each image; -1 in cells left undecided by an interruption.
    scores: cosine of each image to its prompt where candidates were ranked, else None.
    forward_passes: of the network, for the whole batch.
    origins: [B, N] int8, of each token (`samplers.steps.Origin`); None where all were sampled by the generator.
    """

    images: Images
    tokens: Tensor
    scores: list[float] | None = None
    forward_passes: int = 0
    origins: Tensor | None = None


class TokenPipeline(Adapting, Editing, Ranking, Running, Saving):
    """Base of the pipelines: a subclass defines how prompts are encoded and how tokens are decoded to pixels.

    Attributes:
        card: of the loaded checkpoint, if it has one.
        canvas: kind of grid that the pipeline fills.
        ordered: whether every prefix of the tokens is an image, so that `num_tokens` can vary and beam search works.
    """

    card: Card | None = None
    canvas: TokenGrid = TokenGrid()
    ordered = False
    _interrupt = False
    if TYPE_CHECKING:  # of diffusers, whose classes type checkers do not see
        components: dict[str, Any]
        device: torch.device
        dtype: torch.dtype
        config: Any

        def set_progress_bar_config(self, **settings: Any) -> None: ...

    @property
    @abstractmethod
    def official(self) -> Defaults:
        """The authors' sampling settings."""

    @property
    @abstractmethod
    def length(self) -> int:
        """N, cells of a picture of the model's own size, which is square."""

    @abstractmethod
    def start(
        self, prompts: list[str], guided: bool, shape: tuple[int, int], controls: list[Control] | None = None
    ) -> Session:
        """Start a session for one image of each prompt; `guided`: with an unconditional half.

        Args:
            shape: rows and columns of the token grid, from `shape_of`.
            controls: of each image, prepared by `prepare`; all of one size.
        """

    @abstractmethod
    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Decode ids [B, h, w] to pixels [B, 3, H, W] in [0, 1]."""

    def blank_tokens(self, shape: tuple[int, int]) -> Tensor:
        """Return ids [h, w] that stand for undecided cells in a preview."""
        return torch.zeros(shape, dtype=torch.int64)

    @property
    def samplers(self) -> Sequence[str]:
        """Names of the samplers that fit, without those that need a part that this model lacks, e.g. a drafter."""
        parts = {name: getattr(samplers[name], "needs", "") for name in samplers_of("tokens")}
        return [name for name, part in parts.items() if not part or getattr(self, part, None) is not None]

    @property
    def defaults(self) -> Defaults:
        """Default sampling settings: the card's, else `official`."""
        return replace(self.official, **self.card.defaults) if self.card else self.official

    @property
    def looks_ahead(self) -> bool:
        """Whether tokens that are kept are seen by those before them, too; then `start` takes ``grid=``, [B, N] with -1 where a token is to
        be written."""
        return False

    @property
    def name(self) -> str:
        """The model's id, for messages."""
        return self.card.id if self.card and self.card.id else "this model"

    @property
    def codes(self) -> int | None:
        """K, the ids of its tokens; None where the image tokenizer does not say it."""
        return getattr(self.image_tokenizer.config, "n_embed", None)

    @property
    def image_size(self) -> int:
        """Side of the model's own images, in pixels."""
        return self.image_tokenizer.config.image_size

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, S, S] in [0, 1], S the `image_size`, to ids [B, h, w].

        Raises:
            ValueError: the published model came without an image encoder.
        """
        with self.stage("image"):
            return self.canvas.to_grid(self.image_tokenizer.encode(pixels.to(self.device)), self.shape_of())

    def prepare(self, control: Control) -> Control:
        """Resize the image of a control to the size of the image to generate.

        Raises:
            ValueError: this model takes no control, or not this one.
        """
        raise ValueError(f"{self.name} takes no control image: choose a model like argen/emoji-control")

    def shape_of(self, control: Control | None = None, num_tokens: int | None = None) -> tuple[int, int]:
        """Return rows h and columns w of the token grid, under a prepared control.

        Raises:
            ValueError: `num_tokens` for a model with a fixed number of tokens.
        """
        if num_tokens is not None:
            raise ValueError(
                f"num_tokens is {num_tokens}: this model's images have {self.length} tokens, leave it out (FlexTok's are "
                "of any length)"
            )
        return (int(self.length**0.5),) * 2

    def make_sampler(self, name: str, **settings) -> Sampler:
        """Create a sampler by name, with settings as `samplers.settings.make` takes them.

        Raises:
            ValueError: an unknown sampler, one that does not fit this model, or unknown settings.
        """
        name, typed = parse_sampler(name)
        settings = typed | settings
        if draws_of(name) == "latents" or "steps" in settings:
            raise ValueError(
                f"this model writes tokens, and the sampler {name} and its steps are for continuous latents: choose "
                f"one of {', '.join(self.samplers)}, without steps"
            )
        needed = getattr(samplers[name], "needs", "")
        if needed and getattr(self, needed, None) is None and settings.get(needed) is None:
            raise ValueError(
                f"the sampler {name} needs a generator with a {needed}, like argen/emoji-llamagen: for others choose jacobi, "
                "which needs none"
            )
        return make(samplers[name], settings)

    def text_tokens(self, prompt: str) -> tuple[int, int] | None:
        """Return how many text tokens a prompt has, and how many are read; None for a model that reads no text."""
        tokenizer = self.components.get("tokenizer")
        if tokenizer is None:
            return None
        config, limits = self.transformer.config, ("caption_length", "max_position_embeddings")
        limit = min(filter(None, (*(getattr(config, name, None) for name in limits), tokenizer.model_max_length)))
        return len(tokenizer(self.caption(prompt), truncation=False, verbose=False).input_ids), limit

    def read_prompt(self, prompt: str, literal: bool | None = None) -> Reading:
        """How the model reads a prompt, see `argen.hub.cards.Card.read`."""
        return self.card.read(prompt, literal) if self.card else Reading(prompt, prompt)

    def caption(self, prompt: str) -> str:
        """Return the text to encode for a prompt; "class:NAME" becomes the caption of the group in a model of captions.

        Raises:
            ValueError: there is no such group.
        """
        return group_caption(prompt, self.config.get("groups"))

    def stream(
        self,
        prompts: list[str],
        generators: list[torch.Generator],
        guidance_scale: GuidanceScale | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        sampler: str | Sampler = "auto",
        tokens: Tensor | None = None,
        controls: list[Control] | None = None,
        shape: tuple[int, int] | None = None,
        every: int = 1,
    ) -> Generator[Step, None, None]:
        """Generate one image for each prompt; yields the state whenever `every` more cells are decided, and at the end.

        Stop iterating to cancel; the last state, passed as `tokens`, resumes there.

        Args:
            generators: one for each image, which depends on its own alone.
            guidance_scale: a number, or one for each cell; None, here and below, is the model's own.
            tokens: [B, N] int64, ids of the cells to keep, -1 in those to fill.
            controls: of each image, prepared by `prepare`.
            shape: of the token grid, from `shape_of`; None for the model's own.
        """
        check_sampling(guidance_scale, temperature, top_k, top_p)
        scale = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        defaults = self.defaults
        sampling = Sampling(
            defaults.temperature if temperature is None else temperature,
            defaults.top_k if top_k is None else top_k,
            defaults.top_p if top_p is None else top_p,
        )
        sampler = self.make_sampler(sampler) if isinstance(sampler, str) else sampler
        check_prompts(prompts, generators)
        if controls and len({control.image.size for control in controls}) > 1:
            raise ValueError("the control images have several sizes: expected one")
        shape = shape or self.shape_of(controls[0] if controls else None)
        length = math.prod(shape)
        grid = torch.full((len(prompts), length), -1) if tokens is None else tokens
        grid = self.canvas.check(grid, (len(prompts), length), self.codes)
        keys = keys_of(generators, length)
        grid = grid.to(self.device)

        def write(part: slice) -> Generator[Step, None, None]:
            arguments = prompts[part], controls[part] if controls else controls, shape, grid[part]
            return self._write(*arguments, sampling, scale, sampler, Gumbel(keys[part]), every)

        guided = callable(scale) or scale != 1
        return in_parts(write, self.images_at_once(len(prompts), length, guided), grid, every)

    def images_at_once(self, count: int, length: int, guided: bool) -> int:
        """How many of `count` images of `length` cells are generated together, so that what they need fits into free memory."""
        network = self.transformer
        config, rows = network.config, 2 if guided else 1
        width = int(getattr(config, "dim", 0) or getattr(config, "hidden_size", 0))
        depth = int(getattr(network, "depth", 0) or getattr(config, "num_hidden_layers", 0))
        numbers = 2 * depth * (length + TEXT_CELLS) * width + LOGITS * (self.codes or 0)
        return images_at_once(count, rows * numbers * 4, self.device)

    @torch.no_grad()
    def _write(
        self, prompts, controls, shape, grid, sampling, scale, sampler, noise, every
    ) -> Generator[Step, None, None]:
        emitted = -every
        step = Step(grid.clone(), forward_passes=0)
        self.bring("tokens")
        completed = {"grid": grid} if self.looks_ahead else {}
        session = self.start(prompts, callable(scale) or scale != 1, shape, controls, **completed)
        for step in sampler(session, grid, sampling, scale, noise):
            if step.decided - emitted >= every:
                emitted = step.decided
                yield step
                self.bring("tokens")  # a preview may have been decoded
        if step.decided != emitted:
            yield step

    def encode_ahead(self, prompts: list[str]) -> None:
        """Encode prompts of requests that follow, where that takes a large text encoder and the features are kept on disk."""

    @overload
    def __call__(
        self, prompt: Prompts, *, output_type: Literal["pil"] = ..., return_dict: Literal[True] = ..., **arguments: Any
    ) -> TokenPipelineOutput[list[Image.Image]]: ...

    @overload
    def __call__(
        self, prompt: Prompts, *, output_type: Literal["np"], return_dict: Literal[True] = ..., **arguments: Any
    ) -> TokenPipelineOutput[np.ndarray]: ...

    @overload
    def __call__(
        self,
        prompt: Prompts,
        *,
        output_type: Literal["pt", "latent"],
        return_dict: Literal[True] = ...,
        **arguments: Any,
    ) -> TokenPipelineOutput[Tensor]: ...

    @overload
    def __call__(self, prompt: Prompts, *, return_dict: Literal[False], **arguments: Any) -> tuple: ...

    def __call__(
        self,
        prompt: Prompts,
        num_images_per_prompt: int = 1,
        guidance_scale: GuidanceScale | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        sampler: str | Sampler = "auto",
        num_candidates: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        tokens: Tensor | None = None,
        num_tokens: int | None = None,
        control_image: Image.Image | list[Image.Image] | None = None,
        control_type: str = "canny",
        control_strength: float = 1.0,
        size: tuple[int, int] | None = None,
        literal: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["TokenPipeline", int, int, dict], dict | None] | None = None,
        **others,
    ) -> TokenPipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: one, or a list.
            num_images_per_prompt: images returned for each prompt.
            guidance_scale: classifier-free guidance, 1 for none; a function of the cell is allowed. None, here and
                for the next three, is the model's own.
            temperature, top_k, top_p: see `samplers.logits.Sampling`.
            sampler: a name in `argen.registry.samplers`, with its settings behind it or not ("jacobi:window=8"), or a sampler.
            num_candidates: images generated for each prompt; the best by `rank` are returned, best first.
            generator: one, which generates the first image and the seeds of the others, or a list with one for each
                generated image. None creates one with a random seed.
            tokens: [generated images, N] int64 to continue from, -1 in the cells to fill.
            num_tokens: of each image, for models of any length; None is the model's own.
            control_image: to follow, one for all or one for each prompt, for a model that takes it.
            control_type: annotator that it is converted with, see `argen.models.annotators.KINDS`.
            control_strength: of the control, 0 for none.
            size: width and height of the images, under a control; None is the model's own.
            literal: give the model the prompt word for word, not in the names that it knows, see `read_prompt`.
            output_type: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W] in [0, 1]) or "latent" (ids [B, N]).
            callback_on_step_end: called as ``callback(pipe, step, cells decided, {"tokens": [generated images, N]})``
                after each step; tokens in the dict that it returns replace those, with -1 in cells to redraw. Set
                ``pipe._interrupt = True`` in it to stop there and keep the tokens so far.
            others: not allowed; arguments of other diffusers pipelines raise an error that names the alternative.

        Raises:
            ValueError: an invalid argument; says what is expected.
        """
        check_unknown(type(self).__name__, others, _ARGUMENTS)
        check_call(
            prompt,
            num_images_per_prompt,
            num_candidates,
            generator,
            tokens,
            output_type,
            size,
            callback_on_step_end,
            sampler,
            control_image,
        )
        check_sampling(guidance_scale, temperature, top_k, top_p)
        candidates = num_images_per_prompt if num_candidates is None else num_candidates
        texts = [self.read_prompt(text, literal).text for text in ([prompt] if isinstance(prompt, str) else prompt)]
        prompts = [text for text in texts for _ in range(candidates)]
        controls = None
        if control_image is not None:
            images = control_image if isinstance(control_image, list) else [control_image] * len(texts)
            controls = self._prepare_all(images, len(texts), candidates, control_type, control_strength, size)
        shape = self.shape_of(controls[0] if controls else None, num_tokens)
        generators = (
            list(generator) if isinstance(generator, list | tuple) else image_generators(generator, len(prompts))
        )
        settings: dict[str, Any] = {"sampler": sampler, "controls": controls, "shape": shape}
        settings |= {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        step = self._last_step(prompts, generators, settings, tokens, callback_on_step_end)
        grid, origins, scores = self.canvas.resume_state(step), step.origins, None
        if num_candidates is not None:
            cells = self.canvas.to_grid(grid, shape)
            selected, scores = self.select_best(texts, cells, candidates, num_images_per_prompt)
            grid, origins = grid[selected], None if origins is None else origins[selected]
        output = TokenPipelineOutput(
            images=self.images(self.canvas.to_grid(grid, shape), output_type),
            tokens=grid,
            scores=scores,
            forward_passes=step.forward_passes,
            origins=origins,
        )
        return output if return_dict else output.to_tuple()

    def _prepare_all(self, images, prompts: int, candidates: int, kind: str, strength: float, size) -> list[Control]:
        """Prepare a control for each image to generate, from one control image for each prompt."""
        if len(images) != prompts:
            raise ValueError(
                f"got {number_of(len(images), 'control image')} for {number_of(prompts, 'prompt')}: expected one for each"
            )
        prepared = [self.prepare(Control(image, kind, strength, size)) for image in images]
        return [control for control in prepared for _ in range(candidates)]

    def _last_step(self, prompts, generators, settings: dict, tokens: Tensor | None, callback) -> Step:
        """Generate to the end, or until the callback interrupts; continues from tokens that the callback changes, under the same noise."""
        states = [generator.get_state() for generator in generators]
        self._interrupt = False
        index, forward_passes = 0, 0
        with self.progress_bar(total=math.prod(settings["shape"])) as bar:
            steps = self.stream(prompts, generators, tokens=tokens, **settings)
            while (step := next(steps, None)) is not None:
                last = step
                bar.update(step.decided - bar.n)
                changed = step.tokens
                if callback is not None:  # which may change the tokens in place
                    returned = callback(self, index, step.decided, {"tokens": step.tokens.clone()})
                    changed = self._returned_tokens(returned, step.tokens)
                index += 1
                if self._interrupt:
                    last = replace(step, tokens=changed)
                    break
                if not self.canvas.equal(changed, step.tokens):
                    steps.close()
                    forward_passes, last = (
                        forward_passes + step.forward_passes,
                        replace(step, tokens=changed),
                    )
                    for generator, state in zip(generators, states, strict=True):
                        generator.set_state(state)
                    steps = self.stream(prompts, generators, tokens=self.canvas.resume_state(last), **settings)
        return replace(last, forward_passes=forward_passes + last.forward_passes)

    def _returned_tokens(self, returned: Any, tokens: Tensor) -> Tensor:
        """The tokens in the dict that a callback returned, or those that there were.

        Raises:
            ValueError: it returned something else.
        """
        if returned is None:
            return tokens
        if not isinstance(returned, dict):
            raise InvalidValue(
                f"callback_on_step_end returned {cut(repr(returned))}: expected None, or a dict with tokens",
                "callback_on_step_end",
            )
        changed = self.canvas.check(returned.get("tokens", tokens), tuple(tokens.shape), self.codes)
        return changed.to(tokens.device)

    def class_of(self, prompt: str) -> int:
        """Return the class that a prompt names, for a model that reads no text: by the names that it was made with, by ImageNet's if it has
        as many, else by number.

        Raises:
            ValueError: there is no such class.
        """
        count = self.transformer.config.get("classes")
        numbers = None if count in (None, 1000) else [str(number) for number in range(count)]
        return class_id(prompt, self.config.get("class_names") or numbers)

    @overload
    def images(self, tokens: Tensor, output_type: Literal["pil"] = "pil") -> list[Image.Image]: ...

    @overload
    def images(self, tokens: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor: ...

    @torch.no_grad()
    def images(self, tokens: Tensor, output_type: str = "pil") -> list[Image.Image] | np.ndarray | Tensor:
        """Decode ids [B, h, w], or [B, N] of a square, to images as `__call__` returns them; undecided cells (-1) are grey. So are latents
        [B, C, h, w], of a model that writes these, where they are NaN."""
        if tokens.ndim == 2:
            tokens = self.canvas.to_grid(tokens, self.shape_of())
        if output_type == "latent":
            return tokens.flatten(1) if self.canvas.discrete else tokens
        decided = self.canvas.decided(tokens)
        rows, columns = tokens.shape[-2:]
        with self.stage("image"):
            filled = tokens if decided.all() else self.canvas.fill(tokens, self.blank_tokens((rows, columns)))
            # one by one, so that the result is batch-invariant
            pixels = torch.cat([self.decode_tokens(row) for row in filled.split(1)])
        if not decided.all():
            mask = F.interpolate(decided[:, None].float(), pixels.shape[2:])  # each cell over its square
            pixels = torch.where(mask > 0, pixels, UNDECIDED)
        if output_type == "pt":
            return pixels
        array = rearrange(pixels.float().cpu(), "b d h w -> b h w d").numpy()
        if output_type == "np":
            return array
        images = numpy_to_pil(array)
        if decided.all():
            maker = json.dumps(made_by(self))
            for image, rows in zip(images, tokens, strict=True):
                image.info[MADE_BY] = maker
                if not tokens.is_floating_point():
                    image.info[TOKENS] = json.dumps(rows.tolist())
        return images


def in_parts(
    write: Callable[[slice], Generator[Step, None, None]], size: int, grid: Tensor, every: int
) -> Generator[Step, None, None]:
    """The steps of all images, which `write` generates for a slice of them, `size` at a time; cells count as decided by their share.

    Args:
        grid: [B, N], what they begin with.
        every: cells from one step to the next.
    """
    count, length = grid.shape
    if size >= count:
        yield from write(slice(0, count))
        return
    tokens, passes, emitted = grid.clone(), 0, -every
    origins, any_origins = torch.zeros(grid.shape, dtype=torch.int8), False
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        before = passes
        for step in write(part):
            tokens[part] = step.tokens
            origins[part] = Origin.DRAWN if step.origins is None else step.origins
            any_origins |= step.origins is not None
            passes = before + step.forward_passes
            progress = (start * length + (part.stop - start) * step.decided) // count
            if progress - emitted >= every or part.stop == count and step.decided == length:
                emitted = progress
                yield Step(tokens.clone(), passes, origins.clone() if any_origins else None, known=progress)


_ARGUMENTS = [name for name in signature(TokenPipeline.__call__).parameters if name not in ("self", "others")]
