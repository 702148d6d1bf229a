"""The shipped FlexTok: its weights do what weights.md says of them."""

import torch

import argen
from argen.data.tables import pixels, read_split
from argen.eval.judge import recognised
from argen.eval.metrics import psnr
from argen.eval.reconstruction import reconstruct
from argen.files import WEIGHTS
from tokenizers_img.pixels import from_uint8

SAMPLE = WEIGHTS.parent / "data/sample"


def test_more_tokens_keep_more():
    tokenizer, real = argen.load("argen/emoji-flextok"), torch.from_numpy(pixels(read_split(SAMPLE, "test")))
    kept = [psnr(reconstruct(tokenizer, real, count)[0], from_uint8(real)).mean() for count in (1, 8, 64)]
    assert kept[0] + 1 < kept[1] < kept[2] - 1


def test_eight_tokens_show_the_group():
    icons = read_split(SAMPLE, "train").select(range(32))
    real = torch.from_numpy(pixels(icons))
    images = reconstruct(argen.load("argen/emoji-flextok"), real, 8)[0]
    images = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images]
    score = recognised(argen.load("argen/emoji-judge"), images, list(real.numpy()), icons)["judge: group"]
    assert score["value"] >= 0.35  # things alone, which are harder than people; chance is 0.11, of the real ones 0.94
