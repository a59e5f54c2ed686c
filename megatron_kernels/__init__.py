"""Fused kernels for Megatron-style transformers, and the GPT-2 made from them."""

from . import checkpoint, compat, models, nn, parallel, reference
from .backend import implementations, use
from .compat.huggingface import patch, unpatch
from .ops import bias_gelu, cross_entropy, layer_norm, scaled_masked_softmax

__version__ = "0.1.0"
__all__ = ["bias_gelu", "checkpoint", "compat", "cross_entropy", "implementations", "layer_norm", "models", "nn", "parallel",
           "patch", "reference", "scaled_masked_softmax", "unpatch", "use"]
