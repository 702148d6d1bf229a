"""What is asked of a generator, and what has become of it: one object behind command line, Python, web page and APIs."""

import base64
import re
from dataclasses import dataclass, field, fields, replace
from io import BytesIO
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import JsonValue, SkipValidation
from pydantic.config import JsonDict

from argen.bounds import BOUNDS, MAX_CANDIDATES, MAX_CELLS, MAX_IMAGES, check, check_size
from argen.images import from_base64
from argen.registry import draws_of, nearest, samplers, samplers_of
from argen.words import check_prompt, cut, visible
from samplers.errors import InvalidValue
from samplers.next_x import Steps
from samplers.settings import Field, Setting, make, settings, typed_of
from tokenizers_img.pixels import normalized

CANDIDATES_A_BEAM = 4
OLD_SAMPLERS = {"plain": "sequential", "fast_preview": "zipar"}  # names in images and databases of release 0.1
OLD_LANTERN = {"lantern_k": "k", "lantern_delta": "delta", "lantern_lambda": "lambda"}
Grid = tuple[tuple[int, ...], ...]  # rows of ids
MIN_CONTROL = 16  # pixels on a side of a control picture


@dataclass(frozen=True)
class Control:
    """Control image of a request, its kind and its strength.

    Attributes:
        image: of any mode, turned as its EXIF says; one that is as large as the image asked for is taken as it is.
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
                f"the control image is {width} x {height}: expected at least {MIN_CONTROL} x {MIN_CONTROL} pixels"
            )
        check_size(self.size)

    def to_dict(self) -> dict:
        """For JSON: the picture as base64 of a PNG file."""
        values = {"kind": self.kind, "strength": self.strength, "size": self.size}
        return {"image": to_base64(self.image), **values}

    @classmethod
    def from_dict(cls, saved: dict) -> "Control":
        """Read the output of `to_dict`.

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
        values = {name: value for name, value in saved.items() if value is not None}
        return cls(**values | {"image": from_base64(saved["image"], "the control image"), "size": size and tuple(size)})


def _within(name: str, **extra: JsonValue) -> Any:
    """The bounds of a number that tools ask for, too, as a `Field` in the annotation of a setting."""
    bound = BOUNDS[name]
    note: JsonDict = {"note": bound.note} if bound.note else {}
    return Field(ge=bound.low, le=bound.high, json_schema_extra=extra | note)


@settings
class Request:
    """A generation request, checked when it is made.

    Image i is drawn with ``seed + i``, and with nothing else: it does not depend on the others. What is None is left to the model.
    `sampler` is a name of `argen.registry.samplers`, which may have settings behind it, e.g. "lantern:k=5,delta=0.1"; they become
    `sampler_args`. `tokens` are rows of a token grid to go on from: ids that stay, and -1 in the cells that are written. In Python
    `control` is a `Control`.

    Raises:
        ValueError: says which value is out of bounds and what is expected.
    """

    prompt: str = Field(description='what to draw, for example "a red apple, noto style"')
    model: str = Field(
        default="argen/emoji-parti", description="an id that `argen models` lists, or the folder of a saved pipeline"
    )
    num_images: int = Field(
        default=1, ge=1, le=MAX_IMAGES, description="images to give back", json_schema_extra={"flags": ["-n", "--num"]}
    )
    seed: Annotated[int, _within("seed")] = Field(default=0, description="image i is drawn with seed + i")
    guidance_scale: Annotated[float | None, _within("guidance_scale")] = Field(
        default=None, description="how closely to follow the prompt"
    )
    temperature: Annotated[float | None, _within("temperature")] = Field(default=None, description="divides the logits")
    top_k: int | None = Field(
        default=None,
        ge=0,
        le=2**20,
        description="draw among the K most probable tokens",
        json_schema_extra={"note": "0: all"},
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="draw among the most probable tokens of joint probability P",
        json_schema_extra={"note": "1: all"},
    )
    sampler: str = Field(
        default="auto", description="how tokens are decided, with its settings: NAME or NAME:SETTING=VALUE,..."
    )
    sampler_args: dict[str, Any] = Field(default_factory=dict, description="settings of the sampler by their names")
    steps: Steps | tuple[Steps, Steps] | None = Field(
        default=None,
        description="steps from noise to image, for a model of continuous latents such as argen/emoji-xar; two numbers: for its first and its last part",
    )
    num_tokens: Annotated[int | None, _within("num_tokens", flags=["--tokens"])] = Field(
        default=None,
        description="of an image, for a model whose images may have any number",
    )
    num_candidates: Annotated[int | None, _within("num_candidates")] = Field(
        default=None,
        description="draw so many images, numbered by seed + i from 0, and keep the num_images that fit the prompt best",
    )
    num_beams: int | None = Field(
        default=None,
        ge=1,
        le=MAX_CANDIDATES,
        description="search: of the candidates with 1, 2, 4 ... tokens go on with those that fit best, for a model of ordered tokens",
    )
    control: Control | None = Field(default=None, description="image to follow, for a model that takes one")
    literal: bool | None = Field(
        default=None, description="give the model the prompt word for word, not in the names that it knows"
    )
    tokens: SkipValidation[Grid | None] = Field(
        default=None, description="token grid to go on from, -1 in the cells to write"
    )

    def __post_init__(self):
        check_prompt(self.prompt)
        for name in ("model", "sampler"):
            if not visible(getattr(self, name)):
                raise InvalidValue(f"{name} is {cut(repr(getattr(self, name)))}: expected a name", name)
        if ":" in self.sampler:
            name, typed = parse_sampler(self.sampler)
            object.__setattr__(self, "sampler", name)
            object.__setattr__(self, "sampler_args", typed | self.sampler_args)
        if self.sampler not in samplers:
            near = nearest(self.sampler, samplers)
            raise InvalidValue(
                f"unknown sampler {cut(self.sampler)!r}: expected one of {', '.join(samplers)}{near}", "sampler"
            )
        make(samplers[self.sampler], self.sampler_args)  # refuses what it cannot use
        if self.steps is not None and self.sampler != "auto" and draws_of(self.sampler) == "tokens":
            raise ValueError(
                f"steps are those of a flow, but the sampler is {self.sampler}: leave them out, or choose one of "
                f"{', '.join(samplers_of('latents'))} with a model of continuous latents"
            )
        if self.num_candidates is not None and not self.num_images <= self.num_candidates:
            raise InvalidValue(
                f"num_candidates is {self.num_candidates}: expected at least the number of images "
                f"({self.num_images}) and at most {MAX_CANDIDATES}",
                "num_candidates",
            )
        if self.num_beams is not None:
            check_beams(self.num_beams, self.num_drawn)
        if self.tokens is not None:
            check_grid(self.tokens)
            if min(map(min, self.tokens)) >= 0:
                raise ValueError("tokens leave nothing to write: expected -1 in one cell or more")

    @property
    def num_drawn(self) -> int:
        """Images that are drawn to choose from."""
        if self.num_candidates is None:
            return CANDIDATES_A_BEAM * self.num_beams if self.num_beams else self.num_images
        return self.num_candidates

    def sampler_settings(self) -> dict:
        """Arguments of the sampler that are set, with the steps among them."""
        return self.sampler_args | ({} if self.steps is None else {"steps": self.steps})

    def generators(self) -> list[torch.Generator]:
        """A generator for each image that is drawn; with `num_beams`, for each that is searched for."""
        count = self.num_images if self.num_beams else self.num_drawn
        return [torch.Generator().manual_seed(self.seed + i) for i in range(count)]

    def for_image(self, index: int) -> "Request":
        """The request that makes the picture drawn as number `index`, alone."""
        candidates = self.num_candidates if self.num_beams else None
        return replace(self, seed=self.seed + index, num_images=1, num_candidates=candidates)

    @property
    def sampler_text(self) -> str:
        """The sampler with its settings, as it may be typed: "lantern:k=5,delta=0.1"."""
        typed = ",".join(f"{name}={value}".replace(" ", "") for name, value in self.sampler_args.items())
        return f"{self.sampler}:{typed}" if typed else self.sampler

    def with_setting(self, name: str, value: Any) -> "Request":
        """The same with another value of a setting, see `setting_of`; one of a sampler chooses that sampler."""
        name = name_of(name)
        sampler, _, argument = name.partition(".")
        if not argument:
            return replace(self, **{name: value} | ({"sampler_args": {}} if name == "sampler" else {}))
        sampler_args = self.sampler_args if self.sampler == sampler else {}
        return replace(self, sampler=sampler, sampler_args=sampler_args | {argument: value})

    def explicit_settings(self) -> dict:
        """The values by name, without those left to the model."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    def to_dict(self) -> dict:
        """`explicit_settings`, for JSON."""
        return self.explicit_settings() | ({"control": self.control.to_dict()} if self.control else {})

    @classmethod
    def from_dict(cls, saved: dict) -> "Request":
        """Read the output of `to_dict`.

        Raises:
            ValueError: something else; says what.
        """
        if not isinstance(saved, dict):
            raise ValueError(f"settings are a {type(saved).__name__}: expected an object with names of settings")
        saved = _migrated(saved)
        if "prompt" not in saved:
            raise ValueError('no prompt: say what to draw, for example "a red apple"')
        field_names = {item.name for item in fields(cls)}
        if unknown := [name for name in saved if name not in field_names]:
            raise ValueError(f"unknown setting {unknown[0][:60]!r}: expected some of {', '.join(sorted(field_names))}")
        control = saved.get("control")
        parts: dict[str, Any] = {} if control is None else {"control": Control.from_dict(control)}
        if isinstance(saved.get("steps"), list):
            parts["steps"] = tuple(saved["steps"])
        if isinstance(saved.get("sampler_args"), dict):  # JSON has no tuples
            pairs = saved["sampler_args"].items()
            parts["sampler_args"] = {name: tuple(value) if isinstance(value, list) else value for name, value in pairs}
        if saved.get("tokens") is not None:
            if not isinstance(saved["tokens"], list | tuple) or not all(
                isinstance(row, list | tuple) for row in saved["tokens"]
            ):
                raise ValueError("tokens are not a grid: expected rows of whole numbers")
            parts["tokens"] = tuple(map(tuple, saved["tokens"]))
        return cls(**saved | parts)


def _migrated(saved: dict) -> dict:
    """Settings as release 0.1 wrote them, in today's names."""
    if isinstance(saved.get("sampler"), str):
        saved = saved | {"sampler": OLD_SAMPLERS.get(saved["sampler"], saved["sampler"])}
    old = {name: saved[name] for name in OLD_LANTERN if saved.get(name) is not None}
    if old:
        saved = saved | {"sampler_args": {OLD_LANTERN[name]: value for name, value in old.items()}}
    return {name: value for name, value in saved.items() if name not in OLD_LANTERN}


def setting_of(name: str) -> Setting:
    """A setting of a request by its name, or one of a sampler, e.g. "lantern.k".

    Raises:
        ValueError: there is none, or no such sampler.
    """
    sampler, _, argument = name_of(name).partition(".")
    available = typed_of(samplers[sampler] if argument else Request)
    name = argument or name
    if name not in available:
        names = f"expected one of {', '.join(available)}" if available else f"{sampler} has none"
        raise ValueError(f"unknown setting {name[:60]!r}: {names}{nearest(name, available)}")
    return available[name]


def name_of(setting: str) -> str:
    """The name of a setting of today, also of one that release 0.1 had: "lantern.k" of "lantern_k"."""
    return f"lantern.{OLD_LANTERN[setting]}" if setting in OLD_LANTERN else setting


def parse_sampler(text: str) -> tuple[str, dict[str, Any]]:
    """ "lantern:k=5,delta=0.1" -> its name, and its arguments.

    Raises:
        ValueError: no such sampler or setting, or a value that is none of it.
    """
    name, _, typed = text.partition(":")
    available, arguments = typed_of(samplers[name.strip()]), {}
    for part in filter(None, (part.strip() for part in re.split(r",(?![^=]*\))", typed))):
        setting, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or setting not in available:
            raise ValueError(
                f"the sampler {name} has no setting {part[:60]!r}: expected SETTING=VALUE of "
                f"{', '.join(available) or 'none: it has no settings'}"
            )
        if setting in arguments:
            raise InvalidValue(f"{setting} is given twice in {cut(text)!r}: expected each setting once", "sampler")
        arguments[setting] = available[setting].parse(value)
    return name.strip(), arguments


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
        raise ValueError("this model writes numbers, not tokens: edit its images in Python, or choose another model")
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


@dataclass
class Job:
    """A request under way.

    Attributes:
        request: with every value left to the model filled in.
        tokens: [drawn, h, w] int64, -1 where nothing is decided yet; of a model of continuous latents [drawn, C, h, w], NaN there.
        resume_state: what `run` takes to go on from here; None before the first step.
        decided: cells of a picture that are, in every one.
        forward_passes: of the network, so far.
        origins: [drawn, h, w] int8, how each cell came by its token (`samplers.steps.Origin`); None where all were drawn.
        lossless: whether tokens follow the network's own distribution.
        images: PIL images, best first where candidates were ranked; empty until they are ready.
        requests: what makes each of `images` again, alone.
        scores: cosine of each of `images` to the prompt, where candidates were ranked.
        log: lines about what happened.
    """

    request: Request
    tokens: torch.Tensor
    resume_state: torch.Tensor | None = None
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
