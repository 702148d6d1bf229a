"""How sure a generator is of its next token, by kind of prompt, which says what relaxed samplers can gain.

pip install . && python benchmarks/entropy.py
"""

import argparse
import sys

import torch

from argen.command import Parser, guarded, load_model
from argen.eval.judge import read_prompts
from samplers.lantern import table_of
from samplers.logits import Sampling
from samplers.steps import START, guided

KINDS = ("single", "colour", "count", "pair", "relation")  # of the judge's prompts


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Print how wide the distribution of the next token is: its entropy, its largest probability, and what neighbours in the codebook have."""
    pipe = load_model(args.model, args.device, "generator")
    pipe.set_progress_bar_config(disable=True)
    defaults = pipe.defaults
    sampling = Sampling(defaults.temperature, defaults.top_k, defaults.top_p)
    table = table_of(pipe.image_tokenizer.codebook, args.k)
    print(f"{'':10} {'nats':>8} {'most probable':>10} {f'{args.k} neighbours of the token':>30}")
    for kind in KINDS:
        prompts = [truth.prompt for truth in read_prompts() if truth.kind == kind][: args.num]
        generator = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
        tokens = pipe(prompts, generator=generator, output_type="latent").tokens
        read = torch.cat([torch.full_like(tokens[:, :1], START), tokens[:, :-1]], dim=1)
        session, cells = pipe.start(prompts, guided=True), torch.arange(pipe.length)
        logits = guided(*session.forward(read, cells - 1), defaults.guidance_scale, cells)
        probs = sampling.filter(logits).softmax(dim=-1)
        nats = torch.special.entr(probs).sum(dim=-1).mean()
        aggregated = probs.gather(-1, table.to(tokens.device)[tokens]).sum(dim=-1).mean()
        print(f"{kind:10} {nats:8.2f} {probs.amax(dim=-1).mean():10.2f} {aggregated:30.3f}", flush=True)


def main() -> int:
    parser = Parser(prog="python benchmarks/entropy.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="argen/emoji-llamagen", metavar="ID")
    parser.add_argument("--num", type=int, default=48, help="prompts of each of the judge's kinds (default: 48)")
    parser.add_argument("--k", type=int, default=10, help="nearest codebook entries (default: 10)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, mps (default: the best one here)")
    return guarded("benchmarks/entropy.py", measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
