"""From a picture to a control picture: canny edges, HED edges, line art, depth, segments; or a control picture that is given.

HED: ``ControlNetHED.pth`` of lllyasviel/Annotators (Apache-2.0), arXiv 1504.06375. Line art: the generator of
informative-drawings (MIT), ``sk_model.pth`` there, arXiv 2203.12691. Depth: DPT, segments: MaskFormer, through transformers.
The two networks have the published names; canny needs nothing else, segments scipy (``pip install "argen[control]"``).

Letters in shape comments: B images, H W pixels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from argen.device import LOADING
from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.hub import hub_file, model_folder
from tokenizers_img.pixels import on_white, upright

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HEDBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int):
        super().__init__()
        widths = [inputs] + [outputs] * depth
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.projection = nn.Conv2d(outputs, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x, self.projection(x)


class HED(nn.Module):
    """Pixels [B, 3, H, W] of 0 to 255 -> edges [B, 1, H, W] of 0 to 255, white on black."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        sizes = ((3, 64, 2), (64, 128, 2), (128, 256, 3), (256, 512, 3), (512, 512, 3))
        self.block1, self.block2, self.block3, self.block4, self.block5 = (HEDBlock(*size) for size in sizes)

    def forward(self, pixels: Tensor) -> Tensor:
        x, sides = pixels - self.norm, []
        for index, block in enumerate((self.block1, self.block2, self.block3, self.block4, self.block5)):
            x, side = block(F.max_pool2d(x, 2) if index else x)
            sides.append(F.interpolate(side, pixels.shape[2:], mode="bilinear", align_corners=False))
        return 255 * torch.stack(sides).mean(dim=0).sigmoid()


class DrawingBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        half = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        again = [nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width)]
        self.conv_block = nn.Sequential(*half, nn.ReLU(), *again)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class LineArt(nn.Module):
    """Pixels [B, 3, H, W] of 0 to 255 -> drawing [B, 1, H, W] in [0, 1], black on white; H and W multiples of 4."""

    def __init__(self, blocks: int = 3):
        super().__init__()

        def normed(conv: nn.Module, width: int) -> list[nn.Module]:
            return [conv, nn.InstanceNorm2d(width), nn.ReLU()]

        half = {"kernel_size": 3, "stride": 2, "padding": 1}
        self.model0 = nn.Sequential(nn.ReflectionPad2d(3), *normed(nn.Conv2d(3, 64, 7), 64))
        self.model1 = nn.Sequential(*normed(nn.Conv2d(64, 128, **half), 128), *normed(nn.Conv2d(128, 256, **half), 256))
        self.model2 = nn.Sequential(*[DrawingBlock(256) for _ in range(blocks)])
        self.model3 = nn.Sequential(
            *normed(nn.ConvTranspose2d(256, 128, output_padding=1, **half), 128),
            *normed(nn.ConvTranspose2d(128, 64, output_padding=1, **half), 64),
        )
        self.model4 = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(64, 1, 7), nn.Sigmoid())

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model4(self.model3(self.model2(self.model1(self.model0(pixels)))))


def canny(image: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """[H, W, 3] uint8 -> edges [H, W] uint8, 0 or 255, as OpenCV's ``Canny`` finds them (bit-equal).

    Sobel gradients of each channel, of which the steepest counts at each pixel; their L1 norm, thinned along the gradient; what is
    above `high`, and what is above `low` and connected to it.
    """
    padded = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    smooth, slope = np.array([1, 2, 1]), np.array([-1, 0, 1])
    dx, dy = (_filtered(padded, *kernels) for kernels in ((smooth, slope), (slope, smooth)))
    norms = np.abs(dx) + np.abs(dy)
    steepest = norms.argmax(axis=2)[..., None]
    dx, dy, norm = (np.take_along_axis(array, steepest, 2)[..., 0] for array in (dx, dy, norms))
    candidates = _thinned(dx, dy, norm) & (norm > low)
    edges, grown = np.zeros_like(candidates), candidates & (norm > high)
    while (grown != edges).any():  # weak pixels join what they touch
        edges = grown
        around = np.pad(edges, 1)
        grown = candidates & np.any(
            [around[i : i + len(edges), j : j + edges.shape[1]] for i, j in np.ndindex(3, 3)], axis=0
        )
    return (255 * edges).astype(np.uint8)


def _filtered(padded: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """[H + 2, W + 2, C] -> [H, W, C] under a separable 3 x 3 kernel."""
    rows = sum(weight * padded[i : len(padded) - 2 + i] for i, weight in enumerate(down))
    return sum(weight * rows[:, j : rows.shape[1] - 2 + j] for j, weight in enumerate(across))


def _thinned(dx: np.ndarray, dy: np.ndarray, norm: np.ndarray) -> np.ndarray:
    """Where the norm [H, W] is a maximum along the gradient, whose angle is rounded to 45 degrees in OpenCV's fixed-point numbers."""
    height, width = norm.shape
    around = np.pad(norm, 1)

    def beside(down: int, across: int) -> np.ndarray:
        return around[1 + down : 1 + down + height, 1 + across : 1 + across + width]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat = x * round(TANGENT * (1 << 15))
    across, down = y < flat, y > flat + (x << 16)
    falling = (dx ^ dy) < 0
    return np.where(
        across,
        (norm > beside(0, -1)) & (norm >= beside(0, 1)),
        np.where(
            down,
            (norm > beside(-1, 0)) & (norm >= beside(1, 0)),
            np.where(
                falling,
                (norm > beside(-1, 1)) & (norm > beside(1, -1)),
                (norm > beside(-1, -1)) & (norm > beside(1, 1)),
            ),
        ),
    )


def depth_image(depth: Tensor, recipe: str = "dpt") -> Tensor:
    """Raw depth [1, H, W] -> 0 to 255: "dpt" divides by the largest, "midas" takes the smallest off and cuts to integers."""
    if recipe == "dpt":
        return depth * 255 / depth.max()
    low, high = depth.min(), depth.max()
    return ((depth - low) / (high - low) * 255).to(torch.uint8).float()


def _hed(image: Tensor) -> Tensor:
    network = _network(HED, *ANNOTATORS["hed"])
    return network(image[None].float())[0]


def _lineart(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    padded = F.pad(image[None].float(), (0, -width % 4, 0, -height % 4), mode="replicate")
    return 255 * _network(LineArt, *ANNOTATORS["lineart"])(padded)[0, :, :height, :width]


def _depth(image: Tensor, recipe: str) -> Tensor:
    from transformers import DPTForDepthEstimation

    network = _pretrained(DPTForDepthEstimation, DEPTH[recipe])
    depth = network(pixel_values=image[None].float() / 127.5 - 1).predicted_depth
    depth = F.interpolate(depth[:, None], image.shape[1:], mode="bicubic", align_corners=False)[:, 0]
    return depth_image(depth, recipe)


def _segments(image: Tensor) -> Tensor:
    import scipy  # noqa: F401  MaskFormer needs it, and would say so only once it is fetched
    from transformers import MaskFormerForInstanceSegmentation

    network = _pretrained(MaskFormerForInstanceSegmentation, SEGMENTER)
    pixels, short = image[None].float(), min(image.shape[1:])
    size = [32 * max(1, round(side * SHORT_SIDE / short / 32)) for side in image.shape[1:]]
    pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(part)[:, None, None] for part in IMAGENET)
    out = network(pixel_values=(pixels / 255 - mean) / std)
    probs = out.class_queries_logits.softmax(dim=-1)[..., :-1]  # the last class is "nothing"
    masks = F.interpolate(out.masks_queries_logits, image.shape[1:], mode="bilinear", align_corners=False).sigmoid()
    classes = torch.einsum("bqc,bqhw->bchw", probs, masks)[0].argmax(dim=0)
    return segment_colours(network.config.id2label)[classes].permute(2, 0, 1)


def segment_colours(names: dict[int, str]) -> Tensor:
    """Names of classes -> their colours in COCO-Stuff's palette [C, 3] uint8, as mmsegmentation has it; black for others.

    Those are the colours of the pictures that ``seg_cocostuff`` of ControlAR was trained on, as far as is known.
    """
    lines = (Path(__file__).parents[1] / "data/cocostuff.txt").read_text(encoding="utf-8").splitlines()
    colours = {name: list(bytes.fromhex(colour)) for colour, name in (line.split(" ", 1) for line in lines)}
    return torch.tensor([colours.get(names[number], [0, 0, 0]) for number in sorted(names)], dtype=torch.uint8)


def _pretrained(cls: type["PreTrainedModel"], repo: str) -> "PreTrainedModel":
    try:
        folder = model_folder(repo)
        with LOADING:
            return cls.from_pretrained(folder, dtype=torch.float32).eval()
    except OSError as error:
        raise ConnectionError(
            f"{repo} is not on this machine and could not be fetched: connect, or give a control image with the type map"
        ) from error


def _network(cls: type[nn.Module], repo: str, name: str) -> nn.Module:
    weights = read_state_dict(hub_file(repo, name))
    with LOADING:
        return load_strict(cls(), weights, source=name)


ANNOTATORS = {  # published weights, Apache-2.0
    "hed": ("lllyasviel/Annotators", "ControlNetHED.pth"),
    "lineart": ("lllyasviel/Annotators", "sk_model.pth"),
}
TANGENT = 0.4142135623730950488016887242097  # of 22.5 degrees
DEPTH = {"dpt": "Intel/dpt-large", "midas": "Intel/dpt-hybrid-midas"}
SEGMENTER, SHORT_SIDE = "facebook/maskformer-resnet101-coco-stuff", 640  # pixels of the shorter side, as it was tested
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of its colours
KINDS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {  # type -> what it is, [3, H, W] uint8 -> [1 or 3, H, W]
    "canny": ("edges, white on black", lambda x: torch.from_numpy(canny(x.permute(1, 2, 0).numpy()))[None]),
    "hed": ("soft edges, white on black", _hed),
    "lineart": ("line drawing, black on white", _lineart),
    "lineart-inverted": ("line drawing, white on black, for edge_base", lambda x: 255 - _lineart(x)),
    "depth": ("depth by DPT, near is light", lambda x: _depth(x, "dpt")),
    "depth-midas": ("depth by MiDaS, for images that are not square", lambda x: _depth(x, "midas")),
    "segments": ("segments by MaskFormer, in the colours of COCO-Stuff", _segments),
    "seg": ("the image is a map of segments already", lambda x: x),
    "map": ("the image is a control image already", lambda x: x),
}


@torch.no_grad()
def annotate(image: Image.Image, kind: str) -> Tensor:
    """An RGB picture -> its control picture [1 or 3, H, W] of 0 to 255.

    Raises:
        ValueError: unknown kind.
        ConnectionError: its network's weights are not here and cannot be fetched.
        ModuleNotFoundError: canny without OpenCV, segments without scipy.
    """
    check_kind(kind)
    return KINDS[kind][1](torch.from_numpy(np.array(image)).permute(2, 0, 1))


def check_kind(kind: str) -> None:
    """Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown control type {kind!r}: expected one of {', '.join(KINDS)}")


def resized(image: Image.Image, kind: str, size: tuple[int, int]) -> Image.Image:
    """A picture of any mode -> RGB of `size`, on white; maps of segments keep their colours."""
    flat = on_white(upright(image))
    if flat.size == size:
        return flat
    return flat.resize(size, Image.Resampling.NEAREST if kind == "seg" else Image.Resampling.BICUBIC)


def as_control(image: Tensor) -> Tensor:
    """One channel or three [1 or 3, H, W] of 0 to 255 -> what a control encoder reads, [3, H, W] in [-1, 1]."""
    return 2 * (image.float().expand(3, -1, -1) / 255 - 0.5)


def as_image(control: Tensor) -> Image.Image:
    """[1 or 3, H, W] of 0 to 255 -> RGB, to look at."""
    array = control.expand(3, -1, -1).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(array.permute(1, 2, 0).numpy())
