"""Published files: fetched once at the revision of their first fetch, and checked against their first digests afterwards."""

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects

logger = logging.getLogger(__name__)
RECORD = (
    "argen.json"  # in a repository's folder of the hub's cache, and in that of torch: revision and SHA-256 of its files
)
_lock = threading.Lock()
_checked: set[tuple[Path, int, int]] = set()  # files (path, size, time of change) that this process has checked


def hub_folder(repo: str, files: Sequence[str]) -> Path:
    """The folder of a hub repository with `files` (names or glob patterns), out of the hub's cache or fetched into it, of the revision
    that was first fetched.

    Raises:
        ConnectionError: they are not here and cannot be fetched.
        ValueError: a file is not what was first fetched.
    """
    record = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / RECORD
    try:
        revision = _read(record).get("revision")
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"{', '.join(files)} of {repo} is not on this machine and could not be fetched from the hub: connect to the "
            "network, or put it into the hub's cache"
        ) from error
    cached_files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    check_digests(record, folder, list(filter_repo_objects(cached_files, allow_patterns=list(files))), folder.name)
    return folder


def model_folder(name: str) -> Path:
    """The folder of a network in transformers' layout: `name` itself, or that of a hub repository with its settings, its words and its
    weights, as safetensors where it has them.

    Raises:
        ConnectionError, ValueError: as `hub_folder`.
    """
    if Path(name).is_dir():
        return Path(name)
    folder = hub_folder(name, ("*.json", "*.txt", "*.model", "model*.safetensors"))
    if not any(folder.glob("model*.safetensors")):
        hub_folder(name, ("pytorch_model*.bin",))
    return folder


def hub_file(repo: str, name: str) -> Path:
    """One file of a hub repository, see `hub_folder`."""
    path = hub_folder(repo, [name]) / name
    if not path.is_file():  # the cache has the repository, without it
        raise ConnectionError(f"{name} of {repo} is not in the hub's cache: connect to the network to fetch it")
    return path


def download(url: str, path: Path, refusal: str, sha256: str | None = None) -> Path:
    """One file that lies outside the hub, at `path`, or fetched there: all of it, or nothing.

    Args:
        sha256: how its digest begins; None where none is published: then that of the first fetch is kept and asked for.

    Raises:
        ConnectionError: `refusal`, where it cannot be fetched.
        ValueError: it is not what was first fetched.
    """
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(refusal) from error
    if sha256 is None:
        check_digests(path.with_name(RECORD), path.parent, [path.name])
    return path


def check_digests(record: Path, folder: Path, names: Sequence[str], revision: str | None = None) -> None:
    """Compare files with the digests in `record`, once in a process, and add those that it lacks.

    Raises:
        ValueError: a file has another digest.
    """
    with _lock:
        saved = _read(record)
        digests = dict(saved.get("files", {}))
        for name in names:
            path = folder / name
            stat = path.stat()
            facts = path, stat.st_size, stat.st_mtime_ns
            if facts in _checked and name in digests:
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != digests.setdefault(name, digest):
                raise ValueError(
                    f"{path} is not the file that was first fetched (its SHA-256 begins with {digest[:12]}, expected "
                    f"{digests[name][:12]}): delete {path.resolve()} to fetch it again, or {record} to accept it"
                )
            _checked.add(facts)
        updated = ({"revision": revision} if revision else {}) | {"files": digests}
        if updated != saved:
            _write(record, updated)


def _read(record: Path) -> dict:
    try:
        content = json.loads(record.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("files", {}), dict):
        raise ValueError(f"{record} cannot be read: delete it to accept the files beside it as they are")
    return content


def _write(record: Path, content: dict) -> None:
    part = record.with_name(f"{RECORD}.part")
    try:
        part.write_text(json.dumps(content, indent=1))
        part.replace(record)
    except OSError as error:  # the cache is read-only
        logger.warning("the digests of fetched files could not be kept in %s (%s)", record, error.strerror)
