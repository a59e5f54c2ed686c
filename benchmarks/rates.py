"""How fast this machine is at what a training step is made of: `python -m benchmarks.scaling --measure-rates FILE`.

Matrix products at the shapes that the settings' shards have, collectives on a ladder of sizes, a copy, and what the call of an op
costs. All ranks measure at once, as they compute in a step, and the slowest one's median counts. Operands are changed from call to
call, so that they are not all found in a cache.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_kernels import linear
from megatron_kernels.models.blocks import BLOCK
from megatron_kernels.parallel import collectives, group_of

from . import harness, scaling_run
from .trainer import DTYPES, Settings

KIND = "benchmarks.scaling rates"
SECONDS, LEAST, MOST = 0.1, 5, 100  # samples take so long together, but are at least and at most so many
SAMPLE = 1e-3  # seconds that a sample lasts: so many calls are in one
OPERANDS = 2**26  # bytes that the operands of different calls have together
SHARES = (1, 2, 4, 8)  # tensor-parallel sizes whose products are measured, where they divide the heads
SMALLEST, LARGEST = 2**10, {"cpu": 2**26, "cuda": 2**28}  # bytes of a collective's whole tensor
COPIED = {"cpu": 2**26, "cuda": 2**29}

Shape = tuple[int, int, int]


def products(settings: Settings, share: int) -> list[Shape]:
    """[m, k] @ [k, n] of one microbatch's linear layers and head on one of `share` tensor-parallel ranks, each shape once."""
    config = replace(settings, tensor_parallel=share, sequence_parallel=False).config
    tokens, h, f = settings.batch // settings.microbatches * settings.sequence, config.hidden_size, config.ffn_hidden_size
    forward = [(tokens, 3 * h // share, h), (tokens, h, h // share), (tokens, f // share, h), (tokens, h, f // share),
               (tokens, config.padded_vocab_size // share, h)]
    found = [shape for m, n, k in forward for shape in ((m, n, k), (m, k, n), (n, k, m))]
    return list(dict.fromkeys(found))


def batched_products(settings: Settings, share: int, on_cpu: bool) -> list[tuple[int, int, int, int]]:
    """(batch, m, n, k) of attention="softmax": on a CPU by blocks of queries where the sequence is longer than one."""
    s, d = settings.sequence, settings.hidden // settings.heads
    batch = settings.batch // settings.microbatches * settings.heads // share
    blocks = [(min(i + BLOCK, s) - i, min(i + BLOCK, s)) for i in range(0, s, BLOCK)] if on_cpu else [(s, s)]
    return list(dict.fromkeys((batch, *shape) for queries, keys in blocks
                              for shape in ((queries, keys, d), (queries, d, keys), (keys, d, queries))))


def measure(wanted: Sequence[Settings], device: torch.device, ranks_here: int) -> dict[str, Any]:
    """What a file of rates holds, of the products of all that is wanted; collectives are of the first one's dtype. Collective."""
    shares = [(one, share) for one in wanted for share in SHARES if one.heads % share == 0 and one.hidden % share == 0]
    plain = dict.fromkeys((*shape, one.dtype) for one, share in shares for shape in products(one, share))
    batched = dict.fromkeys((*shape, one.dtype) for one, share in shares
                            for shape in batched_products(one, share, device.type == "cpu"))
    with harness.no_collection():
        return {"kind": KIND, "environment": scaling_run.environment(device, ranks_here), "world": dist.get_world_size(),
                "presets": [one.preset for one in wanted],
                "matmul": [{"m": m, "n": n, "k": k, "dtype": dtype, "seconds": product(m, n, k, DTYPES[dtype], device)}
                           for m, n, k, dtype in plain],
                "batched_matmul": [{"batch": b, "m": m, "n": n, "k": k, "dtype": dtype,
                                    "seconds": batched_product(b, m, n, k, DTYPES[dtype], device)}
                                   for b, m, n, k, dtype in batched],
                "collectives": list(measured_collectives(wanted[0].dtype, device)), "copy_bytes_per_second": copy(device),
                "launch": launch(device)}


def product(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of [m, k] @ [k, n], as the linear layers compute it: the second factor is stored [n, k]."""
    calls = [lambda a=a, b=b: linear.product(a, b)
             for a, b in _operands((m, k), (n, k), dtype=dtype, device=device)]
    return seconds(calls, device)


def batched_product(batch: int, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of [batch, m, k] @ [batch, k, n]."""
    calls = [lambda a=a, b=b: torch.bmm(a, b) for a, b in _operands((batch, m, k), (batch, k, n), dtype=dtype, device=device)]
    return seconds(calls, device)


def copy(device: torch.device) -> float:
    """Bytes read and written a second by a copy of a tensor that no cache holds."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: to.copy_(source)], device)


def launch(device: torch.device) -> dict[str, Any]:
    """Host seconds that the call of an op costs, its work being next to none."""
    x = torch.ones(32, device=device)

    def calls() -> float:
        start = time.perf_counter()
        for _ in range(1000):
            x.add_(1.0)
        return (time.perf_counter() - start) / 1000

    taken = []
    for _ in range(LEAST):
        taken.append(calls())
        _finish(device)
    return {"op": "add_ of 32 elements", "seconds": _slowest(harness.quantile(taken, 0.5), device)}


def measured_collectives(of: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Every kind, group size and number of bytes (of the whole tensor), all groups of a size being busy at once."""
    world, rank, dtype = dist.get_world_size(), dist.get_rank(), DTYPES[of]
    for size in (size for size in range(2, world + 1) if world % size == 0):
        own, _ = dist.new_subgroups(size)
        group = group_of(own)
        for kind, call in (("all_reduce", lambda x, group=group: collectives.all_reduce(x, group)),
                           ("all_gather", lambda x, group=group: collectives.all_gather(x.chunk(group.size)[0], group, 0)),
                           ("reduce_scatter", lambda x, group=group: collectives.reduce_scatter(x, group, 0))):
            for length in ladder(device.type):
                x = torch.ones(length // dtype.itemsize // size * size, dtype=dtype, device=device)
                yield {"kind": kind, "ranks": size, "bytes": x.nbytes, "dtype": of,
                       "seconds": seconds([lambda call=call, x=x: call(x)], device)}
    for length in ladder(device.type) if world % 2 == 0 else ():
        x, peer = torch.ones(length // dtype.itemsize, dtype=dtype, device=device), rank ^ 1

        def there_and_back(x: torch.Tensor = x, peer: int = peer) -> None:
            for sends in (rank < peer, rank > peer):
                dist.send(x, peer) if sends else dist.recv(x, peer)

        yield {"kind": "send", "ranks": 2, "bytes": x.nbytes, "dtype": of, "seconds": seconds([there_and_back], device) / 2}


def ladder(device_type: str) -> Iterator[int]:
    """Powers of four."""
    return itertools.takewhile(lambda length: length <= LARGEST[device_type], (SMALLEST * 4**i for i in itertools.count()))


def seconds(calls: list[Callable[[], object]], device: torch.device) -> float:
    """Seconds of one call: the median of samples of several calls each, of the rank where it is largest. Collective: all ranks take
    as many, told by the slowest one's first sample."""
    def sample(count: int) -> float:
        _finish(device)
        start = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        _finish(device)
        return (time.perf_counter() - start) / count

    for call in calls:
        call()
    guess = max(_slowest(sample(len(calls)), device), 1e-7)
    inside = max(1, round(SAMPLE / guess))
    dist.barrier()
    taken = [sample(inside) for _ in range(min(max(round(SECONDS / (guess * inside)), LEAST), MOST))]
    return _slowest(harness.quantile(taken, 0.5), device)


def _operands(*shapes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[list[torch.Tensor]]:
    own = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    return [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(min(max(OPERANDS // own, 1), 16))]


def _slowest(value: float, device: torch.device) -> float:
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
