"""Writing text: a preallocated cache of keys and values, and the loop that draws one token after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .config import GPT2Config
    from .gpt2 import GPT2


class KVCache:
    """Keys and values of the tokens seen so far, in two tensors [layers, batch, heads, capacity, head_dim] made once.

    `length` counts the tokens every layer has stored; the model moves it after its last layer. Of tensor_parallel ranks each
    stores its own heads.
    """

    def __init__(self, config: GPT2Config, batch: int, capacity: int, device=None, dtype=None, tensor_parallel: int = 1):
        if not 1 <= capacity <= config.max_position_embeddings:
            raise ValueError(f"KVCache: capacity must be in [1, max_position_embeddings = {config.max_position_embeddings}], "
                             f"got {capacity}")
        heads = config.num_attention_heads
        shape = (config.num_layers, batch, heads // tensor_parallel, capacity, config.hidden_size // heads)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [b, heads, s, head_dim] after those there; return all, [b, heads, length + s, head_dim]."""
        end = self.length + keys.shape[2]
        batch, capacity = self.keys.shape[1], self.keys.shape[3]
        if end > capacity or keys.shape[0] != batch:
            raise ValueError(f"KVCache: {keys.shape[0]} rows of {end} tokens do not fit into {batch} rows of {capacity}")
        self.keys[layer, :, :, self.length:end] = keys
        self.values[layer, :, :, self.length:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@torch.no_grad()
def generate(self: GPT2, input_ids: Tensor, *, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, do_sample: bool = False, seed: int | None = None, eos_token_id: int | None = None,
             attention_mask: Tensor | None = None) -> Tensor:
    """Continue each row of input_ids.

    Args:
        input_ids: [b, s], int64 or int32. Prompts of different lengths are padded on the left.
        max_new_tokens: n, how many tokens to add.
        do_sample: draw from the distribution; False takes the most likely token.
        temperature, top_k, top_p: for sampling: divide the logits by temperature, keep the top_k largest, then the smallest set
            whose probabilities reach top_p, and draw from what is left.
        seed: of the draws. None continues torch's default generator.
        eos_token_id: a row that produced it is filled with it; when every row has, the rest is not computed.
        attention_mask: [b, s], 0 at the padding.

    Returns:
        [b, s + n], int64: the prompt and what follows. Dropout is off, and the model is left in the mode it was in.

    Raises:
        ValueError: a length beyond max_position_embeddings, an empty prompt, a row that does not end in a token, or a
            sampling parameter out of its range.
    """
    _check(self.config, input_ids, max_new_tokens, temperature, top_k, top_p, eos_token_id, attention_mask)
    b, s = input_ids.shape
    device = input_ids.device
    out = torch.full((b, s + max_new_tokens), 0 if eos_token_id is None else eos_token_id, dtype=torch.int64, device=device)
    out[:, :s] = input_ids
    if max_new_tokens == 0 or b == 0:
        return out
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    keep = None
    if attention_mask is not None:
        keep = torch.ones_like(out)
        keep[:, :s] = attention_mask != 0
    cache = KVCache(self.config, b, s + max_new_tokens - 1, device=device, dtype=next(self.parameters()).dtype,
                    tensor_parallel=self.tensor_group.size)
    done = torch.zeros(b, dtype=torch.bool, device=device)
    was_training = self.training
    self.eval()
    try:
        for end in range(s, s + max_new_tokens):
            mask = None if keep is None else keep[:, :end]
            logits = self(out[:, cache.length:end], attention_mask=mask, cache=cache, logits_to_keep=1)[:, -1]
            token = _draw(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
            if eos_token_id is not None:
                token = token.masked_fill(done, eos_token_id)
                done |= token == eos_token_id
            out[:, end] = token
            if eos_token_id is not None and bool(done.all()):
                break
    finally:
        self.train(was_training)
    return out


def _draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
          generator: torch.Generator | None) -> Tensor:
    """One token per row of logits [b, V]."""
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, index = logits.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the most likely token has nothing before it, so it always stays
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(ordered).scatter_(-1, index, ordered)
    else:
        probs = logits.softmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def _check(config: GPT2Config, input_ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None,
           top_p: float | None, eos_token_id: int | None, attention_mask: Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(f"generate: input_ids must be [batch, seq] with at least one token, got {list(input_ids.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must be at least 0, got {max_new_tokens}")
    total = input_ids.shape[1] + max_new_tokens
    if total > config.max_position_embeddings:
        raise ValueError(f"generate: {input_ids.shape[1]} prompt + {max_new_tokens} new tokens are more than "
                         f"max_position_embeddings {config.max_position_embeddings}")
    if not temperature > 0:
        raise ValueError(f"generate: temperature must be above 0, got {temperature} (do_sample=False draws nothing)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if eos_token_id is not None and not 0 <= eos_token_id < config.vocab_size:
        raise ValueError(f"generate: eos_token_id must be in [0, vocab_size = {config.vocab_size}), got {eos_token_id}")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"generate: attention_mask must be {list(input_ids.shape)}, got {list(attention_mask.shape)}")
        if not bool((attention_mask[:, -1] != 0).all()):
            raise ValueError("generate: attention_mask must end in a token in every row; pad prompts on the left")
