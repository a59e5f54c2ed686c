"""The hyperparameters of a Megatron GPT-2 and of a Megatron BERT, under Megatron-LM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class GPT2Config:
    """Shape and behaviour of a GPT-2; the defaults are the 345M release of Megatron-LM.

    vocab_size counts the classes, padded_vocab_size the rows of the embedding table (Megatron-LM pads the table to a
    multiple of 128 x tensor-parallel size; None means no padding). Logits have padded_vocab_size columns inside the model and
    vocab_size columns where the model returns them.
    """

    num_layers: int = 24
    hidden_size: int = 1024
    num_attention_heads: int = 16
    max_position_embeddings: int = 1024
    vocab_size: int = 50257
    padded_vocab_size: int = None  # type: ignore[assignment]  # None: vocab_size
    ffn_hidden_size: int = None  # type: ignore[assignment]  # None: 4 x hidden_size
    layernorm_epsilon: float = 1e-5
    gelu_approximate: str = "tanh"  # "tanh", or "none" for erf
    untie_embeddings_and_output_weights: bool = False
    hidden_dropout: float = 0.1  # after each sublayer
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_method_std: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    attention: str = "softmax"  # "softmax": our fused softmax; "sdpa": torch.nn.functional.scaled_dot_product_attention
    fuse_linear_loss: bool = False  # the loss without ever holding the logits: less memory, a little more time

    model: ClassVar[str] = "GPT-2"  # what people call it
    causal: ClassVar[bool] = True
    apply_residual_connection_post_layernorm: ClassVar[bool] = False
    num_tokentypes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _complete(self)


@dataclass(frozen=True)
class BertConfig:
    """Shape and behaviour of a BERT; the defaults are the cased 345M release of Megatron-LM.

    vocab_size and padded_vocab_size are as of a GPT2Config. apply_residual_connection_post_layernorm chooses the ordering: False
    is Megatron-LM's, where the residual stream passes the layer norms by (pre-norm); True is the original BERT's, where the
    residual is the normalised tensor (post-norm).
    """

    num_layers: int = 24
    hidden_size: int = 1024
    num_attention_heads: int = 16
    max_position_embeddings: int = 512
    vocab_size: int = 28996
    padded_vocab_size: int = None  # type: ignore[assignment]  # None: vocab_size
    ffn_hidden_size: int = None  # type: ignore[assignment]  # None: 4 x hidden_size
    num_tokentypes: int = 2  # rows of the token-type table; 0 for none
    add_binary_head: bool = True  # the pooler and the next-sentence head
    apply_residual_connection_post_layernorm: bool = False
    layernorm_epsilon: float = 1e-5
    gelu_approximate: str = "none"  # of the layers: "none" for erf, "tanh" as Megatron-LM's bias_gelu_fusion computes it
    lm_head_gelu_approximate: str = None  # type: ignore[assignment]  # of the masked-LM head; None: gelu_approximate
    hidden_dropout: float = 0.1  # after each sublayer
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    init_method_std: float = 0.02
    attention: str = "softmax"  # "softmax": our fused softmax; "sdpa": torch.nn.functional.scaled_dot_product_attention

    model: ClassVar[str] = "BERT"
    causal: ClassVar[bool] = False
    untie_embeddings_and_output_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _complete(self)
        if self.lm_head_gelu_approximate is None:
            object.__setattr__(self, "lm_head_gelu_approximate", self.gelu_approximate)
        if self.lm_head_gelu_approximate not in ("tanh", "none"):
            raise ValueError("BertConfig: lm_head_gelu_approximate must be 'tanh' or 'none', got "
                             f"{self.lm_head_gelu_approximate!r}")
        if self.num_tokentypes < 0:
            raise ValueError(f"BertConfig: num_tokentypes must be at least 0, got {self.num_tokentypes}")


ModelConfig = GPT2Config | BertConfig


def _complete(config: Any) -> None:
    """Fill in what follows from other fields, and raise ValueError for a field that can't be."""
    def fill(name: str, value: int) -> None:
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)

    kind = type(config).__name__
    fill("padded_vocab_size", config.vocab_size)
    fill("ffn_hidden_size", 4 * config.hidden_size)
    for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size", "ffn_hidden_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{kind}: {name} must be at least 1, got {getattr(config, name)}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{kind}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
                         f"{config.num_attention_heads}")
    if config.padded_vocab_size < config.vocab_size:
        raise ValueError(f"{kind}: padded_vocab_size {config.padded_vocab_size} is below vocab_size {config.vocab_size}")
    if config.gelu_approximate not in ("tanh", "none"):
        raise ValueError(f"{kind}: gelu_approximate must be 'tanh' or 'none', got {config.gelu_approximate!r}")
    if config.attention not in ("softmax", "sdpa"):
        raise ValueError(f"{kind}: attention must be 'softmax' or 'sdpa', got {config.attention!r}")
