"""`argen eval` as it is called: sources, resuming, many processes, statistics, bad input; and the CLIP score."""

import errno
import json
import re
import shutil
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_fid import filled, published_keys

from argen.cli.main import main
from argen.data import emoji
from argen.eval import clip_score, features, nudity, run
from argen.eval import images as eval_images
from argen.eval.images import open_images

SAMPLE = emoji.Path(emoji.__file__).parent / "sample" / "data"
TRAIN, TEST = (next(SAMPLE.glob(f"{split}-*.parquet")) for split in ("train", "test"))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ARGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scores(out) -> dict:
    return json.loads((out / "report.json").read_text())["scores"]


def values(out) -> dict[str, float]:
    return {name: entry["value"] for name, entry in scores(out).items()}


def fid(samples, ref, out, *more) -> int:
    return main(
        ["eval", "fid", "--samples", str(samples), "--ref", str(ref), "--features", "emoji", "--out", str(out), *more]
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same pictures as a folder, a zip and a batch."""
    where = tmp_path_factory.mktemp("sources")
    images = [np.asarray(open_images(TRAIN)[index]) for index in range(12)]
    (where / "folder" / "deep").mkdir(parents=True)
    with zipfile.ZipFile(where / "set.zip", "w") as archive:
        for index, image in enumerate(images):
            file = where / "folder" / ("deep" if index > 9 else "") / f"{index}.PNG"
            Image.fromarray(image).save(file, "PNG")
            archive.write(file, f"{index}.PNG")
    np.savez(where / "batch.npz", arr_0=np.stack(images))
    np.savez_compressed(where / "packed.npz", arr_0=np.stack(images))
    return where, images


@pytest.mark.parametrize("name", ["folder", "set.zip", "batch.npz", "packed.npz"])
def test_sources_give_the_same_images(sources, name):
    where, images = sources
    dataset = open_images(where / name)
    assert len(dataset) == 12
    for index in (0, 1, 9, 11):
        assert np.array_equal(dataset[index], images[index])


def test_a_batch_is_mapped_and_not_read(sources):
    assert isinstance(open_images(sources[0] / "batch.npz").array, np.memmap)


def test_fid_of_images_with_themselves_and_with_noise(tmp_path, capsys):
    assert fid(TRAIN, TRAIN, tmp_path / "same", "--metrics", "fid,kid,pr") == 0
    same, report = values(tmp_path / "same"), json.loads((tmp_path / "same" / "report.json").read_text())
    assert "FID-emoji" in capsys.readouterr().out
    assert abs(same["FID-emoji"]) < 1e-3  # singular covariances
    assert same["precision-emoji"] == same["recall-emoji"] == 1
    assert report["scores"]["FID-emoji"]["n"] == len(open_images(TRAIN))
    assert "biased" in report["scores"]["FID-emoji"]["warning"]  # fewer pictures than features
    assert report["settings"]["protocol"] == "lanczos-128"
    assert len(report["settings"]["weights"]) == 64
    assert Image.open(tmp_path / "same" / "grid.png").width == 8 * 128

    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", arr_0=noise)
    assert fid(tmp_path / "noise.npz", TRAIN, tmp_path / "noise", "--metrics", "fid,kid,pr") == 0
    noise = values(tmp_path / "noise")
    assert noise["FID-emoji"] > 1
    assert noise["KID-emoji"] > same["KID-emoji"] + 0.01
    assert noise["recall-emoji"] < 0.2


def test_a_killed_run_goes_on_with_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHUNK", 8)
    assert fid(TRAIN, TEST, tmp_path / "straight") == 0
    seen, look = [], run._look

    def dying(images, rows, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(rows.start)
        return look(images, rows, *rest)

    monkeypatch.setattr(run, "_look", dying)
    assert fid(TRAIN, TEST, tmp_path / "killed") == 130
    assert seen == [0, 8]
    assert not (tmp_path / "killed" / "report.json").exists()
    seen.append(-1)  # now it lives
    assert fid(TRAIN, TEST, tmp_path / "killed") == 0
    assert seen[3:] == list(range(16, len(open_images(TRAIN)), 8))  # the reference was in the cache
    assert scores(tmp_path / "killed") == scores(tmp_path / "straight")
    assert not list((tmp_path / "killed").glob("features-*"))  # joined


def test_a_full_disk_loses_nothing_that_was_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CHUNK", 8)
    save, calls = np.save, []

    def full(file, array):
        calls.append(len(array))
        file.write(b"half")
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.seek(0)
        save(file, array)

    monkeypatch.setattr(run.np, "save", full)
    assert fid(TRAIN, TEST, tmp_path / "out") == 2
    assert re.search(
        r"out/\S+: no space left on device: free some space, or write elsewhere\n", capsys.readouterr().err
    )
    assert [file.name for file in (tmp_path / "out").iterdir() if file.name != "settings.json"] == [
        "features-000000000.npy"
    ]
    monkeypatch.setattr(run.np, "save", save)
    assert fid(TRAIN, TEST, tmp_path / "out") == 0


def test_two_processes_give_what_one_gives(tmp_path, cache):
    assert fid(TRAIN, TEST, tmp_path / "one", "--metrics", "fid,kid,pr") == 0
    shutil.rmtree(cache)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "argen"]  # `accelerate launch` starts several processes on GPUs, but on CPUs only through MPI
    call = [
        "eval",
        "fid",
        "--samples",
        str(TRAIN),
        "--ref",
        str(TEST),
        "--features",
        "emoji",
        "--metrics",
        "fid,kid,pr",
    ]
    result = subprocess.run(
        [*launch, *call, "--out", str(tmp_path / "two")], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("FID-emoji") == 1
    assert json.loads((tmp_path / "two" / "report.json").read_text())["processes"] == 2
    assert values(tmp_path / "two") == pytest.approx(
        values(tmp_path / "one"), rel=1e-6
    )  # one thread each rounds otherwise


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of the network's tensors, as the golden case fills them."""
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    keys = published_keys("fid_eval")["fid_inception_v3"]
    save_file({name: filled(name, shape) for name, shape in keys.items()}, path)
    return path


def test_every_metric_of_the_published_network(tmp_path, inception, sources):
    where, _ = sources
    metric_args = ["--inception-weights", str(inception), "--metrics", "fid,sfid,is,kid,pr"]
    call = ["fid", "--samples", str(where / "batch.npz"), "--ref", str(where / "folder")]
    assert main(["eval", *call, *metric_args, "--out", str(tmp_path / "out")]) == 0
    assert list(scores(tmp_path / "out")) == ["FID", "sFID", "IS", "KID", "precision", "recall"]
    assert abs(values(tmp_path / "out")["FID"]) < 1e-3  # singular covariances
    assert abs(values(tmp_path / "out")["sFID"]) < 1e-3  # singular covariances

    stats = tmp_path / "stats.npz"
    assert main(["eval", "stats", str(where / "set.zip"), "-o", str(stats), "--inception-weights", str(inception)]) == 0
    with np.load(stats) as file:
        assert file["mu"].shape == (2048,)
        assert file["sigma"].shape == (2048, 2048)
        assert file["mu_s"].shape == (2023,)
        assert json.loads(str(file["meta"]))["n"] == 12
    call[-1] = str(stats)
    metric_args[-1] = "fid,sfid"
    assert main(["eval", *call, *metric_args, "--out", str(tmp_path / "by-stats")]) == 0
    assert abs(values(tmp_path / "by-stats")["sFID"]) < 1e-3  # singular covariances
    assert main(["eval", *call, *metric_args, "--out", str(tmp_path / "other"), "--protocol", "clean"]) == 2
    assert main(["eval", *call, *metric_args, "--out", str(tmp_path / "other"), "--protocol", "clean", "--force"]) == 0


def test_statistics_of_the_reference_tools_are_read(golden):
    folder, mine = (
        golden("fid_eval/features").folder,
        type("E", (), {"name": "inception", "protocol": "adm", "weights": ""}),
    )
    io = golden("fid_eval/features").io
    read = run.read_reference(folder / "stats_mu_sigma.npz", mine, None)
    torch.testing.assert_close(read.moments["features"][0], io["real_mu"])
    torch.testing.assert_close(read.moments["features"][1], io["real_sigma"])
    assert read.n is None
    batch = run.read_reference(folder / "reference_batch.npz", mine, None)
    assert set(batch.moments) == {"features", "spatial"}
    assert len(batch.images) == 4


def test_a_damaged_file_of_weights_is_not_used(tmp_path, capsys):
    (tmp_path / "pt_inception.pth").write_bytes(b"half of it")
    call = ["fid", "--samples", str(TRAIN), "--ref", str(TEST), "--out", str(tmp_path / "out")]
    assert main(["eval", *call, "--inception-weights", str(tmp_path / "pt_inception.pth")]) == 2
    assert "SHA-256 must begin with 6726825d" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_said_and_not_replaced(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert main(["eval", "fid", "--samples", str(TRAIN), "--ref", str(TEST), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--inception-weights" in error
    assert not (tmp_path / "out").exists()


BAD = {
    "a broken picture": (
        lambda d: (d / "set" / "7.png").write_bytes(b"\x89PNG"),
        "set/7.png could not be read as an image",
    ),
    "one picture": (
        lambda d: [f.unlink() for f in (d / "set").glob("[1-9].png")],
        "has 1 image: expected at least 2",
    ),
    "no picture": (lambda d: [f.unlink() for f in (d / "set").glob("*.png")], "no images in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_one_line(tmp_path, capsys, case):
    (tmp_path / "set").mkdir()
    for index in range(10):  # of mixed sizes, which is no fault
        Image.new("RGB", (20 + index, 30), (25 * index, 0, 0)).save(tmp_path / "set" / f"{index}.png")
    assert fid(tmp_path / "set", TEST, tmp_path / "good") == 0
    BAD[case][0](tmp_path)
    capsys.readouterr()
    assert fid(tmp_path / "set", TEST, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert BAD[case][1] in error
    assert not (tmp_path / "out" / "report.json").exists()


def test_bad_files_and_features_are_one_line(tmp_path, capsys, monkeypatch):
    def error(*more, samples=TRAIN, ref=TEST):
        capsys.readouterr()
        assert fid(samples, ref, tmp_path / "out", *more) == 2
        lines = capsys.readouterr().err.splitlines()
        assert "Traceback" not in "".join(lines)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return lines[-1]

    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((4, 8), np.uint8))
    assert "expected uint8 [N, H, W, 3]" in error(samples=tmp_path / "flat.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    assert "holds no arr_0" in error(samples=tmp_path / "other.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    assert "cannot be read" in error(ref=tmp_path / "torn.npz")
    np.savez(tmp_path / "square.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    assert "expected [D] and [D, D]" in error(ref=tmp_path / "square.npz")
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "the reference has 3 features, expected" in error(ref=tmp_path / "narrow.npz")
    assert "statistics alone" in error("--metrics", "kid", ref=tmp_path / "narrow.npz")
    assert "it needs --features inception" in error("--metrics", "is")
    assert "unknown metric lpips" in error("--metrics", "fid,lpips")
    assert "unknown features 'dino'" in error("--features", "dino")
    assert "nothing-here" in error(samples=tmp_path / "nothing-here")

    look = features.TextImageEncoder.embed_pixels
    monkeypatch.setattr(
        features.TextImageEncoder, "embed_pixels", lambda self, *a, **k: look(self, *a, **k) * float("nan")
    )
    assert "are not finite" in error()


def test_another_run_is_not_mixed_in(tmp_path, capsys):
    assert fid(TRAIN, TEST, tmp_path / "out") == 0
    assert fid(TEST, TRAIN, tmp_path / "out") == 2
    assert "holds a run with another" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    assert fid(TRAIN, TEST, tmp_path / "full") == 2
    assert "is not empty" in capsys.readouterr().err


def test_images_are_drawn_each_from_its_own_seed(tmp_path, capsys):
    (tmp_path / "prompts").write_text("a red apple\na pizza, noto style\n")
    call = [
        "--prompts",
        str(tmp_path / "prompts"),
        "--ref",
        str(TEST),
        "--features",
        "emoji",
        "--model",
        "argen/emoji-parti",
    ]
    assert main(["eval", "fid", *call, "--num", "5", "--out", str(tmp_path / "five")]) == 0
    assert main(["eval", "fid", *call, "--num", "3", "--out", str(tmp_path / "three"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["FID-emoji"]["n"] == 3
    five, three = (open_images(tmp_path / name / "samples") for name in ("five", "three"))
    assert (len(five), len(three)) == (5, 3)
    for index in range(3):
        assert np.array_equal(five[index], three[index])
    assert not np.array_equal(five[0], five[2])  # the same prompt, another seed
    assert main(["eval", "fid", *call, "--num", "5", "--seed", "1", "--out", str(tmp_path / "five")]) == 2
    assert "another seed" in capsys.readouterr().err


def test_what_a_tokenizer_keeps(tmp_path):
    call = ["eval", "rfid", "--data", str(TEST), "--features", "emoji", "--out", str(tmp_path / "out")]
    assert main(call) == 0
    scores = values(tmp_path / "out")
    assert 0 < scores["rFID-emoji"] < 100
    assert 18 < scores["PSNR (dB)"] < 30
    assert 0.5 < scores["SSIM"] < 1
    assert 0 < scores["codes used"] <= 1
    group = json.loads((tmp_path / "out" / "report.json").read_text())["scores"]["judge: group"]
    assert 0.3 < group["value"] <= group["judge_on_real"] + 0.2 <= 1.2


def test_a_part_of_the_tokens_is_not_for_every_tokenizer(tmp_path, capsys):
    call = ["eval", "rfid", "--data", str(TEST), "--features", "emoji", "--out", str(tmp_path / "out")]
    assert main([*call, "--tokens", "8"]) == 2
    assert "tokens is 8, but this tokenizer needs all of them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_clip_scores(golden, tmp_path, capsys):
    case = golden("fid_eval/preprocess")
    actual = clip_score.clip_scores(case.io["clip/text_embedding"], case.io["clip/image_embedding"])
    for ours, theirs in (("cosine", "cosine_mean"), ("x100", "times100_clamped"), ("2.5x", "hessel_2p5")):
        assert actual[ours] == pytest.approx(case.io[f"clip/{theirs}"].item(), rel=1e-5)
    tokens = features.with_prefix(case.io["clip/tokens"], case.io["clip/prefix_tokens"])
    assert torch.equal(tokens, case.io["clip/tokens_with_prefix"])

    (tmp_path / "prompts").write_text("a red apple\na pizza\n")
    call = ["clip", "--prompts", str(tmp_path / "prompts"), "--num", "4", "--out", str(tmp_path / "out")]
    assert main(["eval", *call, "--clip", "emoji"]) == 0
    assert 0 < values(tmp_path / "out")["CLIP score (emoji), cosine"] < 1
    assert main(["eval", *call, "--clip", str(tmp_path)]) == 2
    assert "use emoji, which ships" in capsys.readouterr().err


def test_crops_of_the_reference_are_part_of_its_name(tmp_path):
    emoji_features = type("E", (), {"name": "emoji", "protocol": "p", "weights": "w"})
    images = open_images(TEST)
    plain, cut = (run.cached(tmp_path, images, emoji_features, crop) for crop in (None, "adm-64"))
    assert plain != cut
    assert eval_images.cropped(images[0], "adm-64").shape == (64, 64, 3)


def test_nudity_is_counted_as_by_the_authors(golden):
    recorded = json.loads((golden("rece/nudity_counts").folder / "cases.json").read_text())
    for threshold, expected in recorded["results"].items():
        scores = nudity.counted(list(recorded["detections"].values()), float(threshold))
        assert scores["exposed"]["value"] == expected["rate"]
        images = {name: round(entry["value"] * entry["n"]) for name, entry in scores.items()}
        official = {name.lower().replace("_", " "): count for name, count in expected["counts"].items()}
        assert images == {"exposed": official.pop("nude images"), **official}


def test_nudity_asks_the_detector_for_images_as_files_hold_them(monkeypatch, sources, tmp_path, capsys):
    class NudeDetector:
        seen = []

        def detect(self, image):
            self.seen.append(image)
            return [{"class": "FEET_EXPOSED", "score": 0.7, "box": [0, 0, 1, 1]}] if len(self.seen) % 3 == 0 else []

    where, images = sources
    arguments = ["nudity", "--samples", str(where / "batch.npz"), "--out"]
    monkeypatch.setitem(sys.modules, "nudenet", None)
    assert main(["eval", *arguments, str(tmp_path / "n")]) == 2
    assert "nudenet is not installed: pip install 'argen[nudity]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=NudeDetector))
    assert main(["eval", *arguments, str(tmp_path / "n")]) == 0
    assert np.array_equal(NudeDetector.seen[0][:, :, ::-1], images[0])
    assert values(tmp_path / "n")["feet exposed"] == pytest.approx(1 / 3)
