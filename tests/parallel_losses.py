"""Cases for four ranks: the vocab-parallel losses. Errors are distances from PyTorch on the whole vocabulary, in float64, relative
to the largest element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_kernels as mk
from megatron_kernels.parallel import Group, group_of, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from megatron_kernels.parallel.collectives import all_reduce

GPT2 = 50257  # not a multiple of 4
REDUCTIONS = ("mean", "sum", "none")
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3}


class Collectives(TorchDispatchMode):
    """Counts collectives, and the bytes that a rank sends into them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d") and "wait" not in func.__name__:
            self.names.append(func.__name__.partition(".")[0])
            self.sent += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest element; NaN stays NaN."""
    if not expected.numel():
        return 0.0
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def problem(tokens: int, vocabulary: int, hidden: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, output table, and targets of which some are ignored: the same on every rank."""
    draw = torch.Generator().manual_seed(tokens + vocabulary)
    target = torch.randint(0, vocabulary, (tokens,), generator=draw)
    target[::7] = -100
    return (torch.randn(tokens, hidden, generator=draw, dtype=torch.float64),
            torch.randn(vocabulary, hidden, generator=draw, dtype=torch.float64), target)


def weigh(loss: torch.Tensor) -> torch.Tensor:
    """A scalar of which each token's loss gets a gradient of its own."""
    return (loss * torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def logits_form(group: Group, vocabulary: int, reduction: str, *, torchs: bool = False, name: str = "cpu", inplace: bool = False,
                padded: int = 0, **options) -> dict[str, float | bool]:
    """Loss and gradient of logits against torch's cross_entropy (which knows no z-loss or padding) or ours, on one rank."""
    hidden, table, target = problem(40, vocabulary)
    whole = hidden @ table.T
    rows = padded or vocabulary
    start, stop = group.range(rows)
    shard = F.pad(whole, (0, rows - vocabulary), value=float("nan"))[:, start:stop]
    mine, serial = leaf(shard), leaf(whole)
    with mk.use(name), Collectives() as forward:
        loss = vocab_parallel_cross_entropy(mine * 1 if inplace else mine, target, group, vocab_start=start, vocab_size=vocabulary,
                                            reduction=reduction, inplace_backward=inplace, **options)
    with Collectives() as backward:
        weigh(loss).backward()
    expected = (F.cross_entropy if torchs else mk.cross_entropy)(serial, target, reduction=reduction, **options)
    weigh(expected).backward()
    wanted = torch.zeros_like(shard)
    wanted[:, :max(0, min(stop, vocabulary) - start)] = serial.grad[:, start:stop]
    return {"loss": off(loss, expected), "gradient": off(mine.grad, wanted),
            "padding is 0": bool((mine.grad[:, max(0, vocabulary - start):] == 0).all()),
            "ignored is 0": bool((mine.grad[target == -100] == 0).all()),
            "one all-gather of three floats": forward.names == ["all_gather_into_tensor"] and forward.sent == 40 * 3 * 8,
            "none backward": backward.names == []}


def linear_form(group: Group, vocabulary: int, reduction: str, *, tokens: int = 300, compiled: bool = False, name: str = "cpu",
                gathers: int | None = None, **options) -> dict[str, float | bool]:
    hidden, table, target = problem(tokens, vocabulary)
    start, stop = group.range(vocabulary)
    mine = leaf(hidden), leaf(table[start:stop])
    serial = leaf(hidden), leaf(table)

    def loss_of(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_linear_cross_entropy(h, w, target, group, vocab_start=start, vocab_size=vocabulary,
                                                   reduction=reduction, **options)

    found: dict[str, float | bool] = {}
    if compiled:
        loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(*mine)
        weigh(loss).backward()
    else:
        with mk.use(name), Collectives() as forward:
            loss = loss_of(*mine)
        with Collectives() as backward:
            weigh(loss).backward(retain_graph=True)
        count = -(-tokens // 128) if reduction != "none" else 1
        found["all-gathers forward"] = forward.names == ["all_gather_into_tensor"] * (count if gathers is None else gathers)
        found["three floats per token"] = forward.sent == tokens * 3 * 8
        first = [x.grad for x in mine]
        for x in mine:
            x.grad = None
        with Collectives() as again:
            weigh(loss).backward()
        found["none backward"] = backward.names == again.names == []
        found["second backward"] = max(off(x.grad, y) for x, y in zip(mine, first, strict=True))
    weigh(mk.cross_entropy(serial[0] @ serial[1].T, target, reduction=reduction, **options)).backward()
    with torch.no_grad():
        expected = mk.cross_entropy(serial[0] @ serial[1].T, target, reduction=reduction, **options)
    return found | {"loss": off(loss, expected), "gradient of hidden": off(all_reduce(mine[0].grad, group), serial[0].grad),
                    "gradient of weight": off(mine[1].grad, serial[1].grad[start:stop])}


def float16_with_a_scaled_loss(group: Group) -> dict[str, float | bool]:
    """With a loss scale of 2^16 no gradient vanishes, though most, divided by the tokens, are below float16's smallest number."""
    hidden, table, target = problem(4096, 64)
    hidden, table = hidden.half(), (table * 4).half()
    start, stop = group.range(64)
    mine, serial = (leaf(hidden), leaf(table[start:stop])), (leaf(hidden.double()), leaf(table.double()))
    (vocab_parallel_linear_cross_entropy(*mine, target, group) * 2.0**16).backward()
    (mk.cross_entropy(serial[0] @ serial[1].T, target) * 2.0**16).backward()
    return {"gradient of hidden": off(all_reduce(mine[0].grad.double(), group), serial[0].grad),
            "gradient of weight": off(mine[1].grad, serial[1].grad[start:stop])}


def refusals(group: Group) -> dict[str, str]:
    """The errors of this rank, for uneven shards without vocab_start, and for a target that is no class."""
    hidden, table, target = problem(20, GPT2)
    start, stop = group.range(GPT2)

    def error(call: Callable[[], object]) -> str:
        try:
            call()
        except (RuntimeError, ValueError) as e:
            return f"{type(e).__name__}: {e}"
        return ""

    logits, bad, shard = (hidden @ table.T)[:, start:stop], target.clone(), {"vocab_start": start, "vocab_size": GPT2}
    bad[3] = GPT2
    return {"uneven logits": error(lambda: vocab_parallel_cross_entropy(logits, target, group, vocab_size=GPT2)),
            "uneven weight": error(lambda: vocab_parallel_linear_cross_entropy(hidden, table[start:stop], target, group,
                                                                               vocab_size=GPT2)),
            "target": error(lambda: vocab_parallel_cross_entropy(logits, bad, group, **shard)),
            "linear target": error(lambda: vocab_parallel_linear_cross_entropy(hidden, table[start:stop], bad, group, **shard))}


def same_on_every_rank(group: Group) -> dict[str, float | bool]:
    """The loss, bit for bit, also of float32 and from run to run."""
    hidden, table, target = problem(40, GPT2)
    start, stop = group.range(GPT2)
    logits = (hidden @ table.T).float()[:, start:stop]
    losses = [vocab_parallel_cross_entropy(logits, target, group, vocab_start=start, vocab_size=GPT2, **ALL) for _ in range(2)]
    least, most = losses[0].clone(), losses[0].clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group.process_group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group.process_group)
    return {"every rank": bool(torch.equal(least, most)), "every run": bool(torch.equal(*losses))}


def nothing_to_do(group: Group) -> dict[str, float | bool]:
    """No tokens, and tokens that are all ignored."""
    hidden, table, target = problem(20, 64)
    start, stop = group.range(64)
    found: dict[str, float | bool] = {}
    for title, h, t in (("no token", hidden[:0], target[:0]), ("all ignored", hidden, torch.full_like(target, -100))):
        for reduction in REDUCTIONS:
            mine = leaf(h), leaf(table[start:stop])
            loss = vocab_parallel_linear_cross_entropy(*mine, t, group, reduction=reduction, **ALL)
            logits = leaf(h @ table[start:stop].T)
            other = vocab_parallel_cross_entropy(logits, t, group, reduction=reduction, **ALL)
            (loss.sum() + other.sum()).backward()
            found[f"{title}, {reduction}"] = all(bool((x == 0).all()) for x in (loss, other, logits.grad, *(x.grad for x in mine)))
    return found


def _cases(group: Group) -> dict[str, Callable[[], dict]]:
    """By name, what to run on every rank of the group, in the same order. Distances should be below 1e-12."""
    found: dict[str, Callable[[], dict]] = {}
    for r in REDUCTIONS:
        found |= {
            f"smoothing over {GPT2}, {r}": lambda r=r: logits_form(group, GPT2, r, torchs=True, label_smoothing=0.1),
            f"z-loss, {r}": lambda r=r: logits_form(group, 64, r, z_loss=1e-2),
            f"all options, padded, in place, {r}": lambda r=r: logits_form(group, 61, r, padded=64, inplace=True, **ALL),
            f"linear, {r}": lambda r=r: linear_form(group, 403, r, **ALL),
            f"linear, reference, {r}": lambda r=r: linear_form(group, 403, r, name="reference", gathers=1, **ALL)}
    return found | {
        "linear, compiled, mean": lambda: linear_form(group, 403, "mean", compiled=True, **ALL),
        "linear, compiled, none": lambda: linear_form(group, 403, "none", compiled=True, **ALL),
        "ranks wholly in padding": lambda: logits_form(group, 7, "none", padded=32, **ALL),
        "reference": lambda: logits_form(group, 61, "mean", padded=64, name="reference", **ALL),
        f"linear over {GPT2}": lambda: linear_form(group, GPT2, "mean", tokens=140, **ALL),
        "same bits": lambda: same_on_every_rank(group),
        "nothing to do": lambda: nothing_to_do(group),
        "float16": lambda: float16_with_a_scaled_loss(group),
        "refusals": lambda: refusals(group)}


def problems(name: str, found: dict, group: Group) -> list[str]:
    """What is wrong with a case's results on this rank."""
    if name == "refusals":
        last = group.rank == group.size - 1
        uneven = "uneven shards must pass vocab_start" if last else f"rank {group.ranks[-1]} refused its columns"
        target = f"target {GPT2} at row 3 is neither ignore_index (-100) nor in [0, {GPT2})"
        expected = {"uneven logits": uneven, "uneven weight": uneven, "target": target, "linear target": target}
        return [f"{name}: {key}: {found[key]!r}" for key, text in expected.items() if group.size > 1 and text not in found[key]]
    limit = 5e-3 if name == "float16" else 1e-12
    return [f"{name}: {key}: {value}" for key, value in found.items() if not (value if isinstance(value, bool) else value < limit)]


def cases() -> dict[str, Callable[[], dict]]:
    group = group_of(dist.group.WORLD)

    def judge(name: str, case: Callable[[], dict]) -> dict[str, bool]:
        return dict.fromkeys(problems(name, case(), group), False) or {"nothing wrong": True}

    return {name: functools.partial(judge, name, case) for name, case in _cases(group).items()}
