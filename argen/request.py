"""What is asked of a generator, and what has become of it: one object behind command line, Python, web page and APIs."""

import base64
from dataclasses import dataclass, field, fields, replace
from io import BytesIO

import torch
from PIL import Image

from argen.bounds import (
    BOUNDS,
    MAX_CANDIDATES,
    MAX_CELLS,
    MAX_TEXT,
    InvalidValue,
    check,
    check_all,
    check_length,
    check_size,
)
from argen.images import from_base64
from argen.words import check_text, visible
from samplers import SOLVERS, by_name
from samplers.logits import Sampling
from tokenizers_img.pixels import normalized

MAX_PROMPT = MAX_TEXT  # characters
CANDIDATES_A_BEAM = 4
OLD_SAMPLERS = {"plain": "sequential", "fast_preview": "zipar"}  # their names in images and databases of release 0.1
Grid = tuple[tuple[int, ...], ...]  # rows of ids
MIN_CONTROL = 16  # pixels on a side of a control picture


@dataclass(frozen=True)
class Control:
    """What a controlled generator follows.

    Attributes:
        picture: of any mode, turned as its EXIF says; one that is as large as the picture asked for is taken as it is.
        kind: how the control picture is made of it, see `argen.models.annotators.KINDS`.
        strength: of the control, 0 for none.
        size: width and height of the picture that is asked for; None for the model's own.

    Raises:
        ValueError: says which value is out of bounds and what is expected.
    """

    image: Image.Image
    kind: str = "canny"
    strength: float = 1.0
    size: tuple[int, int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "image", normalized(self.image))
        if not isinstance(self.kind, str):
            raise ValueError(f"the control's kind is {str(self.kind)[:60]}: expected a name, e.g. canny")
        check("control_strength", self.strength)
        if min(self.image.size) < MIN_CONTROL:
            width, height = self.image.size
            raise ValueError(
                f"the control picture is {width} x {height}: expected at least {MIN_CONTROL} x {MIN_CONTROL} pixels"
            )
        check_size(self.size)

    def to_dict(self) -> dict:
        """For JSON: the picture as base64 of a PNG file."""
        own = {"kind": self.kind, "strength": self.strength, "size": self.size}
        return {"image": to_base64(self.image), **own}

    @classmethod
    def from_dict(cls, saved: dict) -> "Control":
        """What `to_dict` gave.

        Raises:
            ValueError: something else; says what.
        """
        if isinstance(saved, dict) and "picture" in saved:  # as release 0.1 wrote it
            saved = {"image": saved["picture"]} | {name: value for name, value in saved.items() if name != "picture"}
        if not isinstance(saved, dict) or not isinstance(saved.get("image"), str):
            raise ValueError("control has no image: expected the base64 of one, and its kind, strength and size")
        if unknown := [name for name in saved if name not in ("image", "kind", "strength", "size")]:
            raise ValueError(f"unknown setting {unknown[0][:60]!r} of control: expected kind, strength or size")
        size = saved.get("size")
        if size is not None and not (isinstance(size, list | tuple) and len(size) == 2):
            raise ValueError(f"size is {str(size)[:60]}: expected width and height in pixels")
        given = {name: value for name, value in saved.items() if value is not None}
        return cls(**given | {"image": from_base64(saved["image"], "the control image"), "size": size and tuple(size)})


@dataclass(frozen=True)
class Request:
    """A wish for pictures, checked when it is made.

    Attributes:
        prompt: at most `MAX_PROMPT` characters.
        model: id of the generator.
        num_images: pictures to give back.
        seed: picture i is drawn with ``seed + i``, and with nothing else: it does not depend on the others.
        guidance_scale: classifier-free guidance, 1 for none; None for the model's own.
        temperature, top_k, top_p: see `samplers.logits.Sampling`; None for the model's own.
        sampler: a name in `samplers.SAMPLERS` or `samplers.SOLVERS`, or "auto", which is for every model the best one.
        steps: of the flow of a model of continuous latents, or those of its first and its last part; None for the model's own.
        lantern_k, lantern_delta, lantern_lambda: settings of the sampler "lantern", see `samplers.Lantern`; None for its own.
        num_tokens: of each picture, for a model whose pictures may have any number; None for the model's own.
        num_candidates: pictures drawn, of which the `num_images` that fit the prompt best are kept; None draws no more
            than are asked for.
        num_beams: for a model of ordered tokens: each picture is searched for among its beginnings, see
            `argen.pipelines.FlexARPipeline.search`; of `num_candidates` drawn each time so many are gone on with.
        control: what the pictures follow, for a model that takes it.
        tokens: rows of a token grid to go on from: ids that stay, and -1 in the cells that are written; None writes all.

    Raises:
        ValueError: says which value is out of bounds and what is expected.
    """

    prompt: str
    model: str = "argen/emoji-parti"
    num_images: int = 1
    seed: int = 0
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    sampler: str = "auto"
    lantern_k: int | None = None
    lantern_delta: float | None = None
    lantern_lambda: float | None = None
    steps: int | tuple[int, int] | None = None
    num_tokens: int | None = None
    num_candidates: int | None = None
    num_beams: int | None = None
    control: Control | None = None
    tokens: Grid | None = None

    def __post_init__(self):
        check_prompt(self.prompt)
        for name in ("model", "sampler"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected a name")
        if isinstance(self.steps, tuple) and len(self.steps) != 2:
            raise ValueError(f"steps are {self.steps}: expected one number, or two")
        if self.num_images is None or self.seed is None:
            raise ValueError("num_images or seed is None: expected a number, or leave it out")
        check_all((name, getattr(self, name)) for name in BOUNDS if hasattr(self, name))
        by_name("sde" if self.steps is not None and self.sampler == "auto" else self.sampler, **self.sampler_settings())
        if self.num_candidates is not None and not self.num_images <= self.num_candidates <= MAX_CANDIDATES:
            raise InvalidValue(
                f"num_candidates is {self.num_candidates}: expected at least the number of pictures "
                f"({self.num_images}) and at most {MAX_CANDIDATES}",
                "num_candidates",
            )
        if self.num_beams is not None:
            check_beams(self.num_beams, self.drawn)
        if self.tokens is not None:
            check_grid(self.tokens)
            if min(map(min, self.tokens)) >= 0:
                raise ValueError("tokens leave nothing to write: expected -1 in one cell or more")
        Sampling(
            **{key: value for key in ("temperature", "top_k", "top_p") if (value := getattr(self, key)) is not None}
        )

    @property
    def drawn(self) -> int:
        """Pictures that are drawn to choose from."""
        if self.num_candidates is None:
            return CANDIDATES_A_BEAM * self.num_beams if self.num_beams else self.num_images
        return self.num_candidates

    def sampler_settings(self) -> dict:
        """Those of the sampler that are given."""
        lantern = {"k": self.lantern_k, "delta": self.lantern_delta, "lambda_": self.lantern_lambda}
        lantern = {name: value for name, value in lantern.items() if value is not None}
        if lantern and self.sampler != "lantern":
            raise ValueError(
                f"settings of the sampler lantern were given, but the sampler is {self.sampler}: leave them out"
            )
        if self.steps is None:
            return lantern
        if self.sampler not in ("auto", *SOLVERS):
            raise ValueError(
                f"steps are those of a flow, but the sampler is {self.sampler}: leave them out, or choose one of "
                f"{', '.join(SOLVERS)} with a model of continuous latents"
            )
        return {"steps": self.steps}

    def generators(self) -> list[torch.Generator]:
        """A source of luck for each picture that is drawn; with `num_beams`, for each that is searched for."""
        count = self.num_images if self.num_beams else self.drawn
        return [torch.Generator().manual_seed(self.seed + i) for i in range(count)]

    def for_image(self, index: int) -> "Request":
        """The request that makes the picture drawn as number `index`, alone."""
        candidates = self.num_candidates if self.num_beams else None
        return replace(self, seed=self.seed + index, num_images=1, num_candidates=candidates)

    def given(self) -> dict:
        """The values by name, without those left to the model."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict:
        """`given`, for JSON."""
        return self.given() | ({"control": self.control.to_dict()} if self.control else {})

    @classmethod
    def from_dict(cls, saved: dict) -> "Request":
        """What `to_dict` gave.

        Raises:
            ValueError: something else; says what.
        """
        if not isinstance(saved, dict):
            raise ValueError(f"settings are a {type(saved).__name__}: expected an object with names of settings")
        known = {item.name for item in fields(cls)}
        if unknown := [name for name in saved if name not in known]:
            raise ValueError(f"unknown setting {unknown[0][:60]!r}: expected some of {', '.join(sorted(known))}")
        saved = (
            saved | {"sampler": OLD_SAMPLERS.get(saved["sampler"], saved["sampler"])}
            if isinstance(saved.get("sampler"), str)
            else saved
        )
        parts = {"control": Control.from_dict(saved["control"])} if saved.get("control") is not None else {}
        if isinstance(saved.get("steps"), list):
            parts["steps"] = tuple(saved["steps"])
        if saved.get("tokens") is not None:
            if not isinstance(saved["tokens"], list | tuple) or not all(
                isinstance(row, list | tuple) for row in saved["tokens"]
            ):
                raise ValueError("tokens are not a grid: expected rows of whole numbers")
            parts["tokens"] = tuple(map(tuple, saved["tokens"]))
        return cls(**saved | parts)


def to_base64(image: Image.Image) -> str:
    """A picture as a PNG file, in base64."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def rows_of(grid: torch.Tensor) -> Grid:
    """Ids [h, w] or [1, h, w] -> as a request holds them.

    Raises:
        ValueError: they are latents.
    """
    if grid.is_floating_point():
        raise ValueError("this model writes numbers, not tokens: edit its pictures in Python, or choose another model")
    return tuple(map(tuple, grid.reshape(grid.shape[-2:]).tolist()))


def check_grid(rows: Grid) -> None:
    """Raises:
    ValueError: no grid of ids and -1.
    """
    if any(not isinstance(row, list | tuple) for row in rows):
        raise ValueError("tokens are not a grid: expected rows of whole numbers")
    if not rows or not rows[0] or len({len(row) for row in rows}) > 1 or len(rows) * len(rows[0]) > MAX_CELLS:
        raise ValueError(f"tokens are no grid: expected rows of equal length, and at most {MAX_CELLS:,} cells")
    cells = [cell for row in rows for cell in row]
    if any(type(cell) is not int or cell < -1 for cell in cells):
        raise ValueError("tokens hold something else than ids: expected whole numbers, -1 in the cells to write")


def check_beams(num_beams: int, num_candidates: int) -> None:
    """Raises:
    ValueError: no beam, or candidates that are no multiple of the beams.
    """
    if not 1 <= num_beams <= num_candidates or num_candidates % num_beams:
        raise ValueError(
            f"num_beams is {num_beams} and num_candidates {num_candidates}: expected a multiple of at least one beam"
        )


def check_prompt(prompt: str) -> None:
    """Raises:
    ValueError: the prompt is empty, longer than `MAX_PROMPT` characters, or no text that UTF-8 can hold.
    """
    if not isinstance(prompt, str) or not visible(prompt):
        message = 'the prompt is empty: say what to draw, for example "a red apple"'
        raise InvalidValue(message, "prompt", "string_below_min_length")
    check_length(prompt, "the prompt", "prompt")
    check_text(prompt, "the prompt")


@dataclass
class Job:
    """A request under way.

    Attributes:
        request: with every value left to the model filled in.
        tokens: [drawn, h, w] int64, -1 where nothing is decided yet; of a model of continuous latents [drawn, C, h, w], NaN there.
        kept: what `run` takes to go on from here; None before the first step.
        decided: cells of a picture that are, in every one.
        forward_passes: of the network, so far.
        origins: [drawn, h, w] int8, how each cell came by its token (`samplers.steps.Origin`); None where all were drawn.
        lossless: whether the sampler keeps the law of the network.
        pictures: PIL pictures, best first where candidates were ranked; empty until they are ready.
        requests: what makes each of `pictures` again, alone.
        scores: cosine of each of `pictures` to the prompt, where candidates were ranked.
        log: lines about what happened.
    """

    request: Request
    tokens: torch.Tensor
    kept: torch.Tensor | None = None
    decided: int = 0
    forward_passes: int = 0
    origins: torch.Tensor | None = None
    lossless: bool = True
    images: list[Image.Image] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Cells of a picture that were decided in a pass of the network, on average."""
        return self.decided / max(1, self.forward_passes)

    @property
    def progress(self) -> float:
        """Decided cells of all, 0 to 1."""
        return self.decided / self.tokens[0].shape[-2:].numel()
