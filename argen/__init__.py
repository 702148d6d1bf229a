"""argen: a studio for autoregressive image generation."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argen.hub.cards import list_models as list_models
    from argen.hub.loading import load as load
    from argen.registry import register as register
    from argen.request import Request as Request

# transformers says at each start that without torchvision it uses Pillow, which is what argen wants: torchvision is no dependency.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda one: "torchvision" not in one.getMessage())

__version__ = "0.2.0"
_PUBLIC = {
    "load": "argen.hub.loading",
    "list_models": "argen.hub.cards",
    "register": "argen.registry",
    "Request": "argen.request",
}
__all__ = list(_PUBLIC)


if not TYPE_CHECKING:  # or any name would be one of argen's

    def __getattr__(name: str):
        if name in _PUBLIC:  # late, so that `import argen` and its command line start at once
            return getattr(import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'argen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
