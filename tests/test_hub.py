"""Files of the hub: of one revision, and the same as when they were first fetched."""

import json

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from tokenizers_img import hub


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A hub with one repository, whose head moves: the revisions that were asked for."""
    revisions, state = [], {"head": "a" * 40, "content": b"first"}

    def fetched(repo, revision, allow_patterns):
        revisions.append(revision)
        folder = tmp_path / f"models--{repo.replace('/', '--')}/snapshots" / (revision or state["head"])
        for name in ("config.json", "sub/weights.pt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():
                (folder / name).write_bytes(state["content"])
        return str(folder)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "snapshot_download", fetched)
    monkeypatch.setattr(hub, "_checked", set())
    return revisions, state


def test_the_revision_of_the_first_fetch_is_kept(repository, tmp_path):
    revisions, state = repository
    folder = hub.hub_folder("a/b", ["*.json", "sub/*"])
    state["head"], state["content"] = "b" * 40, b"second"
    assert hub.hub_folder("a/b", ["*.json", "sub/*"]) == folder
    assert revisions == [None, "a" * 40]
    held = json.loads((tmp_path / "models--a--b/argen.json").read_text())
    assert held["revision"] == "a" * 40
    assert held["files"].keys() == {"config.json", "sub/weights.pt"}
    assert held["files"]["config.json"] == "a7937b64b8caa58f03721bb6bacf5c78cb235febe0e70b1b84cd99541461a08e"


def test_a_file_that_was_exchanged_is_refused_in_one_line(repository, monkeypatch):
    path = hub.hub_file("a/b", "sub/weights.pt")
    assert path.read_bytes() == b"first"
    for _ in range(2):  # also in another process
        path.write_bytes(b"other")
        with pytest.raises(
            ValueError, match="is not the file that was first fetched .*delete .* to fetch it again"
        ) as error:
            hub.hub_folder("a/b", ["sub/*"])
        assert "\n" not in str(error.value)
        path.write_bytes(b"first")
        assert hub.hub_file("a/b", "sub/weights.pt") == path
        monkeypatch.setattr(hub, "_checked", set())


def test_files_are_read_for_their_digest_once_in_a_process(repository, monkeypatch):
    hub.hub_folder("a/b", ["*"])
    monkeypatch.setattr(hub.hashlib, "file_digest", None)
    hub.hub_folder("a/b", ["*"])
    monkeypatch.setattr(hub, "_checked", set())
    with pytest.raises(TypeError):
        hub.hub_folder("a/b", ["*"])


def test_a_record_that_is_cut_is_said(repository, tmp_path):
    hub.hub_folder("a/b", ["*"])
    (tmp_path / "models--a--b/argen.json").write_text('{"revi')
    with pytest.raises(ValueError, match="argen.json cannot be read: delete it"):
        hub.hub_folder("a/b", ["*"])


def test_a_network_of_transformers_is_fetched_with_one_form_of_its_weights(tmp_path, monkeypatch):
    held = {
        "a/new": ["config.json", "model.safetensors", "pytorch_model.bin"],
        "a/old": ["config.json", "pytorch_model.bin"],
    }

    def fetched(repo, revision, allow_patterns):
        folder = tmp_path / f"models--{repo.replace('/', '--')}/snapshots/{'a' * 40}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(held[repo], allow_patterns=allow_patterns):
            (folder / name).write_bytes(b"x")
        return str(folder)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "snapshot_download", fetched)
    names = {repo: sorted(path.name for path in hub.model_folder(repo).iterdir()) for repo in held}
    assert names == {"a/new": ["config.json", "model.safetensors"], "a/old": ["config.json", "pytorch_model.bin"]}
    assert hub.model_folder(str(tmp_path)) == tmp_path


def test_a_file_outside_the_hub_keeps_its_first_digest(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints/eva.pth"
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, to, hash_prefix: path.write_bytes(b"first"))
    assert hub.download("http://x", path, "refused") == path
    assert hub.download("http://x", path, "refused") == path
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the file that was first fetched"):
        hub.download("http://x", path, "refused")
    path.unlink()
    assert hub.download("http://x", path, "refused").read_bytes() == b"first"
