"""Which weights are on this machine: where, how large, whether they are whole, and away with them."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import CacheNotFound

from argen.files import WEIGHTS
from argen.hub.cards import all_cards, find_card, is_own

SUMS = WEIGHTS / "SHA256SUMS"  # of what ships, as `sha256sum` writes them


@dataclass(frozen=True)
class Holding:
    """A model and where its weights are.

    Attributes:
        folder: None if they are not here.
        bytes: on disk; of a hub repository all of it that is here.
    """

    id: str
    folder: Path | None
    bytes: int

    @property
    def ships(self) -> bool:
        return all_cards()[self.id].repo is None

    @property
    def downloaded(self) -> bool:
        return not self.ships and self.folder is not None

    @property
    def state(self) -> str:
        if self.ships:
            return "ships with argen" if is_own(self.id) else "installed package"
        return "downloaded" if self.downloaded else "not here"


def local_cache() -> list[Holding]:
    """List the weights of every model, in the order of the registry."""
    repos, holdings = _cached(), []
    for name, model in all_cards().items():
        if model.repo is None:
            folder = model.path
            size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
            holdings.append(Holding(name, folder, size))
        else:
            repo = repos.get(model.repo)
            holdings.append(Holding(name, repo and repo.repo_path, repo.size_on_disk if repo else 0))
    return holdings


def verify(id: str) -> dict[str, bool]:
    """Whether each file of a model is what it was when it was released.

    Raises:
        ValueError: no such model.
        FileNotFoundError: it is not here.
    """
    if find_card(id).repo is None:
        lines = (line.split("  ", 1) for line in SUMS.read_text().splitlines())
        prefix = f"{id.removeprefix('argen/')}/"
        digests = {name: digest for digest, name in lines if name.startswith(prefix)}
        if not digests:
            raise ValueError(f"no checksums of {id} are known: only those of argen's own weights and of hub files are")
        return {name: _digest(WEIGHTS / name, "sha256") == digest for name, digest in digests.items()}
    files = {file.file_name: file.blob_path for revision in _repo(id).revisions for file in revision.files}
    return {name: _as_named(path) for name, path in sorted(files.items())}


def delete(id: str) -> list[str]:
    """Delete what the hub's cache has of a model's repository -> the ids that lose their weights with it.

    Raises:
        ValueError: no such model, or one that ships.
        FileNotFoundError: it is not here.
    """
    repo = find_card(id).repo
    if repo is None:
        raise ValueError(f"{id} ships with argen and cannot be deleted alone: choose a downloaded model")
    revisions = [revision.commit_hash for revision in _repo(id).revisions]
    _cache().delete_revisions(*revisions).execute()
    return [name for name, model in all_cards().items() if model.repo == repo]


def set_offline(offline: bool) -> None:
    """Whether the hub is left alone from now on."""
    huggingface_hub.constants.HF_HUB_OFFLINE = offline


def is_offline() -> bool:
    return huggingface_hub.constants.HF_HUB_OFFLINE


def _cached() -> dict:
    """What the hub's cache has, by the names of the repositories."""
    try:
        return {repo.repo_id: repo for repo in _cache().repos if repo.repo_type == "model"}
    except CacheNotFound:
        return {}


def _cache() -> huggingface_hub.HFCacheInfo:
    return huggingface_hub.scan_cache_dir(huggingface_hub.constants.HF_HUB_CACHE)


def _repo(id: str):
    repo = _cached().get(find_card(id).repo)
    if repo is None:
        raise FileNotFoundError(f"the weights of {id} are not here: they are fetched when it is first used")
    return repo


def _as_named(path: Path) -> bool:
    """Whether a file of the hub's cache has the digest that is its name: SHA-256 of large ones, git's own of others."""
    if re.fullmatch(r"[0-9a-f]{64}", path.name):
        return _digest(path, "sha256") == path.name
    return _digest(path, "sha1", f"blob {path.stat().st_size}\0".encode()) == path.name


def _digest(path: Path, kind: str, before: bytes = b"") -> str | None:
    """Digest of `before` and a file; None where there is no file."""
    if not path.is_file():
        return None
    digest = hashlib.new(kind, before)
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
