"""benchmarks.flops: the closed forms against the papers' and against a count of what runs."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch

from benchmarks import flops
from megatron_kernels.models import GPT2, GPT2Config

PAPER = [(40, 1536, 16), (54, 1920, 20), (64, 2304, 24), (72, 3072, 32)]  # 1.2B to 8.3B
SMALL = GPT2Config(num_layers=3, hidden_size=64, num_attention_heads=4, max_position_embeddings=320, vocab_size=301,
                   padded_vocab_size=384, hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)


@pytest.mark.parametrize(("layers", "hidden", "heads"), PAPER)
@pytest.mark.parametrize(("batch", "seq"), [(8, 1024), (3, 100)])
def test_closed_forms_are_those_of_the_papers(layers, hidden, heads, batch, seq):
    config = GPT2Config(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, vocab_size=50257, padded_vocab_size=51200)
    base = batch * seq * layers * hidden ** 2
    assert flops.model_flops(config, batch, seq) == 72 * base * (
        1 + Fraction(seq, 6 * hidden) + Fraction(51200, 12 * layers * hidden))
    assert flops.hardware_flops(config, batch, seq) == 96 * base * (
        1 + Fraction(seq, 6 * hidden) + Fraction(51200, 16 * layers * hidden))
    assert type(flops.model_flops(config, batch, seq)) is int


def counted(config: GPT2Config, batch: int, seq: int, dtype: torch.dtype, recompute: bool = False, autocast: bool = False) -> int:
    model = GPT2(config, dtype=dtype, seed=0, activation_checkpointing=recompute)
    ids = torch.randint(config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(0))
    with flops.counter() as count, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(ids, labels=ids).backward()
    return count.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("change", [{}, {"ffn_hidden_size": 160}, {"untie_embeddings_and_output_weights": True},
                                    {"attention_dropout": 0.1, "hidden_dropout": 0.1}, {"fuse_linear_loss": True}], ids=str)
def test_count_of_a_step_is_the_closed_form(dtype, change):
    config = dataclasses.replace(SMALL, **change)
    assert counted(config, 2, 128, dtype) == flops.model_flops(config, 2, 128)


def test_count_under_autocast():
    assert counted(SMALL, 2, 96, torch.float32, autocast=True) == flops.model_flops(SMALL, 2, 96)


@pytest.mark.parametrize("seq", [129, 320])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_blocks_of_queries_leave_products_out(seq, dropout):
    config = dataclasses.replace(SMALL, attention_dropout=dropout)
    left_out = flops.omitted_flops(config, 2, seq)
    assert 0 < left_out < flops.model_flops(config, 2, seq)
    assert counted(config, 2, seq, torch.float32) == flops.model_flops(config, 2, seq) - left_out
    assert flops.omitted_flops(config, 2, 128) == 0


def test_flash_attention_forms_the_scores_again():
    config = dataclasses.replace(SMALL, attention="sdpa")
    again = config.num_layers * 2 * 2 * 200 ** 2 * config.hidden_size
    assert counted(config, 2, 200, torch.float32) == flops.model_flops(config, 2, 200) + again


def test_recomputation_leaves_out_the_last_product_of_a_layer():
    last = SMALL.num_layers * 2 * 2 * 128 * SMALL.ffn_hidden_size * SMALL.hidden_size
    assert counted(SMALL, 2, 128, torch.bfloat16, recompute=True) == flops.hardware_flops(SMALL, 2, 128) - last


@pytest.mark.parametrize(("name", "dtype", "tera"), [
    ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4), ("NVIDIA H100 PCIe", torch.bfloat16, 756),
    ("NVIDIA H100 NVL", torch.float16, 835), ("NVIDIA H200", torch.bfloat16, 989.4), ("NVIDIA H200 NVL", torch.bfloat16, 835),
    ("NVIDIA GH200 480GB", torch.bfloat16, 989.4), ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
    ("NVIDIA A100 80GB PCIe", torch.float32, 19.5), ("Tesla V100-SXM2-32GB", torch.float16, 125),
    ("Tesla V100-SXM3-32GB", torch.float16, 125), ("Tesla V100-PCIE-16GB", torch.float16, 112),
    ("Tesla V100S-PCIE-32GB", torch.float16, 130), ("NVIDIA L4", torch.bfloat16, 121), ("NVIDIA L40S", torch.bfloat16, 362),
    ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2), ("NVIDIA B200", torch.bfloat16, 2250),
    ("AMD Instinct MI300X", torch.bfloat16, 1307.4), ("Tesla T4", torch.float16, 65)])
def test_peaks(name, dtype, tera):
    rate, source = flops.peak(name, dtype)
    assert rate == tera * 1e12
    assert "NVIDIA" in source or "AMD" in source


@pytest.mark.parametrize(("name", "dtype"), [
    ("AMD EPYC 9B14", torch.float32), ("Tesla V100-SXM2-32GB", torch.bfloat16),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.float16),
    ("NVIDIA GeForce RTX 4090 D", torch.bfloat16), ("NVIDIA L40", torch.bfloat16), ("NVIDIA H800", torch.bfloat16),
    ("NVIDIA H200", torch.int8)])
def test_no_peak_is_made_up(name, dtype):
    assert flops.peak(name, dtype) is None
