"""BERT as Megatron-LM builds it: a bidirectional encoder, a masked-LM head tied to the token table, and a next-sentence head.

The layers are GPT-2's, with attention in both directions and either ordering of layer norm and residual. Parameter names are
Megatron-core's.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..linear import linear, project
from ..nn import LayerNorm
from ..parallel.collectives import copy_to_group, gather_columns
from ..parallel.cross_entropy import vocab_parallel_cross_entropy
from ..parallel.group import ALONE, Group, agreed_seed, group_of
from ..parallel.layers import ParallelModule
from ..parallel.random import SharedGenerator, dropout
from .attention import padding_mask_for
from .config import BertConfig
from .embedding import Embedding
from .layer import Stack
from .weights import SavedModel, assign, initialise

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..checkpoint import Checkpoint

IGNORE = -100
__all__ = ["Bert", "BertConfig"]


class LMHead(nn.Module):
    """layer_norm(gelu(dense(x))), what the token table is multiplied with; the same on every rank of a group."""

    def __init__(self, config: BertConfig, device=None, dtype=None):
        super().__init__()
        h = config.hidden_size
        self.dense = nn.Linear(h, h, device=device, dtype=dtype)
        self.layer_norm = LayerNorm(h, eps=config.layernorm_epsilon, device=device, dtype=dtype)
        self.approximate = config.lm_head_gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(ops.bias_gelu(linear(x, self.dense.weight), self.dense.bias, self.approximate))


class OutputBias(ParallelModule):
    """One number for each class, added to the logits; a rank has those of its rows of the token table."""

    def __init__(self, size: int, group: Group = ALONE, device=None, dtype=None):
        super().__init__()
        self.group = group
        start, stop = group.range(size)
        self.bias = nn.Parameter(torch.empty(stop - start, device=device, dtype=dtype))
        self.splits = {"bias": (0, size)}

    def forward(self, logits: Tensor) -> Tensor:
        """Logits [n, this rank's classes] + bias."""
        return logits + self.bias


class Pooler(nn.Module):
    """tanh(dense(the first token)): hidden [b, s, h] -> [b, h]."""

    def __init__(self, config: BertConfig, device=None, dtype=None):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden[:, 0]))


class Bert(SavedModel):
    """A BERT with the heads it is pre-trained with.

    Args:
        config: its shape; config.apply_residual_connection_post_layernorm chooses the ordering of layer norm and residual,
            config.attention the fused softmax or torch's scaled_dot_product_attention.
        mesh: the ranks that share it, as of a GPT2: its dimension "tp" cuts the layers, the token table and the logits.
        device, dtype: of the parameters.
        seed: of the initial weights; those of a parameter depend on the seed and the parameter's name alone, at every parallel
            size. None draws a seed from torch's default generator, on a mesh that of its first rank.
        activation_checkpointing: keep only the input of each layer for the backward and run the layer again there; also an
            attribute, to be changed at any time.

    Raises ValueError when the ranks do not divide the heads or hidden sizes.
    """

    config: BertConfig

    def __init__(self, config: BertConfig, mesh: DeviceMesh | None = None, *, device=None, dtype=None, seed: int | None = None,
                 activation_checkpointing: bool = False):
        super().__init__()
        group = group_of(mesh, "tp")
        for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
            if getattr(config, name) % group.size:
                raise ValueError(f"Bert: the tensor-parallel size {group.size} of the mesh does not divide {name} "
                                 f"{getattr(config, name)}")
        self.config, self.mesh, self.tensor_group = config, mesh, group
        self.activation_checkpointing = activation_checkpointing
        self.shared_generator = SharedGenerator()
        self._shared = self.shared_generator if group.size > 1 else None
        device = torch.get_default_device() if device is None else torch.device(device)
        self.embedding = Embedding(config, group, device="meta", dtype=dtype)
        self.encoder = Stack(config, group, self._shared, device="meta", dtype=dtype)
        self.lm_head = LMHead(config, "meta", dtype)
        self.output_layer = OutputBias(config.padded_vocab_size, group, "meta", dtype)
        if config.add_binary_head:
            self.pooler = Pooler(config, "meta", dtype)
            self.binary_head = nn.Linear(config.hidden_size, 2, device="meta", dtype=dtype)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(seed)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Megatron-LM's initial weights: N(0, init_method_std), with std / sqrt(2 num_layers) for the two projections of each
        layer that write to the residual; biases 0, layer norms the identity. The same in both orderings."""
        seed = agreed_seed(self.mesh) if seed is None else seed
        self.shared_generator.manual_seed(seed)
        initialise(self, self.config, seed)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, attention_mask: Tensor | None = None,
                tokentype_ids: Tensor | None = None, position_ids: Tensor | None = None,
                return_binary_logits: bool = False) -> Any:
        """The masked-LM logits, or their mean loss when labels are given.

        Args:
            input_ids: [b, s], int64 or int32.
            labels: [b, s]: the token that belongs at each position; -100 where none is to be predicted.
            attention_mask: [b, s], 1 or True = a token, 0 or False = padding. No position attends to padding. Outputs at padding
                are finite and mean nothing, also those of a sequence that is nothing else.
            tokentype_ids: [b, s], rows of the token-type table; by default 0.
            position_ids: [b, s]; by default 0, 1, 2 and so on, as in Megatron-LM, whatever the mask says.
            return_binary_logits: also return the next-sentence head's two logits, which need add_binary_head.

        Returns:
            Logits [b, s, vocab_size] in the parameters' dtype, the same on every rank of a mesh, or the loss, a float32 scalar
            (float64 for float64) that is 0 where all labels are -100; with return_binary_logits, a pair of that and [b, 2].

        Raises:
            ValueError: ids that are not a [b, s] integer tensor, a sequence beyond max_position_embeddings, a mask, token types,
                positions or labels of another shape, or something asked of a table or head that the configuration leaves out.
        """
        self._check(input_ids, attention_mask, tokentype_ids, position_ids, labels)
        if return_binary_logits and not self.config.add_binary_head:
            raise ValueError("Bert: return_binary_logits needs add_binary_head=True in the configuration")
        hidden, table = self._encode(input_ids, attention_mask, tokentype_ids, position_ids)
        x = copy_to_group(self.lm_head(hidden), self.tensor_group)
        logits = self.output_layer(project(x.reshape(-1, x.shape[-1]), table))
        if labels is None:
            logits = logits.unflatten(0, input_ids.shape)
            out = gather_columns(logits, self.tensor_group, self.config.padded_vocab_size)[..., :self.config.vocab_size]
        else:  # nobody else sees the logits, so their gradient is written over them
            start, _ = self.tensor_group.range(self.config.padded_vocab_size)
            out = vocab_parallel_cross_entropy(logits, labels.reshape(-1), self.tensor_group, vocab_start=start,
                                               vocab_size=self.config.vocab_size, ignore_index=IGNORE, reduction="mean",
                                               inplace_backward=True)
        return (out, self.binary_head(self.pooler(hidden))) if return_binary_logits else out

    def encode(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, tokentype_ids: Tensor | None = None,
               position_ids: Tensor | None = None) -> Tensor:
        """The hidden states that the heads start from, [b, s, h]; arguments and errors are those of `forward`."""
        self._check(input_ids, attention_mask, tokentype_ids, position_ids, None)
        return self._encode(input_ids, attention_mask, tokentype_ids, position_ids)[0]

    def _encode(self, input_ids: Tensor, attention_mask: Tensor | None, tokentype_ids: Tensor | None,
                position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The hidden states, and the alias of the token table that the head must use."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if tokentype_ids is None and self.config.num_tokentypes:
            tokentype_ids = torch.zeros_like(input_ids[:1])
        x, table = self.embedding(input_ids, position_ids, tokentype_ids=tokentype_ids)
        assert table is not None
        x = dropout(x, self.config.embedding_dropout, self.training, self._shared)
        mask = padding_mask_for(self.config.attention, attention_mask)
        x, _ = self.encoder(x, mask, again=self.activation_checkpointing)
        return self.encoder.final_layernorm(x), table

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, tokentype_ids: Tensor | None,
               position_ids: Tensor | None, labels: Tensor | None) -> None:
        integers = (torch.int64, torch.int32)
        if input_ids.dim() != 2 or input_ids.dtype not in integers:
            raise ValueError(f"Bert: input_ids must be [batch, seq] of int64 or int32, got {_say(input_ids)}")
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"Bert: {input_ids.shape[1]} tokens are more than max_position_embeddings "
                             f"{self.config.max_position_embeddings}")
        for name, value in (("attention_mask", attention_mask), ("tokentype_ids", tokentype_ids), ("position_ids", position_ids),
                            ("labels", labels)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(f"Bert: {name} must be {list(input_ids.shape)}, got {_say(value)}")
            if value is not None and name != "attention_mask" and value.dtype not in integers:
                raise ValueError(f"Bert: {name} must be int64 or int32, got {_say(value)}")
        if tokentype_ids is not None and not self.config.num_tokentypes:
            raise ValueError("Bert: tokentype_ids given, but the model has no token types (num_tokentypes=0)")

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dtype: torch.dtype | None = None, *, mesh: DeviceMesh | None = None,
                        **changes: Any) -> Bert:
        """The model of an open checkpoint. Its tensors become the parameters, one at a time: memory is that of one model.

        Args:
            checkpoint: what `megatron_kernels.checkpoint.load` returns, of a BERT.
            dtype: of the parameters; None keeps the file's.
            mesh: as of the class; a rank reads its own share of the tensors and no more.
            changes: fields of the configuration to replace, such as attention="sdpa" or hidden_dropout=0.0.

        Raises CheckpointError for a checkpoint of another model.
        """
        config = dataclasses.replace(checkpoint.expect(BertConfig), **changes)
        with torch.device("meta"):
            model = cls(config, mesh)
        assign(model, checkpoint, dtype)
        return model.eval()


def _say(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
