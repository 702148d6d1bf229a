"""Quantized generators by calibration: a generator draws images, and its network is rounded so that it would write them again."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argen import data
from argen.hub.quantized import OF_ROTATION, PART, digest, writing_network
from argen.models.calibration import Batch, calibrate
from argen.models.controlar import ControlAR
from argen.models.gptq import DAMP, R_MIN
from argen.models.quantized import Quantization, check_finite, check_quantizable, quantize
from argen.models.rotation import random_rotation, rotate, stream_of, width_of
from argen.request import Control, Request

BATCH = 8  # images
PROMPTS = Path(data.__file__).with_name("judge_prompts.jsonl")  # of `argen eval emoji`


@dataclass
class Images:
    """What to calibrate with.

    Attributes:
        count: images.
        prompts: taken in turn; None for `default_prompts`.
        seed: image i is drawn from `seed` + i.
    """

    count: int = 64
    prompts: list[str] | None = None
    seed: int = 0


@dataclass
class Result:
    """What `quantize_calibrated` did.

    Attributes:
        metadata: of the file of the network.
        tensors: for the same file.
        notes: for people, one line each.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def default_prompts(pipe: Any, count: int) -> list[str]:
    """Of a model of classes so many of them, of all others so many of the judge's, both from end to end."""
    classes = getattr(getattr(pipe, PART).config, "classes", None)
    if classes is not None:
        prompts = [f"class:{number}" for number in range(classes)]
    else:
        prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    return [prompts[index * len(prompts) // count % len(prompts)] for index in range(count)]


def quantize_calibrated(pipe: Any, how: Quantization, images: Images) -> Result:
    """Quantize a generator's network, in place; with the method rtn nothing is drawn.

    Raises:
        InvalidValue, ValueError: it is quantized already, or cannot be quantized so; its weights are not finite.
    """
    network = writing_network(pipe)
    check_quantizable(network, how)
    for name, weight in network.named_parameters():
        check_finite(name, weight)
    result = Result(how.to_dict() | {"base_sha256": digest(network)})
    if not how.calibrated:
        quantize(network, how)
        return result
    prompts = images.prompts or default_prompts(pipe, images.count)
    prompts = [prompts[index % len(prompts)] for index in range(images.count)]
    for prompt in dict.fromkeys(prompts):
        pipe.check(Request(prompt))
    batches = drawn(pipe, prompts, images.seed)
    rotation = _rotate(pipe, images.seed, result) if how.method == "rsq" else None
    with _texts_read_once(pipe):
        rounded = calibrate(network, batches, how)
    quantize(network, how, {name: (part.integers.to(torch.int8), part.scales) for name, part in rounded.items()})
    seeds = list(range(images.seed, images.seed + images.count))
    result.metadata |= {"clip": True, "damp": DAMP, "act_order": how.act_order}
    result.metadata |= {"r_min": R_MIN if how.method == "rsq" else None, "rotation": rotation}
    result.metadata["calibration"] = {"prompts": prompts, "seeds": seeds, "count": images.count}
    return result


@torch.no_grad()
def drawn(pipe: Any, prompts: Sequence[str], seed: int) -> list[Batch]:
    """Images of prompts with the model's settings, each as the network reads it again; of a ControlAR under the edges of such images, too."""
    pipe.set_progress_bar_config(disable=True)
    controlled = isinstance(getattr(pipe, PART), ControlAR)
    batches = []
    for first in range(0, len(prompts), BATCH):
        texts = list(prompts[first : first + BATCH])
        seeds = range(seed + first, seed + first + len(texts))
        output = pipe(texts, generator=_generators(seeds), output_type="pil" if controlled else "latent")
        batches.append(_batch(pipe, texts, output.tokens))
        if controlled:
            controls = [pipe.prepare(Control(image)) for image in output.images]
            arguments = {"control_image": output.images, "output_type": "latent"}
            output = pipe(texts, generator=_generators(seeds), **arguments)
            batches.append(_batch(pipe, texts, output.tokens, controls))
    return batches


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _batch(pipe: Any, texts: list[str], tokens: Tensor, controls: list[Control] | None = None) -> Batch:
    shape, guided = pipe.shape_of(controls[0] if controls else None), pipe.defaults.guidance_scale != 1
    return Batch(lambda: pipe.start(texts, guided, shape, controls), tokens.to(pipe.device))


@contextmanager
def _texts_read_once(pipe: Any) -> Iterator[None]:
    """The text encoder, which may be larger than the generator, reads each prompt once."""
    known: dict[str, Any] = {}

    def encode(texts: Any) -> Any:
        if (key := repr(texts)) not in known:
            known[key] = type(pipe).encode_text(pipe, texts)
        return known[key]

    if not hasattr(pipe, "encode_text"):
        yield
        return
    vars(pipe)["encode_text"] = encode
    try:
        yield
    finally:
        del vars(pipe)["encode_text"]


def _rotate(pipe: Any, seed: int, result: Result) -> dict[str, Any] | None:
    """Rotate the network, where that is possible; what the metadata says of it."""
    network = getattr(pipe, PART)
    if stream_of(network) is None:
        result.notes.append("not rotated: that needs RMSNorm, and this network has norms with a mean")
        return None
    matrix, signs = random_rotation(width_of(network), torch.Generator().manual_seed(seed))
    rotate(network, matrix)
    if getattr(pipe, "drafter", None) is not None:
        pipe.register_modules(drafter=None)
        result.notes.append("without its drafter, which reads hidden states that are not rotated")
    if signs is None:
        return {"kind": "orthogonal", "seed": seed}
    result.tensors[f"{OF_ROTATION}signs"] = signs
    return {"kind": "hadamard", "signs": f"{OF_ROTATION}signs"}
