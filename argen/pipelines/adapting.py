"""LoRA on a pipeline that is loaded, by the names that diffusers has for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from argen.hub.loading import compile_decoding
from argen.hub.quantized import PART, quantized
from argen.models.lora import Adapter, add_adapters, check_fits, parse, read_adapter
from samplers.errors import InvalidValue


class Adapting(DiffusionPipeline):
    """Mixin of `TokenPipeline`: adapters of the network that writes the tokens."""

    _adapters: dict[str, tuple[Adapter, float]] = {}
    _unchanged: dict[str, torch.Tensor] = {}  # parameters as they are without adapters
    _fused: dict[str, float] = {}  # adapters that `fuse_lora` has made a part of the weights, and their weights before

    def load_lora_weights(self, pretrained_model_name_or_path: str | Path, adapter_name: str | None = None) -> None:
        """Add a LoRA to the weights; "PATH:WEIGHT" adds a part of it.

        Args:
            adapter_name: by which `set_adapters` knows it; None for "default_0", "default_1" and so on.

        Raises:
            ValueError: there is none, it is of another network, or there is one of that name; a quantized model.
        """
        if quantized(self):
            raise InvalidValue("the model is quantized: load it with lora=, which is added before rounding", "lora")
        folder, weight = parse(str(pretrained_model_name_or_path))
        adapter = read_adapter(folder)
        name = adapter_name or f"default_{len(self._adapters)}"
        if name in self._adapters:
            raise InvalidValue(f"there is a LoRA called {name} already: choose another adapter_name", "adapter_name")
        self._restore()
        try:
            check_fits(getattr(self, PART), adapter)
            self._adapters = self._adapters | {name: (adapter, weight)}
        finally:
            self._add()

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Choose which adapters count, each with its weight; those that are not named count nothing.

        Raises:
            ValueError: there is none of a name, or there are not as many weights as names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights: Any = 1.0 if adapter_weights is None else adapter_weights
        weights = [weights] * len(names) if isinstance(weights, int | float) else list(weights)
        unknown = [name for name in names if name not in self._adapters]
        if unknown or len(weights) != len(names):
            expected = ", ".join(self._adapters) or "none, there are no adapters"
            wrong = (
                f"there is no LoRA called {unknown[0]}"
                if unknown
                else f"{len(weights)} weights for {len(names)} adapters"
            )
            raise InvalidValue(f"{wrong}: expected some of {expected}", "adapter_names")
        self._check_separate(names)
        chosen = dict(zip(names, weights, strict=True))
        self._restore()
        self._adapters = {
            name: (adapter, weight if name in self._fused else chosen.get(name, 0.0))
            for name, (adapter, weight) in self._adapters.items()
        }
        self._add()

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Make adapters a part of the weights, so that they stay there when all are unloaded, and are saved with them.

        Args:
            lora_scale: by which their weights are multiplied.
            adapter_names: which; None for all that count.

        Raises:
            ValueError: there is none, or none of a name; one is fused already.
        """
        names = [name for name in self.get_active_adapters() if name not in self._fused]
        names = names if adapter_names is None else list(adapter_names)
        unknown = [name for name in names if name not in self._adapters]
        if unknown or not names:
            wrong = f"there is no LoRA called {unknown[0]}" if unknown else "there is no LoRA to fuse"
            raise InvalidValue(f"{wrong}: add one with load_lora_weights first", "adapter_names")
        self._check_separate(names)
        self._restore()
        self._fused = self._fused | {name: self._adapters[name][1] for name in names}
        scaled = {name: (self._adapters[name][0], lora_scale * self._fused[name]) for name in names}
        self._adapters = self._adapters | scaled
        self._add()

    def unfuse_lora(self) -> None:
        """Let the adapters that were fused, and were not unloaded since, be adapters as they were before."""
        self._restore()
        before = {name: (self._adapters[name][0], weight) for name, weight in self._fused.items()}
        self._adapters, self._fused = self._adapters | before, {}
        self._add()

    def unload_lora_weights(self) -> None:
        """Take all adapters away; the weights are what they were, but for what was fused, which stays."""
        self._restore()
        self._adapters = {name: value for name, value in self._adapters.items() if name in self._fused}
        self._add()
        self._adapters, self._unchanged, self._fused = {}, {}, {}

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that count."""
        return [name for name, (_, weight) in self._adapters.items() if weight]

    def _check_separate(self, names: Sequence[str]) -> None:
        """Raises:
        InvalidValue: one of the adapters is fused.
        """
        if fused := [name for name in names if name in self._fused]:
            raise InvalidValue(
                f"the LoRA {fused[0]} is a part of the weights: call unfuse_lora() first", "adapter_names"
            )

    def _restore(self) -> None:
        parameters = dict(getattr(self, PART).named_parameters())
        for name, value in self._unchanged.items():
            parameters[name].data = value.to(parameters[name].device, parameters[name].dtype)
        self._unchanged = {}

    def _add(self) -> None:
        network = getattr(self, PART)
        parameters = dict(network.named_parameters())
        touched = {f"{name}.weight" for adapter, _ in self._adapters.values() for name in adapter.factors}
        touched |= {name for adapter, _ in self._adapters.values() for name in adapter.whole}
        self._unchanged = {name: parameters[name].data for name in touched}
        add_adapters(network, list(self._adapters.values()), checked=True)
        if getattr(network, "compiled", None) is not None:
            compile_decoding(self, self.device)
