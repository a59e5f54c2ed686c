"""A training step of GPT-2 beside Hugging Face's, eager, compiled and patched: `python -m benchmarks.gpt2`.

Forward and backward of the same model on the same tokens: 4 layers, 1024 hidden, 16 heads, vocabulary 50304, 2 x 512 tokens,
no dropout. "Patched" is Hugging Face's model with our ops in it, not compiled, and once more with the linear cross-entropy. Loss
and gradients are first compared with Hugging Face's in float32. Then the contestants take turns in one process, each with as many
threads. "Products" runs the matrix products of the step and nothing else, in PyTorch: only faster or fewer products can make a step
faster than that. Peak memory is taken for each contestant in a process of its own.
See docs/gpt2.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from rich import box
from rich.table import Table

from megatron_kernels.compat.huggingface import patch
from megatron_kernels.models import GPT2, GPT2Config

from . import files, harness, memory, report

PEERS = ("eager", "compile", "patched", "linear")  # Hugging Face's model as it is, compiled, and with our ops
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMITS = {"fp32": 1.1, "bf16": 1.35}  # times faster than the compiled peer that our step should be
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the loss, and of a gradient's norm
BATCH, LENGTH = 2, 512


def config(attention: str) -> GPT2Config:
    return GPT2Config(num_layers=4, hidden_size=1024, num_attention_heads=16, vocab_size=50304, max_position_embeddings=1024,
                      hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0, attention=attention)


def tokens() -> torch.Tensor:
    return torch.randint(0, 50257, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def huggingface(c: GPT2Config, dtype: torch.dtype, weights: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    """Hugging Face's model of the same shape, with our weights where they are given, in training mode."""
    from transformers import GPT2Config as TheirConfig
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel(TheirConfig(
        n_layer=c.num_layers, n_embd=c.hidden_size, n_head=c.num_attention_heads, n_positions=c.max_position_embeddings,
        vocab_size=c.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0,
        eos_token_id=0, loss_type="ForCausalLMLoss")).to(dtype)
    if weights:
        state = {theirs: to_their_layout(ours, weights[ours], c) for ours, theirs in pairs(c)}
        model.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return model.train()


def pairs(c: GPT2Config) -> Iterator[tuple[str, str]]:
    """Our parameter names and Hugging Face's."""
    yield "embedding.word_embeddings.weight", "transformer.wte.weight"
    yield "embedding.position_embeddings.weight", "transformer.wpe.weight"
    modules = {"input_layernorm": "ln_1", "self_attention.linear_qkv": "attn.c_attn",
               "self_attention.linear_proj": "attn.c_proj", "pre_mlp_layernorm": "ln_2", "mlp.linear_fc1": "mlp.c_fc",
               "mlp.linear_fc2": "mlp.c_proj"}
    names = [(f"decoder.layers.{i}.{a}", f"transformer.h.{i}.{b}") for i in range(c.num_layers) for a, b in modules.items()]
    for ours, theirs in [*names, ("decoder.final_layernorm", "transformer.ln_f")]:
        yield from ((f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias"))


def to_their_layout(name: str, tensor: torch.Tensor, c: GPT2Config) -> torch.Tensor:
    """q, k and v one after the other instead of head by head, and the weights of linear layers transposed."""
    if "linear_qkv" in name:
        tensor = tensor.view(c.num_attention_heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor.T if ".linear_" in name and tensor.dim() == 2 else tensor


def step_of(model: torch.nn.Module, call: Callable[..., object] | None = None) -> Callable[[], torch.Tensor]:
    """Forward, backward, gradients made anew; returns the loss."""
    ids, call = tokens(), model if call is None else call

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        out = call(input_ids=ids, labels=ids)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        loss.backward()
        return loss.detach()
    return step


def products(c: GPT2Config, dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products of forward and backward on operands made beforehand, attention without use of causality."""
    n, h, heads = BATCH * LENGTH, c.hidden_size, c.num_attention_heads

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    layer = ((h, 3 * h), (h, h), (h, 4 * h), (4 * h, h))
    linear = [(made(n, i), made(o, i), made(n, o)) for i, o in (*layer * c.num_layers, (h, c.vocab_size))]
    narrow, square = (made(BATCH * heads, LENGTH, size) for size in (h // heads, LENGTH))

    def step() -> None:
        for x, weight, dy in linear:
            x @ weight.T
            dy @ weight
            dy.T @ x
        for _ in range(c.num_layers):
            for _ in range(2):  # scores and the gradient of the probabilities
                narrow @ narrow.mT
            for _ in range(4):  # the output, and the gradients of q, k and v
                square @ narrow
    return step


def gradients(model: torch.nn.Module, c: GPT2Config) -> dict[str, torch.Tensor]:
    """The model's gradients in float32 by Hugging Face's names, in Hugging Face's layout."""
    if isinstance(model, GPT2):
        return {theirs: to_their_layout(ours, model.get_parameter(ours).grad, c).float() for ours, theirs in pairs(c)}
    return {theirs: model.get_parameter(theirs).grad.float() for _, theirs in pairs(c)}


def disagreement(models: dict[str, torch.nn.Module], ours: GPT2, dtype: torch.dtype) -> str:
    """How a model's loss or gradients differ from Hugging Face's in float32 with the same weights; empty within TOLERANCE."""
    exact = huggingface(ours.config, torch.float32, {name: tensor.float() for name, tensor in ours.state_dict().items()})
    expected_loss = step_of(exact)().item()
    expected = gradients(exact, ours.config)
    for title, model in models.items():
        loss = step_of(model)().item()
        if not abs(loss - expected_loss) <= TOLERANCE[dtype] * expected_loss:
            return f"{title}: loss {loss:.6f}, expected {expected_loss:.6f}"
        for name, found in gradients(model, ours.config).items():
            error = ((found - expected[name]).norm() / expected[name].norm()).item()
            if not error <= TOLERANCE[dtype]:
                return f"{title}: the gradient of {name} is off by {error:.1e} of its norm, allowed {TOLERANCE[dtype]:.0e}"
        model.zero_grad(set_to_none=True)
    return ""


def patched(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Hugging Face's model with our ops where the contestant of that name has them."""
    if name in ("patched", "linear"):
        patch(model, fuse_linear_loss=name == "linear")
    return model


def contestant(name: str, dtype: torch.dtype, attention: str) -> Callable[[], torch.Tensor]:
    if name == "ours":
        return step_of(GPT2(config(attention), dtype=dtype, seed=0))
    model = patched(huggingface(config(attention), dtype), name)
    return step_of(model, torch.compile(model) if name == "compile" else None)


def peak_of_a_step(name: str, dtype: torch.dtype, attention: str) -> dict[str, float]:
    """MiB that the third step holds at its highest, in all and above what was there before it (parameters and program)."""
    step = contestant(name, dtype, attention)
    for _ in range(2):
        step()
    model = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    model.zero_grad(set_to_none=True)
    return memory.peak_of(step)


def peak_in_own_process(name: str, args: argparse.Namespace, dtype: str) -> dict[str, float]:
    return memory.in_own_process("benchmarks.gpt2", ["--peak-of", name, "--dtype", dtype, "--attention", args.attention,
                                                     "--threads", args.threads], name)


def run(dtype_name: str, args: argparse.Namespace) -> dict:
    dtype = DTYPES[dtype_name]
    ours = GPT2(config(args.attention), dtype=dtype, seed=0)
    weights = dict(ours.state_dict())
    models = {"ours": ours} | {name: patched(huggingface(ours.config, dtype, weights), name) for name in ("patched", "linear")}
    failure = disagreement(models, ours, dtype)
    if failure:
        return {"dtype": dtype_name, "failure": failure}
    theirs = huggingface(ours.config, dtype, weights)
    contestants = {name: step_of(model) for name, model in (models | {"eager": theirs}).items()}
    contestants |= {"compile": step_of(theirs, torch.compile(theirs)), "products": products(ours.config, dtype)}
    timings = harness.interleave([harness.Contestant(*item) for item in contestants.items()], seconds=args.seconds,
                                 min_rounds=args.rounds)
    del ours, theirs, models, contestants
    measured = () if args.no_memory else ("ours", *PEERS)
    peaks = {name: peak_in_own_process(name, args, dtype_name) for name in measured}
    return {"dtype": dtype_name, "failure": "", "limit": LIMITS[dtype_name], "attention": args.attention,
            "ratio": timings["compile"].median / timings["ours"].median, "memory_mib": peaks,
            "timings_ms": {name: asdict(timing) for name, timing in timings.items()}}


def show(rows: list[dict]) -> None:
    out = report.console()
    table = Table(title="Training step of GPT-2 on the CPU (median of interleaved steps)", title_justify="left", box=box.SIMPLE)
    for column in ("", "ms", "p20-p80", "x ours", "peak MiB", "of it the step"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    titles = {"ours": "megatron_kernels", "eager": "Hugging Face eager", "compile": "Hugging Face compiled",
              "patched": "Hugging Face patched", "linear": "patched, linear cross-entropy", "products": "matrix products alone"}
    for row in rows:
        if row["failure"]:
            out.print(f"{row['dtype']} is wrong, so it was not timed: {row['failure']}", style="bold red")
            continue
        ours = row["timings_ms"]["ours"]["median"]
        for name, t in row["timings_ms"].items():
            peak = row["memory_mib"].get(name, {})
            table.add_row(f"{row['dtype']} {titles[name]}", f"{t['median']:.0f}", f"{t['p20']:.0f}-{t['p80']:.0f}",
                          f"{t['median'] / ours:.2f}", *(f"{peak[key]:.0f}" if peak else "" for key in ("total", "step")))
        table.add_section()
    out.print(table)
    for row in rows:
        if not row["failure"]:
            verdict = "reached" if row["ratio"] >= row["limit"] else "not reached"
            alone = row["timings_ms"]["compile"]["median"] / row["timings_ms"]["products"]["median"]
            out.print(f"{row['dtype']}: {row['ratio']:.2f} x Hugging Face compiled ({row['limit']} {verdict}); the matrix "
                      f"products alone would be {alone:.2f} x", highlight=False)
            eager, times, memory = row["timings_ms"]["eager"]["median"], row["timings_ms"], row["memory_mib"]
            for name in ("patched", "linear"):
                less = f", {memory['eager']['step'] - memory[name]['step']:.0f} MiB less" if memory else ""
                out.print(f"{row['dtype']}: {titles[name]} is {eager / times[name]['median']:.2f} x Hugging Face eager{less}",
                          highlight=False)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpt2", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--attention", choices=["softmax", "sdpa"], default="softmax", help="of ours; Hugging Face has sdpa")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all this process may use")
    parser.add_argument("--rounds", type=int, help="at least so many steps of each; default 11, with --quick 3")
    parser.add_argument("--seconds", type=float, default=0.0, help="and for at least so long")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--peak-of", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 11)
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(json.dumps(peak_of_a_step(args.peak_of, DTYPES[args.dtype[0]], args.attention)))
        return 0
    harness.restart_reusing("benchmarks.gpt2", argv)
    rows = [run(dtype, args) for dtype in args.dtype]
    environment = asdict(harness.environment())
    show(rows)
    settings = " ".join(f"{name}={value}" for name, value in harness.REUSING_ALLOCATOR.items())
    report.console().print(f"Every contestant with {args.threads} threads; timed in a process restarted with {settings}; "
                           "peak memory in processes where every large block is mapped for itself.\n"
                           f"{report.Results(environment, []).described()}",
                           style="dim", highlight=False)
    if args.json:
        files.write_json(args.json, {"environment": environment, "rows": rows})
    return 1 if any(row["failure"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
