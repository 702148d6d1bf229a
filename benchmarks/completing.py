"""What seeing the known tokens behind a hole gives, when images are completed: seams, and how near the middle comes to the original.

    pip install ".[train]"
    argen train llamagen --images data/emoji/data --init argen/emoji-llamagen --steps 1000 --batch-size 32 --out runs/next
    argen train llamagen --images data/emoji/data --init argen/emoji-llamagen --steps 1000 --batch-size 32 --objective mixed --out runs/mixed
    python benchmarks/completing.py --images data/emoji/data --split validation --model runs/next/final runs/mixed/final

The middle of each image, half as wide and high, is drawn anew after the image's caption. `seam` is the mean difference of pixels on either
side of its border, 0 to 1, less that of the image as it is decoded from its own tokens; `PSNR` and `same tokens` compare the middle with that.
`nats` is the mean cross-entropy of the original's tokens in the middle.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from argen.command import Parser, guarded, load_model
from argen.train.sources import open_source
from samplers.steps import START
from tokenizers_img.pixels import from_pil


def seam(pixels: Tensor, first: int, end: int) -> Tensor:
    """Mean difference of neighbours across the border of the square from `first` to `end` of images [B, 3, S, S]: [B]."""
    sides = []
    for turned in (pixels, pixels.transpose(2, 3)):
        for inside, outside in ((first, first - 1), (end - 1, end)):
            sides.append((turned[:, :, inside] - turned[:, :, outside])[..., first:end].abs().mean(dim=(1, 2)))
    return torch.stack(sides).mean(dim=0)


def surprise(pipe, prompts: list[str], tokens: Tensor, hole: Tensor) -> Tensor:
    """Cross-entropy of the tokens [B, h, w] in the hole [h, w] bool, each after those before it, in nats: [B]."""
    flat, hole = tokens.flatten(1).to(pipe.device), hole.flatten()
    completed = {"grid": flat.masked_fill(hole.to(pipe.device), -1)} if pipe.looks_ahead else {}
    session = pipe.start(prompts, False, tuple(tokens.shape[1:]), None, **completed)
    read = torch.cat([torch.full_like(flat[:, :1], START), flat[:, :-1]], dim=1)
    logits, _ = session.forward(read, torch.arange(flat.shape[1]) - 1)
    return F.cross_entropy(logits[:, hole].mT.float(), flat[:, hole], reduction="none").mean(dim=1)


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """Print a row for each model."""
    source = open_source(args.images, split=args.split)
    places = range(0, len(source), max(1, len(source) // args.num))[: args.num]
    prompts = [source.captions(index)[0] for index in places]
    print(f"{len(prompts)} images\n{'':40}{'seam':>10}{'PSNR':>10}{'same tokens':>14}{'nats':>8}")
    for name in args.model:
        pipe = load_model(name, None, "generator")
        images = torch.stack([from_pil(source.image(index), pipe.image_size) for index in places])
        tokens = torch.cat([pipe.encode_images(part) for part in images.split(32)]).cpu()
        rows, _ = tokens.shape[1:]
        hole = torch.zeros(tokens.shape[1:], dtype=torch.bool)
        hole[rows // 4 : rows - rows // 4, rows // 4 : rows - rows // 4] = True
        first, end = (edge * pipe.image_size // rows for edge in (rows // 4, rows - rows // 4))
        drawn, nats = [], []
        for start in range(0, len(prompts), 16):
            part = slice(start, start + 16)
            generators = [torch.Generator().manual_seed(start + index) for index in range(len(prompts[part]))]
            kept = tokens[part].masked_fill(hole, -1).flatten(1)
            drawn.append(pipe(prompts[part], tokens=kept, generator=generators, output_type="latent").tokens.cpu())
            nats.append(surprise(pipe, prompts[part], tokens[part], hole))
        drawn = torch.cat(drawn).view(tokens.shape)
        ours, theirs = (
            torch.cat([pipe.decode_tokens(part.to(pipe.device)).cpu() for part in each.split(16)])
            for each in (drawn, tokens)
        )
        middle = ..., slice(first, end), slice(first, end)
        error = F.mse_loss(ours[middle], theirs[middle], reduction="none").mean(dim=(1, 2, 3)).clamp(min=1e-6)
        seams = (seam(ours, first, end) - seam(theirs, first, end)).mean()
        same = (drawn == tokens)[:, hole].float().mean()
        print(
            f"{name[-40:]:40}{seams:10.4f}{-10 * error.log10().mean():10.2f}{same:14.1%}{torch.cat(nats).mean():8.2f}",
            flush=True,
        )


def main() -> int:
    parser = Parser(prog="python benchmarks/completing.py", description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, metavar="PATH", help="captioned images, see argen train --images")
    parser.add_argument("--split", metavar="NAME", help="take this split alone")
    parser.add_argument("--model", nargs="+", required=True, metavar="ID", help="generators with a token grid")
    parser.add_argument("--num", type=int, default=200, metavar="N", help="images (default: 200)")
    return guarded("benchmarks/completing.py", measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
