"""Tokens per second of the sequential loop, beside transformers' own, on the same network with random weights, interleaved.

    pip install . && python benchmarks/decode.py --rounds 3

transformers' Llama of the same sizes runs its eager loop with its growing cache, with the same guidance and filters. Ratios of one
run on one machine carry over; tokens per second depend on the machine.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from argen.command import Parser, guarded
from argen.device import pick
from argen.models.llamagen import SIZES, LlamaGen, LlamaGenSession
from samplers.logits import Gumbel, Sampling, guide, keys_of
from samplers.steps import Sequential
from samplers.steps import pick as decide

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLING = Sampling(top_k=2000)


def noise_of(batch: int, length: int) -> Gumbel:
    return Gumbel(keys_of([torch.Generator().manual_seed(index) for index in range(batch)], length))


def argen_loop(model: LlamaGen, batch: int, scale: float) -> Callable[[], Tensor]:
    """Our loop -> ids [batch, N]."""

    def run() -> Tensor:
        ids = torch.arange(batch, device=model.device)
        condition = torch.cat([ids, torch.full_like(ids, model.config.classes)])
        mask = torch.ones(2 * batch, 1, dtype=torch.bool, device=model.device)
        session = LlamaGenSession(model, model.cls_embedding(condition), mask, guided=True)
        noise = noise_of(batch, model.length)
        grid = torch.full((batch, model.length), -1, device=model.device)
        *_, last = Sequential()(session, grid, SAMPLING, scale, noise)
        return last.tokens

    return run


def transformers_loop(model: LlamaForCausalLM, batch: int, length: int, scale: float) -> Callable[[], Tensor]:
    """transformers' forward pass in a loop -> ids [batch, N]."""

    def run() -> Tensor:
        cache, token = DynamicCache(config=model.config), torch.zeros(2 * batch, 1, dtype=torch.long)
        noise = noise_of(batch, length)
        token, ids = token.to(model.device), []
        for cell in range(length):
            logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1].float()
            guided = guide(*logits.chunk(2), scale)[:, None]
            ids.append(decide(guided, SAMPLING, noise, torch.tensor([cell]))[:, 0])
            token = torch.cat([ids[-1], ids[-1]])[:, None]
        return torch.stack(ids, dim=1)

    return run


def llama_like(model: LlamaGen) -> LlamaForCausalLM:
    """transformers' Llama with the sizes of a LlamaGen."""
    config = LlamaConfig(
        vocab_size=model.config.n_embed,
        hidden_size=model.config.dim,
        intermediate_size=model.layers[0].feed_forward.w1.out_features,
        num_hidden_layers=model.config.depth,
        num_attention_heads=model.config.heads,
        max_position_embeddings=model.length + 1,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    """Print a table of tokens per second, and ratios."""
    device = pick(args.device)
    torch.manual_seed(0)
    ours = LlamaGen(grid=args.grid, classes=1000, **SIZES[args.model]).eval()
    theirs = llama_like(ours)
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"LlamaGen-{args.model}, {parameters / 1e6:.0f}M, {ours.length} tokens, guidance 4, {device}")
    print(f"{'':12} {'transformers':>14} {'argen':>10} {'ratio':>7}   tokens per second, best of {args.rounds}")
    for name in args.dtypes:
        for model in (ours, theirs):
            model.to(device, DTYPES[name])
        for batch in args.batches:
            loops = transformers_loop(theirs, batch, ours.length, 4.0), argen_loop(ours, batch, 4.0)
            best = [0.0, 0.0]
            for _ in range(args.rounds):
                for index, loop in enumerate(loops):
                    started = time.perf_counter()
                    loop()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    best[index] = max(best[index], batch * ours.length / (time.perf_counter() - started))
            row = f"{best[0]:14.1f} {best[1]:10.1f} {best[1] / best[0]:7.2f}"
            print(f"{name}, batch {batch:<2} {row}", flush=True)


def main() -> int:
    parser = Parser(prog="python benchmarks/decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="B", choices=list(SIZES), help="size of LlamaGen (default: B)")
    parser.add_argument("--grid", type=int, default=16, help="cells on a side (default: 16, so 256 tokens)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="B")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    return guarded("benchmarks/decode.py", decode, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
