"""Pictures on disk, one at a time: folders, zips, npz batches and parquet tables; crops; and the ways to a network's size."""

import hashlib
import logging
import os
import re
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from argen.bounds import MAX_SIDE
from argen.images import decode_image
from argen.words import cut
from tokenizers_img.pixels import opaque

logger = logging.getLogger(__name__)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}
ImageArray = np.ndarray  # [H, W, 3] uint8


LITTER = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found")  # folders


class ImageSet(Sequence):
    """A set of pictures that is read as it is asked for.

    Attributes:
        captions: of each picture, where the set has some.
        identity: a digest that changes when the set does.
        transparent: names of the images read so far that have transparency; the colour under it is taken, as published tools do.
    """

    captions: list[str] | None = None
    identity: str
    transparent: Collection[str] = ()

    @abstractmethod
    def __getitem__(self, index: int) -> ImageArray: ...


class FileList(ImageSet):
    """Images in files under a folder and the folders that are linked there, or in a zip, in natural order ("2.png" before "10.png").

    What macOS leaves beside images (``._*``, ``__MACOSX``), the thumbnails of file servers (``@eaDir``) and what lies in hidden
    folders (``.ipynb_checkpoints``) is skipped.
    """

    def __init__(self, path: Path):
        self.path, self.zip = path, None
        self.transparent: set[str] = set()
        if path.is_dir():
            files = {str(file.relative_to(path)): file.stat() for file in files_under(path)}
            facts = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in files.items()}
        else:
            self.zip = zipfile.ZipFile(path)
            facts = {m.filename: (m.file_size, m.CRC) for m in self.zip.infolist() if not m.is_dir()}
        facts = {name: fact for name, fact in facts.items() if Path(name).suffix.lower() in SUFFIXES}
        skipped = {name for name in facts if is_litter(name)}
        if skipped:
            what = "1 file that macOS" if len(skipped) == 1 else f"{len(skipped)} files that macOS"
            are = "is" if len(skipped) == 1 else "are"
            logger.warning("%s: %s left beside the images, or in hidden folders, %s skipped", path, what, are)
        self.names = sorted(facts.keys() - skipped, key=natural)
        self.identity = digest([path.name, *((name, facts[name]) for name in self.names)])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageArray:
        name = self.names[index]
        data = self.zip.read(name) if self.zip else (self.path / name).read_bytes()
        image = decode_image(data, f"{self.path / name}")
        if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
            self.transparent.add(name)
        return np.asarray(opaque(image))


def files_under(folder: Path) -> Iterator[Path]:
    """The files in a folder, its subfolders and those that are linked there, each folder once."""
    visited = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in visited:
            folders.clear()
            continue
        visited.add(real)
        yield from (file for name in names if (file := Path(place, name)).is_file())


def is_litter(name: str) -> bool:
    """Whether a file was left by a system or a program: by its name, or in such a folder."""
    *folders, file = Path(name).parts
    return file.startswith("._") or any(folder.startswith(".") or folder in LITTER for folder in folders)


def natural(name: str) -> list[str | int]:
    """Texts and numbers in turn, to sort by."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]


class Batch(ImageSet):
    """``arr_0`` of an npz file as guided-diffusion writes it, [N, H, W, 3] uint8, mapped and never loaded whole."""

    def __init__(self, path: Path):
        self.array = _map_array(path, "arr_0")
        if self.array.ndim != 4 or self.array.shape[3] != 3 or self.array.dtype != np.uint8:
            raise ValueError(
                f"{path} holds {self.array.dtype} of the shape {list(self.array.shape)}: expected uint8 [N, H, W, 3]"
            )
        stat = path.stat()
        self.identity = digest([path.name, stat.st_size, stat.st_mtime_ns])

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> ImageArray:
        return np.asarray(self.array[index])


class Table(ImageSet):
    """The ``image`` column of a parquet file, as `argen data` writes them."""

    def __init__(self, path: Path):
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises, too
        try:
            self.table = Dataset.from_parquet(str(path))
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read as a .parquet table: make it with `argen data`, or fetch it again"
            ) from error
        if "image" not in self.table.column_names:
            raise ValueError(f"{path} has no column `image`: expected a table made by `argen data`")
        self.captions = list(self.table["caption"]) if "caption" in self.table.column_names else None
        stat = path.stat()
        self.identity = digest([path.name, stat.st_size, stat.st_mtime_ns])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> ImageArray:
        return np.asarray(opaque(self.table[index]["image"]))


def open_images(path: str | Path) -> ImageSet:
    """The pictures at `path`: a folder (with its subfolders), a ``.zip``, an ``.npz`` batch or a ``.parquet`` table.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it holds no pictures, or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: expected a folder, or a .zip, .npz or .parquet file")
    kind = FileList if path.is_dir() else {".zip": FileList, ".npz": Batch, ".parquet": Table}.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is no set of images: expected a folder, or a .zip, .npz or .parquet file")
    try:
        images = kind(path)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}): make or fetch it again") from error
    if not len(images):
        hint = ": for a set made by `argen data`, give the .parquet file of a split" if path.is_dir() else ""
        raise ValueError(f"no images in {path}{hint}")
    return images


def _map_array(path: Path, name: str) -> np.ndarray:
    """An array of an npz file; mapped where it is stored without compression, as these files are."""
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ValueError(f"{path} holds no {name}: expected a batch of images, [N, H, W, 3] uint8")
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return np.load(archive.open(member))
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
            shape, fortran, dtype = read_header(file)
            header = file.tell()
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    offset = member.header_offset + 30 + lengths + header
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The whole image with its shorter side of `side` pixels: halved while twice too large, then bicubic (guided-diffusion)."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def crop_adm(image: Image.Image, size: int) -> Image.Image:
    """Centre square as ImageNet evaluations take it, of `shrunk` (guided-diffusion)."""
    image = shrunk(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_square(image: Image.Image, size: int) -> Image.Image:
    """Centre square, then Lanczos: text-to-image evaluations on COCO (LlamaGen)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def crops(image: Image.Image, size: int, how: str) -> list[Image.Image]:
    """The crops of an image that LlamaGen makes token ids of.

    Args:
        size: of the crops, in pixels.
        how: "center", the one of `crop_adm`; "flip", this and its mirror; "ten:RANGE", of the image cropped to int(size * RANGE) the four
            corners (top left, top right, bottom left, bottom right) and the centre, then the same of its mirror, as torchvision's ten
            crops do. LlamaGen's range is 1.1.

    Raises:
        ValueError: another `how`, or a range that is not from 1 to 2.
    """
    if how in ("center", "flip"):
        image = crop_adm(image, size)
        return [image] if how == "center" else [image, ImageOps.mirror(image)]
    if not re.fullmatch(r"ten:\d(\.\d{1,6})?", how) or not 1 <= float(how[4:]) <= 2:
        raise ValueError(
            f"unknown crops {cut(how)!r}: expected center, flip or ten:RANGE, a range from 1 to 2, e.g. ten:1.1"
        )
    image = crop_adm(image, int(size * float(how[4:])))
    return [*_five_crops(image, size), *_five_crops(ImageOps.mirror(image), size)]


def _five_crops(image: Image.Image, size: int) -> list[Image.Image]:
    """The corners and the centre of a square, in the order of torchvision."""
    far = image.width - size
    middle = round(far / 2)
    corners = (0, 0), (far, 0), (0, far), (far, far), (middle, middle)
    return [image.crop((left, top, left + size, top + size)) for left, top in corners]


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {"adm": crop_adm, "square": crop_square}


def check_crop(crop: str) -> str:
    """Raises:
    ValueError: no name of `CROPS` and a size in pixels, as in "adm-256".
    """
    name, _, size = crop.partition("-")
    if name not in CROPS or not re.fullmatch(r"[0-9]{1,5}", size) or not 8 <= int(size) <= MAX_SIDE:
        ways = " or ".join(f"{crop_name}-SIZE" for crop_name in CROPS)
        raise ValueError(f"unknown crop {cut(crop)!r}: expected {ways}, 8 to {MAX_SIDE} pixels, as in adm-256")
    return crop


def cropped(image: ImageArray, crop: str | None) -> ImageArray:
    """Args:
    crop: None, or a name of `CROPS` and a size, as in "adm-256".

    Raises:
        ValueError: another name.
    """
    if crop is None:
        return image
    name, _, size = check_crop(crop).partition("-")
    return np.asarray(CROPS[name](Image.fromarray(image), int(size)))


def tf1_bilinear(image: Tensor, height: int, width: int) -> Tensor:
    """TensorFlow 1's resize of [3, H, W]: no half-pixel shift, the right and lower neighbour clamped."""
    x = image.float()
    for dim, size in ((2, width), (1, height)):
        place = torch.arange(size, dtype=torch.float32) * (x.shape[dim] / size)
        low = place.floor().long()
        share = (place - low).reshape(-1, *[1] * (2 - dim))
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        below, above = x.index_select(dim, low), x.index_select(dim, high)
        x = below + (above - below) * share
    return x


def torch_bilinear(image: Tensor, height: int, width: int, antialias: bool = False) -> Tensor:
    """[3, H, W], centres of pixels aligned."""
    return F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=antialias)[0]


def torch_bilinear_antialias(image: Tensor, height: int, width: int) -> Tensor:
    return torch_bilinear(image, height, width, antialias=True)


def pil_bicubic_float(image: Tensor, height: int, width: int) -> Tensor:
    """clean-fid's "clean": each channel of [3, H, W] as floats, clipped and not rounded."""
    channels = [Image.fromarray(channel.float().numpy()) for channel in image]
    out = [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(out)).clamp(0, 255)


RESIZES = {  # protocol -> how a picture [3, H, W] of 0 to 255 is brought to size
    "adm": tf1_bilinear,
    "pytorch-fid": torch_bilinear,
    "clean": pil_bicubic_float,
    "torchmetrics": torch_bilinear_antialias,
}


def prepared(image: ImageArray, protocol: str, size: int) -> Tensor:
    """[H, W, 3] uint8 -> what the tool named by `protocol` gives to the network, [3, size, size] in about [-1, 1]."""
    channels = torch.tensor(image).permute(2, 0, 1)
    if protocol == "pytorch-fid":
        return 2 * torch_bilinear(channels / 255, size, size) - 1
    return (RESIZES[protocol](channels, size, size) - 128) / 128
