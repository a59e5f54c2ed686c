"""The functions of the four softmax extensions and of xentropy_cuda, on our ops.

Positional orders and results are those of the pybind11 modules in apex's csrc/megatron and apex/contrib/csrc/xentropy. Lists stay
lists. Gradients are new tensors: scaled_upper_triang_masked_softmax_cuda and scaled_softmax_cuda overwrite the incoming one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend, reference
from .arguments import as_mask, as_scale

_EVERY_LABEL = -(2**63)  # an ignore_index that no label has


def _forward(x: Tensor, mask: Tensor | None, scale: float | Tensor, causal: bool) -> Tensor:
    with torch.no_grad():
        name = backend.choose("scaled_masked_softmax", x)
        if name == backend.REFERENCE:
            return reference.scaled_masked_softmax(x, mask, as_scale(scale), causal)
        return backend.namespace(name).scaled_masked_softmax_forward(x, mask, as_scale(scale), causal)


def _backward(output_grads: Tensor, softmax_results: Tensor, scale: float | Tensor, causal: bool) -> Tensor:
    with torch.no_grad():
        name = backend.choose("scaled_masked_softmax", softmax_results)
        if name == backend.REFERENCE:
            wide = torch.promote_types(softmax_results.dtype, torch.float32)
            y, dy = softmax_results.to(wide), output_grads.to(wide)
            return (as_scale(scale) * y * (dy - (y * dy).sum(-1, keepdim=True))).to(softmax_results.dtype)
        return backend.namespace(name).scaled_masked_softmax_backward(output_grads, softmax_results, as_scale(scale), causal)


def causal_softmax_forward(input: Tensor, scale: float | Tensor) -> Tensor:
    """Probabilities of [attn_batches, sq, sk] scores, keys after the query masked; any number of leading dimensions."""
    return _forward(input, None, scale, True)


def causal_softmax_backward(output_grads: Tensor, softmax_results: Tensor, scale: float | Tensor) -> Tensor:
    return _backward(output_grads, softmax_results, scale, True)


def masked_softmax_forward(input: Tensor, mask: Tensor, scale: float | Tensor) -> Tensor:
    """Probabilities of [b, np, sq, sk] scores; mask [b or 1, 1, sq, sk] or any shape that broadcasts, bool or uint8."""
    return _forward(input, as_mask("scaled_masked_softmax_cuda.forward", mask), scale, False)


def softmax_forward(input: Tensor, scale: float | Tensor) -> Tensor:
    """Probabilities of [b, np, sq, sk] scores, nothing masked."""
    return _forward(input, None, scale, False)


def softmax_backward(output_grads: Tensor, softmax_results: Tensor, scale: float | Tensor) -> Tensor:
    """The gradient of scores from that of probabilities, masked or not: masked probabilities are 0."""
    return _backward(output_grads, softmax_results, scale, False)


def get_batch_per_block(query_seq_len: int, key_seq_len: int, batches: int, attn_heads: int) -> int:
    """How many rows a block of upstream's kernel takes, 128 threads of which up to 32 share one or two rows.

    Callers use it to decide whether a shape suits that kernel. Ours take every shape.
    """
    length = 1 << max(key_seq_len - 1, 0).bit_length()
    return 128 // min(length, 32) * (2 if length <= 128 else 1)


def xentropy_forward(input: Tensor, labels: Tensor, smoothing: float, half_to_float: bool) -> list[Tensor]:
    """[losses, log-sum-exps], each [n] in float32, of logits [n, classes] and integer labels [n].

    half_to_float asked upstream for the second in float32; it always is.
    """
    with torch.no_grad():
        name = backend.choose("cross_entropy", input)
        if name == backend.REFERENCE:
            loss = reference.cross_entropy(input, labels.long(), ignore_index=_EVERY_LABEL, label_smoothing=float(smoothing),
                                           reduction="none")
            return [loss, torch.logsumexp(input.to(loss.dtype), -1)]
        return list(backend.namespace(name).cross_entropy_forward(input, labels.long(), input.shape[-1], _EVERY_LABEL,
                                                                  float(smoothing), 0.0))


def xentropy_backward(grad_loss: Tensor, logits: Tensor, max_log_sum_exp: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The gradient of logits, in their dtype."""
    with torch.no_grad():
        wide = torch.promote_types(logits.dtype, torch.float32)
        dloss, lse, labels = grad_loss.to(wide), max_log_sum_exp.to(wide), labels.long()
        name = backend.choose("cross_entropy", logits)
        if name == backend.REFERENCE:
            classes = logits.shape[-1]
            dx = torch.exp(logits.to(wide) - lse.unsqueeze(-1)) - smoothing / classes
            dx -= (1 - smoothing) * torch.nn.functional.one_hot(labels, classes).to(wide)
            return (dx * dloss.unsqueeze(-1)).to(logits.dtype)
        return backend.namespace(name).cross_entropy_backward(dloss, logits, labels, lse, 0, logits.shape[-1], _EVERY_LABEL,
                                                              float(smoothing), 0.0)
