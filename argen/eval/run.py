"""An evaluation from start to end: pictures are drawn or read, looked at in chunks that survive a kill, compared, reported.

Every step is split over the processes of `accelerate launch`, gives the same result for any number of them, and goes on
where it stopped when it is called again with the same settings and the same folder.
"""

import json
import logging
import os
import platform
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from argen import __version__
from argen.eval import metrics
from argen.eval.features import Extractor
from argen.eval.images import ImageArray, ImageSet, cropped, digest, open_images
from argen.files import replacing
from argen.processes import processes
from argen.words import cut

logger = logging.getLogger(__name__)
READING = 2  # raised whenever images are read otherwise than before, so that features of old readings are not taken
CHUNK = 256  # pictures; a killed run loses at most the chunk it was at
KID_SUBSETS, KID_SIZE, IS_SPLITS, NEIGHBOURS = 100, 1000, 10, 3
EMOJI = Path(__file__).parents[1] / "data/emoji_reference.npz"  # of the 12,853 training pictures, by argen/emoji-clip
METRICS = {"fid": "features", "sfid": "spatial", "is": "logits", "kid": "features", "pr": "features"}


@dataclass
class Statistics:
    """Mean and covariance of a set of pictures, as they are kept in a file.

    Attributes:
        moments: of each array of features; "spatial" where it is known.
        n: pictures, None where the file does not say.
        settings: what they depend on (protocol, crop, weights); empty for files of other tools.
        images: real images of the file, for precision and recall (guided-diffusion's reference batches).
        captions: of the pictures; None where the file has none.
    """

    moments: dict[str, tuple[Tensor, Tensor]]
    n: int | None = None
    settings: dict[str, str | None] = field(default_factory=dict)
    images: ImageSet | None = None
    captions: list[str] | None = None


def generator_of(seed: int, index: int) -> torch.Generator:
    """Generator that image `index` of a run is sampled with, in whatever batch and process."""
    return torch.Generator().manual_seed((seed << 32) + index)


def features(
    images: ImageSet,
    extractor: Extractor,
    arrays: Sequence[str],
    folder: Path,
    crop: str | None = None,
    batch_size: int = 32,
) -> dict[str, Tensor]:
    """Features of every image by `extractor`, stored in `folder` as one ``<array>.npy`` each and mapped from there.

    Args:
        arrays: which of the extractor's arrays.
        crop: see `argen.eval.images.cropped`.

    Raises:
        ValueError: a picture is broken, or its features are not finite; says which.
    """
    state = processes()
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in arrays if not (folder / f"{name}.npy").exists()]
    starts = range(0, len(images), CHUNK) if missing else range(0)
    bar = tqdm(
        total=len(images), desc=f"look ({extractor.name})", disable=None if missing and state.is_main_process else True
    )
    for number, first in enumerate(starts):
        files = {name: folder / f"{name}-{first:09d}.npy" for name in missing}
        rows = range(first, min(first + CHUNK, len(images)))
        if number % state.num_processes == state.process_index and not all(file.exists() for file in files.values()):
            chunk = _look(images, rows, extractor, crop, batch_size)
            for name, file in files.items():
                save_array(file, chunk[name].numpy())
        bar.update(len(rows))
    bar.close()
    if images.transparent:
        logger.warning(
            "%d of %d images have transparency: the colour under it is compared, as published tools do; lay them on a background "
            "first if that is not meant",
            len(images.transparent),
            len(images),
        )
    state.wait_for_everyone()
    if state.is_main_process:
        for name in missing:
            parts = [folder / f"{name}-{first:09d}.npy" for first in starts]
            _join(folder / f"{name}.npy", parts, len(images))
    state.wait_for_everyone()
    return {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in arrays}


@torch.no_grad()
def _look(images: ImageSet, rows: range, extractor: Extractor, crop: str | None, batch: int) -> dict[str, Tensor]:
    def read(index: int) -> Tensor:
        return extractor.prepare(cropped(images[index], crop))

    chunks: dict[str, list[Tensor]] = {name: [] for name in extractor.arrays}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(rows.start, rows.stop, batch):
            part = range(first, min(first + batch, rows.stop))
            for name, value in extractor.look(torch.stack(list(pool.map(read, part)))).items():
                finite = value.isfinite().all(dim=1)
                if not finite.all():
                    place = part[int((~finite).nonzero()[0])]
                    raise ValueError(
                        f"the features of image {place} are not finite: the weights or the image are damaged"
                    )
                chunks[name].append(value.float().cpu())
    return {name: torch.cat(parts) for name, parts in chunks.items()}


def save_array(path: Path, array: np.ndarray) -> None:
    """As npy; the file appears whole or not at all."""
    with replacing(path) as file:
        np.save(file, array)


def _join(path: Path, parts: list[Path], rows: int) -> None:
    first = np.load(parts[0], mmap_mode="r")
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (rows, first.shape[1]),
    }
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part).tobytes())
    for part in parts:
        part.unlink()


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of rows [N, D], read in parts."""
    first, *rest = rows.split(4096)
    total = metrics.Moments.of(first)
    for part in rest:
        total = total + metrics.Moments.of(part)
    return total.mean, total.covariance


def settings_of(extractor: Extractor, crop: str | None) -> dict[str, str | None]:
    """Settings that features depend on besides the images."""
    return {"features": extractor.name, "protocol": extractor.protocol, "crop": crop, "weights": extractor.weights}


def cache_folder() -> Path:
    """Where features of references are kept: under ``ARGEN_CACHE``, or the home folder."""
    return Path(os.environ.get("ARGEN_CACHE", Path.home() / ".cache" / "argen")) / "eval"


def cached(cache: Path, images: ImageSet, extractor: Extractor, crop: str | None) -> Path:
    """Where the features of a reference set are kept from one run to the next."""
    return cache / digest([READING, images.identity, len(images), settings_of(extractor, crop), CHUNK])


def writable_npz(path: Path) -> None:
    """Raises ValueError: nothing can be written there."""
    if path.suffix != ".npz" or path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"cannot write {path}: expected a name that ends in .npz, in a folder that may be written")


def save_statistics(
    path: Path, images: ImageSet, extractor: Extractor, crop: str | None, cache: Path, batch_size: int = 32
) -> int:
    """Write ``mu``, ``sigma`` (and ``mu_s``, ``sigma_s``) as pytorch-fid reads them (and guided-diffusion's `read_statistics`,
    but not its main program, which wants ``arr_0``, the images), ``meta``, and the captions
    where there are some.

    Returns:
        The number of pictures.
    """
    enough(len(images), "the set")
    arrays = [name for name in ("features", "spatial") if name in extractor.arrays]
    feature_arrays = features(images, extractor, arrays, cached(cache, images, extractor, crop), crop, batch_size)
    if processes().is_main_process:
        content = {}
        for name, suffix in (("features", ""), ("spatial", "_s")):
            if name in feature_arrays:
                mean, covariance = moments(feature_arrays[name])
                content |= {f"mu{suffix}": mean.numpy(), f"sigma{suffix}": covariance.numpy()}
        meta = json.dumps({"n": len(images), **settings_of(extractor, crop)})
        if captions := getattr(images, "captions", None):
            content["captions"] = np.frombuffer("\n".join(captions).encode(), np.uint8)
        with replacing(path) as file:
            np.savez_compressed(file, **content, meta=np.array(meta))
    return len(images)


def read_reference(path: Path, extractor: Extractor, crop: str | None, force: bool = False) -> ImageSet | Statistics:
    """A set of pictures, or statistics: ours, pytorch-fid's, or a guided-diffusion reference batch.

    Raises:
        ValueError: statistics of another resize, crop or network (unless `force`), or of another shape.
    """
    if path.suffix != ".npz" or not path.is_file():
        return open_images(path)
    try:
        with np.load(path) as file:
            names = set(file.files)
            if "mu" not in names or "sigma" not in names:
                return open_images(path)
            arrays = {
                name: torch.from_numpy(np.asarray(file[name], dtype=np.float64))
                for name in names
                if name[:2] in ("mu", "si")
            }
            meta = json.loads(str(file["meta"])) if "meta" in names else {}
            captions = file["captions"].tobytes().decode().split("\n") if "captions" in names else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}): make or fetch it again") from error
    statistics = {"features": (arrays["mu"], arrays["sigma"])}
    if {"mu_s", "sigma_s"} <= names:
        statistics["spatial"] = (arrays["mu_s"], arrays["sigma_s"])
    for mean, covariance in statistics.values():
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path} holds mu {list(mean.shape)} and sigma {list(covariance.shape)}: expected [D] and [D, D]"
            )
    n = meta.pop("n", None)
    ours = settings_of(extractor, crop)
    checked = [key for key in meta if key != "crop" or crop is not None]
    different = [f"{key} {meta[key]} instead of {ours[key]}" for key in checked if meta[key] != ours.get(key)]
    if different and not force:
        raise ValueError(
            f"the statistics in {path} were made with {', '.join(different)}: make them again with `argen eval stats`, "
            "or compare all the same with --force"
        )
    return Statistics(statistics, n, meta, open_images(path) if "arr_0" in names else None, captions)


def enough(n: int, name: str) -> None:
    """Raises ValueError for fewer than two pictures, which have no covariance."""
    if n < 2:
        raise ValueError(f"{name} has {n} image{'s' if n != 1 else ''}: expected at least 2")


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError: a metric is unknown."""
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metric {cut(', '.join(unknown))}: expected some of {', '.join(METRICS)}")


def check(names: Sequence[str], extractor: Extractor, reference: ImageSet | Statistics) -> None:
    """Raises ValueError: a metric is unknown, or cannot be had from these features and this reference."""
    check_names(names)
    for name in names:
        if METRICS[name] not in extractor.arrays:
            raise ValueError(f"{name} cannot be had from {extractor.name}: it needs --features inception")
    if not isinstance(reference, Statistics):
        enough(len(reference), "the reference")
        return
    for name in set(names) & {"kid", "pr"}:
        if reference.images is None:
            raise ValueError(f"{name} needs the images of the reference, and its file holds statistics alone")
    for name in set(names) & {"fid", "sfid"}:
        if METRICS[name] not in reference.moments:
            raise ValueError(f"{name} needs mu_s and sigma_s in the file of the reference, which has none")


def compare(
    samples: ImageSet,
    reference: ImageSet | Statistics,
    extractor: Extractor,
    names: Sequence[str],
    folder: Path,
    cache: Path,
    crop: str | None = None,
    batch_size: int = 32,
) -> dict[str, dict]:
    """Distances of `samples` to `reference`: {metric: {"value", "n", "n_reference", ...}}, some with a "warning".

    Args:
        names: of `METRICS`.
        folder, cache: for the features of the samples and of the reference.
        crop: of the reference's pictures alone.
    """
    check(names, extractor, reference)
    enough(len(samples), "the set of samples")
    arrays = sorted({METRICS[name] for name in names})
    fake = features(samples, extractor, arrays, folder, None, batch_size)
    has_statistics = isinstance(reference, Statistics)  # then pictures are looked at for what statistics do not give
    real_set = reference.images if has_statistics else reference
    needed = sorted({METRICS[name] for name in names if name in ("kid", "pr") or not has_statistics} - {"logits"})
    real = {}
    if needed:
        real = features(real_set, extractor, needed, cached(cache, real_set, extractor, crop), crop, batch_size)
    return _measure(names, fake, real, reference, extractor) if processes().is_main_process else {}


def _measure(names, fake, real, reference, extractor) -> dict[str, dict]:
    n, out = len(next(iter(fake.values()))), {}
    n_reference = reference.n if isinstance(reference, Statistics) else len(reference)
    for name in names:
        rows, array = fake[METRICS[name]], METRICS[name]
        entry: dict = {"n": n, "n_reference": n_reference}
        if name in ("fid", "sfid"):
            if isinstance(reference, Statistics):
                mean, covariance = reference.moments[array]
            else:
                mean, covariance = moments(real[array])
            if len(mean) != rows.shape[1]:
                raise ValueError(
                    f"the reference has {len(mean)} features, expected {rows.shape[1]} as {extractor.name} gives"
                )
            entry["value"] = metrics.frechet_distance(*moments(rows), mean, covariance)
            if n <= rows.shape[1]:
                entry["warning"] = f"{n} samples for {rows.shape[1]} features: the value is biased upward"
        elif name == "is":
            order = metrics.canonical_order(rows)
            mean, deviation = metrics.inception_score(rows[order], IS_SPLITS)
            entry |= {"value": mean, "std": deviation, "splits": IS_SPLITS, "order": "by content, then shuffled"}
            entry["n_reference"] = None
        elif name == "kid":
            mean, deviation = metrics.kernel_distance(real[array], rows, KID_SUBSETS, KID_SIZE)
            entry |= {"value": mean, "std": deviation, "subsets": KID_SUBSETS, "n_reference": len(real[array])}
            entry["subset_size"] = min(KID_SIZE, n, len(real[array]))
        else:
            if min(n, len(real[array])) <= NEIGHBOURS:
                raise ValueError(f"precision and recall need more than {NEIGHBOURS} images on both sides")
            precision, recall = metrics.precision_recall(real[array], rows, NEIGHBOURS)
            entry |= {"neighbours": NEIGHBOURS, "n_reference": len(real[array])}
            out[extractor.called("precision")] = entry | {"value": precision}
            out[extractor.called("recall")] = entry | {"value": recall}
            continue
        out[extractor.called({"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID"}[name])] = entry
    return out


def draw(sample: Callable[[range], list[Image.Image]], n: int, folder: Path, batch_size: int = 32) -> ImageSet:
    """Pictures 0 to n - 1 as PNG files in `folder`; those that are there already are kept.

    Args:
        sample: picture numbers -> pictures, each of which depends on its number alone.
    """
    state = processes()
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=n, desc="draw", disable=None if state.is_main_process else True)
    for number, first in enumerate(range(0, n, batch_size)):
        rows = range(first, min(first + batch_size, n))
        files = [folder / f"{index:06d}.png" for index in rows]
        if number % state.num_processes == state.process_index and not all(file.exists() for file in files):
            for file, image in zip(files, sample(rows), strict=True):
                with replacing(file) as out:
                    image.save(out, "PNG")
        bar.update(len(rows))
    bar.close()
    state.wait_for_everyone()
    images = open_images(folder)
    if len(images) != n:
        raise ValueError(f"{folder} holds {len(images)} images, expected {n}: choose another --out")
    return images


def report(folder: Path, settings: dict, scores: dict[str, dict], seconds: dict[str, float], images: ImageSet) -> str:
    """Write ``report.json`` and ``grid.png`` (the first 64 pictures) into `folder`; the table to print."""
    if not processes().is_main_process:
        return ""
    versions = {"argen": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "diffusers", "transformers")}
    content = {"scores": scores, "settings": settings, "seconds": seconds, "versions": versions}
    content["processes"] = processes().num_processes
    with replacing(folder / "report.json") as file:
        file.write(json.dumps(content, indent=1).encode())
    with replacing(folder / "grid.png") as file:
        grid([images[i] for i in range(min(64, len(images)))]).save(file, "PNG")
    lines = []
    for name, entry in scores.items():
        extra = f" +- {entry['std']:.4g}" if "std" in entry else ""
        counts = f"N {entry['n']:,}" + (f" against {entry['n_reference']:,}" if entry.get("n_reference") else "")
        lines.append(f"{name:28} {entry['value']:>10.4f}{extra:14} {counts}")
        if entry.get("judge_on_real") is not None:
            lines[-1] += f" (on real held-out images: {entry['judge_on_real']:.4f})"
        if "warning" in entry:
            lines.append(f"  warning: {entry['warning']}")
    return "\n".join([*lines, f"{folder / 'report.json'}"])


def grid(images: list[ImageArray], columns: int = 8, side: int = 128) -> Image.Image:
    """Small pictures in rows."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * side, rows * side), "white")
    for index, image in enumerate(images):
        small = Image.fromarray(image)
        small.thumbnail((side, side))
        page.paste(small, (index % columns * side, index // columns * side))
    return page


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
