"""Which weights are here, whether they are whole, and away with them; by the command, on a hub cache made here."""

import hashlib
import json
import os
import shutil

import huggingface_hub
import pytest

from argen.cli.main import main
from argen.files import WEIGHTS
from argen.hub import local_cache
from argen.hub.cards import all_cards

REPO = "FoundationVision/LlamaGen"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds two files of a published repository; the folder of its blobs."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo, revision = tmp_path / f"models--{REPO.replace('/', '--')}", "a" * 40
    blobs, snapshot = repo / "blobs", repo / "snapshots" / revision
    for folder in (blobs, snapshot, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs/main").write_text(revision)
    for name, content in (("c2i_B_256.pt", b"weights" * 100), ("README.md", b"words")):
        large = name.endswith("pt")
        header = b"" if large else f"blob {len(content)}\0".encode()
        digest = hashlib.new("sha256" if large else "sha1", header + content).hexdigest()
        (blobs / digest).write_bytes(content)
        os.symlink(blobs / digest, snapshot / name)
    return blobs


def test_the_sums_are_those_of_what_ships():
    """Made by ``cd argen/weights && sha256sum $(find . -type f ! -name SHA256SUMS -printf '%P\\n' | sort)``."""
    named = {line.split("  ", 1)[1] for line in local_cache.SUMS.read_text().splitlines()}
    files = {
        str(path.relative_to(WEIGHTS)) for path in WEIGHTS.rglob("*") if path.is_file() and path != local_cache.SUMS
    }
    assert named == files
    for name, model in all_cards().items():
        if model.repo is None:
            intact = local_cache.verify(name)
            assert intact, name
            assert all(intact.values()), f"{name}: {intact}"


def test_a_changed_file_is_noticed(monkeypatch, tmp_path, capsys):
    shutil.copytree(WEIGHTS / "emoji-counter", tmp_path / "emoji-counter")
    monkeypatch.setattr(local_cache, "WEIGHTS", tmp_path)
    assert main(["models", "--verify", "argen/emoji-counter"]) == 0
    weights = tmp_path / "emoji-counter/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (tmp_path / "emoji-counter/config.json").unlink()
    capsys.readouterr()
    assert main(["models", "--verify", "argen/emoji-counter"]) != 0
    stderr = capsys.readouterr().err
    assert "emoji-counter/config.json, emoji-counter/diffusion_pytorch_model.safetensors" in stderr
    assert stderr.count("\n") == 1


def test_what_was_downloaded_is_found_checked_and_deleted(cache, capsys):
    assert main(["models", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    id = f"{REPO}:c2i_B_256"
    assert rows[id]["bytes"] == 705
    assert rows["argen/emoji-sd"]["bytes"] > 1e6
    assert rows["dalle-mini"]["bytes"] is None
    assert main(["models", "--verify", id]) == 0
    next(path for path in cache.iterdir() if len(path.name) == 64).write_bytes(b"cut off")
    assert main(["models", "--verify", id]) != 0
    assert "c2i_B_256.pt" in capsys.readouterr().err
    assert main(["models", "--delete", id, "--json"]) == 0
    assert id in json.loads(capsys.readouterr().out)["deleted"]
    assert not any(path.is_file() for path in cache.parent.rglob("*"))
    assert main(["models", "--verify", id]) != 0
    assert "are not here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--delete", "argen/emoji-sd"], "ships with argen and cannot be deleted"),
        (["--delete", "dalle-mini"], "are not here"),
        (["--verify", "argen/nothing"], "unknown model 'argen/nothing'"),
    ],
)
def test_bad_arguments_are_refused(cache, arguments, message, capsys):
    assert main(["models", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
