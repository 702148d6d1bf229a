"""Images of a user's own, with captions, classes or control images, for training: any usual layout on disk, checked before it is used.

    source = open_source("photos", "metadata.csv")
    print(source.report(size=256))
    train, held = held_out(source)

Rows hold names, captions, sizes and hashes; an image is read when it is asked for.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path

from PIL import Image

from argen.train.checking import Checked, check_images, read_rgb
from argen.train.containers import Container
from argen.train.layouts import Listing, Row, list_images
from argen.train.tables import Columns, listed
from argen.words import cut, number_of

HELD_OUT, MOST_HELD_OUT = 16, 10  # at least so many images, and at most one of so many


def shown(names: Sequence[str]) -> str:
    """The first five names, in brackets."""
    return "(" + ", ".join(cut(name) for name in names[:5]) + (", ..." if len(names) > 5 else "") + ")"


@dataclass(frozen=True)
class Report:
    """What a checking pass found; `str` is what the command prints.

    Attributes:
        layout: in words.
        images: how many can be used.
        captions: of all images.
        captioned: images with a caption.
        splits, class_sizes: name -> how many images.
        sizes: width and height of the smallest, the middle and the largest image, by their area; upright, in pixels.
        dropped: reason -> names of the images that are not used.
        duplicates: images with the bytes of an earlier one; they are kept.
        crop: size in pixels that `smaller` are enlarged to; None where none was given.
        smaller: images whose shorter side is below `crop`.
        long_captions: captions that are too long; None where nothing said which are.
        unlisted: names of files that the metadata do not name.
        warnings: what may be wrong, in sentences.
    """

    path: Path
    layout: str
    images: int
    captions: int
    captioned: int
    splits: dict[str, int]
    class_sizes: dict[str, int]
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    dropped: dict[str, list[str]]
    duplicates: int
    crop: int | None = None
    smaller: int = 0
    long_captions: int | None = None
    unlisted: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        splits = ", ".join(f"{name} {count:,}" for name, count in self.splits.items())
        sizes = ", ".join(f"{width}x{height}" for width, height in self.sizes)
        lines = [f"{self.path}: {self.layout}", f"images: {self.images:,}" + (f" ({splits})" if splits else "")]
        if self.captions:
            lines.append(f"captions: {self.captions:,}, for {self.captioned:,} of {self.images:,} images")
        if self.class_sizes:
            names = sorted(self.class_sizes.items(), key=lambda item: -item[1])
            most = ", ".join(f"{name} {count:,}" for name, count in names[:5]) + (", ..." if len(names) > 5 else "")
            lines.append(f"classes: {len(names):,} ({most})")
        lines.append(f"sizes (smallest, median, largest): {sizes}")
        lines += [f"dropped, {reason}: {len(names):,} {shown(names)}" for reason, names in self.dropped.items()]
        if self.duplicates:
            lines.append(f"duplicates: {number_of(self.duplicates, 'image')} with the bytes of another, kept")
        if self.smaller:
            lines.append(f"smaller than {self.crop} pixels: {number_of(self.smaller, 'image')}, enlarged")
        if self.long_captions:
            lines.append(f"longer than the text encoder reads: {number_of(self.long_captions, 'caption')}, cut")
        if self.unlisted:
            lines.append(
                f"not listed in the metadata, left out: {number_of(len(self.unlisted), 'file')} {shown(self.unlisted)}"
            )
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


class Source:
    """Images that passed the checks, in a fixed order.

    Attributes:
        path: where they lie.
        layout: how they are arranged, in words.
        classes: names of the classes, whose positions are the labels; None where the images have none.
    """

    def __init__(self, listing: Listing, rows: Sequence[tuple[Row, Checked, Checked]]):
        self.path, self.layout, self.classes = listing.container.path, listing.layout, listing.classes
        self._listing, self._rows = listing, rows
        self._labels = {name: index for index, name in enumerate(self.classes or ())}

    @property
    def _container(self) -> Container:
        return self._listing.container

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Name of the image's file, for messages."""
        return self._rows[index][0].name

    def image(self, index: int) -> Image.Image:
        """The image: RGB, upright, what is transparent over white. Raises as `argen.images.decode_image` does, or an OSError."""
        name = self.name(index)
        return read_rgb(self._container.read(name), name)

    def control(self, index: int) -> Image.Image | None:
        """The control image, read as `image` is; None where there is none."""
        name = self._rows[index][0].control
        return None if name is None else read_rgb(self._container.read(name), name)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._rows[index][0].captions

    def label(self, index: int) -> int | None:
        """Position in `classes`."""
        label = self._rows[index][0].label
        return None if label is None else self._labels[label]

    def split(self, index: int) -> str:
        """train, validation or test; "" where the set has no splits."""
        return self._rows[index][0].split

    def size(self, index: int) -> tuple[int, int]:
        """Width and height, upright, in pixels."""
        return self._rows[index][1][1:3]

    def key(self, index: int) -> str:
        """SHA-256 of the bytes of the image's file, 64 hexadecimal digits."""
        return self._rows[index][1].sha.hex()

    @property
    def has_captions(self) -> bool:
        return any(row.captions for row, _, _ in self._rows)

    @cached_property
    def identity(self) -> str:
        """A digest of the bytes of all images and control images in order, of captions, labels, splits and names of classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for row, image, control in self._rows:
            digest.update(repr((image.sha, control.sha, row.captions, row.label, row.split)).encode())
        return digest.hexdigest()[:16]

    def subset(self, indices: Iterable[int]) -> "Source":
        """Some of the images, in the order of `indices`; labels stay as they are."""
        return Source(self._listing, [self._rows[index] for index in indices])

    def report(self, size: int | None = None, too_long: Callable[[str], bool] | None = None) -> Report:
        """What the checking pass found.

        Args:
            size: of the crops that will be made, in pixels.
            too_long: says whether a caption is longer than the text encoder reads.
        """
        rows = [row for row, _, _ in self._rows]
        sizes = sorted((self.size(index) for index in range(len(self))), key=lambda each: (each[0] * each[1], each))
        members = Counter(row.label for row in rows)
        captions = [caption for row in rows for caption in row.captions]
        class_sizes = {name: members[name] for name in self.classes or ()}
        return Report(
            path=self.path,
            layout=self.layout,
            images=len(rows),
            captions=len(captions),
            captioned=sum(bool(row.captions) for row in rows),
            splits={name: count for name, count in Counter(row.split for row in rows).items() if name},
            class_sizes=class_sizes,
            sizes=(sizes[0], sizes[len(sizes) // 2], sizes[-1]),
            dropped=self._listing.dropped,
            duplicates=len(rows) - len({image.sha for _, image, _ in self._rows}),
            crop=size,
            smaller=sum(min(each) < size for each in sizes) if size else 0,
            long_captions=sum(map(too_long, captions)) if too_long else None,
            unlisted=self._listing.unlisted,
            warnings=self._listing.warnings + _class_warnings(class_sizes),
        )


def open_source(
    path: str | Path,
    captions: str | Path | None = None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    control_column: str | None = None,
    split: str | None = None,
    missing_captions: str = "error",
    strict: bool = False,
    conditions: bool = True,
) -> Source:
    """Find out how images are arranged, read each once, and drop those that cannot be used.

    Args:
        path: a folder or ``.zip`` with metadata, caption files or class folders; WebDataset shards (``.tar``) or ``.parquet`` tables, or a
            folder of them; or a table that names image files.
        captions: a table (csv, jsonl, parquet) that names the images at `path`; its names are relative to them, or to itself. It may be
            named as it lies in the folder `path`.
        image_column, caption_column, label_column, control_column: names in tables; the ends of files in WebDataset shards.
        split: train, validation or test, to take this one alone.
        missing_captions: "error", or "drop" to leave out images without a caption where others have one.
        strict: stop at the first image that cannot be read, instead of leaving it out.
        conditions: whether classes or captions are learned; if not, images that lack them stay.

    Raises:
        FileNotFoundError, ValueError: there is nothing; nothing that can be read; what was named does not fit what is there.
    """
    if missing_captions not in ("error", "drop"):
        raise ValueError(f"missing_captions is {missing_captions!r}: expected error or drop")
    columns = Columns(image_column, caption_column, label_column, control_column)
    path, captions = Path(path), None if captions is None else Path(captions)
    if captions is not None and not captions.exists() and (path / captions).is_file():
        captions = path / captions
    listing = list_images(path, captions, columns)
    _take_split(listing, split)
    if conditions:
        _check_captions(listing, missing_captions)
    rows = _checked_rows(listing, strict)
    source = Source(listing, rows)
    if split in (None, "train"):
        _check_enough(source, conditions)
    return source


def _take_split(listing: Listing, split: str | None) -> None:
    """Leave the rows of one split.

    Raises:
        ValueError: there is no such split.
    """
    if split is None:
        return
    splits = dict.fromkeys(row.split for row in listing.rows if row.split)
    if split not in splits:
        raise ValueError(f"{listing.container.path} has no split {split!r}: it has {listed(splits)}")
    listing.rows = [row for row in listing.rows if row.split == split]


def _check_captions(listing: Listing, missing_captions: str) -> None:
    """Drop images without a caption, where others have one.

    Raises:
        ValueError: there are some, and they are not to be dropped.
    """
    captioned = [row for row in listing.rows if row.captions]
    missing = [row.name for row in listing.rows if not row.captions] if captioned else []
    without = missing + listing.unlisted if len(listing.unlisted) >= len(listing.rows) else missing
    if without and missing_captions == "error":
        total = len(listing.rows) + len(without) - len(missing)
        raise ValueError(
            f"{len(without):,} of {total:,} images in {listing.container.path} have no caption ({listed(without)}): add them, or "
            "drop these images (missing captions: drop)"
        )
    if missing:
        listing.dropped["without caption"] = missing
        listing.rows = captioned


def _checked_rows(listing: Listing, strict: bool) -> list[tuple[Row, Checked, Checked]]:
    """The rows whose image and control image can be read, with what is known of both; others are noted in `listing.dropped`.

    Raises:
        ValueError: none can be read; or one cannot, and `strict`.
    """
    images = check_images(listing.container, [row.name for row in listing.rows])
    with_control = [row.control for row in listing.rows if row.control is not None]
    controls = (
        dict(zip(with_control, check_images(listing.container, with_control), strict=True)) if with_control else {}
    )
    rows, first_error = [], ""
    for row, image in zip(listing.rows, images, strict=True):
        control = controls.get(row.control, Checked())
        if image.error or control.error:
            first_error = first_error or image.error or control.error
            reason = "broken" if image.error else "broken control image"
            listing.dropped.setdefault(reason, []).append(row.name)
        else:
            rows.append((row, image, control))
    if first_error and (strict or not rows):
        total = len(listing.rows)
        which = f"all {total:,} images in {listing.container.path} are broken, the first: " if not rows else ""
        raise ValueError(which + first_error)
    if not rows:
        raise ValueError(
            f"no images in {listing.container.path} can be used: expected some with a caption, or with an image"
        )
    return rows


def _check_enough(source: Source, classes: bool) -> None:
    """Raises:
    ValueError: one image alone, or no class with two where they are learned.
    """
    if len(source) == 1:
        raise ValueError(f"{source.path} holds one image that can be used: expected at least 2, since one is held out")
    labels = Counter(source.label(index) for index in range(len(source)))
    if classes and source.classes is not None and max(labels.values()) < 2:
        raise ValueError(f"no class in {source.path} has two images: expected more in {listed(source.classes)}")


def _class_warnings(class_sizes: dict[str, int]) -> list[str]:
    few = [name for name, count in class_sizes.items() if count < 2]
    if not few:
        return []
    which = f"class {few[0]} has" if len(few) == 1 else f"the classes {listed(few)} have"
    return [f"{which} less than two images"]


def held_out(source: Source) -> tuple[Source, Source]:
    """Part a source in images to train on, and others to measure the loss on.

    A validation split is taken where there is one, else that of the tests. Else it is 1% of the images or 16, whichever is more, at most a
    tenth and at least one: those whose bytes have the lowest hashes, so that they stay when files are added. Images with equal bytes stay
    together. Where there are splits, what belongs to neither train nor the split taken is left out.

    Raises:
        ValueError: all images are the same.
    """
    splits = [source.split(index) for index in range(len(source))]
    for split in ("validation", "test"):
        if split in splits and "train" in splits:
            train, held = ([i for i, each in enumerate(splits) if each == name] for name in ("train", split))
            return source.subset(train), source.subset(held)
    groups: dict[str, list[int]] = {}
    for index in range(len(source)):
        groups.setdefault(source.key(index), []).append(index)
    if len(groups) < 2:
        raise ValueError(f"all images in {source.path} are the same: expected at least two")
    count = max(1, min(max(ceil(len(source) / 100), HELD_OUT), len(source) // MOST_HELD_OUT))
    chosen: set[int] = set()
    for _, group in sorted(groups.items()):
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    chosen = chosen or set(min(groups.values(), key=len))
    return source.subset(i for i in range(len(source)) if i not in chosen), source.subset(sorted(chosen))
