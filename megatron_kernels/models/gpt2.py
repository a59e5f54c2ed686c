"""GPT-2 as Megatron-LM builds it: pre-norm, biases everywhere, learned positions, output table tied to the token table.

Parameter names are Megatron-core's. Layer norm, softmax, bias-GeLU and cross-entropy are this package's ops; everything else is
matrix products and three additions a layer.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..linear import project
from ..parallel.collectives import copy_to_group, gather_columns, gather_sequence
from ..parallel.cross_entropy import vocab_parallel_cross_entropy
from ..parallel.group import Group, agreed_seed, group_of
from ..parallel.layers import VocabParallelEmbedding
from ..parallel.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from ..parallel.random import SharedGenerator, dropout
from .attention import attention_mask_for
from .config import GPT2Config
from .embedding import Embedding
from .generation import KVCache, generate
from .layer import Stack
from .scoring import score
from .weights import SavedModel, assign, initialise

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..checkpoint import Checkpoint

IGNORE = -100


class GPT2(SavedModel):
    """A GPT-2 language model.

    Args:
        config: its shape; config.attention chooses the fused softmax or torch's scaled_dot_product_attention.
        mesh: the ranks that share it: its dimension "tp" cuts every layer (a mesh of one dimension without a name is taken as
            that; `megatron_kernels.parallel.make_mesh` makes one). None is this process alone, the same code with one rank.
        sequence_parallel: what lies between the layers' products (layer norms, dropout, the residual stream) is shared along the
            sequence, which must be a multiple of the tensor-parallel size. `parallel.finish_gradients` must then follow the
            backward.
        stage: (number, count) of a pipeline stage: this model holds that part of the layers; the first has the embeddings, the
            last the norm and the head. forward takes input_ids in the first and hidden states [b, s, h] in the others, and gives
            hidden states except in the last; `parallel.Pipeline` puts stages together.
        device, dtype: of the parameters.
        seed: of the initial weights; those of a parameter depend on the seed and the parameter's name alone, at every parallel
            size. None draws a seed from torch's default generator, on a mesh that of its first rank.
        activation_checkpointing: keep only the input of each layer for the backward and run the layer again there; also an
            attribute, to be changed at any time. Gradients are bitwise the same, dropout included.

    Raises ValueError when the ranks do not divide the heads, hidden sizes or layers.
    """

    config: GPT2Config

    def __init__(self, config: GPT2Config, mesh: DeviceMesh | None = None, *, sequence_parallel: bool = False,
                 stage: tuple[int, int] = (0, 1), device=None, dtype=None, seed: int | None = None,
                 activation_checkpointing: bool = False):
        super().__init__()
        group = group_of(mesh, "tp")
        _check_parallel(config, group, stage)
        self.config, self.mesh, self.tensor_group, self.stage = config, mesh, group, stage
        self.sequence_parallel = sequence_parallel and group.size > 1
        self.activation_checkpointing = activation_checkpointing
        self.shared_generator = SharedGenerator()
        self._shared = self.shared_generator if group.size > 1 else None
        device = torch.get_default_device() if device is None else torch.device(device)
        number, count = stage
        self.is_first, self.is_last = number == 0, number == count - 1
        own = config.num_layers // count
        tied = not config.untie_embeddings_and_output_weights
        if self.is_first or (self.is_last and tied):
            self.embedding = Embedding(config, group, self.is_first, "meta", dtype)
        self.decoder = Stack(config, group, self._shared, range(number * own, (number + 1) * own), self.is_last, "meta", dtype)
        if self.is_last and not tied:
            self.output_layer = VocabParallelEmbedding(config.padded_vocab_size, config.hidden_size, group=group, device="meta",
                                                       dtype=dtype)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Megatron-LM's initial weights: N(0, init_method_std), with std / sqrt(2 num_layers) for the two projections of each
        layer that write to the residual stream; biases 0, layer norms the identity."""
        seed = agreed_seed(self.mesh) if seed is None else seed
        self.shared_generator.manual_seed(seed)
        initialise(self, self.config, seed)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, cache: KVCache | None = None, logits_to_keep: int | None = None,
                return_attention_probs: bool = False) -> Any:
        """Logits, or the mean loss when labels are given.

        Args:
            input_ids: [b, s], int64 or int32. With a cache, the tokens that follow the cached ones.
            labels: [b, s], usually input_ids: position i is scored against label i + 1. -100 is not scored. With a column more,
                [b, s + 1], the last position is scored too.
            attention_mask: [b, cached + s], 1 or True = a token, 0 or False = padding, on either side. Outputs at padding are
                finite and mean nothing.
            position_ids: [b, s]; by default they count the tokens of attention_mask, or from the cache's length.
            cache: keys and values of earlier tokens; those of input_ids are added to it.
            logits_to_keep: compute the logits of the last n positions alone. Not together with labels.
            return_attention_probs: also return each layer's probabilities before dropout, a list of [b, heads, s, cached + s].
                For attention="softmax" alone. On a mesh, of this rank's heads.

        Returns:
            Logits [b, s or logits_to_keep, vocab_size] in the parameters' dtype, the same on every rank of a mesh, or the loss, a
            float32 scalar (float64 for float64); with return_attention_probs, a pair of that and the list.

        Raises:
            ValueError: ids that are not a [b, s] integer tensor, a sequence beyond max_position_embeddings, a mask, positions
                or labels of another shape, or probabilities asked of attention="sdpa".
        """
        if not (self.is_first and self.is_last):
            if any(x is not None for x in (labels, attention_mask, position_ids, cache, logits_to_keep)) or return_attention_probs:
                raise ValueError(f"GPT2: stage {self.stage[0]} of {self.stage[1]} takes token ids or hidden states and nothing "
                                 "else")
            return self._forward_stage(input_ids)
        past = 0 if cache is None else cache.length
        self._check(input_ids, labels, attention_mask, position_ids, past, logits_to_keep, return_attention_probs)
        s = input_ids.shape[1]
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past, past + s, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = attention_mask_for(self.config.attention, attention_mask, s, past + s, input_ids.device)

        sequence = self._sequence(s, cache)
        x, table = self._embed(input_ids, position_ids, sequence)
        x, probs = self.decoder(x, mask, cache, return_attention_probs, sequence, again=self.activation_checkpointing)
        if cache is not None:
            cache.length += s
        x = self._before_head(x, sequence, logits_to_keep)
        hidden, table = x.reshape(-1, x.shape[-1]), self._table(table)
        if labels is None:
            logits = project(hidden, table).unflatten(0, x.shape[:2])
            out = gather_columns(logits, self.tensor_group, self.config.padded_vocab_size)[..., :self.config.vocab_size]
        else:
            out = self._loss(hidden, table, labels, s)
        return (out, probs) if return_attention_probs else out

    def _forward_stage(self, x: Tensor) -> Tensor:
        """One stage of a pipeline: token ids or hidden states to hidden states; of the last, logits [b s, this rank's columns]."""
        sequence = self._sequence(x.shape[1] * (1 if self.is_first or not self.sequence_parallel else self.tensor_group.size), None)
        if self.is_first:
            self._check(x, None, None, None, 0, None, False)
            x, _ = self._embed(x, torch.arange(x.shape[1], device=x.device)[None], sequence)
        x, _ = self.decoder(x, sequence=sequence, again=self.activation_checkpointing)
        if not self.is_last:
            return x
        x = self._before_head(x, sequence, None)
        return project(x.reshape(-1, x.shape[-1]), self._table(None))

    def _sequence(self, s: int, cache: KVCache | None) -> bool:
        """Whether this call is sequence-parallel; the few tokens that follow a cache are not worth sharing."""
        sequence = self.sequence_parallel and cache is None
        if sequence and s % self.tensor_group.size:
            raise ValueError(f"GPT2: sequence_parallel needs a sequence that is a multiple of the {self.tensor_group.size} "
                             f"tensor-parallel ranks, got {s} tokens")
        return sequence

    def _embed(self, input_ids: Tensor, position_ids: Tensor, sequence: bool) -> tuple[Tensor, Tensor | None]:
        x, table = self.embedding(input_ids, position_ids, sequence)
        return dropout(x, self.config.embedding_dropout, self.training, None if sequence else self._shared), table

    def _before_head(self, x: Tensor, sequence: bool, keep: int | None) -> Tensor:
        """The last norm, and f: the head is column-parallel, so each rank needs all of x and gives a part of its gradient."""
        if keep is not None and not sequence:
            x = x[:, -keep:]
        x = self.decoder.final_layernorm(x)
        x = gather_sequence(x, self.tensor_group) if sequence else copy_to_group(x, self.tensor_group)
        return x[:, -keep:] if keep is not None and sequence else x

    def _table(self, shared: Tensor | None) -> Tensor:
        """This rank's rows of the output table: the alias that the embedding gave out, or the parameter."""
        if shared is not None:
            return shared
        untied = self.config.untie_embeddings_and_output_weights
        return self.output_layer.weight if untied else self.embedding.word_embeddings.weight

    def _loss(self, hidden: Tensor, table: Tensor, labels: Tensor, s: int) -> Tensor:
        """The labels [b, s or s + 1] are shifted, not the logits."""
        target = F.pad(labels[:, 1:], (0, s + 1 - labels.shape[1]), value=IGNORE).reshape(-1)
        if self.config.fuse_linear_loss:
            return vocab_parallel_linear_cross_entropy(hidden, table, target, self.tensor_group, reduction="mean",
                                                       **self._vocabulary())
        return self.loss_of_logits(project(hidden, table), target, "mean")

    def loss_of_logits(self, logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        """The loss of this rank's columns of the logits [n, columns] against the shifted labels [n]. Nobody else sees the logits,
        so their gradient is written over them."""
        return vocab_parallel_cross_entropy(logits, target, self.tensor_group, reduction=reduction, inplace_backward=True,
                                            **self._vocabulary())

    def _vocabulary(self) -> dict[str, int]:
        start, _ = self.tensor_group.range(self.config.padded_vocab_size)
        return {"vocab_start": start, "vocab_size": self.config.vocab_size, "ignore_index": IGNORE}

    def _check(self, input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None,
               past: int, logits_to_keep: int | None, return_attention_probs: bool) -> None:
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"GPT2: input_ids must be [batch, seq] of int64 or int32, got {_say(input_ids)}")
        b, s = input_ids.shape
        if past + s > self.config.max_position_embeddings:
            raise ValueError(f"GPT2: {past + s} tokens are more than max_position_embeddings "
                             f"{self.config.max_position_embeddings}")
        own = (b, s + 1) if labels is not None and labels.shape == (b, s + 1) else (b, s)
        for name, value, shape in (("labels", labels, own), ("attention_mask", attention_mask, (b, past + s)),
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
    score = score

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, dtype: torch.dtype | None = None, *, mesh: DeviceMesh | None = None,
                        sequence_parallel: bool = False, stage: tuple[int, int] = (0, 1), **changes: Any) -> GPT2:
        """The model of an open checkpoint. Its tensors become the parameters, one at a time: memory is that of one model.

        Args:
            checkpoint: what `megatron_kernels.checkpoint.load` returns.
            dtype: of the parameters; None keeps the file's.
            mesh, sequence_parallel, stage: as of the class; a rank reads its own share of the tensors and no more.
            changes: fields of the configuration to replace, such as attention="sdpa" or hidden_dropout=0.0.

        Raises CheckpointError for a checkpoint of another model.
        """
        config = dataclasses.replace(checkpoint.expect(GPT2Config), **changes)
        with torch.device("meta"):
            model = cls(config, mesh, sequence_parallel=sequence_parallel, stage=stage)
        assign(model, checkpoint, dtype)
        return model.eval()


def _check_parallel(config: GPT2Config, group: Group, stage: tuple[int, int]) -> None:
    for name in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
        if getattr(config, name) % group.size:
            raise ValueError(f"GPT2: the tensor-parallel size {group.size} of the mesh does not divide {name} "
                             f"{getattr(config, name)}")
    number, count = stage
    if count < 1 or not 0 <= number < count:
        raise ValueError(f"GPT2: stage must be (number, count) with 0 <= number < count, got {stage}")
    if config.num_layers % count:
        raise ValueError(f"GPT2: {count} pipeline stages do not divide num_layers {config.num_layers}")


def _say(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
