"""`argen eval colours`: how many of the palette's colours a set of images has."""

import argparse

HELP = "how many colours of the mosaic's palette a set of images has"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", metavar="IMAGES", help="a folder, or a .zip, .npz or .parquet file")


def run(args: argparse.Namespace) -> None:
    """Print the number; what else `argen eval` writes is in `argen.cli.measures.common`."""
    from PIL import Image

    from argen.eval.images import open_images
    from argen.hub.loading import load
    from tokenizers_img.pixels import from_pil

    images, tokenizer = open_images(args.samples), load("mosaic/tokenizer")
    colours: set[int] = set()
    for index in range(len(images)):
        pixels = from_pil(Image.fromarray(images[index]), tokenizer.config.image_size)
        colours |= set(tokenizer.encode(pixels[None])[0].tolist())
    print(f"{args.samples}: {len(colours)} of {tokenizer.config.n_embed} colours in {len(images)} images")
