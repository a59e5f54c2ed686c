"""Floating-point operations of a training step: in closed form, counted while it runs, and what a device could do at best.

A multiplication and an addition are two operations, and matrix products are all that counts, causal or not: that is how the papers
count, and what makes figures comparable.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from megatron_kernels.models import GPT2Config
from megatron_kernels.models.blocks import BLOCK

aten = torch.ops.aten


def layer_flops(config: GPT2Config, batch: int, seq: int) -> int:
    """The products of one layer's forward: batch * seq * (8 h^2 + 4 h f + 4 seq h), f the feed-forward size."""
    h, f = config.hidden_size, config.ffn_hidden_size
    return batch * seq * (8 * h * h + 4 * h * f + 4 * seq * h)


def head_flops(config: GPT2Config, batch: int, seq: int) -> int:
    """The product of the output table's forward, 2 batch * seq * h * V, V the padded vocabulary."""
    return 2 * batch * seq * config.hidden_size * config.padded_vocab_size


def model_flops(config: GPT2Config, batch: int, seq: int) -> int:
    """Forward and backward of one batch: 72 B S L h^2 (1 + S / 6h + V / 12 L h) where f = 4 h.

    B = batch, S = seq, L layers, h hidden size, V padded vocabulary. A backward has two products for each of the forward's: this
    is the form of Narayanan et al. 2021 (arXiv 2104.04473, appendix) without its recomputation. Exact.
    """
    return 3 * (config.num_layers * layer_flops(config, batch, seq) + head_flops(config, batch, seq))


def hardware_flops(config: GPT2Config, batch: int, seq: int) -> int:
    """Where every layer's forward is computed again in the backward: 96 B S L h^2 (1 + S / 6h + V / 16 L h) where f = 4 h.

    Narayanan et al. 2021 (arXiv 2104.04473, equation 3). torch's checkpointing stops where the backward has all it needs, as a
    rule before a layer's last product, so that less may run: what `counter` counts.
    """
    return model_flops(config, batch, seq) + config.num_layers * layer_flops(config, batch, seq)


def omitted_flops(config: GPT2Config, batch: int, seq: int) -> int:
    """What attention="softmax" leaves out on a CPU beyond 128 tokens, where no block of queries is multiplied with keys that the
    causal mask hides: `model_flops` less this is what `counter` counts there, without recomputation."""
    whole = 4 * batch * seq * seq * config.hidden_size
    blocks = 4 * batch * config.hidden_size * sum((min(i + BLOCK, seq) - i) * min(i + BLOCK, seq) for i in range(0, seq, BLOCK))
    return 3 * config.num_layers * (whole - blocks)


def counter() -> FlopCounterMode:
    """torch's FlopCounterMode, which prints nothing: `with counter() as count: step()`, then `count.get_total_flops()`.

    It knows more than torch's own: products that are added in place, oneDNN's linear layers, and the CPU's flash attention. The
    kernels of this package form no products. For a step of GPT2 with attention="softmax" and without recomputation it counts
    `model_flops` (less `omitted_flops` on a CPU); attention="sdpa" is one product more for each layer, 2 B S^2 h, as flash
    attention forms the scores again in its backward.
    """
    found = FlopCounterMode(display=False, custom_mapping=_rules())
    found.mod_tracker = _NoModules()  # type: ignore[assignment]
    return found


class _NoModules:
    """In the place of torch's module tracker: autograd refuses its hooks where a pipeline's schedule splits the backward."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _mm(a: Any, b: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _bmm(a: Any, b: Any) -> int:
    return a[0] * _mm(a[1:], b[1:])


def _rules() -> dict[Any, Callable[..., int]]:
    """Formulas by op packet; arguments come as shapes."""
    rules: dict[Any, Callable[..., int]] = {
        aten.addmm_: lambda total, a, b, *args, out_shape=None, **kwargs: _mm(a, b),
        aten.baddbmm_: lambda total, a, b, *args, out_shape=None, **kwargs: _bmm(a, b),
        aten._scaled_dot_product_flash_attention_for_cpu: _plain(sdpa_flop),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _plain(sdpa_backward_flop),
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        rules[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *args, out_shape=None, **kwargs: _mm(x, weight[::-1])
    return rules


def _plain(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of torch's, which it gave a wrapper that turns tensors into shapes; shapes pass through that unchanged."""
    return lambda *args, out_shape=None, **kwargs: formula(*args, out_val=None, **kwargs)


class Peak(NamedTuple):
    """Dense peak FLOP/s of a device by dtype (products summed in float32), and the maker's paper that says so."""

    rates: dict[torch.dtype, float]
    source: str


def _tera(source: str, **rates: float) -> Peak:
    return Peak({getattr(torch, name): rate * 1e12 for name, rate in rates.items()}, source)


_H100 = _tera("NVIDIA H100 Tensor Core GPU datasheet, SXM, without sparsity", float16=989.4, bfloat16=989.4, float32=66.9)
# By a pattern of the name that torch.cuda.get_device_name gives; the first that is found counts. float32 is without TF32.
PEAKS: dict[str, Peak] = {
    r"V100S": _tera("NVIDIA V100 Tensor Core GPU datasheet, V100S PCIe", float16=130, float32=16.4),
    r"V100.*PCI": _tera("NVIDIA V100 Tensor Core GPU datasheet, PCIe", float16=112, float32=14),
    r"V100": _tera("NVIDIA V100 Tensor Core GPU datasheet, SXM2", float16=125, float32=15.7),
    r"\bT4\b": _tera("NVIDIA T4 datasheet", float16=65, float32=8.1),
    r"\bA100\b": _tera("NVIDIA A100 Tensor Core GPU datasheet, without sparsity", float16=312, bfloat16=312, float32=19.5),
    r"\bL4\b": _tera("NVIDIA L4 datasheet, without sparsity", float16=121, bfloat16=121, float32=30.3),
    r"\bL40S\b": _tera("NVIDIA L40S datasheet, without sparsity", float16=362, bfloat16=362, float32=91.6),
    r"RTX 4090\b(?! D| Laptop)": _tera("NVIDIA Ada GPU Architecture whitepaper, appendix A, without sparsity", float16=165.2,
                                       bfloat16=165.2, float32=82.6),
    r"\bH100 NVL\b": _tera("NVIDIA H100 Tensor Core GPU datasheet, NVL, without sparsity", float16=835, bfloat16=835, float32=60),
    r"\bH100 PCIe\b": _tera("NVIDIA H100 Tensor Core GPU Architecture whitepaper, PCIe, without sparsity", float16=756,
                            bfloat16=756, float32=51.2),
    r"\bH100\b": _H100,
    r"\bGH200\b": _H100._replace(source="NVIDIA GH200 Grace Hopper Superchip datasheet, without sparsity"),
    r"\bH200 NVL\b": _tera("NVIDIA H200 Tensor Core GPU datasheet, NVL, without sparsity", float16=835, bfloat16=835, float32=60),
    r"\bH200\b": _H100._replace(source="NVIDIA H200 Tensor Core GPU datasheet, SXM, without sparsity"),
    r"\bB200\b": _tera("NVIDIA HGX B200 datasheet, an eighth of eight GPUs, without sparsity", float16=2250, bfloat16=2250),
    r"\bMI300X\b": _tera("AMD Instinct MI300X datasheet, without sparsity", float16=1307.4, bfloat16=1307.4, float32=163.4),
}


def peak(device_name: str, dtype: torch.dtype) -> tuple[float, str] | None:
    """Dense peak FLOP/s of a device and the source; None for a device or dtype that `PEAKS` does not have.

    device_name: as torch.cuda.get_device_name gives it. float32 is the rate of the ordinary units, which torch uses unless TF32
    is switched on.
    """
    for pattern, found in PEAKS.items():
        if re.search(pattern, device_name):
            return (found.rates[dtype], found.source) if dtype in found.rates else None
    return None
