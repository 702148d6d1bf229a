"""The caches of token ids and of text features: what is encoded again, and what is not."""

import errno
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import LAYOUTS, caption, name, png, with_csv

from argen.eval.images import crop_adm, crops
from argen.train import token_cache
from argen.train.sources import open_source
from argen.train.token_cache import FeatureCache, TokenCache, prune

SETTINGS = {"tokenizer": "a" * 64, "size": 8, "resize": "adm", "crop": "center", "flip": False, "dtype": "fp32"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path / "cache"))


class Tokenizer:
    """A tiny network: the brightness of 4x4 parts, and how many images it saw."""

    def __init__(self, fails_after: int = 10**9, offset: int = 0):
        self.seen, self.fails_after, self.offset = 0, fails_after, offset

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        self.seen += len(images)
        if self.seen > self.fails_after:
            raise KeyboardInterrupt
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).long()
        return pixels.unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4, 5)) + self.offset  # [B, 2, 2]


def center(image: Image.Image) -> list[Image.Image]:
    return crops(image, 8, "center")


def direct(source, offset: int = 0) -> list[list[int]]:
    encode = Tokenizer(offset=offset)
    return [encode([crop_adm(source.image(i), 8)]).flatten().tolist() for i in range(len(source))]


def cached(tokens) -> list[list[int]]:
    return [tokens.ids(i).tolist() for i in range(len(tokens))]


def test_layouts_give_the_same_ids(tmp_path):
    """200 images in every layout: encoded once, the same ids, those of images that are encoded on the fly."""
    ids, encode = [], Tokenizer()
    for number, layout in enumerate(LAYOUTS.values()):
        source = open_source(*layout(tmp_path / f"set{number}", 200))
        tokens = TokenCache(None, SETTINGS).encode(source, encode, center)
        assert encode.seen == 200
        assert tokens.encoded == (200 if number == 0 else 0)
        assert [source.captions(i) for i in range(200)] == [(caption(i),) for i in range(200)]
        ids.append(cached(tokens))
    assert all(each == ids[0] for each in ids)
    assert ids[0] == direct(source)
    assert tokens.ids(0).dtype == np.int64
    assert tokens.shape == (2, 2)
    assert (tmp_path / "cache" / "tokens").is_dir()


def test_a_changed_image_is_encoded_alone(tmp_path):
    folder, _ = with_csv(tmp_path / "set", 30)
    TokenCache(tmp_path / "tokens", SETTINGS).encode(open_source(folder), Tokenizer(), center)
    (folder / f"{name(7)}.png").write_bytes(png(500))
    encode, source = Tokenizer(), open_source(folder)
    tokens = TokenCache(tmp_path / "tokens", SETTINGS).encode(source, encode, center)
    assert encode.seen == tokens.encoded == 1
    assert cached(tokens) == direct(source)


def test_other_settings_are_another_folder(tmp_path):
    source = open_source(*with_csv(tmp_path / "set", 20))
    for key in SETTINGS:
        encode = Tokenizer(offset=70_000 if key == "dtype" else 0)  # more than 16 bits hold
        tokens = TokenCache(tmp_path / "tokens", SETTINGS | {key: "other"}).encode(source, encode, center)
        assert encode.seen == 20
        assert cached(tokens) == direct(source, encode.offset)
    folders = list((tmp_path / "tokens").iterdir())
    assert len(folders) == len(SETTINGS)
    assert all((folder / "manifest.json").exists() and (folder / "shard-00000.parquet").exists() for folder in folders)
    with pytest.raises(ValueError, match="lack size, dtype"):
        TokenCache(tmp_path, {key: 1 for key in SETTINGS if key not in ("size", "dtype")})


def test_resumes_at_the_shard_where_it_was_killed(tmp_path):
    source = open_source(*with_csv(tmp_path / "set", 100))
    with pytest.raises(KeyboardInterrupt):
        TokenCache(tmp_path / "tokens", SETTINGS, shard=20).encode(source, Tokenizer(fails_after=50), center, batch=5)
    encode, cache = Tokenizer(), TokenCache(tmp_path / "tokens", SETTINGS, shard=20)
    assert len(cache.shards()) == 2
    tokens = cache.encode(source, encode, center)
    assert encode.seen == 60
    assert [path.name for path in cache.shards()] == [f"shard-{i:05}.parquet" for i in range(5)]
    assert cached(tokens) == direct(source)


def test_shards_are_parted_among_processes(tmp_path):
    source = open_source(*with_csv(tmp_path / "set", 50))
    barrier, results = threading.Barrier(3), {}
    caches = [TokenCache(tmp_path / "t", SETTINGS, rank=r, world=3, barrier=barrier.wait, shard=10) for r in range(3)]

    def work(rank: int) -> None:
        results[rank] = caches[rank].encode(source, Tokenizer(), center)

    threads = [threading.Thread(target=work, args=[rank]) for rank in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [results[rank].encoded for rank in range(3)] == [20, 20, 10]
    assert all(cached(results[rank]) == direct(source) for rank in range(3))


@pytest.mark.parametrize("rows", [7, 10_000])
def test_crops(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(token_cache, "ROW_GROUP", rows)
    source = open_source(*with_csv(tmp_path / "set", 9))
    cache = TokenCache(tmp_path / "tokens", SETTINGS | {"crop": "ten:1.1"})
    tokens = cache.encode(source, Tokenizer(), lambda image: crops(image, 8, "ten:1.1"), batch=3)
    assert tokens.crops == 10
    for i in range(9):
        expected = Tokenizer()(crops(source.image(i), 8, "ten:1.1")).flatten(1)
        assert [tokens.ids(i, crop).tolist() for crop in range(10)] == expected.tolist()
    with pytest.raises(IndexError):
        tokens.ids(0, 10)


def test_crops_are_those_of_torchvision():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    size, large = 16, np.asarray(crop_adm(image, int(16 * 1.1)))
    far, middle = len(large) - size, round((len(large) - size) / 2)
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    expected = [each[y : y + size, x : x + size] for each in (large, large[:, ::-1]) for y, x in corners]
    assert all((np.asarray(a) == b).all() for a, b in zip(crops(image, size, "ten:1.1"), expected, strict=True))
    plain, mirror = crops(image, size, "flip")
    assert (np.asarray(plain)[:, ::-1] == np.asarray(mirror)).all()
    for how in ("ten", "ten:0.9", "ten:3", "twelve"):
        with pytest.raises(ValueError, match="expected center, flip or ten:RANGE"):
            crops(image, size, how)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source, cache = open_source(*with_csv(tmp_path / "set", 6)), TokenCache(tmp_path / "tokens", SETTINGS)

    def full(file, *rest):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "write_shard", full)
        with pytest.raises(OSError, match=r"the disk is full, .*shard-00000.parquet was not written: make room"):
            cache.encode(source, Tokenizer(), center)
    assert not cache.shards()
    assert not list(cache.folder.glob(".*"))
    assert cached(cache.encode(source, Tokenizer(), center)) == direct(source)


def test_a_damaged_shard_is_encoded_again(tmp_path, caplog):
    source, cache = open_source(*with_csv(tmp_path / "set", 6)), TokenCache(tmp_path / "tokens", SETTINGS)
    cache.encode(source, Tokenizer(), center)
    cache.shards()[0].write_bytes(cache.shards()[0].read_bytes()[:-200])
    encode = Tokenizer()
    assert cached(cache.encode(source, encode, center)) == direct(source)
    assert encode.seen == 6
    assert "its images are encoded again" in caplog.text


def test_ids_that_are_none(tmp_path):
    source, cache = open_source(*with_csv(tmp_path / "set", 6)), TokenCache(tmp_path / "tokens", SETTINGS)
    for wrong in (lambda images: torch.rand(len(images), 4), lambda images: torch.full((len(images), 4), -1)):
        with pytest.raises(ValueError, match="expected whole numbers"):
            cache.encode(source, wrong, center)
    with pytest.raises(ValueError, match="1 token grids for 6 images of 1 crops"):
        cache.encode(source, lambda images: torch.zeros(1, 4, dtype=torch.long), center)


def test_prune_deletes_what_was_not_used_for_longest(tmp_path):
    source, folders = open_source(*with_csv(tmp_path / "set", 20)), []
    for age in range(3):
        cache = TokenCache(tmp_path / "t", SETTINGS | {"size": age})
        cache.encode(source, Tokenizer(), center)
        os.utime(cache.folder / "manifest.json", (1000 + age, 1000 + age))
        folders.append(cache.folder)
        del cache
    in_use = TokenCache(tmp_path / "t", SETTINGS | {"size": 0})
    os.utime(in_use.folder / "manifest.json", (1, 1))
    most = sum(file.stat().st_size for file in (tmp_path / "t").rglob("*") if file.is_file()) - 100
    assert prune(tmp_path / "t", 10**9) == []
    assert prune(tmp_path / "t", most) == [folders[1]]
    assert prune(tmp_path / "t", 0) == [folders[2]]
    assert in_use.folder.exists()
    tokens = in_use.encode(source, Tokenizer(), center)
    del in_use
    assert prune(tmp_path / "t", 0) == []
    assert tokens.ids(3).tolist() == direct(source)[3]
    del tokens
    assert prune(tmp_path / "t", 0) == [folders[0]]


def encode_texts(texts: list[str]) -> list[torch.Tensor]:
    return [torch.arange(len(text) * 3, dtype=torch.float32).reshape(-1, 3) / 8 for text in texts]


def test_features_of_texts(tmp_path):
    texts = [caption(i)[: 3 + i] for i in range(12)] + [""]
    settings = {"encoder": "b" * 64, "max_length": 120}
    cache = FeatureCache(None, settings, shard=5)
    assert cache.encode([*texts, *texts], encode_texts) == 13
    assert len(cache.shards()) == 3
    again = FeatureCache(None, settings)
    assert again.encode([*texts, "new"], encode_texts, batch=1) == 1
    for text in [*texts, "new"]:
        assert text in again
        features = again.features(text)
        assert features.dtype == torch.bfloat16
        assert torch.equal(features, encode_texts([text])[0].bfloat16())
    with pytest.raises(KeyError):
        again.features("unknown")
    assert FeatureCache(None, {"encoder": "c" * 64}).encode(texts, encode_texts) == 13
    assert again.folder.parent == tmp_path / "cache" / "features"
