"""Drop-in names for code that is written for Megatron-LM and apex. What differs from them on purpose: docs/differences.md.

`install()` registers the extension modules that their Python code imports, `patch_megatron()` puts our ops into an installed
Megatron-core, and the classes and functions here have the signatures of theirs. Nothing of either is imported unless asked.
"""

from .arguments import UpstreamError
from .cross_entropy import SoftmaxCrossEntropyLoss, fused_vocab_parallel_cross_entropy, vocab_parallel_cross_entropy
from .fusions import bias_dropout_add, bias_gelu_impl, get_bias_dropout_add
from .megatron import patch_megatron, unpatch_megatron
from .modules import install, uninstall
from .norms import FastLayerNorm, FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm
from .softmax import (
    AttnMaskType,
    FusedScaleMaskSoftmax,
    GenericScaledMaskedSoftmax,
    ScaledMaskedSoftmax,
    ScaledSoftmax,
    ScaledUpperTriangMaskedSoftmax,
)

__all__ = ["AttnMaskType", "FastLayerNorm", "FusedLayerNorm", "FusedRMSNorm", "FusedScaleMaskSoftmax", "GenericScaledMaskedSoftmax",
           "MixedFusedLayerNorm", "ScaledMaskedSoftmax", "ScaledSoftmax", "ScaledUpperTriangMaskedSoftmax",
           "SoftmaxCrossEntropyLoss", "UpstreamError", "bias_dropout_add", "bias_gelu_impl", "fused_vocab_parallel_cross_entropy",
           "get_bias_dropout_add", "install", "patch_megatron", "uninstall", "unpatch_megatron", "vocab_parallel_cross_entropy"]
