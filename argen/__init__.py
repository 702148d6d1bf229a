"""argen: a studio for autoregressive image generation."""

import logging

# transformers says at each start that without torchvision it uses Pillow, which is what argen wants: torchvision is no dependency.
logging.getLogger("transformers.utils.import_utils").addFilter(lambda one: "torchvision" not in one.getMessage())

__version__ = "0.1.0"
__all__ = ["MODELS", "load"]


def __getattr__(name: str):
    if name in __all__:  # late, so that `import argen` and its command line start at once
        from argen import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'argen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
