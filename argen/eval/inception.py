"""The Inception-V3 of the FID: TensorFlow's graph of 2015-12-05, in the PyTorch form that every reference tool reads.

Metric: "GANs Trained by a Two Time-Scale Update Rule" (arXiv 1706.08500). Weights:
``pt_inception-2015-12-05-6726825d.pth`` of github.com/mseitzer/pytorch-fid (Apache-2.0), whose layout this file has. It
differs from torchvision's network in its pools (zero padding is not counted; the last block takes the maximum), in 1008
classes, and in having no input transform of its own.
"""

import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from tokenizers_img.checkpoint import load_strict, read_state_dict
from tokenizers_img.hub import download

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # one file, two names
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
SHA256 = "6726825d"  # how the digest of the file begins
SIZE, SPATIAL = 299, 7  # side of the pictures; channels of the spatial features


class BasicConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
shrink = partial(F.max_pool2d, kernel_size=3, stride=2)


class InceptionA(nn.Module):
    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(inputs, 64, 1)
        self.branch5x5_1 = BasicConv2d(inputs, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average(x))], dim=1)


class InceptionB(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(inputs, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, shrink(x)], dim=1)


class InceptionC(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        flat, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7_1 = BasicConv2d(inputs, width, 1)
        self.branch7x7_2 = BasicConv2d(width, width, **flat)
        self.branch7x7_3 = BasicConv2d(width, 192, **tall)
        self.branch7x7dbl_1 = BasicConv2d(inputs, width, 1)
        self.branch7x7dbl_2 = BasicConv2d(width, width, **tall)
        self.branch7x7dbl_3 = BasicConv2d(width, width, **flat)
        self.branch7x7dbl_4 = BasicConv2d(width, width, **tall)
        self.branch7x7dbl_5 = BasicConv2d(width, 192, **flat)
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average(x))], dim=1)


class InceptionD(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(inputs, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, shrink(x)], dim=1)


class InceptionE(nn.Module):
    def __init__(self, inputs: int, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1 = BasicConv2d(inputs, 320, 1)
        self.branch3x3_1 = BasicConv2d(inputs, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(inputs, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(parts, dim=1)


class FIDInception(ModelMixin, ConfigMixin):
    """Normalised pictures [B, 3, 299, 299] -> features; `argen.eval.images.RESIZES` says how pictures get there."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (InceptionA(*s) for s in ((192, 32), (256, 64), (288, 64)))
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b, self.Mixed_6c = InceptionC(768, 128), InceptionC(768, 160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(768, 160), InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average)
        self.Mixed_7c = InceptionE(2048, partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def from_original(cls, path: str | Path) -> "FIDInception":
        """Load the published file, or the same tensors as ``.safetensors``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the published file is damaged, or the tensors are another network's.
        """
        if Path(path).suffix != ".safetensors" and Path(path).is_file() and not sha256(path).startswith(SHA256):
            raise ValueError(
                f"{path} is not {FILES[0]}: its SHA-256 must begin with {SHA256}: fetch it again from {URL}"
            )
        model = cls()
        unused = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}  # not published
        return load_strict(model, read_state_dict(path) | unused, source=path)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """-> "64", "192", "768", "2048": means over space after that layer [B, 64] ...; "spatial" [B, 2023]: a part of
        Mixed_6d in the order row, column, channel (sFID); "logits_unbiased" and "logits" [B, 1008]."""
        out = {}
        x = shrink(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        out["64"] = x.mean(dim=(2, 3))
        x = shrink(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        out["192"] = x.mean(dim=(2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        out["spatial"] = x[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)  # branch1x1 comes first
        x = self.Mixed_6e(x)
        out["768"] = x.mean(dim=(2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        out["2048"], out["logits_unbiased"] = x, F.linear(x, self.fc.weight)
        out["logits"] = out["logits_unbiased"] + self.fc.bias
        return out


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def find_weights() -> Path:
    """The published file from torch's cache, fetched into it when it is not there.

    Raises:
        ConnectionError: it is not here and cannot be fetched.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    refusal = (
        f"the Inception weights are not on this machine and could not be fetched: get {URL} and give its path with "
        f"--inception-weights, or put it into {folder}; --features emoji needs no download"
    )
    return download(URL, folder / FILES[0], refusal, SHA256)
