"""Token and position tables, and one gradient for the token table's two uses: embedding, and output projection.

The table is the largest tensor of a small GPT-2, and what a training step spends outside the layers is passes over it. Autograd
would make its gradient three times: the head's, a table of zeros with the embedding's rows added, and the sum. Here the
embedding hands the head its own alias of the table, so that the head's gradient comes back through the embedding, which adds
its rows to it in place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .config import GPT2Config


class Embedding(nn.Module):
    """Token and position tables; the dropout after their sum is the model's."""

    def __init__(self, config: GPT2Config, device=None, dtype=None):
        super().__init__()
        self.tied = not config.untie_embeddings_and_output_weights
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size, device=device, dtype=dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """[b, s] token ids and [b or 1, s] positions -> hidden [b, s, h], and for a tied head the table it must use."""
        if self.tied:
            words, table = _EmbedAndShare.apply(self.word_embeddings.weight, input_ids)
        else:
            words, table = self.word_embeddings(input_ids), None
        return words + self.position_embeddings(position_ids), table


class _EmbedAndShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows, dtable):
        (ids,) = ctx.saved_tensors
        ids, drows = ids.reshape(-1).long(), drows.reshape(-1, drows.shape[-1])
        # The head's product made dtable for this node alone, so it may be written. On a GPU index_put_ repeats bitwise.
        return (dtable.index_add_(0, ids, drows) if ids.is_cpu else dtable.index_put_((ids,), drows, accumulate=True)), None
