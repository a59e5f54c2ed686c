"""A rank reads its part of a checkpoint and no more: parts joined are the whole, for every format, version and group size."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from megatron_checkpoints import Form, Model, write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import names
from megatron_kernels.models import GPT2
from megatron_kernels.parallel import Group
from megatron_kernels.parallel.layout import shares

MODEL = Model(layers=2, vocab=514)
VERSIONED = [(version, style) for version in (None, 0, 1.0, 2.0, 3.0) for style in ("transformer", "encoder", "norm")]
FORMS = [Form(version, style, tp=tp, args=version is not None and version >= 2) for tp in (1, 2) for version, style in VERSIONED]
FORMS += [Form(3.0, style, tp=2, pp=2) for style in ("te", "core", "core_te")]
FORMS += [Form(3.0, tp=2, box="zip"), Form(1.0, "transformer", tp=2, legacy=True)]


class Copied(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation made from others, views aside."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if inputs and isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.bytes += tensor.nbytes
        return result


def load(tmp_path, form, model=MODEL):
    config = tmp_path / "config_file.json"
    config.write_text(json.dumps({"n_head": model.heads, "vocab_size": model.vocab}))
    return checkpoint.load(write(tmp_path / "source", form, model), config)


def huggingface(tmp_path, model=MODEL, **options):
    checkpoint.save_huggingface(load(tmp_path, Form(), model), tmp_path / "hf", **options)
    return checkpoint.load(tmp_path / "hf")


def pickled(tmp_path, model=MODEL):
    from safetensors.torch import load_file

    huggingface(tmp_path, model)
    torch.save(load_file(tmp_path / "hf" / "model.safetensors"), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "hf" / "model.safetensors").unlink()
    return checkpoint.load(tmp_path / "hf")


def check_parts(opened):
    """Ranges that fall on heads, and the odd ones of 3 and 5 ranks, which do not."""
    for parameter in names.parameters(opened.config):
        whole, dim = opened.tensors[parameter.canonical], parameter.split or 0
        for size in (1, 2, 3, 4, 5):
            pieces = [opened.part(parameter.canonical, dim, *Group(size, rank).range(whole.shape[dim])) for rank in range(size)]
            assert torch.equal(torch.cat(pieces, dim), whole), (parameter.canonical, size)
        if whole.dim() == 2:  # the other dimension
            assert torch.equal(opened.part(parameter.canonical, 1 - dim, 1, 4), whole.narrow(1 - dim, 1, 3))


def check_models(opened):
    """Whole models of each rank; a Group stands for the mesh, as nothing is communicated."""
    expected = GPT2.from_checkpoint(opened).state_dict()
    for stages in (1, 2):
        for size in (1, 2, 4):
            seen = set()
            for rank in range(size):
                for number in range(stages):
                    model = GPT2.from_checkpoint(opened, mesh=Group(size, rank, "none"), stage=(number, stages))
                    for name, parameter, share in shares(model):
                        assert torch.equal(parameter, share.of(expected[name])), (name, rank, size)
                        seen.add(name)
            assert seen == set(expected)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.version}-{form.style}-tp{form.tp}-pp{form.pp}-{form.box}")
def test_megatron(tmp_path, form):
    opened = load(tmp_path, form)
    check_parts(opened)
    check_models(opened)


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, untied=True, vocab=97)], ids=["tied", "untied"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 5000}], ids=["one file", "several"])
def test_huggingface(tmp_path, model, options):
    opened = huggingface(tmp_path, model, **options)
    check_parts(opened)
    check_models(opened)


def test_pickled_huggingface(tmp_path):
    opened = pickled(tmp_path)
    assert opened.details["weights"] == "pytorch_model.bin"
    check_parts(opened)
    check_models(opened)


def test_in_memory(tmp_path):
    opened = load(tmp_path, Form())
    check_parts(replace(opened, tensors=dict(opened.tensors)))


LARGE = Model(layers=3, heads=8, head_dim=8, ffn=256, positions=16, vocab=509)


@pytest.mark.parametrize("source", ["hf", "hf bin", "v0 tp1", "v0 tp2", "v1 tp2", "v2 tp1", "v2 tp2", "v3 tp8"])
def test_bytes(tmp_path, source):
    """A rank of four copies at most a quarter of what is split (vocabulary rounded up), and no copy is made of a copy."""
    if source.startswith("hf"):
        opened = (pickled if source == "hf bin" else huggingface)(tmp_path, LARGE)
    else:
        version, tp = source.split()
        opened = load(tmp_path, Form(float(version[1:]), "encoder", tp=int(tp[2:])), replace(LARGE, vocab=512))
    split = {p.canonical for p in names.parameters(opened.config) if p.split is not None}
    total = sum(math.prod(opened.meta(name)[0]) * opened.meta(name)[1].itemsize for name in split)
    for rank in range(4):
        with Copied() as copied:
            model = GPT2.from_checkpoint(opened, mesh=Group(4, rank, "none"))
        held = sum(parameter.nbytes for name, parameter, _ in shares(model) if name in split)
        replicated = sum(parameter.nbytes for name, parameter, _ in shares(model) if name not in split)
        assert held <= total / 4 + 128 * 64 * 2 / 4
        assert copied.bytes <= held + replicated
        if source.startswith("hf"):
            assert copied.bytes >= held / 4  # the transposed matrices at least are copied: the counter counts
    with Copied() as everything:
        GPT2.from_checkpoint(opened)
    print(f"{source}: {copied.bytes} of {total} bytes copied by a rank of 4, {everything.bytes} by one alone")


def test_other_dtype(tmp_path):
    opened = load(tmp_path, Form())
    model = GPT2.from_checkpoint(opened, torch.float32, mesh=Group(2, 1, "none"), sequence_parallel=True)
    assert model.sequence_parallel and all(parameter.dtype == torch.float32 for parameter in model.parameters())
