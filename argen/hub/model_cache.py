"""Models that are in memory, shared by all who ask for them."""

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil
import torch

from argen.hub.loading import load, move, networks_of


class ModelCache:
    """Models by their ids, each loaded when it is first asked for, and once, whatever threads ask; the least recently used ones are
    released when all together are too large.

    Args:
        device: where they are put.
        load: id -> the model, on the CPU.
        limit: bytes that they may take together; one alone may be larger. None for half of the memory of the device.
    """

    def __init__(self, device: torch.device | str, load: Callable[[str], Any] = load, limit: int | None = None):
        self.device, self.load = torch.device(device), load
        self.limit = memory(self.device) // 2 if limit is None else limit
        self.loaded: dict[str, Any] = {}  # the least recently used first
        self.lock = threading.Lock()
        self.locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __call__(self, model: str) -> Any:
        with self.locks[model]:  # others can be loaded while this one is fetched
            with self.lock:
                loaded = self.loaded.pop(model, None)
            if loaded is None:
                loaded = move(self.load(model), self.device)
            with self.lock:
                self.loaded[model] = loaded
                for old in list(self.loaded)[:-1]:
                    if sum(map(size_of, self.loaded.values())) <= self.limit:
                        break
                    del self.loaded[old]
            return loaded

    def forget(self, model: str) -> None:
        """Release a model; who asks for it next has it loaded again."""
        with self.locks[model], self.lock:
            self.loaded.pop(model, None)


def size_of(model: Any) -> int:
    """Bytes of the weights of a network or of a pipeline."""
    tensors = {
        id(tensor): tensor for network in networks_of(model) for tensor in (*network.parameters(), *network.buffers())
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
