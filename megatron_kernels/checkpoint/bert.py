"""BERTs: what their checkpoints tell about the configuration, and their Hugging Face names.

Megatron-LM's own ordering of layer norm and residual (pre-norm) is Hugging Face's model type `megatron-bert`. With
apply_residual_connection_post_layernorm a Megatron BERT is the original BERT (post-norm), Hugging Face's `bert`, whose norms end
a sublayer where Megatron's begin the next one. In both, query, key and value are three matrices.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.config import BertConfig, ModelConfig
from . import names
from .errors import CheckpointError, MissingConfigurationError
from .settings import (
    describe,
    fields_of,
    gelu_of_huggingface,
    known_by_args,
    known_by_user,
    merge,
    settle_vocabulary,
    truth,
)
from .tensors import Checkpoint, Entry, LazyTensors, rows_of_heads
from .weights import Made, Source, check_source, locate, weight_files

SUPPORTED_ARGS = ("apply_residual_connection_post_layernorm",)
TYPES = {"megatron-bert": False, "bert": True}  # Hugging Face's model types -> whether the ordering is post-norm
_HF_FIELDS = {
    "vocab_size": "vocab_size", "max_position_embeddings": "max_position_embeddings", "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_attention_heads", "intermediate_size": "ffn_hidden_size",
    "type_vocab_size": "num_tokentypes", "layer_norm_eps": "layernorm_epsilon", "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout", "initializer_range": "init_method_std",
}
_HF_DEFAULTS: dict[str, dict[str, Any]] = {  # what Hugging Face's own configurations take for absent fields
    "megatron-bert": {"vocab_size": 29056, "hidden_size": 1024, "num_layers": 24, "num_attention_heads": 16,
                      "ffn_hidden_size": 4096},
    "bert": {"vocab_size": 30522, "hidden_size": 768, "num_layers": 12, "num_attention_heads": 12, "ffn_hidden_size": 3072},
}
_HF_BOTH = {"max_position_embeddings": 512, "num_tokentypes": 2, "layernorm_epsilon": 1e-12, "gelu_approximate": "none"}
_SHAPES_345M = {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "max_position_embeddings": 512}
_VOCABS_345M = (28996, 30522)  # cased, uncased
_QKV = ("query", "key", "value")


def measure(measured: dict[str, Any], first: dict[str, Tensor], label: str) -> dict[str, Any]:
    """What the tensors of a Megatron BERT tell beside the sizes; `first` has each tensor of the first shard."""
    if measured["untie_embeddings_and_output_weights"]:
        raise CheckpointError(f"{label}: an output layer with weights of its own, which is not supported in a BERT")
    types = first.get(names.TOKENTYPE_EMBEDDINGS.canonical)
    sizes = {name: value for name, value in measured.items() if name != "untie_embeddings_and_output_weights"}
    return sizes | {"num_tokentypes": 0 if types is None else types.shape[0],
                    "add_binary_head": names.BINARY_HEAD[0].canonical in first}


def _known_by_args(args: dict[str, Any], label: str) -> dict[str, Any]:
    known = {name: value for name, value in known_by_args(args, label).items()
             if name not in ("bos_token_id", "eos_token_id", "untie_embeddings_and_output_weights")}
    if "gelu_approximate" in known:  # bias_gelu_fusion, which makes it tanh, reaches the layers alone
        known["lm_head_gelu_approximate"] = "tanh" if truth(args.get("openai_gelu")) else "none"
    if args.get(SUPPORTED_ARGS[0]) is not None:
        known[SUPPORTED_ARGS[0]] = truth(args[SUPPORTED_ARGS[0]])
    return known


def known_by_huggingface(content: dict[str, Any], label: str) -> dict[str, Any]:
    """What the config.json of a BERT states, under our names. Raises CheckpointError for another model, for values of the wrong
    type, and for options that change the function."""
    kind = content.get("model_type")
    if kind is not None and kind not in TYPES:
        raise CheckpointError(f"{label}: model_type {kind!r}, expected {' or '.join(map(repr, TYPES))}")
    for name, fine in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False),
                       ("tie_word_embeddings", True), ("embedding_size", content.get("hidden_size")), ("pruned_heads", {}),
                       ("quantization_config", None)):
        if (value := content.get(name, fine)) not in (fine, None):
            raise CheckpointError(f"{label}: {name} = {value!r} is not supported; expected {fine!r}")
    known = fields_of(content, _HF_FIELDS, label)
    if "hidden_dropout" in known:
        known["embedding_dropout"] = known["hidden_dropout"]
    if "hidden_act" in content:
        known["gelu_approximate"] = gelu_of_huggingface(content["hidden_act"], label, "hidden_act")
        known["lm_head_gelu_approximate"] = known["gelu_approximate"]
    if kind is not None:
        known[SUPPORTED_ARGS[0]] = TYPES[kind]
    return known


def combine(measured: dict[str, Any], args: dict[str, Any] | None, config: ModelConfig | str | Path | None, label: str,
            tensor_parallel: int) -> tuple[BertConfig, tuple[str, ...]]:
    """The configuration of a Megatron BERT, and notes for the user; as `settings.combine` does it for a GPT-2."""
    user, user_label = known_by_user(config, BertConfig, known_by_huggingface)
    if not measured["num_tokentypes"] and not isinstance(config, BertConfig):
        user.pop("num_tokentypes", None)  # Hugging Face's always has some
    known = merge(measured, None if args is None else _known_by_args(args, label), user, user_label, label)
    values = {name: value for name, (value, _) in known.items()}
    notes: list[str] = []
    if args is None:
        if vocab := _vocab_345m(measured, tensor_parallel):
            values = {"num_attention_heads": 16, "vocab_size": vocab} | values
            if config is None:
                notes.append(f"no args in the checkpoint: the shapes are the 345M release's, so are heads (16), vocabulary "
                             f"({vocab}), activation (erf GELU), epsilon (1e-5, where transformers' converter wrote 1e-12) and "
                             "ordering (pre-norm)")
        missing = [name for name in ("num_attention_heads", "vocab_size") if name not in values]
        if "num_attention_heads" not in values or (missing and config is None):
            raise MissingConfigurationError(
                f"{label}: the checkpoint has no args, and its shapes ({describe(measured)}) are not the 345M release's; give "
                f"{' and '.join(missing)} with a configuration file (--config FILE, a Hugging Face config.json; hidden_act there "
                "defaults to gelu, model_type to megatron-bert)",
                measured | {"num_attention_heads": tensor_parallel, "vocab_size": measured["padded_vocab_size"]}, BertConfig)
    if "num_attention_heads" not in values:
        raise CheckpointError(f"{label}: args lack num_attention_heads; give it with a configuration file (--config FILE)")
    notes += settle_vocabulary(values, known, label)
    settings = _make_config(values, label)
    if settings.gelu_approximate != settings.lm_head_gelu_approximate:
        notes.append("the layers compute the tanh GELU (args.bias_gelu_fusion), the masked-LM head the erf one; Hugging Face has "
                     "one hidden_act for both, for which a conversion takes the layers'")
    return settings, tuple(notes)


def _vocab_345m(measured: dict[str, Any], tensor_parallel: int) -> int:
    """The vocabulary of the 345M release with these shapes, or 0."""
    step = 128 * tensor_parallel
    same = all(measured[name] == size for name, size in _SHAPES_345M.items())
    return next((vocab for vocab in _VOCABS_345M if same and measured["padded_vocab_size"] == -(-vocab // step) * step), 0)


def _make_config(values: dict[str, Any], label: str) -> BertConfig:
    try:
        return BertConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{label}: {error}") from None


def huggingface_keys(parameter: names.Parameter, config: BertConfig) -> tuple[str, ...]:
    """The keys of a parameter in Hugging Face's model of that ordering: three of query, key and value, one of any other."""
    if parameter.canonical == names.WORD_EMBEDDINGS.canonical:
        return ("bert.embeddings.word_embeddings.weight",)
    if parameter.canonical == names.POSITION_EMBEDDINGS.canonical:
        return ("bert.embeddings.position_embeddings.weight",)
    module, _, kind = parameter.canonical.rpartition(".")
    post = config.apply_residual_connection_post_layernorm
    if module == "encoder.final_layernorm":
        return (f"bert.encoder.layer.{config.num_layers - 1}.output.LayerNorm.{kind}" if post else f"bert.encoder.ln.{kind}",)
    if not module.startswith("encoder.layers."):
        return (parameter.huggingface,)
    _, _, number, rest = module.split(".", 3)
    layer = f"bert.encoder.layer.{number}"
    if rest == "self_attention.linear_qkv":
        return tuple(f"{layer}.attention.self.{part}.{kind}" for part in _QKV)
    if rest == "input_layernorm" and post:
        before = f"bert.encoder.layer.{int(number) - 1}.output" if int(number) else "bert.embeddings"
        return (f"{before}.LayerNorm.{kind}",)
    here = {"input_layernorm": "attention.ln", "pre_mlp_layernorm": "attention.output.LayerNorm" if post else "ln",
            "self_attention.linear_proj": "attention.output.dense", "mlp.linear_fc1": "intermediate.dense",
            "mlp.linear_fc2": "output.dense"}
    return (f"{layer}.{here[rest]}.{kind}",)


_IGNORED = ("bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")  # a buffer, copies


def _bare(key: str) -> str | None:
    """A key as transformers has it today: old files call a layer norm's weight gamma and its bias beta."""
    if key in _IGNORED:
        return None
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def load(directory: Path, content: dict[str, Any], config: ModelConfig | str | Path | None = None) -> Checkpoint:
    """Read a Hugging Face directory of a BERT whose config.json has this content; see `checkpoint.load`."""
    label = str(directory / "config.json")
    known = known_by_huggingface(content, label)
    user, user_label = known_by_user(config, BertConfig, known_by_huggingface)
    for name, value in user.items():
        if name in known and known[name] != value and not name.endswith(("dropout", "std")):
            raise CheckpointError(f"{user_label} says {name} = {value!r}, but {label} says {known[name]!r}")
        known[name] = value
    known = _HF_DEFAULTS[content["model_type"]] | _HF_BOTH | known
    files, kind = weight_files(directory)
    found = locate(files, _bare)
    heads = [parameter.huggingface for parameter in names.BINARY_HEAD]
    known["add_binary_head"] = user.get("add_binary_head", "cls.seq_relationship.weight" in found)  # a pooler alone is of no use
    settings = _make_config(known, label)
    entries = {parameter.canonical: _entry(parameter, found, settings, directory) for parameter in names.parameters(settings)}
    expected = {key for parameter in names.parameters(settings) for key in huggingface_keys(parameter, settings)}
    if unknown := sorted(set(found) - expected - set(heads)):
        raise CheckpointError(f"{found[unknown[0]].label}: unknown key {unknown[0]}; expected the parameters of a "
                              f"{content['model_type']} with {settings.num_layers} layers and its pre-training heads")
    return Checkpoint(settings, LazyTensors(entries), None, "huggingface", directory,
                      {"model": f"BERT ({content['model_type']})", "layout": f"directory, {len(files)} file(s): {directory}",
                       "weights": kind})


def _entry(parameter: names.Parameter, found: dict[str, Source], config: BertConfig, directory: Path) -> Entry:
    keys = huggingface_keys(parameter, config)
    shape = parameter.shape(config)
    sources = [check_source(found.get(key), key, (shape[0] // len(keys), *shape[1:]), directory) for key in keys]
    first = sources[0]
    for source in sources[1:]:
        if source.dtype != first.dtype:
            raise CheckpointError(f"{source.label}: {source.key} is of {source.dtype}, but {first.key} of {first.dtype}")
    assert first.dtype is not None
    return Entry(shape, first.dtype, partial(_read, sources, parameter, config.num_attention_heads), first.key,
                 parameter.split or 0)


def _read(sources: list[Source], parameter: names.Parameter, heads: int, start: int, stop: int) -> Tensor:
    if not parameter.is_qkv:
        return sources[0].read().narrow(parameter.split or 0, start, stop - start).contiguous()
    parts = [source.read().unflatten(0, (heads, -1)) for source in sources]  # [heads, head_dim, ...] each
    size = 3 * parts[0].shape[1]
    first, last = start // size, -(-stop // size)
    grouped = torch.stack([part[first:last] for part in parts], 1)
    return rows_of_heads(grouped, start - first * size, stop - first * size).contiguous()


def tensors_for_huggingface(checkpoint: Checkpoint, config: BertConfig, dtype: torch.dtype | None) -> dict[str, Made]:
    """Key -> the tensor to be written, made when it is asked for. Rows that pad the vocabulary are dropped; a model without token
    types gets a table of two zero rows, because Hugging Face's model always has one."""
    made: dict[str, Made] = {}
    for parameter in names.parameters(config):
        shape, own = checkpoint.meta(parameter.canonical)
        if parameter.symbols[0] == "v":
            shape = (config.vocab_size, *shape[1:])
        keys = huggingface_keys(parameter, config)
        for i, key in enumerate(keys):
            made[key] = Made((shape[0] // len(keys), *shape[1:]), dtype or own,
                             partial(_part, checkpoint, parameter, config, i, dtype or own))
    if not config.num_tokentypes:
        shape, own = (2, config.hidden_size), dtype or checkpoint.dtype
        made[names.TOKENTYPE_EMBEDDINGS.huggingface] = Made(shape, own, lambda: torch.zeros(shape, dtype=own))
    return made


def _part(checkpoint: Checkpoint, parameter: names.Parameter, config: BertConfig, which: int, dtype: torch.dtype) -> Tensor:
    tensor = checkpoint.tensors[parameter.canonical]
    if parameter.is_qkv:
        tensor = tensor.unflatten(0, (config.num_attention_heads, 3, -1))[:, which].flatten(0, 1)
    if parameter.symbols[0] == "v":
        tensor = tensor[:config.vocab_size]
    return tensor.to(dtype).contiguous()


def to_huggingface(config: BertConfig) -> dict[str, Any]:
    """The fields of the Hugging Face config.json for `config`."""
    post = config.apply_residual_connection_post_layernorm
    name = f"{'Bert' if post else 'MegatronBert'}{'ForPreTraining' if config.add_binary_head else 'ForMaskedLM'}"
    fields = {hf: getattr(config, ours) for hf, ours in _HF_FIELDS.items()}
    return {"architectures": [name], "model_type": next(kind for kind, ordering in TYPES.items() if ordering is post), **fields,
            "type_vocab_size": config.num_tokentypes or 2,
            "hidden_act": "gelu_new" if config.gelu_approximate == "tanh" else "gelu", "position_embedding_type": "absolute",
            "pad_token_id": 0, "tie_word_embeddings": True, "is_decoder": False, "use_cache": True}


def megatron_args(config: BertConfig) -> dict[str, Any]:
    """What Megatron-LM's command line says of a BERT otherwise than of a GPT-2; CheckpointError for what it can't say."""
    layers, head = config.gelu_approximate, config.lm_head_gelu_approximate
    if (layers, head) == ("none", "tanh"):
        raise CheckpointError("Megatron-LM has no option for erf GELU in the layers and tanh GELU in the masked-LM head")
    cased = config.vocab_size == _VOCABS_345M[0]
    return {"tokenizer_type": "BertWordPieceCase" if cased else "BertWordPieceLowerCase",
            "bert_binary_head": config.add_binary_head, "openai_gelu": head == "tanh",
            "bias_gelu_fusion": (layers, head) == ("tanh", "none"),
            SUPPORTED_ARGS[0]: config.apply_residual_connection_post_layernorm}
