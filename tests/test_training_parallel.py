"""Training on four ranks: one torchrun runs everything below, and the tests look at what it left.

Every layout gives the losses of one process on the same data, resumes bit for bit, and goes on from another layout's checkpoint;
a signal to one rank stops all of them at the same iteration.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_cases import base, rows, same, text, train, weights, words

from megatron_kernels.models import GPT2
from megatron_kernels.training import logs
from megatron_kernels.training.options import DType, Replicas

__all__ = ["base", "text", "words"]  # fixtures
RANKS = 4
QUIET = {"num_layers": 4, "num_attention_heads": 4, "global_batch_size": 8, "hidden_dropout": 0.0, "attention_dropout": 0.0,
         "valid_fraction": 0.1, "eval_interval": 3, "eval_batches": 1}
LAYOUTS = {
    "tp2-dp2": {"tensor_parallel": 2},
    "tp2-sp-fsdp2": {"tensor_parallel": 2, "sequence_parallel": True, "data_parallel": Replicas.fsdp},
    "pp2-dp2": {"pipeline_parallel": 2},
    "pp2-tp2-sp": {"pipeline_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True, "recompute": True},
    "zbv-fsdp2": {"pipeline_parallel": 2, "schedule": "ZBVZeroBubble", "data_parallel": Replicas.fsdp},
}
FAST, NOISY = "tp2-dp2", ("tp2-dp2", "pp2-tp2-sp")
MIXED = {
    "bf16-tp2-dp2": {**LAYOUTS["tp2-dp2"], "dtype": DType.bfloat16},
    "bf16-tp2-sp-fsdp2": {**LAYOUTS["tp2-sp-fsdp2"], "dtype": DType.bfloat16},
    "bf16-pp2-dp2": {**LAYOUTS["pp2-dp2"], "dtype": DType.bfloat16},
    "bf16-zbv-fsdp2": {**LAYOUTS["zbv-fsdp2"], "dtype": DType.bfloat16},
    "fp16-tp2-dp2": {**LAYOUTS["tp2-dp2"], "dtype": DType.float16},
    "fp16-fsdp4": {"data_parallel": Replicas.fsdp, "dtype": DType.float16},
}


def worker(out: Path, base: dict, everything: bool) -> None:
    """What one rank runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    codes: list[int] = []

    def run(name: str, **options) -> None:
        start = time.perf_counter()
        codes.append(train(base, save=out / name, log_csv=out / f"{name}.csv", **options))
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - start:5.1f} s  {name}", file=sys.stderr, flush=True)

    for name, layout in ({**LAYOUTS, **MIXED} if everything else {FAST: LAYOUTS[FAST]}).items():
        run(name, **QUIET, **layout, save_interval=3)
    # With dropout, in one go and in two.
    for name in NOISY if everything else (FAST,):
        noisy = {**LAYOUTS[name], **{key: QUIET[key] for key in ("num_layers", "num_attention_heads", "global_batch_size")}}
        run(f"whole-{name}", iterations=4, **noisy)
        run(f"parts-{name}", iterations=2, decay_iterations=4, **noisy)
        run(f"parts-{name}", iterations=4, resume=True, **noisy)
    if everything:  # from one layout to another, the last time with files for people
        run("moved", iterations=2, decay_iterations=6, **QUIET, **LAYOUTS["pp2-dp2"])
        run("moved", iterations=4, decay_iterations=6, resume=True, **QUIET, **LAYOUTS["tp2-sp-fsdp2"])
        run("moved", resume=True, export_huggingface=out / "hf", export_megatron=out / "megatron", export_tensor_parallel=4,
            **QUIET, **LAYOUTS["pp2-tp2-sp"])

    row = logs.Log.row

    def only_here(self, entry):
        row(self, entry)
        if entry.iteration == 2 and dist.get_rank() == 3:
            signal.raise_signal(signal.SIGTERM)
    logs.Log.row = only_here
    run("stopped", **QUIET, **LAYOUTS[FAST])
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(codes))
    dist.destroy_process_group()


def launched(out: Path, *arguments: object) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__, str(out),
               *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parent,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-6000:]
    return out


@pytest.fixture(scope="module")
def launch(tmp_path_factory, text, words):
    return launched(tmp_path_factory.mktemp("ranks"), text, words)


@pytest.fixture(scope="module")
def launch_all(tmp_path_factory, text, words):
    return launched(tmp_path_factory.mktemp("all"), text, words, "all")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text, words):
    """The same run on one process."""
    out = tmp_path_factory.mktemp("alone")
    train(options_of(text, words), **QUIET, log_csv=out / "log.csv", save=out / "run")
    return out


def options_of(text, words) -> dict:
    return {"data": [Path(text)], "tokenizer": Path(words), "seq_length": 16, "hidden_size": 32, "micro_batch_size": 2,
            "iterations": 6, "lr": 3e-3, "warmup": 2, "log_interval": 1000, "seed": 7}


def difference(one: Path, other: Path, *columns: str) -> float:
    return max(abs(float(a[column] or 0) - float(b[column] or 0)) for a, b in zip(rows(one), rows(other), strict=True)
               for column in columns)


def as_alone(out: Path, alone: Path, layout: str) -> None:
    assert difference(out / f"{layout}.csv", alone / "log.csv", "loss", "valid_loss") < 2e-5
    assert difference(out / f"{layout}.csv", alone / "log.csv", "grad_norm") < 2e-4
    assert [row["valid_loss"] != "" for row in rows(out / f"{layout}.csv")] == [False, False, True] * 2
    expected = weights(alone / "run")
    for name, value in weights(out / layout).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)


def resumed_bitwise(out: Path, layout: str) -> None:
    assert rows(out / f"whole-{layout}.csv") == rows(out / f"parts-{layout}.csv")
    assert same(out / f"whole-{layout}", out / f"parts-{layout}")


def test_losses_are_those_of_one_process(launch, alone):
    as_alone(launch, alone, FAST)


def test_resumes_bitwise(launch):
    resumed_bitwise(launch, FAST)


def test_a_signal_to_one_rank_stops_all(launch):
    codes = [json.loads((launch / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert codes == [[0, 0, 0, 0, 143]] * RANKS
    assert [path.name for path in (launch / "stopped").iterdir()] == ["step_00000003"] and len(rows(launch / "stopped.csv")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_in_every_layout(launch_all, alone, layout):
    as_alone(launch_all, alone, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MIXED)
def test_16_bits(launch_all, alone, layout):
    """Near the losses of float32, and not the same."""
    assert 1e-6 < difference(launch_all / f"{layout}.csv", alone / "log.csv", "loss", "valid_loss") < 5e-3
    scales = {row["loss_scale"] for row in rows(launch_all / f"{layout}.csv")}
    assert scales == ({"65536.0"} if layout.startswith("fp16") else {"1.0"})


@pytest.mark.slow
@pytest.mark.parametrize("layout", NOISY)
def test_resumes_bitwise_in_a_pipeline_too(launch_all, layout):
    resumed_bitwise(launch_all, layout)


@pytest.mark.slow
def test_another_layout_goes_on_with_the_same_data(launch_all, alone):
    assert difference(launch_all / "moved.csv", alone / "log.csv", "loss") < 2e-5
    expected = weights(launch_all / "moved")
    for model in (GPT2.from_huggingface(launch_all / "hf"), GPT2.from_megatron(launch_all / "megatron")):
        assert all(torch.equal(value[:300] if "word" in name else value, expected[name][:300] if "word" in name else expected[name])
                   for name, value in model.named_parameters())


if __name__ == "__main__":
    worker(Path(sys.argv[1]), options_of(*sys.argv[2:4]), sys.argv[4:] == ["all"])
