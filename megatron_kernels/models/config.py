"""The hyperparameters of a Megatron GPT-2, under Megatron-LM's names."""

from __future__ import annotations

from dataclasses import dataclass


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

    def __post_init__(self) -> None:
        def fill(name: str, value: int) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        fill("padded_vocab_size", self.vocab_size)
        fill("ffn_hidden_size", 4 * self.hidden_size)
        for name in ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size",
                     "ffn_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPT2Config: {name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"GPT2Config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                             f"{self.num_attention_heads}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"GPT2Config: padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}")
        if self.gelu_approximate not in ("tanh", "none"):
            raise ValueError(f"GPT2Config: gelu_approximate must be 'tanh' or 'none', got {self.gelu_approximate!r}")
        if self.attention not in ("softmax", "sdpa"):
            raise ValueError(f"GPT2Config: attention must be 'softmax' or 'sdpa', got {self.attention!r}")
