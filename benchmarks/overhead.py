"""What a call of an op costs before its kernel runs: `python -m benchmarks.overhead`.

Microseconds per call on tiny CPU tensors, without and with a gradient wanted, beside torch.nn.functional.layer_norm. For "triton"
every kernel is replaced by an empty one, so that checks, allocations and autograd are left; for "cpu" the kernels run, on 2 x 16
elements. Processor time, and the best of several series, because a busy machine only ever adds.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

LIMIT = 3  # times layer_norm


class EmptyKernel:
    """Stands where a Triton kernel stood: kernel[grid](...) does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


def empty_kernels(modules: list) -> int:
    """Replace every Triton kernel in the modules; how many there were."""
    count = 0
    for module in modules:
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                setattr(module, name, EmptyKernel())
                count += 1
    return count


def microseconds(function: Callable[[], object], calls: int, series: int) -> float:
    for _ in range(calls // 4):
        function()
    best = float("inf")
    for _ in range(series):
        begin = time.process_time()
        for _ in range(calls):
            function()
        best = min(best, (time.process_time() - begin) / calls)
    return best * 1e6


def functions(mk) -> dict[str, Callable[[Tensor], Tensor]]:
    """A call of each op on x [2, 16]."""
    weight, bias, target = torch.ones(16), torch.zeros(16), torch.zeros(2, dtype=torch.long)
    return {"scaled_masked_softmax": lambda x: mk.scaled_masked_softmax(x, None, 0.5, True),
            "bias_gelu": lambda x: mk.bias_gelu(x, bias),
            "layer_norm": lambda x: mk.layer_norm(x, weight, bias),
            "cross_entropy": lambda x: mk.cross_entropy(x, target, reduction="none")}


def measure(implementations: list[str], calls: int, series: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(implementation, op) -> microseconds without and with a gradient wanted; torch's layer_norm is ("torch", "F.layer_norm")."""
    import megatron_kernels as mk
    from megatron_kernels.triton import OPS

    if "triton" in implementations:
        empty_kernels([importlib.import_module(f"megatron_kernels.triton.{op}") for op in sorted(set(OPS.values()))])
    x, weight, bias = torch.randn(2, 16), torch.ones(16), torch.zeros(16)
    inputs = (x, x.clone().requires_grad_())

    def times(function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        without, with_gradient = (microseconds(lambda t=t: function(t), calls, series) for t in inputs)
        return without, with_gradient

    result = {("torch", "F.layer_norm"): times(lambda t: F.layer_norm(t, (16,), weight, bias))}
    for name in implementations:
        with mk.use(name):
            result |= {(name, op): times(function) for op, function in functions(mk).items()}
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", choices=["cpu", "triton"], default=["cpu", "triton"])
    parser.add_argument("--calls", type=int, default=3000, help="calls in a series")
    parser.add_argument("--series", type=int, default=9)
    args = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # lets the Triton path take CPU tensors
    torch.set_num_threads(1)
    result = measure(args.implementations, args.calls, args.series)
    base = result["torch", "F.layer_norm"]
    table = Table(title="Microseconds per call, without / with a gradient wanted")
    for column in ("implementation", "op", "without", "with", "x F.layer_norm"):
        table.add_column(column, justify="left" if column in ("implementation", "op") else "right")
    for (name, op), (without, with_gradient) in result.items():
        ratios = without / base[0], with_gradient / base[1]
        mark = "" if name == "torch" else " ✓" if max(ratios) <= LIMIT else " ✗"
        table.add_row(name, op, f"{without:.1f}", f"{with_gradient:.1f}", f"{ratios[0]:.1f} / {ratios[1]:.1f}{mark}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
