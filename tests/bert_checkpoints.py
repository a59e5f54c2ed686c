"""Builds Megatron BERT checkpoints from known tensors: those of `megatron_checkpoints.py`, with what a BERT has beside a GPT-2.

Like there nothing is shared with the package, and the truth has separate query, key and value matrices, [out, in].
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import megatron_checkpoints as gpt2
import torch
from megatron_checkpoints import Form, Model, cut, folder, save

ARGS = {"bias_gelu_fusion": False, "tokenizer_type": "BertWordPieceLowerCase", "bert_binary_head": True}


def truth(model: Model, seed: int = 0, types: int = 2, binary: bool = True) -> dict[str, torch.Tensor]:
    """Every tensor of a BERT of these sizes, distinct and unstructured."""
    h, generator = model.hidden, torch.Generator().manual_seed(seed + 1000)
    shapes: dict[str, tuple[int, ...]] = {"lm.dense.weight": (h, h), "lm.dense.bias": (h,), "lm.norm.weight": (h,),
                                          "lm.norm.bias": (h,), "lm.bias": (model.vocab,)}
    if types:
        shapes["types"] = (types, h)
    if binary:
        shapes |= {"pool.weight": (h, h), "pool.bias": (h,), "binary.weight": (2, h), "binary.bias": (2,)}
    more = {name: torch.randn(shape, generator=generator).to(model.dtype) for name, shape in shapes.items()}
    return gpt2.truth(model, seed) | more


def content(tensors: dict[str, torch.Tensor], form: Form, model: Model, t: int, p: int) -> dict[str, Any]:
    """What torch.save writes for one rank."""
    whole = gpt2.shard(tensors, form, model, t, p)
    core = form.style.startswith("core")
    last = p == form.pp - 1
    out = whole["model"]
    if core:
        out = {key.replace("decoder.", "encoder.", 1) if key.startswith("decoder.") else key: value for key, value in out.items()}
        whole["model"] = out
    if p == 0 and "types" in tensors:
        types = tensors["types"].clone()
        if core:
            out["embedding.tokentype_embeddings.weight"] = types
        elif form.flat_embedding:
            out["language_model"]["embedding"]["tokentype_embeddings.weight"] = types
        else:
            out["language_model"]["embedding"]["tokentype_embeddings"] = {"weight": types}
    if not last:
        return whole
    norm = "layer_norm" if core else "norm" if form.style == "norm" else "layernorm"
    head = {"dense.weight": tensors["lm.dense.weight"].clone(), "dense.bias": tensors["lm.dense.bias"].clone(),
            f"{norm}.weight": tensors["lm.norm.weight"].clone(), f"{norm}.bias": tensors["lm.norm.bias"].clone()}
    bias = cut(tensors["lm.bias"], 0, t, form.tp)
    pool = {f"dense.{kind}": tensors[f"pool.{kind}"].clone() for kind in ("weight", "bias") if f"pool.{kind}" in tensors}
    binary = {kind: tensors[f"binary.{kind}"].clone() for kind in ("weight", "bias") if f"binary.{kind}" in tensors}
    if core:
        out |= {**{f"lm_head.{key}": value for key, value in head.items()}, "output_layer.bias": bias,
                **{f"pooler.{key}": value for key, value in pool.items()},
                **{f"binary_head.{key}": value for key, value in binary.items()}}
        whole["model"] = out
    else:
        out["lm_head"] = head | {"bias": bias}
        if pool:
            out["language_model"]["pooler"], out["binary_head"] = pool, binary
    return whole


def write(root: Path, form: Form, model: Model, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write a checkpoint below `root`; returns the path that a user would give."""
    tensors = truth(model) if tensors is None else tensors
    form = Form(**{**vars(form), "changes": ARGS | form.changes})
    base = root if form.box == "file" else root / ("iter_0001000" if form.box == "directory" else "release")
    for t in range(form.tp):
        for p in range(form.pp):
            place = base if form.box == "file" else base / folder(form, t, p)
            save(content(tensors, form, model, t, p), place / "model_optim_rng.pt", form.legacy)
    if form.box == "file":
        return root / "model_optim_rng.pt"
    (root / "latest_checkpointed_iteration.txt").write_text("1000" if form.box == "directory" else "release")
    if form.box != "zip":
        return root
    with zipfile.ZipFile(root / "checkpoint.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted([root / "latest_checkpointed_iteration.txt", *base.rglob("*.pt")]):
            archive.write(path, path.relative_to(root).as_posix())
    return root / "checkpoint.zip"


def as_huggingface(tensors: dict[str, torch.Tensor], model: Model, vocab: int | None = None,
                   post_norm: bool = False) -> dict[str, torch.Tensor]:
    """The truth under the keys of MegatronBertForPreTraining, or of BertForPreTraining for the original ordering."""
    out = {"bert.embeddings.word_embeddings.weight": tensors["wte"][:vocab],
           "bert.embeddings.position_embeddings.weight": tensors["wpe"],
           "bert.embeddings.token_type_embeddings.weight": tensors.get("types", torch.zeros(2, model.hidden, dtype=model.dtype)),
           "cls.predictions.bias": tensors["lm.bias"][:vocab]}
    for kind in ("weight", "bias"):
        out[f"cls.predictions.transform.dense.{kind}"] = tensors[f"lm.dense.{kind}"]
        out[f"cls.predictions.transform.LayerNorm.{kind}"] = tensors[f"lm.norm.{kind}"]
        if "pool.weight" in tensors:
            out[f"bert.pooler.dense.{kind}"] = tensors[f"pool.{kind}"]
            out[f"cls.seq_relationship.{kind}"] = tensors[f"binary.{kind}"]
        norms = [tensors[f"{i}.ln{n}.{kind}"] for i in range(model.layers) for n in (1, 2)] + [tensors[f"lnf.{kind}"]]
        if post_norm:  # of the embeddings, then of each attention and each output
            layers = [f"encoder.layer.{i}.{at}" for i in range(model.layers) for at in ("attention.output", "output")]
            keys = [f"bert.{place}.LayerNorm.{kind}" for place in ("embeddings", *layers)]
        else:
            keys = [f"bert.encoder.layer.{i}.{at}.{kind}" for i in range(model.layers) for at in ("attention.ln", "ln")]
            keys += [f"bert.encoder.ln.{kind}"]
        out |= dict(zip(keys, norms, strict=True))
        for i in range(model.layers):
            for hf, name in (("attention.self.query", "q"), ("attention.self.key", "k"), ("attention.self.value", "v"),
                             ("attention.output.dense", "proj"), ("intermediate.dense", "fc1"), ("output.dense", "fc2")):
                out[f"bert.encoder.layer.{i}.{hf}.{kind}"] = tensors[f"{i}.{name}.{kind}"]
    return out
