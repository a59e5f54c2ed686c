"""Token, position and token-type tables, and one gradient for the token table's two uses: embedding, and output projection.

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

from ..parallel.collectives import SEQUENCE, share_of
from ..parallel.group import ALONE, Group
from ..parallel.layers import VocabParallelEmbedding, elsewhere, local_ids
from .config import ModelConfig


class Embedding(nn.Module):
    """Token and position tables, and a token-type table where the configuration has one; the dropout after their sum is the
    model's.

    The last stage of a pipeline has the token table alone, for a tied head: `positions=False`.
    """

    def __init__(self, config: ModelConfig, group: Group = ALONE, positions: bool = True, device=None, dtype=None):
        super().__init__()
        self.tied = not config.untie_embeddings_and_output_weights
        h = config.hidden_size
        self.word_embeddings = VocabParallelEmbedding(config.padded_vocab_size, h, group=group, device=device, dtype=dtype)
        if positions:
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, h, device=device, dtype=dtype)
            if config.num_tokentypes:
                self.tokentype_embeddings = nn.Embedding(config.num_tokentypes, h, device=device, dtype=dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor, sequence: bool = False,
                tokentype_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[b, s] token ids and [b or 1, s] positions -> hidden [b, s, h], and for a tied head the table it must use.

        sequence=True gives this rank's share of the sequence, [b, s / size, h]. tokentype_ids [b or 1, s] add rows of the
        token-type table, which a model without sequence parallelism may have.
        """
        words = self.word_embeddings
        if self.tied:
            rows, table = _EmbedAndShare.apply(words.weight, input_ids, words.start, words.total)
        else:
            rows, table = F.embedding(*words.local(input_ids)), None
        if sequence:
            position_ids = share_of(position_ids, words.group, SEQUENCE)
        hidden = words.reduce(rows, input_ids, sequence) + self.position_embeddings(position_ids)
        return hidden if tokentype_ids is None else hidden + self.tokentype_embeddings(tokentype_ids), table


class _EmbedAndShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, start, total):
        ctx.save_for_backward(ids)
        ctx.range = start, weight.shape[0], total
        return F.embedding(local_ids(ids, *ctx.range), weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows, dtable):
        (ids,) = ctx.saved_tensors
        ids, drows = ids.reshape(-1).long(), drows.reshape(-1, drows.shape[-1])
        _, rows, total = ctx.range
        if rows < total:
            drows = drows.masked_fill(elsewhere(ids, *ctx.range).unsqueeze(-1), 0.0)
            ids = local_ids(ids, *ctx.range)
        # The head's product made dtable for this node alone, so it may be written. On a GPU index_put_ repeats bitwise.
        dtable = dtable.index_add_(0, ids, drows) if ids.is_cpu else dtable.index_put_((ids,), drows, accumulate=True)
        return dtable, None, None, None
