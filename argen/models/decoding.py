"""What the networks have that decode token by token with a cache: how they are read where they are quantized, and moved where they are compiled."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from argen.models.quantized import stores_quantized

logger = logging.getLogger(__name__)
FILE = "diffusion_pytorch_model.safetensors"  # what diffusers calls it


class Decoding(nn.Module):
    """Mixin of the networks that decode token by token, before diffusers' `ModelMixin`.

    Attributes:
        compiled: what decodes in its place where it fits, see `argen.models.compiled` and `argen.models.graphed`; or None.
    """

    compiled: Any = None
    if TYPE_CHECKING:  # of diffusers, whose classes type checkers do not see
        config: Any
        dtype: torch.dtype
        device: torch.device

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Read a saved network as diffusers does.

        Raises:
            ValueError: it is that of a quantized pipeline, whose folder `argen.load` reads.
        """
        folder = Path(pretrained_model_name_or_path) / (arguments.get("subfolder") or "")
        if (file := folder / FILE).is_file() and stores_quantized(file):
            whole = (folder.parent / "model_index.json").is_file()
            advice = (
                f"load that with argen.load({str(folder.parent)!r})" if whole else "save its pipeline, and load that"
            )
            raise ValueError(f"{folder} is the network of a quantized pipeline: {advice}")
        return super().from_pretrained(pretrained_model_name_or_path, **arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's; what was compiled of the network is released when it comes into another precision."""
        before = None if self.compiled is None else self.dtype
        super()._apply(fn, recurse)
        if before not in (None, self.dtype):
            self.compiled.release()
            if not self.compiled.fits():
                logger.warning(
                    "a %s is compiled in float32: in %s it decodes uncompiled", type(self).__name__, self.dtype
                )
        return self
