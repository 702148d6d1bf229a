"""`argen ui`."""

import argparse
import os
import signal
import sys
from pathlib import Path

from argen.command import device_argument, device_for, load_arguments, load_options

HELP = "open the web page, and the APIs of OpenAI and A1111"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=7860, help="of the page and the APIs; 0 for any that is free")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to let other machines in, which needs a --key")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("pictures"), metavar="DIR", help="where finished images are kept"
    )
    parser.add_argument(
        "--key", action="append", default=[], help="which clients must show; again for each user, or ARGEN_KEYS"
    )
    parser.add_argument("--no-metadata", action="store_true", help="write no settings into the images' files")
    parser.add_argument(
        "--model-dir",
        type=Path,
        action="append",
        metavar="DIR",
        help="where the page may load saved pipelines from; again for each (default: the current folder, none with a --key)",
    )
    parser.add_argument(
        "--model-memory",
        type=float,
        metavar="GB",
        help="of models that stay loaded; the least recently used ones are released (default: half of the memory)",
    )
    device_argument(parser)
    load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from argen.hub.loading import loader
    from argen.hub.model_cache import ModelCache
    from argen.jobs.queue import Studio
    from argen.server.app import create, serve
    from argen.server.guard import LOCAL_HOSTS, check_keys, owner_of
    from argen.ui.build import build
    from argen.ui.context import AppContext

    keys = [key for key in [*args.key, *os.environ.get("ARGEN_KEYS", "").split(",")] if key]
    if args.host not in LOCAL_HOSTS and not keys:
        raise ValueError(f"--host {args.host} lets other machines in: give --key KEY too, which they must show")
    check_keys(keys)
    if args.model_memory is not None and not 0 < args.model_memory < 1e6:
        raise ValueError(f"--model-memory is {args.model_memory}: expected a number of gigabytes above 0")
    limit = None if args.model_memory is None else int(args.model_memory * 1e9)
    folders = args.model_dir or ([] if keys else [Path()])
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--model-dir {folder} is not a folder: expected one that exists")
    os.umask(0o077)  # what is kept is for its owner's eyes alone
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the queue is closed, as at Ctrl-C
    device = device_for(args.device, load_options(args))
    studio = Studio(
        args.data_dir, ModelCache(device, loader(device, **load_options(args)), limit), not args.no_metadata, folders
    )
    try:
        page = build(AppContext(studio, owner_of(keys[0]) if keys else None, device, limit))
        serve(create(studio, page, keys, args.host in LOCAL_HOSTS), args.host, args.port)
    finally:
        studio.close()
