"""Token ids of images and features of texts on disk, so that a set is encoded once and not at every start.

See `argen.train.shards` for the folder. Entries are found by the SHA-256 of what was encoded, so that sets share them and a changed image is
encoded alone.

Shards of token ids are parquet files without compression: columns image (SHA-256), crop (index), codes (little-endian uint16 or uint32), height and
width (in tokens). The codes of a row group are one page, which is mapped into memory as it lies in the file. Shards of features are
safetensors files with one tensor for each text.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from argen.train.shards import ShardedCache, prune

__all__ = ["FeatureCache", "TokenCache", "Tokens", "prune"]
logger = logging.getLogger(__name__)
SHARD, ROW_GROUP, TEXT_SHARD = 10_000, 10_000, 1000  # images of a shard; rows of a group, one page; texts of a shard


class Images(Protocol):
    """What is encoded: see `argen.train.sources.Source`."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image: ...

    def key(self, index: int) -> str: ...


class TokenCache(ShardedCache):
    """Token ids of images, which depend on: tokenizer (a hash of its weights and settings), size, resize, crop, flip, dtype."""

    kind, place, ending, usual = "token", "tokens", ".parquet", SHARD
    needed = ("tokenizer", "size", "resize", "crop", "flip", "dtype")

    def encode(
        self,
        source: Images,
        encode_batch: Callable[[list[Image.Image]], Tensor | np.ndarray],
        crops: Callable[[Image.Image], list[Image.Image]],
        batch: int = 16,
    ) -> "Tokens":
        """The token ids of all images of a source; those that the cache lacks are encoded now.

        Args:
            encode_batch: images, all of one size -> whole numbers [B, L] or [B, H, W].
            crops: image -> its crops, the same number for every image, see `argen.eval.images.crops`.
            batch: crops that are encoded at once.

        Raises:
            OSError: the disk is full.
            ValueError: an image cannot be read any more.
        """
        keys = [source.key(index) for index in range(len(source))]
        with self.writing():
            known = Index(self.shards(), set(keys))
            missing = list({key: i for i, key in enumerate(keys) if key not in known.where}.items())
            mine = self.mine(missing)
            self.barrier()  # all have looked before one writes
            total = sum(len(part) for _, part in mine)
            with tqdm(total=total, desc="encoding images", unit="image", disable=None, leave=False) as bar:
                for number, part in mine:
                    self._encode_shard(number, part, source, encode_batch, crops, batch, bar)
            self.barrier()
        if missing and self.rank == 0:
            prune(self.root)
        index = Index(self.shards(), set(keys)) if missing else known
        return Tokens(index, keys, total, self._in_use)

    def _encode_shard(self, number, part, source, encode_batch, crops, batch, bar) -> None:
        """Encode some (key, index) and write them; images are read while others are encoded."""
        ids: list[np.ndarray] = []
        count = 0
        waiting: list[Image.Image] = []
        for pieces in _ahead(lambda item: crops(source.image(item[1])), part):
            count = count or len(pieces)
            waiting += pieces
            while len(waiting) >= batch:
                ids.append(_as_ids(encode_batch(waiting[:batch])))
                waiting = waiting[batch:]
            bar.update()
        if waiting:
            ids.append(_as_ids(encode_batch(waiting)))
        codes = np.concatenate(ids)
        if len(codes) != count * len(part):
            raise ValueError(
                f"{len(codes)} token grids for {len(part)} images of {count} crops: expected {count} for each image"
            )
        with self.new_shard(f"shard-{number:05}.parquet") as file:
            write_shard(file, [key for key, _ in part], codes, count)


def _as_ids(codes: Tensor | np.ndarray) -> np.ndarray:
    """Ids [B, L] or [B, H, W] -> [B, H, W] uint16, or uint32 where one needs it."""
    codes = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
    if codes.ndim not in (2, 3) or codes.dtype.kind not in "iu" or codes.size == 0 or codes.min() < 0:
        raise ValueError(f"token ids are {codes.dtype} {list(codes.shape)}: expected whole numbers [B, L] or [B, H, W]")
    codes = codes[:, None] if codes.ndim == 2 else codes
    return codes.astype("<u2" if codes.max() < 2**16 else "<u4")


def _ahead(load: Callable[[Any], Any], items: Sequence[Any], workers: int = 4) -> Iterator[Any]:
    """`load` of each item in order, some of them ahead of time in threads."""
    with ThreadPoolExecutor(workers) as pool:
        futures = []
        for item in items:
            futures.append(pool.submit(load, item))
            if len(futures) > 2 * workers:
                yield futures.pop(0).result()
        for future in futures:
            yield future.result()


def write_shard(file: Any, keys: Sequence[str], codes: np.ndarray, crops: int) -> None:
    """Write a shard of token ids.

    Args:
        keys: of the images, hexadecimal.
        codes: [images * crops, H, W] uint16 or uint32, the crops of an image together.
    """
    import pyarrow as pa
    import pyarrow.parquet

    _, height, width = codes.shape
    shas = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(len(keys), 32).repeat(crops, 0)
    columns = {
        "image": _fixed(shas),
        "crop": pa.array(np.tile(np.arange(crops, dtype=np.uint16), len(keys))),
        "codes": _fixed(codes.reshape(len(codes), -1)),
        "height": pa.array(np.full(len(codes), height, np.uint16)),
        "width": pa.array(np.full(len(codes), width, np.uint16)),
    }
    meta = {"dtype": codes.dtype.str, "crops": str(crops), "height": str(height), "width": str(width)}
    schema = pa.schema([pa.field(name, array.type, nullable=False) for name, array in columns.items()], meta)
    table = pa.Table.from_arrays(list(columns.values()), schema=schema)
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False, "data_page_size": 2**30}
    pyarrow.parquet.write_table(table, file, row_group_size=ROW_GROUP, **plain)


def _fixed(rows: np.ndarray) -> Any:
    """[N, K] of any dtype -> a column of bytes of one length."""
    import pyarrow as pa

    rows = np.ascontiguousarray(rows)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1] * rows.itemsize), len(rows), [None, pa.py_buffer(rows)]
    )


class Shard:
    """A shard of token ids, mapped into memory.

    Raises:
        ValueError: it is damaged, or was not written by `write_shard`.
    """

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self.images = file.read(["image"])["image"].to_pylist()
                meta = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
                self.crops, self.shape = int(meta["crops"]), (int(meta["height"]), int(meta["width"]))
                groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
                data = np.memmap(path, np.uint8, "r")
                self.pages = [_page(data, group, np.dtype(meta["dtype"]), self.shape) for group in groups]
        except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no shard of token ids ({error})") from error

    def ids(self, row: int) -> np.ndarray:
        """[L] int64 of a row."""
        return self.pages[row // ROW_GROUP][row % ROW_GROUP].astype(np.int64)


def _page(data: np.ndarray, group: Any, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    """The codes of a row group, [N, L], where they lie in the file: behind the header of their only page."""
    chunk = {c.path_in_schema: c for c in map(group.column, range(group.num_columns))}["codes"]
    size = chunk.num_values * shape[0] * shape[1] * dtype.itemsize
    end = chunk.data_page_offset + chunk.total_compressed_size
    if chunk.compression != "UNCOMPRESSED" or not 0 < chunk.total_compressed_size - size < 64 or end > len(data):
        raise ValueError("its codes are not stored in one plain page for each row group")
    return data[end - size : end].view(dtype).reshape(chunk.num_values, -1)


class Index:
    """Where the token ids of images lie in shards; those that cannot be read are left out.

    Attributes:
        shards: that hold some of them.
        where: key of an image -> (position in `shards`, first row).
    """

    def __init__(self, paths: Iterable[Path], keys: set[str]):
        self.shards: list[Shard] = []
        self.where: dict[str, tuple[int, int]] = {}
        for path in paths:
            try:
                shard = Shard(path)
            except ValueError as error:
                logger.warning("%s: its images are encoded again", error)
                continue
            rows = range(0, len(shard.images), shard.crops)
            found = {key: row for row in rows if (key := shard.images[row].hex()) in keys}
            shard.images = []
            if found:
                self.where |= {key: (len(self.shards), row) for key, row in found.items()}
                self.shards.append(shard)


class Tokens:
    """Token ids of the images of a source, mapped into memory.

    Attributes:
        crops: of each image.
        shape: height and width in tokens; (1, L) where the encoder gave no grid.
        encoded: how many images this process encoded for it.
    """

    def __init__(self, index: Index, keys: Sequence[str], encoded: int, in_use: filelock.BaseFileLock):
        places = [index.where[key] for key in keys]
        self._where = np.array(places, np.int64).reshape(-1, 2)
        self._shards, self.encoded, self._in_use = index.shards, encoded, in_use
        kinds = {(shard.crops, shard.shape) for shard in index.shards}
        if len(kinds) > 1:
            raise ValueError(f"the shards of a token cache differ in crops and shape: {sorted(kinds)}")
        self.crops, self.shape = kinds.pop()

    def __len__(self) -> int:
        return len(self._where)

    def ids(self, index: int, crop: int = 0) -> np.ndarray:
        """[L] int64, row by row of the grid.

        Raises:
            IndexError: no such image or crop.
        """
        if not 0 <= crop < self.crops:
            raise IndexError(f"crop {crop} of {self.crops}")
        shard, row = self._where[index]
        return self._shards[shard].ids(int(row) + crop)


class FeatureCache(ShardedCache):
    """Features of texts, [T, C] bf16 without padding, which depend on: encoder (a hash of its weights and settings), and what else there is, e.g.
    cleaning and the longest text."""

    kind, place, ending, usual = "feature", "features", ".safetensors", TEXT_SHARD
    needed = ("encoder",)

    def __init__(self, root: str | Path | None, settings: dict[str, Any], **others: Any):
        super().__init__(root, settings, **others)
        self._where: dict[str, Any] = {}
        self._opened: set[Path] = set()
        self._open_new()

    def encode(
        self, texts: Iterable[str], encode_batch: Callable[[list[str]], Sequence[Tensor]], batch: int = 16
    ) -> int:
        """Encode the texts that the cache lacks; returns how many this process encoded.

        Args:
            encode_batch: texts -> features of each, [T, C], without padding.

        Raises:
            OSError: the disk is full.
        """
        with self.writing():
            self._open_new()
            missing = list({name: text for text in texts if (name := text_key(text)) not in self._where}.items())
            mine = self.mine(missing)
            self.barrier()
            total = sum(len(part) for _, part in mine)
            with tqdm(total=total, desc="encoding texts", unit="text", disable=None, leave=False) as bar:
                for number, part in mine:
                    tensors = {}
                    for start in range(0, len(part), batch):
                        names, words = zip(*part[start : start + batch], strict=True)
                        features = [each.detach().to("cpu", torch.bfloat16) for each in encode_batch(list(words))]
                        tensors |= {name: each.clone() for name, each in zip(names, features, strict=True)}
                        bar.update(len(words))
                    with self.new_shard(f"features-{number:05}.safetensors") as file:
                        file.write(save(tensors))
            self.barrier()
        if missing and self.rank == 0:
            prune(self.root)
        self._open_new()
        return total

    def __contains__(self, text: str) -> bool:
        return text_key(text) in self._where

    def features(self, text: str) -> Tensor:
        """[T, C] bf16 of a text; it alone is read from the file.

        Raises:
            KeyError: the text was not encoded.
        """
        name = text_key(text)
        return self._where[name].get_tensor(name)

    def _open_new(self) -> None:
        """Open the shards that were written since the last time."""
        for path in self.shards():
            if path in self._opened:
                continue
            try:
                file = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                logger.warning("%s cannot be read (%s): its texts are encoded again", path, error)
                continue
            self._opened.add(path)
            self._where |= dict.fromkeys(file.keys(), file)


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
