"""The shipped ControlAR: it follows edges and segments, in squares and other shapes, as far as it is told to."""

import numpy as np
import pytest
import torch
from PIL import Image

import argen
from argen.data.scenes import segments
from argen.eval.control import brought, edge_f1, segment_iou
from argen.eval.images import Table
from argen.files import WEIGHTS
from argen.models.annotators import canny

SAMPLE = WEIGHTS.parent / "data" / "sample" / "data"


@pytest.fixture(scope="module")
def shipped():
    pipe = argen.load("argen/emoji-control")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scenes():
    table = Table(next(SAMPLE.glob("train-*.parquet")))
    rows = range(0, len(table), max(1, len(table) // 8))[:8]
    return [(table.captions[row], Image.fromarray(brought(table[row]))) for row in rows]


def generated(pipe, prompts: list[str], **kwargs) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    return [brought(np.asarray(image)) for image in pipe(prompts, generator=generators, **kwargs).images]


def test_edges_are_followed(shipped, scenes):
    prompts, images = map(list, zip(*scenes, strict=True))
    edges = [canny(np.asarray(image)) for image in images]
    scores = {
        strength: np.mean(
            [
                edge_f1(canny(image), target)
                for image, target in zip(
                    generated(shipped, prompts, control_image=images, control_strength=strength), edges, strict=True
                )
            ]
        )
        for strength in (0.0, 1.0)
    }
    assert scores[1.0] >= 0.7
    assert scores[1.0] >= scores[0.0] + 0.3


def test_segments_are_followed(shipped, scenes):
    box = [(0, 0, 128, 128)]
    prompts, images = map(list, zip(*scenes, strict=True))
    maps = [Image.fromarray(segments(np.asarray(image), box)) for image in images]
    results = generated(shipped, prompts, control_image=maps, control_type="seg")
    ious = [segment_iou(result, np.asarray(image), box) for result, image in zip(results, images, strict=True)]
    assert np.mean(ious) >= 0.7


@pytest.mark.parametrize("size", [(256, 128), (128, 256), (192, 128)])
def test_other_shapes(shipped, scenes, size):
    control = Image.new("RGB", size, "white")
    for (_, image), place in zip(scenes[:2], ((0, 0), (size[0] - 128, size[1] - 128)), strict=True):
        control.paste(image.resize((128, 128)), place)
    prompt = " and ".join(prompt for prompt, _ in scenes[:2])
    (image,) = shipped(
        prompt, control_image=control, size=size, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert image.shape == (size[1], size[0], 3)
    drawn, asked = (brought(each) for each in ((image * 255).round().astype(np.uint8), np.asarray(control)))
    assert edge_f1(canny(drawn), canny(asked)) >= 0.5
