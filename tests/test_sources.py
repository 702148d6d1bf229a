"""A user's own images, in every layout they come in, and what is wrong with them."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from argen.images import decode_image
from argen.train import checking
from argen.train.sources import held_out, open_source

COLOURS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path / "cache"))


def png(seed: int, size: tuple[int, int] = (12, 10), form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def name(i: int) -> str:
    return f"image.{i:03}"


def caption(i: int) -> str:
    return f'a "{COLOURS[i % 3]}" thing, number {i}'


def write_images(folder: Path, count: int = 6, in_classes: bool = False) -> Path:
    for i in range(count):
        file = folder / (COLOURS[i % 3] if in_classes else "") / f"{name(i)}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i))
    return folder


def csv_text(count: int = 6, header: str = "file_name,caption") -> str:
    rows = [f'{name(i)}.png,"{caption(i).replace(chr(34), 2 * chr(34))}"' for i in range(count)]
    return "\n".join([header, *rows]) + "\n"


def with_csv(folder: Path, count: int) -> tuple[Path, Path | None]:
    (write_images(folder, count) / "metadata.csv").write_text(csv_text(count))
    return folder, None


def with_csv_elsewhere(folder: Path, count: int) -> tuple[Path, Path | None]:
    write_images(folder / "photos", count)
    (folder / "captions.csv").write_text(csv_text(count).replace("file_name,caption", "file_name,text"), "utf-16")
    return folder / "photos", folder / "captions.csv"


def with_jsonl(folder: Path, count: int) -> tuple[Path, Path | None]:
    lines = [json.dumps({"file_name": f"{name(i)}.png", "prompt": [caption(i)]}) for i in range(count)]
    (write_images(folder, count) / "metadata.jsonl").write_text("\n".join(lines))
    return folder, None


def with_metadata_parquet(folder: Path, count: int) -> tuple[Path, Path | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [f"{name(i)}.png" for i in range(count)]
    table = pa.table({"file_name": files, "caption": [caption(i) for i in range(count)]})
    pq.write_table(table, write_images(folder, count) / "metadata.parquet")
    return folder, None


def with_texts(folder: Path, count: int) -> tuple[Path, Path | None]:
    for i in range(count):
        (write_images(folder, count) if i == 0 else folder).joinpath(f"{name(i)}.txt").write_text(f"{caption(i)}\n")
    return folder, None


def llamagen_jsonl(folder: Path, count: int) -> tuple[Path, Path | None]:
    write_images(folder / "pixels", count)
    lines = [{"image_path": f"pixels/{name(i)}.png", "text": [caption(i), " "]} for i in range(count)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "set.jsonl", None


def zipped(folder: Path, count: int) -> tuple[Path, Path | None]:
    with_texts(folder / "photos", count)
    with zipfile.ZipFile(folder / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((folder / "photos").iterdir()):
            archive.write(file, f"photos/{file.name}")
        archive.writestr("__MACOSX/photos/._image.png", b"litter")
    return folder / "photos.zip", None


def shards(folder: Path, count: int) -> tuple[Path, Path | None]:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i in range(count)[shard * count // 2 : (shard + 1) * count // 2]:
                record = {"text": caption(i)} if shard else {"other": 1}
                files = {"png": png(i), "json": json.dumps(record).encode()} | (
                    {} if shard else {"txt": caption(i).encode()}
                )
                for kind, data in files.items():
                    member = tarfile.TarInfo(f"./{i:03}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder, None


def parquet(folder: Path, count: int) -> tuple[Path, Path | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    images = [{"bytes": png(i), "path": None} for i in range(count)]
    pq.write_table(pa.table({"image": images, "text": [caption(i) for i in range(count)]}), folder / "a.parquet")
    return folder / "a.parquet", None


LAYOUTS = {
    "metadata.csv beside": with_csv,
    "captions in captions.csv": with_csv_elsewhere,
    "metadata.jsonl beside": with_jsonl,
    "metadata.parquet beside": with_metadata_parquet,
    "captions in .txt": with_texts,
    "table set.jsonl": llamagen_jsonl,
    "captions in .txt or": zipped,
    "WebDataset": shards,
    "parquet tables": parquet,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    path, captions = LAYOUTS[layout](tmp_path / "set", 6)
    source = open_source(path, captions)
    report = str(source.report())
    assert layout in report
    assert len(source) == 6
    for i in range(6):
        assert source.captions(i) == (caption(i),)
        assert (np.asarray(source.image(i)) == np.asarray(Image.open(io.BytesIO(png(i))))).all()
    assert source.label(0) is None
    assert source.classes is None
    assert source.size(0) == (12, 10)
    assert "captions: 6, for 6 of 6 images" in report
    assert "sizes (smallest, median, largest): 12x10, 12x10, 12x10" in report


@pytest.mark.parametrize("form", ["folder", "zip", "splits"])
def test_class_folders(tmp_path, form):
    path = tmp_path / "set"
    write_images(path / "train" if form == "splits" else path, 9, in_classes=True)
    if form == "splits":
        write_images(path / "val", 3, in_classes=True)
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in sorted(path.rglob("*.png")):
                archive.write(file, f"top/{file.relative_to(path)}")
        path = tmp_path / "x.zip"
    source = open_source(path)
    assert source.classes == ["blue", "green", "red"]
    assert [source.classes[source.label(i)] in source.name(i) for i in range(len(source))] == [True] * len(source)
    assert "classes: 3 (blue" in str(source.report())
    if form == "splits":
        train, held = held_out(source)
        assert (len(train), len(held)) == (9, 3)
        assert {held.split(i) for i in range(3)} == {"validation"}
        assert "images: 12 (train 9, validation 3)" in str(source.report())
        assert len(open_source(path, split="validation")) == 3
        with pytest.raises(ValueError, match="no split 'test': it has train, validation"):
            open_source(path, split="test")


def test_labels_and_control_images_from_a_table(tmp_path):
    write_images(tmp_path / "set", 4)
    write_images(tmp_path / "set" / "edges", 4)
    rows = [f"{name(i)}.png,edges/{name(3 - i)}.png,{10 - i // 2}" for i in range(4)]
    (tmp_path / "set" / "metadata.csv").write_text(
        "\n".join(["file_name;edges;label", *(row.replace(",", ";") for row in rows)])
    )
    source = open_source(tmp_path / "set", control_column="edges")
    assert source.classes == ["9", "10"]
    assert [source.label(i) for i in range(4)] == [1, 1, 0, 0]
    assert (np.asarray(source.control(0)) == np.asarray(source.image(3))).all()
    assert source.report().unlisted == []


def test_several_rows_of_a_file_are_several_captions(tmp_path):
    write_images(tmp_path / "set", 2)
    rows = ["file_name,caption", *(f"{name(i)}.png,{text}" for i in range(2) for text in ("one", "two"))]
    (tmp_path / "set" / "metadata.csv").write_text("\n".join(rows))
    source = open_source(tmp_path / "set")
    assert source.captions(0) == source.captions(1) == ("one", "two")


def test_images_are_upright_and_over_white(tmp_path):
    write_images(tmp_path / "set", 2)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "set" / "clear.png")
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "set" / "turned.jpg", exif=exif)
    source = open_source(tmp_path / "set")
    by_name = {source.name(i): i for i in range(len(source))}
    assert source.image(by_name["clear.png"]).getpixel((0, 0)) == (255, 255, 255)
    assert source.size(by_name["turned.jpg"]) == source.image(by_name["turned.jpg"]).size == (10, 20)


def test_report_counts_what_is_dropped(tmp_path):
    folder = write_images(tmp_path / "set", 20)
    for i in range(20):
        (folder / f"{name(i)}.txt").write_text(caption(i) if i != 3 else " \n")
    for i in range(6):
        (folder / f"broken{i}.png").write_bytes(png(i)[:100])
        (folder / f"broken{i}.txt").write_text("x")
    (folder / "copy.png").write_bytes(png(0))
    (folder / "copy.txt").write_text("a very long caption indeed")
    (folder / "large.png").write_bytes(png(50, (40, 50)))
    (folder / "large.txt").write_text("x")
    source = open_source(folder, missing_captions="drop")
    report = source.report(size=16, too_long=lambda text: "very long" in text)
    assert (report.images, report.duplicates, report.smaller, report.long_captions) == (21, 1, 20, 1)
    assert report.sizes == ((12, 10), (12, 10), (40, 50))
    text = str(report)
    assert "dropped, broken: 6 (broken0.png, broken1.png, broken2.png, broken3.png, broken4.png, ...)" in text
    assert f"dropped, without caption: 1 ({name(3)}.png)" in text
    assert "duplicates: 1 image with the bytes of another, kept" in text
    assert "smaller than 16 pixels: 20 images, enlarged" in text
    assert "longer than the text encoder reads: 1 caption, cut" in text
    with pytest.raises(ValueError, match=r"broken0.png could not be read as an image"):
        open_source(folder, missing_captions="drop", strict=True)


def test_files_that_no_table_names_are_counted(tmp_path):
    folder, _ = with_csv(tmp_path / "set", 6)
    (folder / "extra.png").write_bytes(png(99))
    source = open_source(folder)
    assert len(source) == 6
    assert "not listed in the metadata, left out: 1 file (extra.png)" in str(source.report())


def test_class_with_one_image_is_a_warning(tmp_path):
    write_images(tmp_path / "set", 4, in_classes=True)
    assert "warning: the classes blue, green have less than two images" in str(open_source(tmp_path / "set").report())


def test_images_outside_class_folders_are_a_warning(tmp_path):
    write_images(write_images(tmp_path / "set", 4, in_classes=True), 1)
    source = open_source(tmp_path / "set")
    assert source.classes is None
    assert len(source) == 5
    assert f"images outside them ({name(0)}.png): the folders are no classes" in str(source.report())


def test_tables_of_splits_and_of_a_zip(tmp_path):
    for split, count in (("train", 6), ("validation", 3)):
        with_csv(tmp_path / "set" / "inner" / split, count)
    train, held = held_out(open_source(tmp_path / "set"))
    assert (len(train), len(held)) == (6, 3)
    assert held.captions(2) == (caption(2),)
    path, _ = zipped(tmp_path / "zips", 6)
    (tmp_path / "c.csv").write_text(csv_text(6))
    assert open_source(path, tmp_path / "c.csv").captions(5) == (caption(5),)


def test_splits_by_the_names_of_parquet_files(tmp_path):
    for split, count in (("train", 8), ("validation", 2)):
        parquet(tmp_path / split, count)[0].rename(tmp_path / f"{split}-00000-of-00001.parquet")
        (tmp_path / split).rmdir()
    source = open_source(tmp_path)
    assert [len(part) for part in held_out(source)] == [8, 2]


def half_captions(folder: Path):
    with_texts(folder, 6)
    for i in range(3):
        (folder / f"{name(i)}.txt").unlink()


def half_listed(folder: Path):
    (write_images(folder, 6) / "metadata.csv").write_text(csv_text(3))


def table(text: str | bytes, file: str = "metadata.csv"):
    def write(folder: Path):
        (write_images(folder, 6) / file).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def all_broken(folder: Path):
    write_images(folder, 3)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:60])


BAD = {
    "no images in .*it is empty": lambda folder: folder.mkdir(),
    "its files end in .txt": lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("x")),
    "holds one image that can be used: expected at least 2": lambda folder: write_images(folder, 1),
    "all 3 images in .* are broken, the first: image.000.png could not be read": all_broken,
    "3 of 6 images in .* have no caption .image.000.png, image.001.png, image.002.png.: add them": half_captions,
    "3 of 6 images in .* have no caption .image.003.png": half_listed,
    "no column caption, text or prompt: it has file_name, words": table(csv_text(6, "file_name,words")),
    "no column file_name: it has file, caption": table(csv_text(6, "file,caption")),
    "metadata.csv names 2 files that are not there: image.006.png, image.007.png": table(csv_text(8)),
    "no class in .* has two images: expected more in blue, green, red": lambda folder: write_images(folder, 3, True),
    "metadata.csv is no text in UTF-8: save it as such": table(
        "file_name,caption\nimage.000.png,Gr\xfcn\n".encode("latin-1")
    ),
    "metadata.csv has more cells in line 2 than in its header": table("file_name,caption\nimage.000.png,a, b\n"),
    "metadata.csv holds no rows": table("file_name,caption\n"),
    "metadata.jsonl has no JSON object in line 1": table("[1]\n", "metadata.jsonl"),
    "metadata.parquet cannot be read as a .parquet table": table("none", "metadata.parquet"),
    "2 of 6 images in .* have no label": table(
        "file_name,label\n" + "".join(f"{name(i)}.png,{'x' if i > 1 else ''}\n" for i in range(6))
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_sets(tmp_path, line):
    BAD[line](tmp_path / "set")
    with pytest.raises(ValueError, match=line) as error:
        open_source(tmp_path / "set")
    assert "\n" not in str(error.value)


def test_bad_paths(tmp_path):
    folder, _ = with_csv(tmp_path / "set", 6)
    with pytest.raises(FileNotFoundError, match="no images at .*nowhere: expected a folder"):
        open_source(tmp_path / "nowhere")
    assert len(open_source(folder, "metadata.csv")) == 6
    with pytest.raises(FileNotFoundError, match="no captions at .*nowhere.csv: expected"):
        open_source(folder, tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="is a file of another kind: expected a folder of images"):
        open_source(folder / f"{name(0)}.png")
    with pytest.raises(ValueError, match="is a folder: expected a table of captions"):
        open_source(folder, folder)
    with pytest.raises(ValueError, match=r"has no column 'x' \(caption column\): it has file_name, caption"):
        open_source(folder, caption_column="x")
    for damaged in ("x.zip", "x.tar", "x.parquet"):
        (tmp_path / damaged).write_bytes(b"damaged" * 200)
        with pytest.raises(
            ValueError, match=rf"{damaged} cannot be read as a .{damaged[2:]}.*: make or fetch it again"
        ):
            open_source(tmp_path / damaged)
    assert len(open_source(folder, missing_captions="drop")) == 6


def test_half_of_the_captions_can_be_dropped(tmp_path):
    half_captions(tmp_path / "a")
    half_listed(tmp_path / "b")
    assert [len(open_source(tmp_path / each, missing_captions="drop")) for each in "ab"] == [3, 3]


def test_second_start_reads_no_image(tmp_path, monkeypatch):
    folder, _ = with_csv(tmp_path / "set", 6)
    read = []
    decode = checking.decode_image
    monkeypatch.setattr(checking, "decode_image", lambda data, name: read.append(name) or decode(data, name))
    first = open_source(folder)
    assert len(read) == 6
    assert open_source(folder).identity == first.identity
    assert len(read) == 6
    (folder / f"{name(2)}.png").write_bytes(png(77))
    changed = open_source(folder)
    assert read[6:] == [f"{name(2)}.png"]
    assert changed.identity != first.identity
    assert [changed.key(i) == first.key(i) for i in range(6)] == [True, True, False, True, True, True]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path / "file"))
    assert len(open_source(with_csv(tmp_path / "set", 6)[0])) == 6


@pytest.mark.parametrize(("count", "held"), [(2, 1), (12, 1), (60, 6), (200, 16)])
def test_held_out_by_hash(tmp_path, count, held):
    folder = write_images(tmp_path / "set", count)
    (folder / "copy.png").write_bytes(png(0))
    train, others = held_out(open_source(folder))
    keys = [{part.key(i) for i in range(len(part))} for part in (train, others)]
    assert not keys[0] & keys[1]
    assert len(train) + len(others) == count + 1
    assert len(others) in (held, held - 1, held + 1)
    for i in range(count, count + 5):
        (folder / f"new{i}.png").write_bytes(png(i))
    again = held_out(open_source(folder))[1]
    new = {again.key(i) for i in range(len(again))}
    assert len(keys[1] & new) >= len(keys[1]) - 2


def test_all_the_same(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(0))
    with pytest.raises(ValueError, match="are the same: expected at least two"):
        held_out(open_source(tmp_path))


def test_memory_does_not_hold_the_images(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "BMP")  # 12 KB
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(10_000):
            archive.writestr(f"{i}.bmp", file.getvalue() + i.to_bytes(4))
    process, memory = psutil.Process(), []

    def decode(data: bytes, name: str) -> Image.Image:
        if int(name.removesuffix(".bmp")) % 100 == 0:
            memory.append(process.memory_info().rss)
        return decode_image(data, name)

    monkeypatch.setattr(checking, "decode_image", decode)
    before = process.memory_info().rss
    source = open_source(tmp_path / "many.zip")
    assert len(source) == 10_000
    assert len(memory) == 100
    assert max(*memory, process.memory_info().rss) - before < 50_000_000  # the images are 123 MB
    assert source.report().duplicates == 0
