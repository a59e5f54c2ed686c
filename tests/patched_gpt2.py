"""Pairs of small Hugging Face GPT-2s with the same weights, the second patched, and how tests compare them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_kernels.compat.huggingface import patch

transformers = pytest.importorskip("transformers")
modeling_gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
GPT2Config, GPT2LMHeadModel = transformers.GPT2Config, transformers.GPT2LMHeadModel

VOCAB, LENGTH = 61, 12
ATTENTION = ("eager", "sdpa")
PADDING = (None, "left", "right")
# Up to 5.0 eager attention has a causal buffer beside the mask; a compiled model then keeps its softmax where there is padding.
MASK_IS_WHOLE = not hasattr(modeling_gpt2.GPT2Attention(GPT2Config(n_embd=4, n_head=1, n_positions=2)), "bias")


def make(attention="eager", kind=GPT2LMHeadModel, seed=0, **fields):
    """A small model with weights large enough that attention is far from uniform, and no bias or norm at its initial value."""
    torch.manual_seed(seed)
    rates = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "classifier_dropout")
    fields = dict.fromkeys(rates, 0.0) | {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 40, "vocab_size": VOCAB,
                                          "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False} | fields
    model = kind(GPT2Config(attn_implementation=attention, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1).add_(0.1 * torch.randn_like(parameter))
    return model.train()


def pair(*args, **kwargs):
    """The same model twice, the second one patched."""
    options = {"fuse_linear_loss": kwargs.pop("fuse_linear_loss", False)}
    theirs = make(*args, **kwargs)
    ours = copy.deepcopy(theirs)
    patch(ours, **options)
    return theirs, ours


def batch(padding=None, seed=1):
    """Three rows, two of them padded; labels are -100 on padding. `keep` is True where there is a token."""
    ids = torch.randint(1, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones_like(ids, dtype=torch.bool)
    for row, count in enumerate((5, 0, 3)):
        if padding and count:
            keep[row, slice(0, count) if padding == "left" else slice(LENGTH - count, LENGTH)] = False
    inputs = {"input_ids": ids.masked_fill(~keep, 0), "labels": ids.masked_fill(~keep, -100)}
    return inputs | ({"attention_mask": keep.long()} if padding else {}), keep


def assert_near(ours, theirs, limit=1e-5, what=""):
    error = (ours - theirs).abs().max().item()
    assert error <= limit, f"{what} is off by {error:.1e}"


def assert_same_gradients(ours, theirs, limit=1e-5):
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (their.grad is None), name
        if mine.grad is not None:
            assert_near(mine.grad, their.grad, limit, name)


def assert_step_agrees(ours, theirs, inputs, keep, call=None):
    expected, found = theirs(**inputs), (ours if call is None else call)(**inputs)
    assert_near(found.loss, expected.loss, what="loss")
    if found.logits is not None:
        assert_near(found.logits[keep], expected.logits[keep], 1e-4, "logits")
    expected.loss.backward()
    found.loss.backward()
    assert_same_gradients(ours, theirs)


def ops_of(call):
    """The names of the operators that a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return {event.key for event in found.key_averages()}


def fused(*names):
    return {f"megatron_kernels::{name}" for name in names}
