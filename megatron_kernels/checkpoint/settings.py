"""The model's configuration, put together from what the tensors, Megatron's `args` and a Hugging Face config.json say.

Layers, width, feed-forward width, positions and padded vocabulary are read off the tensors; the other sources must agree
with them. `args` or the config file tell the rest, and features of Megatron-LM that change the function computed are refused
by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.config import GPT2Config, ModelConfig
from .errors import CheckpointError, MissingConfigurationError

# Hugging Face's name -> ours
_HF_FIELDS = {
    "vocab_size": "vocab_size", "n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_layers",
    "n_head": "num_attention_heads", "n_inner": "ffn_hidden_size", "layer_norm_epsilon": "layernorm_epsilon",
    "resid_pdrop": "hidden_dropout", "embd_pdrop": "embedding_dropout", "attn_pdrop": "attention_dropout",
    "initializer_range": "init_method_std", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
}
_HF_ALIASES = {"n_ctx": "n_positions", "max_position_embeddings": "n_positions", "hidden_size": "n_embd",
               "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")
_ERF_GELU = ("gelu", "gelu_python")
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "max_position_embeddings")  # told by the tensors
_TAKEN_FROM_ARGS = ("num_attention_heads", "padded_vocab_size", "hidden_dropout", "attention_dropout", "init_method_std",
                    "bos_token_id", "eos_token_id")
_SHAPES_345M = {"num_layers": 24, "hidden_size": 1024, "ffn_hidden_size": 4096, "max_position_embeddings": 1024}
_VOCAB_345M = 50257


def truth(value: Any) -> bool:
    """A flag as Megatron's args hold it: a bool, None, a number, or now and then a word."""
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def _experts(value: Any) -> bool:
    counts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(count, int) and count > 1 for count in counts)


def _other_than(*fine: Any) -> Any:
    return lambda value: value is not None and str(getattr(value, "value", value)).lower() not in fine


# args attribute, whether a value of it is refused, what it is
_REFUSED_ARGS: tuple[tuple[str, Any, str], ...] = (
    ("swiglu", truth, "SwiGLU"),
    ("gated_linear_unit", truth, "a gated linear unit"),
    ("glu_activation", truth, "a gated linear unit"),
    ("geglu", truth, "GEGLU"),
    ("quick_geglu", truth, "quick GEGLU"),
    ("squared_relu", truth, "squared ReLU"),
    ("relu", truth, "ReLU"),
    ("quick_gelu", truth, "quick GELU"),
    ("apply_residual_connection_post_layernorm", truth, "the residual connection taken after the layer norm (post-layernorm)"),
    ("apply_layernorm_1p", truth, "layer norm with weights stored around zero"),
    ("normalization", _other_than("layernorm"), "a normalization other than LayerNorm"),
    ("rms_norm", truth, "RMSNorm"),
    ("use_rotary_position_embeddings", truth, "rotary position embeddings"),
    ("use_rotary_emb", truth, "rotary position embeddings"),
    ("position_embedding_type", _other_than("learned_absolute", "absolute", "positionembeddingtype.absolute"),
     "position embeddings other than learned absolute ones"),
    ("add_position_embedding", lambda value: value is not None and not truth(value), "no position embeddings"),
    ("multi_latent_attention", truth, "multi-latent attention"),
    ("qk_layernorm", truth, "layer norms on queries and keys"),
    ("window_size", truth, "sliding-window attention"),
    ("num_experts", _experts, "a mixture of experts"),
    ("add_bias_linear", lambda value: value is not None and not truth(value), "linear layers without biases"),
    ("embed_layernorm", truth, "a layer norm after the embeddings"),
    ("attention_head_type", _other_than("multihead"), "multi-query attention"),
    ("add_cross_attention", truth, "cross attention"),
)


def refuse_unsupported(args: dict[str, Any], label: str, supported: Collection[str] = ()) -> None:
    """Raise CheckpointError naming the first attribute of `args` that asks for something the model isn't; `supported` are the
    attributes that it takes nevertheless."""
    for name, refused, feature in _REFUSED_ARGS:
        if name in args and name not in supported and refused(args[name]):
            raise CheckpointError(f"{label}: args.{name} = {args[name]!r} asks for {feature}, which is not supported")
    heads, groups = args.get("num_attention_heads"), args.get("num_query_groups")
    if truth(args.get("group_query_attention")) and groups != heads:
        raise CheckpointError(f"{label}: args.group_query_attention with num_query_groups = {groups!r} and {heads!r} heads: "
                              "grouped-query attention is not supported")


def gelu_of_args(args: dict[str, Any]) -> str | None:
    """"tanh" or "none" (erf) as Megatron-LM would compute it; None when `args` has neither flag."""
    flags = [args[name] for name in ("bias_gelu_fusion", "openai_gelu") if name in args]
    return None if not flags else "tanh" if any(map(truth, flags)) else "none"


def gelu_of_huggingface(name: str, label: str, field: str = "activation_function") -> str:
    """Our `gelu_approximate` for a Hugging Face activation; raises CheckpointError for anything but a GELU."""
    if name in _TANH_GELU:
        return "tanh"
    if name in _ERF_GELU:
        return "none"
    raise CheckpointError(f"{label}: {field} {name!r} is not supported; expected one of "
                          f"{', '.join((*_TANH_GELU, *_ERF_GELU))}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError when it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def fields_of(content: dict[str, Any], names: dict[str, str], label: str) -> dict[str, Any]:
    """The numbers of a config.json under our names; raises CheckpointError for values of the wrong type. `names` maps Hugging
    Face's to ours."""
    known: dict[str, Any] = {}
    for hf, ours in names.items():
        value = content.get(hf)
        if value is None:
            continue
        if isinstance(value, list) and hf.endswith("token_id") and value:
            value = value[0]
        kind = float if ours.endswith(("dropout", "epsilon", "std")) else int
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise CheckpointError(f"{label}: {hf} must be of type {kind.__name__}, got {value!r}")
        known[ours] = kind(value)
    return known


def known_by_huggingface(content: dict[str, Any], label: str) -> dict[str, Any]:
    """What a Hugging Face config.json states, under our names; what it leaves out is left out.

    Raises CheckpointError for a model that is no GPT-2, for values of the wrong type, and for options that change the function.
    """
    if content.get("model_type", "gpt2") != "gpt2":
        raise CheckpointError(f"{label}: model_type {content['model_type']!r}, expected 'gpt2'")
    for name, fine in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False),
                       ("pruned_heads", {}), ("quantization_config", None)):
        if (value := content.get(name, fine)) not in (fine, None):
            raise CheckpointError(f"{label}: {name} = {value!r} is not supported; expected {fine!r}")
    aliases = {alias: _HF_FIELDS[name] for alias, name in _HF_ALIASES.items() if name not in content}
    known = fields_of(content, _HF_FIELDS | aliases, label)
    if "activation_function" in content:
        known["gelu_approximate"] = gelu_of_huggingface(content["activation_function"], label)
    if "tie_word_embeddings" in content:
        known["untie_embeddings_and_output_weights"] = not content["tie_word_embeddings"]
    return known


def known_by_user(config: ModelConfig | str | Path | None, kind: type[ModelConfig] = GPT2Config,
                  by_huggingface: Callable[[dict[str, Any], str], dict[str, Any]] = known_by_huggingface,
                  ) -> tuple[dict[str, Any], str]:
    """What the user's configuration states, under our names, and how to call it in messages.

    A checkpoint of that kind is to be read; `by_huggingface` knows its config.json."""
    if config is None:
        return {}, "config"
    if isinstance(config, ModelConfig):
        if not isinstance(config, kind):
            raise CheckpointError(f"config is a {type(config).__name__}, but the checkpoint is a {kind.model}: expected a "
                                  f"{kind.__name__}")
        known = {name: value for name, value in asdict(config).items() if value is not None}
        if config.padded_vocab_size == config.vocab_size:
            known.pop("padded_vocab_size")  # its default, which says nothing about the table
        return known, "config"
    return by_huggingface(read_json(Path(config)), str(config)), str(config)


def known_by_args(args: dict[str, Any], label: str) -> dict[str, Any]:
    """What Megatron's args state, under our names; raises CheckpointError where they contradict themselves."""
    known = {name: args[name] for name in (*_SIZES, *_TAKEN_FROM_ARGS) if args.get(name) is not None}
    if known.get("num_layers") is None and args.get("encoder_num_layers") is not None:
        known["num_layers"] = args["encoder_num_layers"]
    for name, value in known.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"{label}: args.{name} must be a number, got {value!r}")
    eps = {name: args[name] for name in ("layernorm_epsilon", "norm_epsilon") if args.get(name) is not None}
    if len(set(eps.values())) > 1:
        raise CheckpointError(f"{label}: args contradict themselves: " + ", ".join(f"{k} = {v!r}" for k, v in eps.items()))
    if eps:
        known["layernorm_epsilon"] = float(next(iter(eps.values())))
    if "hidden_dropout" in known:
        known["embedding_dropout"] = known["hidden_dropout"]
    heads, channels = known.get("num_attention_heads"), args.get("kv_channels")
    if heads and channels and "hidden_size" in known and heads * channels != known["hidden_size"]:
        raise CheckpointError(f"{label}: args.kv_channels = {channels} x num_attention_heads = {heads} is not hidden_size = "
                              f"{known['hidden_size']}, which is not supported")
    if (gelu := gelu_of_args(args)) is not None:
        known["gelu_approximate"] = gelu
    if args.get("orig_vocab_size"):
        known["vocab_size"] = int(args["orig_vocab_size"])
    if args.get("untie_embeddings_and_output_weights") is not None:
        known["untie_embeddings_and_output_weights"] = truth(args["untie_embeddings_and_output_weights"])
    return known


def _is_345m(measured: dict[str, Any], tensor_parallel: int) -> bool:
    step = 128 * tensor_parallel
    return (all(measured[name] == size for name, size in _SHAPES_345M.items())
            and measured["padded_vocab_size"] == -(-_VOCAB_345M // step) * step)


Known = dict[str, tuple[Any, str]]  # field of a configuration -> its value, and who says so


def merge(measured: dict[str, Any], args: dict[str, Any] | None, user: dict[str, Any], user_label: str, label: str) -> Known:
    """What tensors, args and the user's configuration state together. Sources later in that order fill what is still open; a
    contradiction raises CheckpointError with both values, except about dropouts and the like, where the user decides."""
    known: Known = {name: (value, "the tensors") for name, value in measured.items()}
    stated = [(args, f"args in {label}")] if args is not None else []
    dropouts = ("hidden_dropout", "embedding_dropout", "attention_dropout", "init_method_std", "attention")
    for facts, source in [*stated, (user, user_label)]:
        for name, value in facts.items():
            if name not in known or (name in dropouts and source == user_label):
                known[name] = (value, source)
            elif known[name][0] != value:
                said, where = known[name]
                raise CheckpointError(f"{source} say {name} = {value!r}, but {where}{'' if label in where else f' in {label}'} "
                                      f"say {said!r}")
    return known


def combine(measured: dict[str, Any], args: dict[str, Any] | None, config: ModelConfig | str | Path | None, label: str,
            tensor_parallel: int) -> tuple[GPT2Config, tuple[str, ...]]:
    """The configuration of a Megatron GPT-2, and notes for the user.

    measured: what the tensors tell (layers, sizes, padded_vocab_size, untie_embeddings_and_output_weights). Raises
    CheckpointError where that, args and config contradict each other, and MissingConfigurationError where they leave it open.
    """
    user, user_label = known_by_user(config)
    known = merge(measured, None if args is None else known_by_args(args, label), user, user_label, label)
    values = {name: value for name, (value, _) in known.items()}
    notes: list[str] = []
    if args is None:
        if _is_345m(measured, tensor_parallel):
            for name, value in {"num_attention_heads": 16, "vocab_size": _VOCAB_345M}.items():
                values.setdefault(name, value)
            if config is None:
                notes.append("no args in the checkpoint: the shapes are the 345M release's, so are heads (16), vocabulary "
                             "(50257) and activation (tanh GELU)")
        missing = [hf for hf in ("n_head", "vocab_size") if _HF_FIELDS[hf] not in values]
        if "num_attention_heads" not in values or (missing and config is None):
            raise MissingConfigurationError(
                f"{label}: the checkpoint has no args, and its shapes ({describe(measured)}) are not the 345M release's; give "
                f"{' and '.join(missing)} with a configuration file (--config FILE, a Hugging Face config.json; "
                "activation_function there defaults to gelu_new)",
                measured | {"num_attention_heads": tensor_parallel, "vocab_size": measured["padded_vocab_size"]})
        values.setdefault("gelu_approximate", "tanh")
    values.setdefault("gelu_approximate", "none")
    if "num_attention_heads" not in values:
        raise CheckpointError(f"{label}: args lack num_attention_heads; give n_head with a configuration file (--config FILE)")
    notes += settle_vocabulary(values, known, label)
    return make_config(values, label), tuple(notes)


def settle_vocabulary(values: dict[str, Any], known: Known, label: str) -> list[str]:
    """Give `values` a vocab_size where nobody said one, with a note about it; raises CheckpointError where it is too large."""
    notes = []
    if "vocab_size" not in values:
        values["vocab_size"] = values["padded_vocab_size"]
        notes.append(f"the original vocabulary size is unknown: all {values['vocab_size']} rows are kept as classes; "
                     "vocab_size in a configuration file (--config FILE) tells it")
    if values["vocab_size"] > values["padded_vocab_size"]:
        source = known["vocab_size"][1] if "vocab_size" in known else "the 345M release"
        raise CheckpointError(f"{source} says vocab_size = {values['vocab_size']}, but the word embeddings in {label} have "
                              f"only {values['padded_vocab_size']} rows")
    return notes


def make_config(values: dict[str, Any], label: str) -> GPT2Config:
    """A GPT2Config, with <|endoftext|> as begin and end where the vocabulary is GPT-2's and nothing else was said."""
    if values["vocab_size"] == _VOCAB_345M:
        for name in ("bos_token_id", "eos_token_id"):
            values.setdefault(name, _VOCAB_345M - 1)
    try:
        return GPT2Config(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{label}: {error}") from None


def to_huggingface(config: GPT2Config, vocab_size: int) -> dict[str, Any]:
    """The fields of a Hugging Face config.json for `config`, with the vocabulary that the weights file holds."""
    fields = {hf: getattr(config, ours) for hf, ours in _HF_FIELDS.items()}
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **fields, "vocab_size": vocab_size,
            "n_ctx": config.max_position_embeddings,
            "activation_function": "gelu_new" if config.gelu_approximate == "tanh" else "gelu",
            "tie_word_embeddings": not config.untie_embeddings_and_output_weights,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
            "add_cross_attention": False, "use_cache": True}


def describe(measured: dict[str, Any]) -> str:
    """The sizes that the tensors tell, in words."""
    return ", ".join(f"{name} {measured[name]}" for name in (*_SIZES, "padded_vocab_size"))
