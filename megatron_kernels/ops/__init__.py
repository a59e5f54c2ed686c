"""The public functions: one file per op with its signature, shape functions and autograd."""

from .bias_gelu import bias_gelu
from .cross_entropy import cross_entropy
from .layer_norm import layer_norm
from .scaled_masked_softmax import scaled_masked_softmax

__all__ = ["bias_gelu", "cross_entropy", "layer_norm", "scaled_masked_softmax"]
