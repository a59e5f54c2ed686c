"""The model over the items of a task, batch by batch, and the figures made of what it says.

Batches are fixed by the order of the items and the batch size alone. Data-parallel ranks take them in turn, every number goes to
the ledger, and the numbers are added up exactly (math.fsum) at the end: neither the number of replicas nor an interruption changes
a bit of the result.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..parallel.collectives import all_gather
from ..parallel.group import ALONE, Group
from .datasets import IGNORE, Task
from .ledger import Ledger

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..models import GPT2


def evaluate(model: GPT2, task: Task, ledger: Ledger, batch_size: int, replicas: Group = ALONE,
             track: Callable[[list[Any]], Iterable[Any]] = iter) -> None:
    """Score what the ledger does not have yet, and enter it there.

    Args:
        model: on the device to compute on; of several tensor-parallel ranks, this rank's part.
        task: the same on every rank.
        ledger: holds the same on every rank. Those with a path are written to their files as this goes on, also when it is
            interrupted.
        batch_size: items of a batch. It must not change between runs that share a ledger's file.
        replicas: the data-parallel group; each of its ranks must call this.
        track: wraps the list of rounds, for a progress bar.

    Raises ValueError when a loss is not finite, and CollectiveError when another rank has stopped.
    """
    device = next(model.parameters()).device
    order = task.order()
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    left = [batch for batch in batches if any(ledger.values[item] is None for item in batch)]
    rounds = [left[i:i + replicas.size] for i in range(0, len(left), replicas.size)]
    try:
        for shared in track(rounds):
            start = time.perf_counter()
            values = torch.zeros(1, batch_size, dtype=torch.float64)
            if replicas.rank < len(shared):
                own = shared[replicas.rank]
                values[0, :len(own)] = torch.tensor(_values(model, task, own, device), dtype=torch.float64)
            found = all_gather(values.to(device), replicas, 0).tolist()
            seconds = time.perf_counter() - start
            for batch, row in zip(shared, found, strict=False):  # in the last round some replicas have nothing
                ledger.enter(batch, row[:len(batch)], seconds / len(shared))
    finally:
        ledger.save()


def _values(model: GPT2, task: Task, items: Sequence[int], device: torch.device) -> list[float]:
    ids, targets = task.batch(items)
    losses, hits = model.score(ids.to(device), targets)
    losses, hits = losses.cpu(), hits.cpu()
    if not losses.isfinite().all():
        raise ValueError(f"a loss of {task.noun}s {min(items)} to {max(items)} is {losses[~losses.isfinite()][0].item()}: damaged "
                         f"weights, or too narrow a range in {str(next(model.parameters()).dtype).removeprefix('torch.')}")
    counts = (targets != IGNORE).sum(1).tolist()
    return [task.value(loss.tolist(), hit.tolist()) for loss, hit in zip(losses.split(counts), hits.split(counts), strict=True)]


def perplexity(ledger: Ledger, tokens: int, words: int) -> dict[str, Any]:
    """Figures of a text of `tokens` tokens, made from `words` words, all of its windows being in the ledger.

    loss: nats per scored token, sum / (tokens - 1). perplexity: exp(loss). adjusted_perplexity: exp(loss * token_ratio), per word:
    token_ratio = (tokens - 1) / (words - 1). None where a text of one word has no ratio, or where a figure is beyond float64.
    """
    loss = math.fsum(_all(ledger)) / (tokens - 1)
    ratio = (tokens - 1) / (words - 1) if words > 1 else None
    return {"perplexity": _exp(loss), "adjusted_perplexity": None if ratio is None else _exp(loss * ratio), "loss": loss,
            "token_ratio": ratio, "tokens": tokens, "original_tokens": words}


def accuracy(ledger: Ledger) -> dict[str, Any]:
    """accuracy: the share of examples that are right, all of them being in the ledger."""
    values = _all(ledger)
    correct = round(math.fsum(values))
    return {"accuracy": correct / len(values), "correct": correct, "examples": len(values)}


def _all(ledger: Ledger) -> list[float]:
    values = [value for value in ledger.values if value is not None]
    assert len(values) == len(ledger.values)
    return values


def _exp(x: float) -> float | None:
    try:
        return math.exp(x)
    except OverflowError:
        return None


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash of the weights and the configuration."""
    found = hashlib.sha256(repr(sorted(vars(checkpoint.config).items())).encode())
    for name in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
