"""Tools on the Stable Diffusion pipelines of diffusers: what a prompt binds, forbids and counts."""

from argen.diffusion.count_token import CountToken
from argen.diffusion.rece import ConceptErasure
from argen.diffusion.tome import SemanticBinding

__all__ = ["ConceptErasure", "CountToken", "SemanticBinding"]
