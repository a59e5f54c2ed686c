"""GPT-2 as Megatron-LM builds it: pre-norm, biases everywhere, learned positions, output table tied to the token table.

Parameter names are Megatron-core's. Layer norm, softmax, bias-GeLU and cross-entropy are this package's ops; everything else is
matrix products and three additions a layer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from .. import ops
from ..nn import LayerNorm
from .attention import SelfAttention, attention_mask_for
from .config import GPT2Config
from .embedding import Embedding
from .generation import KVCache, generate
from .linear import Linear, linear, project

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

IGNORE = -100


class MLP(nn.Module):
    """linear_fc2(gelu(linear_fc1(x))); linear_fc1's bias is added inside the fused bias-GeLU."""

    def __init__(self, config: GPT2Config, device=None, dtype=None):
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.ffn_hidden_size, device=device, dtype=dtype)
        self.linear_fc2 = Linear(config.ffn_hidden_size, config.hidden_size, device=device, dtype=dtype)
        self.approximate = config.gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(ops.bias_gelu(linear(x, self.linear_fc1.weight), self.linear_fc1.bias, self.approximate))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout before each addition."""

    def __init__(self, config: GPT2Config, layer: int, device=None, dtype=None):
        super().__init__()
        norm = {"eps": config.layernorm_epsilon, "device": device, "dtype": dtype}
        self.input_layernorm = LayerNorm(config.hidden_size, **norm)
        self.self_attention = SelfAttention(config, layer, device, dtype)
        self.pre_mlp_layernorm = LayerNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, device, dtype)
        self.dropout = config.hidden_dropout

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
                return_probs: bool = False) -> tuple[Tensor, Tensor | None]:
        y, probs = self.self_attention(self.input_layernorm(x), mask, cache, return_probs)
        x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.pre_mlp_layernorm(x)), self.dropout, self.training), probs


class Decoder(nn.Module):
    """The layers and the norm after them."""

    def __init__(self, config: GPT2Config, device=None, dtype=None):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i, device, dtype) for i in range(config.num_layers))
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layernorm_epsilon, device=device, dtype=dtype)


class GPT2(nn.Module):
    """A GPT-2 language model.

    Args:
        config: its shape; config.attention chooses the fused softmax or torch's scaled_dot_product_attention.
        device, dtype: of the parameters.
        seed: of the initial weights; those of a parameter depend on the seed and the parameter's name alone. None draws a seed
            from torch's default generator.
        activation_checkpointing: keep only the input of each layer for the backward and run the layer again there; also an
            attribute, to be changed at any time. Gradients are bitwise the same, dropout included.
    """

    def __init__(self, config: GPT2Config, *, device=None, dtype=None, seed: int | None = None,
                 activation_checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        device = torch.get_default_device() if device is None else torch.device(device)
        self.embedding = Embedding(config, "meta", dtype)
        self.decoder = Decoder(config, "meta", dtype)
        if config.untie_embeddings_and_output_weights:
            self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False, device="meta", dtype=dtype)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Megatron-LM's initial weights: N(0, init_method_std), with std / sqrt(2 num_layers) for the two projections of each
        layer that write to the residual stream; biases 0, layer norms the identity."""
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "layernorm" in name:
                parameter.fill_(1.0)
            else:
                own = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little", signed=True)
                std = self.config.init_method_std
                if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                    std /= (2 * self.config.num_layers) ** 0.5
                parameter.normal_(0.0, std, generator=torch.Generator(parameter.device).manual_seed(own))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None, logits_to_keep: int | None = None,
                return_attention_probs: bool = False) -> Any:
        """Logits, or the mean loss when labels are given.

        Args:
            input_ids: [b, s], int64 or int32. With a cache, the tokens that follow the cached ones.
            labels: [b, s], usually input_ids: position i is scored against label i + 1. -100 is not scored.
            attention_mask: [b, cached + s], 1 or True = a token, 0 or False = padding, on either side. Outputs at padding are
                finite and mean nothing.
            position_ids: [b, s]; by default they count the tokens of attention_mask, or from the cache's length.
            cache: keys and values of earlier tokens; those of input_ids are added to it.
            logits_to_keep: compute the logits of the last n positions alone. Not together with labels.
            return_attention_probs: also return each layer's probabilities before dropout, a list of [b, heads, s, cached + s].
                For attention="softmax" alone.

        Returns:
            Logits [b, s or logits_to_keep, vocab_size] in the parameters' dtype, or the loss, a float32 scalar (float64 for
            float64); with return_attention_probs, a pair of that and the list.

        Raises:
            ValueError: ids that are not a [b, s] integer tensor, a sequence beyond max_position_embeddings, a mask, positions
                or labels of another shape, or probabilities asked of attention="sdpa".
        """
        past = 0 if cache is None else cache.length
        self._check(input_ids, labels, attention_mask, position_ids, past, logits_to_keep, return_attention_probs)
        s = input_ids.shape[1]
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past, past + s, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = attention_mask_for(self.config.attention, attention_mask, s, past + s, input_ids.device)

        x, table = self.embedding(input_ids, position_ids)
        x = F.dropout(x, self.config.embedding_dropout, self.training)
        probs = []
        for layer in self.decoder.layers:
            if self.activation_checkpointing and cache is None and torch.is_grad_enabled():
                x, p = recompute(layer, x, mask, cache, return_attention_probs, use_reentrant=False)
            else:
                x, p = layer(x, mask, cache, return_attention_probs)
            probs.append(p)
        if cache is not None:
            cache.length += s
        if logits_to_keep is not None:
            x = x[:, -logits_to_keep:]
        x = self.decoder.final_layernorm(x)
        logits = project(x.reshape(-1, x.shape[-1]), self.output_layer.weight if table is None else table)
        out = logits.view(*x.shape[:2], -1)[..., :self.config.vocab_size] if labels is None else self._loss(logits, labels)
        return (out, probs) if return_attention_probs else out

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The labels are shifted, not the logits, and nobody else sees the logits, so their gradient is written over them."""
        target = F.pad(labels[:, 1:], (0, 1), value=IGNORE).reshape(-1)
        return ops.cross_entropy(logits, target, vocab_size=self.config.vocab_size, ignore_index=IGNORE, inplace_backward=True)

    def _check(self, input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None,
               past: int, logits_to_keep: int | None, return_attention_probs: bool) -> None:
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"GPT2: input_ids must be [batch, seq] of int64 or int32, got {_say(input_ids)}")
        b, s = input_ids.shape
        if past + s > self.config.max_position_embeddings:
            raise ValueError(f"GPT2: {past + s} tokens are more than max_position_embeddings "
                             f"{self.config.max_position_embeddings}")
        for name, value, shape in (("labels", labels, (b, s)), ("attention_mask", attention_mask, (b, past + s)),
                                   ("position_ids", position_ids, (b, s))):
            if value is not None and value.shape != shape:
                raise ValueError(f"GPT2: {name} must be {list(shape)}, got {_say(value)}")
        if labels is not None and labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"GPT2: labels must be int64 or int32, got {_say(labels)}")
        if logits_to_keep is not None and (labels is not None or not 1 <= logits_to_keep <= s):
            raise ValueError(f"GPT2: logits_to_keep must be in [1, seq = {s}], without labels, got {logits_to_keep}")
        if return_attention_probs and self.config.attention != "softmax":
            raise ValueError("GPT2: return_attention_probs needs attention='softmax'; "
                             f"attention={self.config.attention!r} never forms the probabilities")

    generate = generate

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dtype: torch.dtype | None = None, **changes: Any) -> GPT2:
        """The model of an open checkpoint. Its tensors become the parameters, one at a time: memory is that of one model.

        Args:
            checkpoint: what `megatron_kernels.checkpoint.load` returns.
            dtype: of the parameters; None keeps the file's.
            changes: fields of the configuration to replace, such as attention="sdpa" or hidden_dropout=0.0.
        """
        with torch.device("meta"):
            model = cls(dataclasses.replace(checkpoint.config, **changes))
        tensors = {}
        for name in checkpoint.tensors:
            tensor = checkpoint.tensors[name]
            tensors[name] = tensor if dtype is None else tensor.to(dtype)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    @classmethod
    def from_megatron(cls, path: str | Path, config: GPT2Config | str | Path | None = None, dtype: torch.dtype | None = None,
                      **changes: Any) -> GPT2:
        """Load a Megatron-LM checkpoint: the zip, a .pt, an iteration directory or the one above it, of any parallel size.

        config (or the path of a Hugging Face config.json) supplies what the file can't tell. For the rest see `from_checkpoint`
        and `megatron_kernels.checkpoint.load`, which also says what is refused. The model comes in eval mode.
        """
        from .. import checkpoint
        return cls.from_checkpoint(checkpoint.load(path, config), dtype, **changes)

    @classmethod
    def from_huggingface(cls, path: str | Path, dtype: torch.dtype | None = None, **changes: Any) -> GPT2:
        """Load a Hugging Face GPT-2 directory (config.json beside its weights); see `from_checkpoint`. Comes in eval mode."""
        from .. import checkpoint
        return cls.from_checkpoint(checkpoint.load(path), dtype, **changes)

    def save_megatron(self, directory: str | Path, *, tensor_parallel: int = 1, pipeline_parallel: int = 1,
                      **options: Any) -> None:
        """Write a Megatron-LM checkpoint for that parallel size; see `megatron_kernels.checkpoint.save_megatron`."""
        from .. import checkpoint
        checkpoint.save_megatron(self._checkpoint(), directory, tensor_parallel=tensor_parallel,
                                 pipeline_parallel=pipeline_parallel, **options)

    def save_huggingface(self, directory: str | Path, **options: Any) -> None:
        """Write a Hugging Face GPT-2 directory; see `megatron_kernels.checkpoint.save_huggingface`."""
        from .. import checkpoint
        checkpoint.save_huggingface(self._checkpoint(), directory, **options)

    def _checkpoint(self) -> Checkpoint:
        from ..checkpoint import Checkpoint
        return Checkpoint(config=self.config, tensors=self.state_dict(), iteration=None)


def _say(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
