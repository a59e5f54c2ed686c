"""Builds Megatron checkpoints of every version, key style and parallel layout from known tensors.

Written from the layouts' descriptions alone and sharing nothing with the package, so that a mistake of the reader can't hide
here. The truth is kept in the plainest form: separate query, key and value matrices, [out, in].
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
import sys
import types
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Model:
    """Sizes of a small GPT-2, with odd ratios so that swapped dimensions don't cancel."""

    layers: int = 2
    heads: int = 4
    head_dim: int = 3
    ffn: int = 20
    positions: int = 7
    vocab: int = 16  # rows of the table
    untied: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Form:
    """How a checkpoint is written down."""

    version: float | None = 3.0
    style: str = "encoder"  # transformer, encoder, norm, te, core, core_te
    tp: int = 1
    pp: int = 1
    vp: int = 1
    args: bool = True
    box: str = "directory"  # directory, release, file, zip
    legacy: bool = False  # torch's pickle format before 1.6
    flat_embedding: bool = False
    changes: dict[str, Any] = field(default_factory=dict)  # of args
    noise: bool = False  # optimizer, random states, enums of modules that aren't installed


def truth(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the model, distinct and unstructured."""
    generator = torch.Generator().manual_seed(seed)
    h, f = model.hidden, model.ffn
    shapes = {"wte": (model.vocab, h), "wpe": (model.positions, h), "lnf.weight": (h,), "lnf.bias": (h,)}
    if model.untied:
        shapes["head"] = (model.vocab, h)
    for i in range(model.layers):
        for norm in ("ln1", "ln2"):
            shapes |= {f"{i}.{norm}.weight": (h,), f"{i}.{norm}.bias": (h,)}
        for name, out, width in (("q", h, h), ("k", h, h), ("v", h, h), ("proj", h, h), ("fc1", f, h), ("fc2", h, f)):
            shapes |= {f"{i}.{name}.weight": (out, width), f"{i}.{name}.bias": (out,)}
    return {name: torch.randn(shape, generator=generator).to(model.dtype) for name, shape in shapes.items()}


def as_huggingface(tensors: dict[str, torch.Tensor], model: Model, vocab: int | None = None) -> dict[str, torch.Tensor]:
    """The truth under the keys of GPT2LMHeadModel, whose matrices are [in, out]."""
    out = {"transformer.wte.weight": tensors["wte"][:vocab], "transformer.wpe.weight": tensors["wpe"],
           "transformer.ln_f.weight": tensors["lnf.weight"], "transformer.ln_f.bias": tensors["lnf.bias"]}
    if model.untied:
        out["lm_head.weight"] = tensors["head"][:vocab]
    for i in range(model.layers):
        layer = {name.split(".", 1)[1]: t for name, t in tensors.items() if name.startswith(f"{i}.")}
        for kind in ("weight", "bias"):
            out[f"transformer.h.{i}.ln_1.{kind}"] = layer[f"ln1.{kind}"]
            out[f"transformer.h.{i}.ln_2.{kind}"] = layer[f"ln2.{kind}"]
        out[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat([layer[f"{n}.weight"] for n in "qkv"]).T
        out[f"transformer.h.{i}.attn.c_attn.bias"] = torch.cat([layer[f"{n}.bias"] for n in "qkv"])
        for hf, name in (("attn.c_proj", "proj"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2")):
            out[f"transformer.h.{i}.{hf}.weight"] = layer[f"{name}.weight"].T
            out[f"transformer.h.{i}.{hf}.bias"] = layer[f"{name}.bias"]
    return out


def qkv(tensors: dict[str, torch.Tensor], layer: int, kind: str, rank: int, form: Form, model: Model) -> torch.Tensor:
    """One rank's rows of query_key_value, by the layout of the version."""
    heads = model.heads // form.tp
    whole = [tensors[f"{layer}.{name}.{kind}"].unflatten(0, (model.heads, model.head_dim)) for name in "qkv"]
    own = [each[rank * heads:(rank + 1) * heads] for each in whole]
    stack = {0: 0, 1: 2}.get(int(form.version or 0), 1)  # [3, np, hn], [np, hn, 3], [np, 3, hn]
    return torch.stack(own, stack).flatten(0, 2).contiguous()


STYLES = {  # ln1, qkv, proj, ln2, fc1, fc2; "module|prefix": Transformer Engine's fused modules prefix the kind
    "transformer": ("input_layernorm.", "attention.query_key_value.", "attention.dense.", "post_attention_layernorm.",
                    "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h."),
    "encoder": ("input_layernorm.", "self_attention.query_key_value.", "self_attention.dense.", "post_attention_layernorm.",
                "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h."),
    "norm": ("input_norm.", "self_attention.query_key_value.", "self_attention.dense.", "post_attention_norm.",
             "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h."),
    "te": ("self_attention.layernorm_qkv.layer_norm_", "self_attention.layernorm_qkv.", "self_attention.proj.",
           "layernorm_mlp.layer_norm_", "layernorm_mlp.fc1_", "layernorm_mlp.fc2_"),
    "core": ("input_layernorm.", "self_attention.linear_qkv.", "self_attention.linear_proj.", "pre_mlp_layernorm.",
             "mlp.linear_fc1.", "mlp.linear_fc2."),
    "core_te": ("self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.", "self_attention.linear_proj.",
                "mlp.linear_fc1.layer_norm_", "mlp.linear_fc1.", "mlp.linear_fc2."),
}


def cut(tensor: torch.Tensor, dim: int, rank: int, count: int) -> torch.Tensor:
    return tensor.chunk(count, dim)[rank].clone()


def layers_of(form: Form, model: Model, pipeline: int, virtual: int) -> range:
    """Global numbers of the layers in a chunk: virtual chunk v of rank p starts at v L/V + p L/(V P)."""
    count = model.layers // (form.pp * form.vp)
    start = virtual * (model.layers // form.vp) + pipeline * count
    return range(start, start + count)


def chunk(tensors: dict[str, torch.Tensor], form: Form, model: Model, t: int, p: int, v: int) -> dict[str, Any]:
    """The `model` dictionary of one rank and virtual chunk."""
    ln1, qkv_name, proj, ln2, fc1, fc2 = STYLES[form.style]
    first, last = (p, v) == (0, 0), (p, v) == (form.pp - 1, form.vp - 1)
    final = "final_norm." if form.style == "norm" else "final_layernorm."
    flat: dict[str, Any] = {}
    for local, layer in enumerate(layers_of(form, model, p, v)):
        at = f"layers.{local}."
        for kind in ("weight", "bias"):
            flat[at + ln1 + kind] = tensors[f"{layer}.ln1.{kind}"].clone()
            flat[at + ln2 + kind] = tensors[f"{layer}.ln2.{kind}"].clone()
            flat[at + qkv_name + kind] = qkv(tensors, layer, kind, t, form, model)
            flat[at + fc1 + kind] = cut(tensors[f"{layer}.fc1.{kind}"], 0, t, form.tp)
        for name, key in (("proj", proj), ("fc2", fc2)):
            flat[at + key + "weight"] = cut(tensors[f"{layer}.{name}.weight"], 1, t, form.tp)
            flat[at + key + "bias"] = tensors[f"{layer}.{name}.bias"].clone()
        if form.style.endswith("te"):
            flat[at + qkv_name + "_extra_state"] = io.BytesIO(b"scales")
    if last:
        flat |= {final + kind: tensors[f"lnf.{kind}"].clone() for kind in ("weight", "bias")}
    embedding = {"word_embeddings.weight": cut(tensors["wte"], 0, t, form.tp),
                 "position_embeddings.weight": tensors["wpe"].clone()}
    head = cut(tensors["head" if model.untied else "wte"], 0, t, form.tp)
    if form.style.startswith("core"):
        out = {f"decoder.{key}": value for key, value in flat.items()}
        if first:
            out |= {f"embedding.{key}": value for key, value in embedding.items()}
        if last and (model.untied or form.pp > 1):
            out["output_layer.weight"] = head
        return out
    language: dict[str, Any] = {"transformer" if form.style == "transformer" else "encoder": flat}
    if first:
        language["embedding"] = embedding if form.flat_embedding else {
            key.split(".")[0]: {"weight": value} for key, value in embedding.items()}
    if last and model.untied:
        language["output_layer"] = {"weight": head}
    out = {"language_model": language}
    if last and not model.untied and form.pp > 1:
        out["word_embeddings_for_head"] = {"weight": head}
    return out


def namespace(form: Form, model: Model, t: int, p: int) -> argparse.Namespace:
    values: dict[str, Any] = {
        "num_layers": model.layers, "hidden_size": model.hidden, "num_attention_heads": model.heads,
        "ffn_hidden_size": model.ffn, "kv_channels": model.head_dim, "max_position_embeddings": model.positions,
        "padded_vocab_size": model.vocab,
        "layernorm_epsilon": 1e-5, "bias_gelu_fusion": True, "openai_gelu": False, "hidden_dropout": 0.1,
        "attention_dropout": 0.1, "rank": p * form.tp + t, "params_dtype": model.dtype,
        "apply_residual_connection_post_layernorm": False, "tokenizer_type": "GPT2BPETokenizer"}
    if (form.version or 0) >= 3:
        values |= {"tensor_model_parallel_size": form.tp, "pipeline_model_parallel_size": form.pp}
    else:
        values |= {"model_parallel_size": form.tp}
    if form.vp > 1:
        values["virtual_pipeline_model_parallel_size"] = form.vp
    if model.untied:
        values["untie_embeddings_and_output_weights"] = True
    values |= form.changes
    return argparse.Namespace(**{name: value for name, value in values.items() if value is not ...})


@contextlib.contextmanager
def modules_that_are_not_installed():
    """Classes of Megatron's modules, which exist while a checkpoint is pickled and are gone when it is read."""
    made = {}

    def module(name: str, **members: Any) -> None:
        made[name] = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__ = name, key
            setattr(made[name], key, member)

    by_name = enum.Enum("ByName", "member")  # pickled as Python 3.11.0 to 3.11.3 does it
    by_name.__reduce_ex__ = lambda self, protocol: (getattr, (type(self), self.name))
    module("megatron.model.enums", ModelType=enum.Enum("ModelType", "encoder_or_decoder other"), ByName=by_name)
    module("fp16.loss_scaler", DynamicLossScaler=type("DynamicLossScaler", (), {}))
    packages = {name: types.ModuleType(name) for name in ("megatron", "megatron.model", "fp16")}
    sys.modules.update(packages | made)
    try:
        yield made["megatron.model.enums"], made["fp16.loss_scaler"].DynamicLossScaler
    finally:
        for name in packages | made:
            del sys.modules[name]


def shard(tensors: dict[str, torch.Tensor], form: Form, model: Model, t: int, p: int) -> dict[str, Any]:
    """The whole dictionary that torch.save writes for one rank."""
    content: dict[str, Any] = {"iteration": 1000}
    if form.version is not None:
        content["checkpoint_version"] = form.version
    if form.args:
        content["args"] = namespace(form, model, t, p)
    chunks = [chunk(tensors, form, model, t, p, v) for v in range(form.vp)]
    content |= {"model": chunks[0]} if form.vp == 1 else {f"model{v}": each for v, each in enumerate(chunks)}
    return content


def add_noise(content: dict[str, Any], enums: Any, scaler: Any) -> dict[str, Any]:
    import random
    import signal

    import numpy

    if "args" in content:
        args = content["args"]
        args.model_type, args.exit_signal, args.lr = enums.ModelType.encoder_or_decoder, signal.SIGTERM, numpy.float64(1.5e-4)
        args.by_name = enums.ByName.member
        args.load, args.layernorm_epsilon = Path("/somewhere"), numpy.float64(args.layernorm_epsilon)
    loss_scaler = scaler()
    loss_scaler.cur_scale = 65536.0
    return content | {
        "optimizer": {"loss_scaler": loss_scaler, "state": {0: {"exp_avg": torch.zeros(3)}}, "groups": [{"params": {1, 2}}]},
        "random_rng_state": random.getstate(), "np_rng_state": numpy.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}


def save(content: Any, path: Path, legacy: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


def folder(form: Form, t: int, p: int) -> str:
    return f"mp_rank_{t:02d}" + (f"_{p:03d}" if form.pp > 1 else "")


def write(root: Path, form: Form, model: Model, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a checkpoint below `root`; returns the path that a user would give."""
    tensors = truth(model) if tensors is None else tensors
    base = root if form.box == "file" else root / ("iter_0001000" if form.box == "directory" else "release")
    with modules_that_are_not_installed() as (model_type, scaler):
        for t in range(form.tp):
            for p in range(form.pp):
                content = shard(tensors, form, model, t, p)
                if form.noise:
                    content = add_noise(content, model_type, scaler)
                path = (base if form.box == "file" else base / folder(form, t, p)) / "model_optim_rng.pt"
                save(content, path, form.legacy)
                (path.parent / "distrib_optim.pt").write_bytes(b"not looked at")
    if form.box == "file":
        return root / "model_optim_rng.pt"
    (root / "latest_checkpointed_iteration.txt").write_text("1000" if form.box == "directory" else "release")
    if form.box != "zip":
        return root
    archive = root / "checkpoint.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted([root / "latest_checkpointed_iteration.txt", *base.rglob("*.pt")]):
            file.write(path, path.relative_to(root).as_posix())
    return archive
