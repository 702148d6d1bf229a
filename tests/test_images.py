"""The one reader of images, on the files that people have."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from argen.eval.images import open_images
from argen.eval.run import features
from argen.images import decode_image, fitted, from_base64, open_image, read_image
from argen.models.annotators import annotate, resized
from argen.request import Control
from tokenizers_img.pixels import from_pil, to_mask

RAMP = [2, 64, 128, 241]  # of a ramp 0..65535 over 128 columns, at columns 1, 32, 64 and 120
AT = [1, 32, 64, 120]


def ramp(mode: str) -> Image.Image:
    values = np.round(np.linspace(0, 65535, 128)).astype(np.uint16)[None].repeat(96, 0)
    if mode == "I;16":
        return Image.fromarray(values)
    if mode == "I":
        return Image.fromarray(values.astype(np.int32))
    return Image.fromarray((values / 65535).astype(np.float32))


@pytest.mark.parametrize(("mode", "form"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")])
def test_depth_is_scaled_everywhere(tmp_path, mode, form):
    path = tmp_path / f"depth.{form.lower()}"
    ramp(mode).save(path, form)
    image = open_image(path)
    grey = np.asarray(image.convert("L"))
    assert np.abs(grey[0, AT].astype(int) - RAMP).max() <= 1
    assert abs(grey.mean() - 127.5) < 1
    pixels = from_pil(ramp(mode), 128)  # in Python, without a file
    assert abs(255 * pixels[0, 64, 64].item() - 128) < 1.5
    control = annotate(resized(Control(ramp(mode), "map").image, "map", (128, 96)), "map")
    assert abs(control[0, 0, 64].item() - 128) < 1.5
    (tmp_path / "set").mkdir()
    path.rename(tmp_path / "set" / path.name)
    assert abs(int(open_images(tmp_path / "set")[0][0, 64, 0]) - 128) < 1.5


def test_ranges_of_32_bit_images():
    for values, expected in (
        ([0, 255], [0, 255]),
        ([-10, 10], [0, 255]),
        ([0, 1 << 20], [0, 255]),
        ([0, 65535], [0, 255]),
    ):
        image = Image.fromarray(np.array([values], np.int32))
        assert np.asarray(decode_image(saved(image, "TIFF"), "x").convert("L")).tolist() == [expected]
    image = Image.fromarray(np.array([[np.nan, 0.0, np.inf, 1.0]], np.float32))
    assert np.asarray(decode_image(saved(image, "TIFF"), "x").convert("L")).tolist() == [[0, 0, 255, 255]]


def saved(image: Image.Image, form: str, **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def test_images_are_turned_as_their_camera_was():
    image = Image.new("RGB", (96, 128), "white")
    image.paste("black", (0, 0, 96, 32))
    for orientation, size in ((1, (96, 128)), (3, (96, 128)), (6, (128, 96)), (8, (128, 96))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("JPEG", "PNG", "WEBP", "TIFF"):
            seen = decode_image(saved(image, form, exif=exif), "x")
            assert seen.size == size
            side = {1: (48, 5), 3: (48, 123), 6: (123, 48), 8: (5, 48)}[orientation]
            assert max(seen.getpixel(side)[:3]) < 30
            assert Control(Image.open(io.BytesIO(saved(image, form, exif=exif)))).image.size == size
    broken = saved(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert decode_image(broken, "x").size == (96, 128)


def test_alpha_counts_in_masks():
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (4, 0, 8, 8))
    for one in (mask, mask.convert("LA"), mask.quantize(4)):
        assert np.asarray(to_mask(one)).mean() == pytest.approx(127.5)
    assert np.asarray(to_mask(Image.new("1", (8, 8), 1))).mean() == 255
    assert np.asarray(to_mask(ramp("I;16"))).mean() == pytest.approx(127.5, abs=1)


def test_large_texts_do_not_keep_an_image_from_being_read(tmp_path):
    info = PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)  # as ComfyUI writes
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.png", pnginfo=info)
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


MODES = {
    "cmyk.jpg": Image.new("CMYK", (16, 16), (0, 255, 255, 0)),
    "grey.png": Image.new("LA", (16, 16), (255, 0)),
    "palette.gif": Image.new("P", (16, 16), 3),
    "bits.png": Image.new("1", (16, 16)),
}


@pytest.mark.parametrize("name", list(MODES))
def test_every_mode_becomes_rgb_or_rgba(tmp_path, name):
    MODES[name].save(tmp_path / name)
    assert open_image(tmp_path / name).mode in ("RGB", "RGBA")


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        red, _, blue = open_image(tmp_path / name).convert("RGB").getpixel((0, 0))
        assert red > 200 > blue


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\x89PNG\r\n\x1a\n",
        b"qoif" + b"\xff" * 20,
        b"DDS " + b"\0" * 200,
        b"\0\0\0\x1cftypavif" + b"\0" * 60,
    ],
    ids=["empty", "text", "png", "qoi", "dds", "avif"],
)
def test_broken_files_are_named(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match="a.png (could not be read as an image|has too many pixels)"):
        open_image(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no image at"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="could not be read|too many"):
        read_image(data, "the mask")


def test_pixels_are_counted_before_they_are_decoded():
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (head, b"IDAT" + zlib.compress(b"\0"), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(ValueError, match="too many pixels"):
        read_image(png, "the picture")
    for text in ("%%%", "", "data:image/png;base64,"):
        with pytest.raises(ValueError, match="is not base64"):
            from_base64(text)


def test_another_shape_is_padded():
    image = fitted(Image.new("RGB", (64, 64), "red"), (128, 64))
    assert (image.size, image.getpixel((0, 0)), image.getpixel((64, 32))) == ((128, 64), (255, 255, 255), (255, 0, 0))


def test_sets_of_macos_links_and_odd_numbers(tmp_path, caplog):
    folder = tmp_path / "set"
    (folder / "__MACOSX").mkdir(parents=True)
    for name in ("0.png", "①.png", "٣.png", "10.png", "2.png"):
        Image.new("RGB", (16, 16), "red").save(folder / name)
    (folder / "._0.png").write_bytes(b"\0\5\x16\7")
    (folder / "__MACOSX" / "a.png").write_bytes(b"\0")
    (folder / "folder.png").mkdir()
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGBA", (16, 16), (0, 255, 0, 0)).save(tmp_path / "elsewhere" / "x.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    dataset = open_images(folder)
    assert "2 files that macOS left" in caplog.text
    assert len(dataset) == 6
    assert dataset.names.index("2.png") < dataset.names.index("10.png")
    assert dataset[dataset.names.index("linked/x.png")][0, 0].tolist() == [
        0,
        255,
        0,
    ]  # the colour under it, as published tools read


def test_transparency_is_said(tmp_path, caplog):
    class Mean:
        name, arrays = "mean", {"features": 3}

        def prepare(self, image):
            return torch.tensor(image).float()

        def look(self, batch):
            return {"features": batch.mean(dim=(1, 2))}

    (tmp_path / "set").mkdir()
    Image.new("RGBA", (16, 16), (0, 255, 0, 9)).save(tmp_path / "set" / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "set" / "b.png")
    features(open_images(tmp_path / "set"), Mean(), ["features"], tmp_path / "kept")
    assert "1 of 2 images have transparency" in caplog.text
