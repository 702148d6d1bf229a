"""What quantizing a generator costs: its logits, its tokens, and what its images show.

    pip install . && python benchmarks/quantization.py --num 100

All variants draw the same prompts with the same seeds. Logits are compared along the images of full precision: the relative error is that
of logits less their mean, and KL the divergence from the distribution of full precision at temperature 1, in nats, with the condition and
without. Weights are unpacked to float32 first, so nothing but their rounding counts. Calibration draws other images, of other prompts.
"""

import argparse
import copy
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from argen.command import Parser, guarded, load_model
from argen.eval.features import encoder_features
from argen.eval.judge import Truth, evaluate, read_prompts
from argen.eval.metrics import frechet_distance
from argen.eval.run import EMOJI, moments, read_reference
from argen.hub.calibration import Images, quantize_calibrated
from argen.models.calibration import Batch
from argen.models.quantized import Quantization, QuantizedLinear

SHIPPED = ["argen/emoji-parti", "argen/emoji-llamagen", "argen/emoji-seed-lm"]
VARIANTS = {
    "fp32": None,
    "int8 rtn": Quantization(8),
    "int4 rtn": Quantization(4, 32),
    "int4 gptq": Quantization(4, 32, "gptq"),
    "int4 rsq": Quantization(4, 32, "rsq"),
}
BATCH = 16


class Judged:
    """Looks at the images of each variant."""

    def __init__(self, device: str | None):
        self.judge = load_model("argen/emoji-judge", device)
        self.extractor = encoder_features("emoji", load_model("argen/emoji-clip", device))
        self.reference = read_reference(EMOJI, self.extractor, None).moments["features"]

    def scores(self, images: list[np.ndarray], truths: list[Truth]) -> tuple[float, float]:
        """Share of the judge's questions that are answered right, and FID-emoji."""
        answers = evaluate(self.judge, images, truths).values()
        right = sum(answer["value"] * answer["n"] for answer in answers) / sum(answer["n"] for answer in answers)
        inputs = torch.stack([self.extractor.prepare(image) for image in images])
        rows = torch.cat([self.extractor.look(part)["features"].cpu() for part in inputs.split(BATCH)])
        return right, frechet_distance(*moments(rows), *self.reference)


def unpack(network: nn.Module) -> None:
    """Replace quantized layers by ordinary ones of the same numbers."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.dequantized().shape[1], len(layer.scales), bias=layer.bias is not None)
            plain.weight, plain.bias = nn.Parameter(layer.dequantized()), layer.bias
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, plain)


def draw(pipe: Any, truths: list[Truth], seed: int) -> tuple[Tensor, list[np.ndarray]]:
    """Tokens [B, N] and images [H, W, 3] uint8."""
    tokens, images = [], []
    for first in range(0, len(truths), BATCH):
        texts = [truth.prompt for truth in truths[first : first + BATCH]]
        generators = [torch.Generator().manual_seed(seed + first + index) for index in range(len(texts))]
        output = pipe(texts, generator=generators)
        tokens.append(output.tokens)
        images += [np.asarray(image) for image in output.images]
    return torch.cat(tokens), images


def batches_of(pipe: Any, tokens: Tensor, truths: list[Truth]) -> list[Batch]:
    """Images to read again."""
    guided, batches = pipe.defaults.guidance_scale != 1, []
    for first in range(0, len(truths), BATCH):
        texts = [truth.prompt for truth in truths[first : first + BATCH]]
        start = lambda texts=texts: pipe.start(texts, guided, pipe.shape_of(), None)  # noqa: E731
        batches.append(Batch(start, tokens[first : first + BATCH]))
    return batches


@torch.no_grad()
def difference(batches: list[Batch], others: list[Batch]) -> tuple[float, float]:
    """Relative error of the logits, and mean KL divergence."""
    error, size, divergences = 0.0, 0.0, []
    for batch, other in zip(batches, others, strict=True):
        official, ours = (part.read(part.start()) for part in (batch, other))
        logits, quantized = (
            torch.cat([part for part in pair if part is not None]).float() for pair in (official, ours)
        )
        centred = logits - logits.mean(dim=-1, keepdim=True)
        error += (quantized - quantized.mean(dim=-1, keepdim=True) - centred).square().sum().item()
        size += centred.square().sum().item()
        log_probs = logits.log_softmax(dim=-1)
        divergences.append((log_probs.exp() * (log_probs - quantized.log_softmax(dim=-1))).sum(dim=-1).flatten())
    return (error / size) ** 0.5, torch.cat(divergences).mean().item()


def compare(args: argparse.Namespace) -> None:
    """Print a table for each model."""
    judged = Judged(args.device)
    for model in args.models:
        base = load_model(model, args.device, "generator", {"dtype": "fp32"})
        base.set_progress_bar_config(disable=True)
        images = Images(args.samples, seed=args.seed + args.num)
        truths = chosen(args.num, args.samples)
        tokens = draw(base, truths, args.seed)[0]
        official = batches_of(base, tokens, truths)
        print(f"\n{model}, {args.num} prompts, calibrated on {args.samples} images, {torch.get_num_threads()} threads")
        print(
            f"{'':10} {'logit error':>12} {'KL, nats':>10} {'same tokens':>12} {'judge':>7} {'FID-emoji':>10} {'seconds':>8}"
        )
        for name, how in VARIANTS.items():
            pipe = load_model(model, args.device, "generator", {"dtype": "fp32"})
            pipe.set_progress_bar_config(disable=True)
            started = time.perf_counter()
            if how is not None:
                quantize_calibrated(pipe, how, copy.copy(images))
                unpack(pipe.transformer)
            seconds = time.perf_counter() - started
            error, divergence = difference(official, batches_of(pipe, tokens, truths))
            own_tokens, own_images = draw(pipe, truths, args.seed)
            same = (own_tokens == tokens).float().mean().item()
            right, fid = judged.scores(own_images, truths)
            print(
                f"{name:10} {error:12.4f} {divergence:10.5f} {same:12.1%} {right:7.3f} {fid:10.1f} {seconds:8.1f}",
                flush=True,
            )


def chosen(count: int, samples: int) -> list[Truth]:
    """Prompts from all kinds that calibration does not draw."""
    truths = read_prompts()
    taken = {index * len(truths) // samples for index in range(samples)}
    rest = [truth for index, truth in enumerate(truths) if index not in taken]
    if count > len(rest):
        raise ValueError(f"num is {count}: expected at most {len(rest)} prompts beside those of calibration")
    return [rest[index * len(rest) // count] for index in range(count)]


def main() -> int:
    parser = Parser(prog="python benchmarks/quantization.py", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=SHIPPED, metavar="ID", help=f"(default: {' '.join(SHIPPED)})")
    parser.add_argument("--num", type=int, default=100, metavar="N", help="images of each variant (default: 100)")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="images to calibrate with (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    return guarded("benchmarks/quantization.py", compare, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
