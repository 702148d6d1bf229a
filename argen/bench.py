"""How fast pictures are made, and what it costs: ``python -m argen.bench WHAT``.

``decode``: the same network with random weights, interleaved: our sequential loop, and transformers' own Llama of the same sizes with its
eager loop and growing cache. Both draw with the same guidance and filters. Ratios of one run on one machine; the number of
tokens a second depends on the machine.

``models``: seconds a picture of whole generators, from prompt to pixels, interleaved.

``speculative``: the shipped generator with every sampler, one picture at a time: passes, tokens a pass, tokens a second, and what
the judge and FID-emoji say of the pictures.

``entropy``: how sure a generator is of its next token, which says what relaxed samplers can gain.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from argen.command import Parser, guarded, load_model
from argen.device import pick
from argen.eval.features import encoder_features
from argen.eval.images import ImageSet, open_images
from argen.eval.judge import evaluate, read_prompts
from argen.eval.run import cache_folder, compare
from argen.models.llamagen import SIZES, LlamaGen, LlamaGenSession
from samplers.auto import Auto
from samplers.jacobi import Jacobi
from samplers.lantern import Lantern, table_of
from samplers.logits import Gumbel, Sampling, guide, keys_of
from samplers.recycling import TokenRecycling
from samplers.rules import KSeq
from samplers.sjd import GroupedJacobi, SpeculativeJacobi
from samplers.speculative import Speculative
from samplers.steps import START, Sampler, Sequential, guided
from samplers.steps import pick as decide
from samplers.trees import SMALL_TREE, DrawnTree, DynamicTree, IndependentTree
from samplers.zipar import ZipAR

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLING = Sampling(top_k=2000)
KINDS = ("single", "colour", "count", "pair", "relation")  # of the judge's prompts


def noise_of(batch: int, length: int) -> Gumbel:
    return Gumbel(keys_of([torch.Generator().manual_seed(index) for index in range(batch)], length))


def plain(model: LlamaGen, batch: int, scale: float) -> Callable[[], Tensor]:
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


def eager(model: LlamaForCausalLM, batch: int, length: int, scale: float) -> Callable[[], Tensor]:
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
    """Print a table of tokens a second, and ratios."""
    device = pick(args.device)
    torch.manual_seed(0)
    ours = LlamaGen(grid=args.grid, classes=1000, **SIZES[args.model]).eval()
    theirs = llama_like(ours)
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"LlamaGen-{args.model}, {parameters / 1e6:.0f}M, {ours.length} tokens, guidance 4, {device}")
    print(f"{'':12} {'transformers':>14} {'argen':>10} {'ratio':>7}   tokens a second, best of {args.turns}")
    for name in args.dtypes:
        for model in (ours, theirs):
            model.to(device, DTYPES[name])
        for batch in args.batches:
            loops = eager(theirs, batch, ours.length, 4.0), plain(ours, batch, 4.0)
            best = [0.0, 0.0]
            for _ in range(args.turns):
                for index, loop in enumerate(loops):
                    started = time.perf_counter()
                    loop()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    best[index] = max(best[index], batch * ours.length / (time.perf_counter() - started))
            row = f"{best[0]:14.1f} {best[1]:10.1f} {best[1] / best[0]:7.2f}"
            print(f"{name}, batch {batch:<2} {row}", flush=True)


def models(args: argparse.Namespace) -> None:
    """Print a table of seconds a picture, and what each takes of the first."""
    pipes = {name: load_model(name, args.device, "generator") for name in args.models}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    print(f"{'':34} {'batch':>5} {'seconds per image':>18} {'of the first':>13}   best of {args.turns}")
    for batch in args.batches:
        best = dict.fromkeys(pipes, float("inf"))
        for turn in range(args.turns):
            for name, pipe in pipes.items():
                generator = torch.Generator().manual_seed(turn)
                started = time.perf_counter()
                pipe(args.prompt, batch, generator=generator)  # its pictures are on the CPU, so it is over
                best[name] = min(best[name], (time.perf_counter() - started) / batch)
        first = next(iter(best.values()))
        for name, seconds in best.items():
            print(f"{name:34} {batch:5} {seconds:18.3f} {seconds / first:13.2f}", flush=True)


def settings() -> dict[str, Sampler]:
    """The samplers that `speculative` compares, by what they are called in its table."""
    return {
        "sequential": Sequential(),
        "auto": Auto(),
        **{f"jacobi, window {window}": Jacobi(window) for window in (8, 16, 32)},
        "sjd": SpeculativeJacobi(),
        "gsd": GroupedJacobi(),
        "recycling": TokenRecycling(),
        "speculative, static tree": Speculative(),
        "speculative, dynamic tree": Speculative(DynamicTree(12, 3, 4)),
        "speculative, drawn tree": Speculative(DrawnTree(12, 4)),
        "speculative, k-SEQ": Speculative(IndependentTree(SMALL_TREE.paths), KSeq()),
        **{f"lantern, k 10, delta {delta}": Lantern(10, delta) for delta in (0.05, 0.1, 0.2, 0.4)},
        **{f"lantern, k 10, lambda {bound}": Lantern(10, lambda_=bound) for bound in (2.0, 5.0)},
        **{f"zipar, window {window}": ZipAR(window) for window in (2, 4)},
    }


def speculative(args: argparse.Namespace) -> None:
    """Print a table, one row a sampler, and write it, with a plot if asked for."""
    if args.plot:
        import matplotlib  # noqa: F401 - now, if it is missing, and not after an hour
    pipe = load_model(args.model, args.device, "generator")
    pipe.set_progress_bar_config(disable=True)
    judge = load_model("argen/emoji-judge", args.device)
    kinds: dict[str, list] = {}
    for truth in read_prompts():
        kinds.setdefault(truth.kind, []).append(truth)
    truths = [truth for kind in args.kinds for truth in kinds[kind][: args.num]]
    reference = open_images(args.ref) if args.ref else None
    rows = []
    for name, sampler in settings().items():
        if args.only and not any(name.startswith(one) for one in args.only):
            continue
        if getattr(pipe, "drafter", None) is None and name.startswith(("speculative", "lantern")):
            continue
        forward_passes, images, started = 0, [], time.perf_counter()
        for index, truth in enumerate(truths):
            out = pipe(truth.prompt, generator=torch.Generator().manual_seed(index), sampler=sampler)
            forward_passes, images = forward_passes + out.forward_passes, images + out.images
        seconds = time.perf_counter() - started
        told = evaluate(judge, [np.asarray(image) for image in images], truths)
        identity = [entry for question, entry in told.items() if question.endswith("identity")]
        row = {
            "sampler": name,
            "lossless": sampler.lossless,
            "passes": forward_passes / len(truths),
            "tokens_per_step": len(truths) * pipe.length / forward_passes,
            "tokens_a_second": len(truths) * pipe.length / seconds,
            "identity": sum(entry["value"] * entry["n"] for entry in identity) / sum(entry["n"] for entry in identity),
        }
        if reference is not None:
            row["fid_emoji"] = _fid(images, reference)
        rows.append(row)
        if len(rows) == 1:
            print(" ".join(f"{column:>15}" for column in list(row)[2:]), "  sampler")
        cells = [f"{value:15.3f}" for value in list(row.values())[2:]]
        print(" ".join(cells), f"  {name}{'' if sampler.lossless else ' (relaxed)'}", flush=True)
    args.out.write_text(json.dumps({"model": args.model, "prompts": len(truths), "rows": rows}, indent=1) + "\n")
    if args.plot:
        _plot(rows, args.plot)


@torch.no_grad()
def entropy(args: argparse.Namespace) -> None:
    """Print how wide the distribution of the next token is: its entropy, its largest probability, and what neighbours in the codebook have."""
    pipe = load_model(args.model, args.device, "generator")
    pipe.set_progress_bar_config(disable=True)
    own = pipe.defaults
    sampling = Sampling(own.temperature, own.top_k, own.top_p)
    table = table_of(pipe.image_tokenizer.codebook, args.k)
    print(f"{'':10} {'nats':>8} {'most probable':>10} {f'{args.k} neighbours of the token':>30}")
    for kind in KINDS:
        prompts = [truth.prompt for truth in read_prompts() if truth.kind == kind][: args.num]
        generator = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
        tokens = pipe(prompts, generator=generator, output_type="latent").tokens
        read = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], dim=1)
        session, cells = pipe.start(prompts, guided=True), torch.arange(pipe.length)
        logits = guided(*session.forward(read, cells - 1), own.guidance_scale, cells)
        probs = sampling.filter(logits).softmax(dim=-1)
        nats = torch.special.entr(probs).sum(dim=-1).mean()
        lent = probs.gather(-1, table.to(tokens.device)[tokens]).sum(dim=-1).mean()
        print(f"{kind:10} {nats:8.2f} {probs.amax(dim=-1).mean():10.2f} {lent:30.3f}", flush=True)


def _fid(images: list[Image.Image], reference: ImageSet) -> float:
    extractor = encoder_features("emoji", load_model("argen/emoji-clip", None))
    with tempfile.TemporaryDirectory() as folder:
        for index, image in enumerate(images):
            image.save(Path(folder) / f"{index}.png")
        samples = open_images(folder)
        return compare(samples, reference, extractor, ["fid"], Path(folder) / "features", cache_folder())["FID-emoji"][
            "value"
        ]


def _plot(rows: list[dict], path: Path) -> None:
    """Tokens a pass against the judge's identity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        axes.scatter(row["tokens_per_step"], row["identity"], color="tab:blue" if row["lossless"] else "tab:orange")
        axes.annotate(
            row["sampler"],
            (row["tokens_per_step"], row["identity"]),
            fontsize=7,
            xytext=(4, 3),
            textcoords="offset points",
        )
    axes.margins(x=0.2, y=0.1)  # room for the names
    axes.set_xlabel("tokens per step")
    axes.set_ylabel("identity, by the judge (blue: lossless, orange: relaxed)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m argen.bench``."""
    parser = Parser(prog="python -m argen.bench", description="How fast pictures are made.")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    add = commands.add_parser("decode", help="tokens a second of our loop and of transformers' on one network")
    add.add_argument("--model", default="B", choices=list(SIZES), help="size of LlamaGen (default: B)")
    add.add_argument("--grid", type=int, default=16, help="cells on a side (default: 16, so 256 tokens)")
    add.add_argument("--batches", type=int, nargs="+", default=[1, 4], metavar="B")
    add.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    add.add_argument("--turns", type=int, default=3)
    add.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    add.set_defaults(run=decode)
    add = commands.add_parser("models", help="seconds a picture of whole generators")
    shipped = ["argen/emoji-llamagen", "argen/emoji-parti", "argen/emoji-xar", "argen/emoji-flextok-ar"]
    add.add_argument("models", nargs="*", default=shipped, metavar="ID", help=f"(default: {' '.join(shipped)})")
    add.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="B")
    add.add_argument("--prompt", default="a red apple")
    add.add_argument("--turns", type=int, default=3)
    add.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    add.set_defaults(run=models)
    add = commands.add_parser("speculative", help="every sampler on the shipped generator: passes, speed, quality")
    add.add_argument("--model", default="argen/emoji-llamagen", metavar="ID")
    add.add_argument("--num", type=int, default=20, help="prompts of each of the judge's kinds (default: 20)")
    add.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="(default: all five)")
    add.add_argument("--only", nargs="+", metavar="NAME", help="samplers whose name begins so")
    add.add_argument("--ref", type=Path, metavar="SET", help="pictures of training, for FID-emoji")
    add.add_argument("--out", type=Path, default=Path("speculative.json"), metavar="JSON")
    add.add_argument("--plot", type=Path, metavar="PNG", help="also draw quality against tokens per step")
    add.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    add.set_defaults(run=speculative)
    add = commands.add_parser("entropy", help="how sure the shipped generator is of its next token, by kind of prompt")
    add.add_argument("--model", default="argen/emoji-llamagen", metavar="ID")
    add.add_argument("--num", type=int, default=48, help="prompts of each of the judge's kinds (default: 48)")
    add.add_argument("--k", type=int, default=10, help="neighbours (default: 10)")
    add.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    add.set_defaults(run=entropy)
    args = parser.parse_args(argv)
    return guarded("argen.bench", args.run, args)


if __name__ == "__main__":
    sys.exit(main())
