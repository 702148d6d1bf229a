"""Reading and writing the picture sets: Hugging Face `datasets` folders of parquet files."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL.Image import Resampling

from argen.files import naming
from tokenizers_img.pixels import opaque


def check_new(out: Path) -> None:
    """Raises:
    FileExistsError: `out` is a file, or a folder that is not empty.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty: choose another folder with --out")


def write_splits(out: Path, rows: dict[str, list[dict]]) -> None:
    """Write each split as ``out/data/<split>-00000-of-00001.parquet``; `out` appears whole or not at all.

    Args:
        rows: split name -> records; ``image`` holds PNG bytes, the other fields plain values or lists of them.
    """
    from datasets import Dataset, Features, Image, disable_progress_bars

    disable_progress_bars()
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        (work / "data").mkdir()
        for split, records in rows.items():
            if not records:
                continue
            columns = {key: [record[key] for record in records] for key in records[0] if key != "image"}
            columns = {"image": [{"bytes": record["image"], "path": None} for record in records], **columns}
            table = Dataset.from_dict(columns)
            table = table.cast(Features({**table.features, "image": Image()}))
            with naming(out):
                table.to_parquet(work / "data" / f"{split}-00000-of-00001.parquet")
        if out.exists():
            out.rmdir()
        work.chmod(0o755)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def read_split(folder: str | Path, split: str):
    """One split of a folder written by `write_splits`, as a `datasets.Dataset`.

    Raises:
        FileNotFoundError: there is no such folder or split.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    files = sorted(Path(folder).glob(f"data/{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"no split {split!r} in {folder}: make the set with `argen data`, or check the path")
    return Dataset.from_parquet([str(file) for file in files])


def pixels(table, size: int | None = None) -> np.ndarray:
    """All pictures of a table as one array [N, H, W, 3] uint8 (a set of this size fits in memory), of `size` pixels a side; None for
    their own."""
    images = (opaque(image) for image in table["image"])
    return np.stack(
        [
            np.asarray(image if size in (None, image.width) else image.resize((size, size), Resampling.BOX))
            for image in images
        ]
    )
