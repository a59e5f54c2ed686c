"""The losses of Megatron-LM and apex under their names: nothing is overwritten, gradients have the logits' dtype."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from .. import ops
from .arguments import UpstreamError

_IGNORED = -100


def _tensor_parallel_group(group: Any) -> Any:
    """The group given, else Megatron's tensor-parallel group where Megatron-core runs in this process, else None: one rank."""
    state = sys.modules.get("megatron.core.parallel_state")
    if group is None and state is not None:
        return state.get_tensor_model_parallel_group(check_initialized=False)
    return group


def vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0,
                                 tp_group: Any = None) -> Tensor:
    """The loss of each token, of logits whose columns are spread over a group in equal shares.

    Args:
        vocab_parallel_logits: [s, b, vocabulary / ranks], or any leading dimensions.
        target: [s, b], class numbers of the whole vocabulary; a negative one gives loss 0 and gradient 0.
        label_smoothing: a in [0, 1): the other K - 1 classes share a of the probability, K being the whole vocabulary. (PyTorch
            shares it among all K classes: its a is this one times K / (K - 1).)
        tp_group: a ProcessGroup; None: Megatron-core's tensor-parallel group where it is initialised, else this process alone.

    Returns:
        [s, b], float32 (float64 for float64).

    Raises:
        UpstreamError: label_smoothing out of range. On a CPU a target beyond the vocabulary raises RuntimeError.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise UpstreamError(f"vocab_parallel_cross_entropy: label_smoothing must be in [0, 1), got {label_smoothing}")
    group = _tensor_parallel_group(tp_group)
    ranks = 1 if group is None else group.size()
    if label_smoothing:
        classes = vocab_parallel_logits.shape[-1] * ranks
        label_smoothing *= classes / (classes - 1) if classes > 1 else 0.0
    target = target.masked_fill(target < 0, _IGNORED)
    if ranks == 1:
        return ops.cross_entropy(vocab_parallel_logits, target, ignore_index=_IGNORED, label_smoothing=label_smoothing,
                                 reduction="none")
    from ..parallel.cross_entropy import vocab_parallel_cross_entropy as of_group  # only who has a group needs it

    return of_group(vocab_parallel_logits, target, group, ignore_index=_IGNORED, label_smoothing=label_smoothing)


def fused_vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any = None) -> Tensor:
    """`vocab_parallel_cross_entropy` without smoothing, as megatron.core.fusions.fused_cross_entropy has it."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, 0.0, tp_group)


class SoftmaxCrossEntropyLoss:
    """apex.contrib.xentropy: apply(logits [n, classes], labels [n]) -> the loss of each row, float32.

    smoothing is shared by all classes, as in PyTorch. Rows labelled padding_idx, by default 0, give loss 0 and gradient 0. Any
    number of leading dimensions works. half_to_float changes nothing: the loss is float32 always.
    """

    @staticmethod
    def apply(logits: Tensor, labels: Tensor, smoothing: float = 0.0, padding_idx: int = 0, half_to_float: bool = False) -> Tensor:
        return ops.cross_entropy(logits, labels, ignore_index=padding_idx, label_smoothing=smoothing, reduction="none")
