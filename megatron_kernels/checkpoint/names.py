"""One table of names: every parameter of the model in Megatron-core's, Megatron-LM's and Hugging Face's words.

The canonical names are Megatron-core's (local layer spec). The table also says how tensor parallelism cuts a parameter:
column-parallel layers along dimension 0, row-parallel ones along dimension 1 (their bias is replicated), the vocabulary
along 0.
Hugging Face's GPT-2 stores its matrices as Conv1D, [in, out]: the transpose of Megatron's [out, in]. Its BERTs' names, which
depend on the ordering of layer norm and residual, are in `bert.py`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

from ..models.config import BertConfig, ModelConfig
from .errors import CheckpointError


@dataclass(frozen=True)
class Parameter:
    """One parameter: its three names, its full shape in symbols (see `sizes`), and the dimension tensor parallelism cuts."""

    canonical: str
    megatron: str
    huggingface: str
    symbols: tuple[str, ...]
    split: int | None = None
    conv1d: bool = False

    @property
    def is_qkv(self) -> bool:
        return ".linear_qkv." in self.canonical

    def shape(self, config: ModelConfig, tensor_parallel: int = 1) -> tuple[int, ...]:
        """Shape of one of `tensor_parallel` shards (of the whole, by default)."""
        whole = [sizes(config)[symbol] for symbol in self.symbols]
        if self.split is not None:
            whole[self.split] //= tensor_parallel
        return tuple(whole)

    def of_layer(self, layer: int, stack: str = "decoder") -> Parameter:
        """This row of the per-layer table as the parameter of layer `layer`, counted from 0; a BERT's stack is its encoder."""
        return Parameter(f"{stack}.layers.{layer}.{self.canonical}", f"layers.{layer}.{self.megatron}",
                         f"h.{layer}.{self.huggingface}", self.symbols, self.split, self.conv1d)


def sizes(config: ModelConfig) -> dict[str, int]:
    """What the symbols of the table stand for: v rows of the vocabulary, p positions, t token types, h hidden, 3h,
    f feed-forward, and 2 for the next-sentence head's classes."""
    return {"v": config.padded_vocab_size or config.vocab_size, "p": config.max_position_embeddings, "h": config.hidden_size,
            "3h": 3 * config.hidden_size, "f": config.ffn_hidden_size or 4 * config.hidden_size, "t": config.num_tokentypes, "2": 2}


# canonical module, Megatron-LM's, Hugging Face's, shape of the weight, split of the weight, split of the bias
_LAYER_MODULES: tuple[tuple[str, str, str, tuple[str, ...], int | None, int | None], ...] = (
    ("input_layernorm", "input_layernorm", "ln_1", ("h",), None, None),
    ("self_attention.linear_qkv", "self_attention.query_key_value", "attn.c_attn", ("3h", "h"), 0, 0),
    ("self_attention.linear_proj", "self_attention.dense", "attn.c_proj", ("h", "h"), 1, None),
    ("pre_mlp_layernorm", "post_attention_layernorm", "ln_2", ("h",), None, None),
    ("mlp.linear_fc1", "mlp.dense_h_to_4h", "mlp.c_fc", ("f", "h"), 0, 0),
    ("mlp.linear_fc2", "mlp.dense_4h_to_h", "mlp.c_proj", ("h", "f"), 1, None),
)

LAYER: tuple[Parameter, ...] = tuple(
    Parameter(f"{core}.{kind}", f"{megatron}.{kind}", f"{hf}.{kind}", shape if kind == "weight" else shape[:1],
              weight_split if kind == "weight" else bias_split, conv1d=kind == "weight" and len(shape) == 2)
    for core, megatron, hf, shape, weight_split, bias_split in _LAYER_MODULES for kind in ("weight", "bias"))

WORD_EMBEDDINGS = Parameter("embedding.word_embeddings.weight", "word_embeddings.weight", "wte.weight", ("v", "h"), 0)
POSITION_EMBEDDINGS = Parameter("embedding.position_embeddings.weight", "position_embeddings.weight", "wpe.weight", ("p", "h"))
FINAL_NORM = tuple(Parameter(f"decoder.final_layernorm.{kind}", f"final_layernorm.{kind}", f"ln_f.{kind}", ("h",))
                   for kind in ("weight", "bias"))
OUTPUT_LAYER = Parameter("output_layer.weight", "output_layer.weight", "lm_head.weight", ("v", "h"), 0)
HEAD_COPY = "word_embeddings_for_head.weight"  # the tied head's copy of the word embeddings on the last pipeline stage

TOKENTYPE_EMBEDDINGS = Parameter("embedding.tokentype_embeddings.weight", "tokentype_embeddings.weight",
                                 "bert.embeddings.token_type_embeddings.weight", ("t", "h"))
LM_HEAD = (
    Parameter("lm_head.dense.weight", "lm_head.dense.weight", "cls.predictions.transform.dense.weight", ("h", "h")),
    Parameter("lm_head.dense.bias", "lm_head.dense.bias", "cls.predictions.transform.dense.bias", ("h",)),
    Parameter("lm_head.layer_norm.weight", "lm_head.layernorm.weight", "cls.predictions.transform.LayerNorm.weight", ("h",)),
    Parameter("lm_head.layer_norm.bias", "lm_head.layernorm.bias", "cls.predictions.transform.LayerNorm.bias", ("h",)),
    Parameter("output_layer.bias", "lm_head.bias", "cls.predictions.bias", ("v",), 0))
BINARY_HEAD = (
    Parameter("pooler.dense.weight", "pooler.dense.weight", "bert.pooler.dense.weight", ("h", "h")),
    Parameter("pooler.dense.bias", "pooler.dense.bias", "bert.pooler.dense.bias", ("h",)),
    Parameter("binary_head.weight", "binary_head.weight", "cls.seq_relationship.weight", ("2", "h")),
    Parameter("binary_head.bias", "binary_head.bias", "cls.seq_relationship.bias", ("2",)))
_ONLY_IN_BERT = (TOKENTYPE_EMBEDDINGS, *LM_HEAD, *BINARY_HEAD)


def is_bert(canonical: Iterable[str]) -> bool:
    """Whether there are names among these that a BERT has and a GPT-2 hasn't."""
    return not {parameter.canonical for parameter in _ONLY_IN_BERT}.isdisjoint(canonical)


def heads_of_bert(found: Container[str]) -> tuple[Parameter, ...]:
    """What the last stage of a BERT with these names must have: the masked-LM head, and all of the next-sentence head or
    nothing of it."""
    return LM_HEAD + (BINARY_HEAD if any(parameter.canonical in found for parameter in BINARY_HEAD) else ())


def bert_parameters(config: BertConfig) -> Iterator[Parameter]:
    """Every parameter of a BERT, in the order of the forward pass."""
    yield WORD_EMBEDDINGS
    yield POSITION_EMBEDDINGS
    if config.num_tokentypes:
        yield TOKENTYPE_EMBEDDINGS
    for layer in range(config.num_layers):
        for parameter in LAYER:
            yield parameter.of_layer(layer, "encoder")
    yield from final_norm(config)
    yield from LM_HEAD
    if config.add_binary_head:
        yield from BINARY_HEAD


def final_norm(config: ModelConfig) -> Iterator[Parameter]:
    """Weight and bias of the norm after the last layer."""
    for parameter in FINAL_NORM:
        yield replace(parameter, canonical=of_encoder(parameter.canonical)) if isinstance(config, BertConfig) else parameter


def of_encoder(canonical: str) -> str:
    """The name in a BERT of what the reader, which doesn't know yet what it reads, has as a part of the decoder."""
    return f"encoder.{canonical.removeprefix('decoder.')}" if canonical.startswith("decoder.") else canonical


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Every parameter of the model, in the order of the forward pass."""
    if isinstance(config, BertConfig):
        yield from bert_parameters(config)
        return
    yield WORD_EMBEDDINGS
    yield POSITION_EMBEDDINGS
    for layer in range(config.num_layers):
        for parameter in LAYER:
            yield parameter.of_layer(layer)
    yield from final_norm(config)
    if config.untie_embeddings_and_output_weights:
        yield OUTPUT_LAYER


# Other spellings of the modules of a layer, over the years: v1/v2 `attention`, the 2023 legacy `*_norm`, Transformer Engine's
# TransformerLayer, and Megatron-core's Transformer Engine spec, which keeps a layer norm inside the linear layer after it.
_MODULE_ALIASES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "pre_mlp_layernorm",
    "attention.query_key_value": "self_attention.linear_qkv",
    "self_attention.layernorm_qkv": "self_attention.linear_qkv",
    "attention.dense": "self_attention.linear_proj",
    "self_attention.proj": "self_attention.linear_proj",
}
_FUSED_ALIASES = {
    "self_attention.layernorm_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "layernorm_mlp.layer_norm_": "pre_mlp_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "layernorm_mlp.fc1_": "mlp.linear_fc1.",
    "layernorm_mlp.fc2_": "mlp.linear_fc2.",
}
_LAYER_KEYS = {
    **{p.canonical: p.canonical for p in LAYER},
    **{p.megatron: p.canonical for p in LAYER},
    **{f"{alias}.{kind}": f"{core}.{kind}" for alias, core in _MODULE_ALIASES.items() for kind in ("weight", "bias")},
    **{alias + kind: core + kind for alias, core in _FUSED_ALIASES.items() for kind in ("weight", "bias")},
}
_OUTER_KEYS = {
    "word_embeddings.weight": WORD_EMBEDDINGS.canonical,
    "position_embeddings.weight": POSITION_EMBEDDINGS.canonical,
    "output_layer.weight": OUTPUT_LAYER.canonical,
    HEAD_COPY: HEAD_COPY,
    **{p.megatron: p.canonical for p in FINAL_NORM},
    **{p.megatron.replace("final_layernorm", "final_norm"): p.canonical for p in FINAL_NORM},
    **{p.megatron: p.canonical for p in _ONLY_IN_BERT},
    **{p.megatron.replace("layernorm", "norm"): p.canonical for p in LM_HEAD if "layernorm" in p.megatron},
    **{p.canonical: p.canonical for p in LM_HEAD},
}
_WRAPPERS = re.compile(r"(?:(?:module|model|language_model|embedding|transformer|encoder|decoder)\.)*")
_LAYER_KEY = re.compile(r"layers\.(\d+)\.(.+)")

_REFUSED = (
    (r"rotary|inv_freq", "rotary position embeddings"),
    (r"experts|router|\.gate\.", "a mixture of experts"),
    (r"classification_head|multichoice_head", "a classifier made of a BERT"),
    (r"inter_attention|inter_layernorm|cross_attention|cross_attn", "an encoder-decoder (cross attention)"),
    (r"attention\.(query|key_value|q_proj|k_proj|v_proj|linear_q|linear_kv|linear_q_\w+|linear_kv_\w+)\.",
     "multi-query, grouped-query or latent attention (separate query and key-value projections)"),
    (r"[qk]_layernorm|[qk]_norm", "layer norms on queries and keys"),
    (r"lora|adapter", "adapter weights"),
)


def refused_feature(key: str) -> str | None:
    """What a Megatron key belongs to when it is no part of a model that is read, in words; None when it is simply unknown."""
    return next((feature for pattern, feature in _REFUSED if re.search(pattern, key)), None)


def from_megatron(key: str) -> str | None:
    """Canonical name of a flattened Megatron key, of any style; layer numbers stay local to the pipeline stage.

    None for what carries no weights (Transformer Engine's `_extra_state`). Raises KeyError for an unknown key.
    """
    if "_extra_state" in key:
        return None
    bare = key[_WRAPPERS.match(key).end():]  # type: ignore[union-attr]
    if layer := _LAYER_KEY.fullmatch(bare):
        return f"decoder.layers.{layer[1]}.{_LAYER_KEYS[layer[2]]}"
    return _OUTER_KEYS[bare]


def implies_grouped_qkv(key: str) -> bool:
    """Whether a key's style came after checkpoint version 2.0, so that its QKV rows are [heads, 3, head_dim]."""
    return ".linear_qkv." in key or ".layernorm_qkv." in key


def split_layer(canonical: str) -> tuple[int, str] | None:
    """(layer, rest) of a canonical per-layer name, None for the others."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", canonical)
    return (int(match[1]), match[2]) if match else None


_HF_IGNORED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks that old versions stored as buffers


def from_huggingface(key: str) -> str | None:
    """Hugging Face key without its `transformer.` prefix; None for the buffers that hold no weights."""
    bare = key.removeprefix("transformer.")
    return None if _HF_IGNORED.fullmatch(bare) else bare


def huggingface_key(parameter: Parameter) -> str:
    """The key under which GPT2LMHeadModel keeps `parameter`."""
    return parameter.huggingface if parameter is OUTPUT_LAYER else f"transformer.{parameter.huggingface}"


def check_parallel(config: ModelConfig, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Raise CheckpointError unless the model can be cut into `tensor_parallel` x `pipeline_parallel` shards."""
    for name, size in (("tensor_parallel", tensor_parallel), ("pipeline_parallel", pipeline_parallel)):
        if size < 1:
            raise CheckpointError(f"{name} must be at least 1, got {size}")
    for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
        if getattr(config, name) % tensor_parallel:
            raise CheckpointError(f"tensor_parallel {tensor_parallel} does not divide {name} {getattr(config, name)}")
    if config.num_layers % pipeline_parallel:
        raise CheckpointError(f"pipeline_parallel {pipeline_parallel} does not divide num_layers {config.num_layers}")
