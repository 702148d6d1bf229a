"""Images per second through the FID network: ours against pytorch-fid's own loop, interleaved, on the same random weights.

    pip install . pytorch-fid && python benchmarks/inception.py

Prints the ratio of each round and the largest difference of a feature (both resize as pytorch-fid does).
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pytorch_fid import fid_score
from pytorch_fid import inception as theirs
from safetensors.torch import save_file

from argen.eval import features, run
from argen.eval.images import open_images
from argen.eval.inception import FIDInception


def random_network() -> FIDInception:
    """Create a network with random weights that preserve the variance of activations."""
    torch.manual_seed(0)
    network = FIDInception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=64, help="number of images")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pictures").mkdir()
        rng = np.random.default_rng(0)
        for index in range(args.num):
            coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            coarse.resize((args.size, args.size), Image.Resampling.BICUBIC).save(root / "pictures" / f"{index:05d}.png")
        state = {k: v for k, v in random_network().state_dict().items() if not k.endswith("num_batches_tracked")}
        save_file(state, root / "weights.safetensors")

        theirs.load_state_dict_from_url = lambda *_, **__: state
        network = theirs.InceptionV3().to(args.device)
        extractor = features.inception_features(root / "weights.safetensors", "pytorch-fid", torch.device(args.device))
        images = open_images(root / "pictures")
        files = sorted((root / "pictures").glob("*.png"))
        print(f"{args.num} images of {args.size} x {args.size}, {args.device}, {torch.get_num_threads()} threads")
        for index in range(args.rounds):
            start = time.perf_counter()
            ours = run.features(images, extractor, ["features"], root / f"round-{index}", None, args.batch_size)
            middle = time.perf_counter()
            other = fid_score.get_activations(files, network, args.batch_size, device=args.device)
            end = time.perf_counter()
            rates = args.num / (middle - start), args.num / (end - middle)
            difference = np.abs(ours["features"].numpy() - other).max()
            print(
                f"argen {rates[0]:.2f}/s, pytorch-fid {rates[1]:.2f}/s, ratio {rates[0] / rates[1]:.2f}, "
                f"largest difference {difference:.1e} of features up to {np.abs(other).max():.1f}"
            )


if __name__ == "__main__":
    main()
