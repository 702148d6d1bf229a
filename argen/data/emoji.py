"""Single pictures with names: six permissively licensed emoji icon sets, rendered on a white ground.

The icon sets are the npm packages in `STYLES`; groups, subgroups and keywords come from `emojibase-data` (MIT).
`build` fetches them with the ``npm`` client (or reads a folder given by the caller), renders every visible icon
with resvg and writes three parquet splits that `datasets.load_dataset(folder)` reads:

- ``train``;
- ``validation``: held-out *combinations*, a style and a concept that training sees apart but never together;
- ``test``: held-out *concepts*, in no style ever trained on.
"""

import hashlib
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from argen.data.concepts import names_of, read_aliases, slug
from argen.words import is_plural


@dataclass(frozen=True)
class Style:
    package: str
    version: str
    licence: str
    prompt: str  # how a caption names the style


STYLES = {
    "fluent": Style("@iconify-json/fluent-emoji", "1.2.7", "MIT", "fluent style"),
    "flat": Style("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "flat style"),
    "noto": Style("@iconify-json/noto", "1.2.9", "Apache-2.0", "noto style"),
    "twemoji": Style("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "twemoji style"),
    "blob": Style("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "blob style"),
    "firefox": Style("@iconify-json/fxemoji", "1.2.2", "CC-BY-4.0", "firefox style"),
}
NAMES_PACKAGE = ("emojibase-data", "17.0.0")
TEST_PERCENT, VALIDATION_PERCENT = 4, 3  # of the concepts; of the (style, concept) pairs
TONES_PERCENT = 6  # of the icons with a skin tone are kept: there are five of each person without one
SPLITS = ("train", "validation", "test")
GROUPS = (
    "activities",
    "animals-nature",
    "flags",
    "food-drink",
    "objects",
    "other",
    "people-body",
    "smileys-emotion",
    "symbols",
    "travel-places",
)  # of all pictures, as generators of classes take them
THINGS = (
    "animals-nature",
    "food-drink",
    "travel-places",
    "activities",
    "objects",
)  # groups of what is no face, person, flag or sign

_TONE = r"(?:medium-light|medium-dark|light|medium|dark)"
_LONG_TONES = re.compile(rf"(?:-{_TONE}-skin-tone)+(?=-|$)")
_SHORT_TONES = re.compile(rf"(?:-{_TONE}){{1,2}}$")


@dataclass
class Icon:
    """One picture before it is rendered; the fields become the columns of the parquet files."""

    name: str  # "red apple", "waving hand medium dark skin tone"
    concept: str  # the name without skin tones: splits are made on it
    style: str
    skin_tone: str  # "" where the icon has none
    group: str  # emojibase group, "food-drink"
    subgroup: str
    keywords: list[str]
    hexcode: str  # of emojibase, which joins the languages; "" where it does not know the icon
    caption: str
    licence: str
    source: str  # package@version:icon


def split_of(style: str, concept: str, styles_of_concept: int) -> str:
    """The fixed split of a picture: a hash of its concept, then of its style and concept. What has everyday names is not held out."""
    if _percent(concept) < TEST_PERCENT and concept not in everyday():
        return "test"
    if styles_of_concept > 1 and _percent(f"{style}/{concept}") < VALIDATION_PERCENT:
        return "validation"
    return "train"


@cache
def everyday() -> frozenset[str]:
    """The concepts that people ask for by everyday names, see `argen.data.concepts.read_aliases`."""
    return frozenset(concept for concepts in read_aliases().values() for concept in concepts)


def _percent(key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"argen/{key}".encode()).digest()[:4], "big") % 100


def with_article(name: str) -> str:
    """ "apple" -> "an apple"; names in the plural and names that open with a number stay bare."""
    if is_plural(name) or name[0].isdigit() or name.startswith("flag "):
        return name
    sounds_like_vowel = name[0] in "aeiou" and not name.startswith(("uni", "ewe", "one ", "euro", "ukulele", "ufo"))
    return f"{'an' if sounds_like_vowel else 'a'} {name}"


def caption(row: Mapping[str, Any], rng: random.Random) -> str:
    """A caption of a single picture drawn at random: its name or an everyday one, as often; article, style and keywords come and go.

    Args:
        row: of a table that `build` wrote.
    """
    everyday_names = [] if row["skin_tone"] else names_of(row["concept"])
    subject = rng.choice(everyday_names) if everyday_names and rng.random() < 0.5 else row["name"]
    text = with_article(subject) if rng.random() < 0.7 else subject
    keywords = row["keywords"]
    if keywords and rng.random() < 0.1:
        text += ", " + ", ".join(rng.sample(keywords, k=min(len(keywords), rng.randint(1, 2))))
    if rng.random() < 0.6:
        text += f", {STYLES[row['style']].prompt}"
    return text


def cache_folder() -> Path:
    """Where the npm packages are kept."""
    return Path.home() / ".cache/argen/icons"


def fetch_package(package: str, version: str, cache: Path) -> Path:
    """The unpacked npm package `package`@`version`, fetched once into `cache`.

    Raises:
        FileNotFoundError: the ``npm`` command is missing.
        ConnectionError: npm could not fetch the package.
    """
    folder = cache / f"{package.replace('/', '_')}-{version}"
    if folder.exists():
        return folder
    if not shutil.which("npm"):
        raise FileNotFoundError(
            f"`npm` was not found and {package} is not at {folder}: install Node.js, or give --icons a folder "
            "that holds the unpacked packages"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        result = subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"], cwd=temporary, capture_output=True, text=True
        )
        if result.returncode:
            raise ConnectionError(f"npm could not fetch {package}@{version}: {result.stderr.strip()[-300:]}")
        archive = next(Path(temporary).glob("*.tgz"))
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        (Path(temporary) / "package").rename(folder)
    return folder


def named(folder: Path) -> dict[str, dict]:
    """slug of the English label -> emojibase record (its hexcode and tags, group and subgroup as words)."""
    messages = json.loads((folder / "en/messages.json").read_text())
    groups = {g["order"]: g["key"] for g in messages["groups"]}
    subgroups = {g["order"]: g["key"] for g in messages["subgroups"]}
    table = {}
    for record in json.loads((folder / "en/data.json").read_text()):
        if "group" in record:
            table[slug(record["label"])] = {
                "group": groups[record["group"]],
                "subgroup": subgroups[record["subgroup"]],
                "tags": sorted(record.get("tags", [])),
                "hexcode": record["hexcode"],
            }
    return table


def split_tone(icon: str, known_names: dict) -> tuple[str, str]:
    """Separate skin tones from an icon's name, spelled long or short.

    "waving-hand-medium-dark" -> ("waving-hand", "medium dark"); "man-dark-skin-tone-beard" -> ("man-beard", "dark").
    """
    match = _LONG_TONES.search(icon)
    if not match and icon not in known_names:
        match = _SHORT_TONES.search(icon)
    if not match or icon in known_names:
        return icon, ""
    tones = re.findall(_TONE, match.group())
    return icon[: match.start()] + icon[match.end() :], " and ".join(dict.fromkeys(t.replace("-", " ") for t in tones))


def icons(cache: Path) -> Iterator[tuple[Icon, str]]:
    """The visible icons of all sets with their SVG texts, in a fixed order: few of those with a skin tone, and of sets that write
    names without spaces those that emojibase knows."""
    known_names = named(fetch_package(*NAMES_PACKAGE, cache))
    joined = {name.replace("-", ""): name for name in known_names}
    group_names = {
        "Animals & Nature": "animals-nature",
        "Food & Drink": "food-drink",
        "Travel & Places": "travel-places",
    }
    group_names |= {"Smileys & Emotion": "smileys-emotion", "People & Body": "people-body"}
    for style, source in STYLES.items():
        folder = fetch_package(source.package, source.version, cache)
        data = json.loads((folder / "icons.json").read_text())
        metadata = json.loads((folder / "metadata.json").read_text())
        category = {
            icon: group_names.get(group, group.lower())
            for group, members in metadata.get("categories", {}).items()
            for icon in members
        }
        dashed = sum("-" in icon for icon in data["icons"]) > len(data["icons"]) / 2
        for icon, body in sorted(data["icons"].items()):
            spelled = icon if dashed else joined.get(icon, "")
            base, tone = split_tone(spelled, known_names)
            if body.get("hidden") or not base or (tone and _percent(f"{style}/{icon}") >= TONES_PERCENT):
                continue
            base = joined.get(base.replace("-", ""), base)
            record = known_names.get(
                base, {"group": category.get(icon, "other"), "subgroup": "", "tags": [], "hexcode": ""}
            )
            concept = base.replace("-", " ")
            name = f"{concept} {tone} skin tone" if tone else concept
            width, height = (body.get(side, data[side]) for side in ("width", "height"))
            left, top = body.get("left", 0), body.get("top", 0)
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body["body"]}</svg>'
            )
            yield (
                Icon(
                    name=name,
                    concept=concept,
                    style=style,
                    skin_tone=tone,
                    group=record["group"],
                    subgroup=record["subgroup"],
                    keywords=record["tags"],
                    hexcode=record["hexcode"],
                    caption=f"{with_article(name)}, {source.prompt}",
                    licence=source.licence,
                    source=f"{source.package}@{source.version}:{icon}",
                ),
                svg,
            )


def render(svg: str, size: int) -> bytes:
    """An SVG as a `size` x `size` PNG, padded to a square, on white."""
    import resvg_py

    icon = Image.open(
        BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, skip_system_fonts=True)))
    ).convert("RGBA")
    icon.thumbnail((size, size), Image.Resampling.LANCZOS)
    image = Image.new("RGB", (size, size), "white")
    image.paste(icon, ((size - icon.width) // 2, (size - icon.height) // 2), icon)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _render_job(job: tuple[str, int]) -> bytes:
    return render(*job)


def build(out: Path, icons_dir: Path | None = None, size: int = 256) -> dict[str, int]:
    """Render the whole set into `out` as parquet splits; returns the number of pictures of each split.

    Args:
        out: a new folder; it appears only when everything is written.
        icons_dir: where the npm packages are kept (default: argen's cache folder); missing ones are fetched.
        size: side of the square pictures, in pixels.
    """
    from argen.data.tables import check_new, write_splits

    check_new(out)
    if not 8 <= size <= 1024:
        raise ValueError(f"size is {size}: expected 8 to 1024 pixels")
    cache = icons_dir or cache_folder()
    records, svgs = zip(*icons(cache), strict=True)
    styles_of = defaultdict(set)
    for record in records:
        styles_of[record.concept].add(record.style)

    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    with ProcessPoolExecutor() as pool:
        images = pool.map(_render_job, ((svg, size) for svg in svgs), chunksize=64)
        for record, png in tqdm(zip(records, images, strict=True), total=len(records), desc="render"):
            split = split_of(record.style, record.concept, len(styles_of[record.concept]))
            rows[split].append({"image": png, **asdict(record)})
    write_splits(out, rows)
    return dict(Counter({split: len(part) for split, part in rows.items()}))


def sample(emoji: Path, out: Path, num: int = 64) -> dict[str, int]:
    """A small set out of the one in `emoji`: of each style as many, three of four for training; same layout and columns.

    The pictures are those of things with short names, in an order fixed by a hash.
    """
    from argen.data.tables import check_new, read_split, write_splits

    check_new(out)
    if num < 32:
        raise ValueError(f"num is {num}: expected at least 32, so that each style is in each split")
    rows: dict[str, list[dict]] = {}
    shares = {"train": num * 3 // 4, "validation": num // 8, "test": num - num * 3 // 4 - num // 8}
    for split, share in shares.items():
        table = read_split(emoji, split)
        records = table.remove_columns("image").to_list()
        indices = []
        for style_index, style in enumerate(STYLES):
            fits = [
                index
                for index, row in enumerate(records)
                if row["style"] == style and row["group"] in THINGS and len(row["name"].split()) <= 2
            ]
            fits.sort(key=lambda index: hashlib.sha256(records[index]["source"].encode()).digest())
            indices += fits[: (share + style_index) // len(STYLES)]
        rows[split] = []
        for index in indices:
            buffer = BytesIO()
            table[index]["image"].save(buffer, "PNG", optimize=True)
            rows[split].append({"image": buffer.getvalue(), **records[index]})
    write_splits(out, rows)
    return {split: len(part) for split, part in rows.items()}
