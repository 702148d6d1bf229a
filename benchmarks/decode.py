"""Tokens per second of ways to write the tokens of a LlamaGen with random weights, interleaved in one process.

    pip install ".[openvino]" && python benchmarks/decode.py --rounds 3

`official` does what the loop of the authors' repository does: a cache as long as the image from the start, all of which every token
attends to under a mask row that is looked up, the math attention kernel, complex rotary numbers, logits filtered and drawn by multinomial.
`transformers` is its Llama of the same sizes with its eager loop and growing cache. The others are argen's sequential loop: as it is,
compiled, and compiled with weights of 8 bits. First all must write the same greedy tokens, but for the last two columns' rounding (the
share that is equal is printed). Ratios carry over to like machines; tokens per second depend on the machine.
"""

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from argen.command import Parser, guarded
from argen.device import DTYPES, pick
from argen.hub.loading import compile_decoding
from argen.models.llamagen import SIZES, LlamaGen
from argen.models.quantized import Quantization, quantize
from argen.models.session import LlamaGenSession
from samplers.logits import Gumbel, Sampling, guide, keys_of
from samplers.steps import Sequential
from samplers.steps import pick as decide

SCALE, TOP_K = 4.0, 2000
Loop = Callable[[int, Sampling], Tensor]  # batch, sampling -> ids [batch, N]


def noise_of(batch: int, length: int) -> Gumbel:
    return Gumbel(keys_of([torch.Generator().manual_seed(index) for index in range(batch)], length))


def argen_loop(model: LlamaGen) -> Loop:
    def run(batch: int, sampling: Sampling) -> Tensor:
        ids = torch.arange(batch, device=model.device)
        condition = torch.cat([ids, torch.full_like(ids, model.config.classes)])
        mask = torch.ones(2 * batch, 1, dtype=torch.bool, device=model.device)
        session = LlamaGenSession(model, model.cls_embedding(condition), mask, guided=True)
        grid = torch.full((batch, model.length), -1, device=model.device)
        *_, last = Sequential()(session, grid, sampling, SCALE, noise_of(batch, model.length))
        return last.tokens

    return run


def official_loop(model: LlamaGen) -> Loop:
    """The steps of the authors' `generate`, on the weights of a LlamaGen."""
    heads, length = model.config.heads, model.length
    causal = torch.tril(torch.ones(length + 1, length + 1, dtype=torch.bool, device=model.device))
    turns = torch.cat([torch.zeros(1, *model.freqs_cis.shape[1:], device=model.device), model.freqs_cis])
    turns = torch.view_as_complex(turns.float().contiguous())  # the condition's is zero

    def norm(x: Tensor, part) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + part.eps)).type_as(x) * part.weight

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * turns[places][None, :, None]).flatten(3).type_as(x)

    def forward(x: Tensor, places: Tensor, cache: list[Tensor]) -> Tensor:
        mask = causal[None, None, places].expand(len(x), -1, -1, -1)
        for index, layer in enumerate(model.layers):
            part, normed = layer.attention, norm(x, layer.attention_norm)
            parts = F.linear(normed, part.wqkv.weight).split(x.shape[-1], dim=-1)
            query, key, value = (each.view(len(x), -1, heads, x.shape[-1] // heads) for each in parts)
            query, key = rotate(query, places), rotate(key, places)
            cache[index][0][:, :, places], cache[index][1][:, :, places] = key.transpose(1, 2), value.transpose(1, 2)
            with sdpa_kernel(SDPBackend.MATH):
                attended = F.scaled_dot_product_attention(query.transpose(1, 2), *cache[index], attn_mask=mask)
            x = x + F.linear(attended.transpose(1, 2).contiguous().view(x.shape), part.wo.weight)
            feed, normed = layer.feed_forward, norm(x, layer.ffn_norm)
            gated = F.silu(F.linear(normed, feed.w1.weight)) * F.linear(normed, feed.w3.weight)
            x = x + F.linear(gated, feed.w2.weight)
        return F.linear(norm(x, model.norm), model.output.weight).float()

    def sample(logits: Tensor, sampling: Sampling) -> Tensor:
        conditional, unconditional = logits[:, -1].chunk(2)
        guided = unconditional + (conditional - unconditional) * SCALE
        if sampling.temperature == 0:
            return guided.argmax(dim=-1, keepdim=True)
        least = torch.topk(guided, sampling.top_k)[0][..., -1, None]
        probs = F.softmax(guided.masked_fill(guided < least, -float("inf")), dim=-1)
        return torch.multinomial(probs, num_samples=1)

    def run(batch: int, sampling: Sampling) -> Tensor:
        ids = torch.arange(batch, device=model.device)
        x = model.cls_embedding(torch.cat([ids, torch.full_like(ids, model.config.classes)]))
        size = 2 * batch, heads, length + 1, model.config.dim // heads
        cache = [torch.zeros(2, *size, dtype=x.dtype, device=x.device) for _ in model.layers]
        tokens = [sample(forward(x, torch.zeros(1, dtype=torch.long, device=x.device), cache), sampling)]
        for place in range(1, length):
            embedded = model.tok_embeddings(torch.cat([tokens[-1], tokens[-1]]))
            logits = forward(embedded, torch.tensor([place], device=x.device), cache)
            tokens.append(sample(logits, sampling))
        return torch.cat(tokens, dim=1)

    return run


def transformers_loop(network: LlamaForCausalLM, length: int) -> Loop:
    def run(batch: int, sampling: Sampling) -> Tensor:
        device = network.device
        cache, token = DynamicCache(config=network.config), torch.zeros(2 * batch, 1, dtype=torch.long, device=device)
        noise, ids = noise_of(batch, length), []
        for cell in range(length):
            logits = network(token, past_key_values=cache, use_cache=True).logits[:, -1].float()
            guided = guide(*logits.chunk(2), SCALE)[:, None]
            ids.append(decide(guided, sampling, noise, torch.tensor([cell]))[:, 0])
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


def loops_of(model: LlamaGen, dtype: torch.dtype) -> dict[str, Loop]:
    """The ways that run here, by name."""
    network = llama_like(model).to(model.device, dtype)
    loops = {
        "official": official_loop(model),
        "transformers": transformers_loop(network, model.length),
        "argen": argen_loop(model),
    }
    if model.device.type == "cpu" and dtype == torch.float32 and importlib.util.find_spec("openvino"):
        for name in ("compiled", "compiled int8"):
            other = copy.deepcopy(model)
            if name.endswith("int8"):
                quantize(other, Quantization(8))
            compile_decoding(other)
            loops[name] = argen_loop(other)
    return loops


def weights_read(model: LlamaGen, bits: int) -> int:
    """Bytes of the linear layers, which a step of one token reads; with 8 bits without their scales."""
    linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    return sum(part.weight.numel() for part in linear) * bits // 8


def read_bandwidth(device: torch.device, tries: int = 9) -> float:
    """Bytes a second at which numbers are summed up that no cache holds: the best of some tries."""
    numbers = torch.ones(2**27, device=device)
    best = 0.0
    for _ in range(tries):
        started = time.perf_counter()
        numbers.sum().item()
        best = max(best, numbers.nbytes / (time.perf_counter() - started))
    return best


@torch.no_grad()
def decode(args: argparse.Namespace) -> None:
    """Print a table of tokens per second, and of ratios to the official loop."""
    device, dtype = pick(args.device), DTYPES[args.dtype]
    torch.manual_seed(0)
    model = LlamaGen(grid=args.grid, classes=1000, **SIZES[args.model]).eval()
    torch.nn.init.normal_(model.output.weight, std=0.1)  # which are zero at the beginning of a training
    model.to(device, dtype)
    parameters = sum(part.numel() for part in model.parameters()) / 1e6
    loops = loops_of(model, dtype)
    tokens = {name: loop(1, Sampling(temperature=0)) for name, loop in loops.items()}  # also compiles
    equal = {name: (ids == tokens["official"]).float().mean().item() for name, ids in tokens.items()}
    print(
        f"LlamaGen-{args.model}, {parameters:.0f}M, {model.length} tokens, guidance {SCALE:g}, top-k {TOP_K}, {args.dtype}, "
        f"{device}, {torch.get_num_threads()} threads; tokens per second, medians of {args.rounds}, and ratios to official"
    )
    bandwidth = read_bandwidth(device)
    print(
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s; its share that reading the weights takes at the first batch size stands last"
    )
    print(
        f"{'':16}"
        + "".join(f"{f'batch {batch}':>16}" for batch in args.batches)
        + f"{'greedy equal':>16}{'bandwidth':>12}"
    )
    seconds: dict[tuple[str, int], list[float]] = {}
    for batch in args.batches:
        for _ in range(args.rounds):
            for name, loop in loops.items():
                started = time.perf_counter()
                loop(batch, Sampling(top_k=TOP_K))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.setdefault((name, batch), []).append(time.perf_counter() - started)
    for name in loops:
        cells = []
        for batch in args.batches:
            speed = batch * model.length / median(seconds[name, batch])
            ratio = median(seconds["official", batch]) / median(seconds[name, batch])
            cells.append(f"{speed:9.1f} {ratio:6.2f}")
        bits = 8 if name.endswith("int8") else 8 * dtype.itemsize
        share = weights_read(model, bits) * model.length / median(seconds[name, args.batches[0]]) / bandwidth
        agreement = "" if name == "transformers" else f"{equal[name]:.0%}"
        print(f"{name:16}" + "".join(cells) + f"{agreement:>16}{share:>12.0%}", flush=True)


def main() -> int:
    parser = Parser(prog="python benchmarks/decode.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="B", choices=list(SIZES), help="size of LlamaGen (default: B)")
    parser.add_argument("--grid", type=int, default=16, help="cells on a side (default: 16, so 256 tokens)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="B")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    return guarded("benchmarks/decode.py", decode, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
