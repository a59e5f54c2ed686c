"""The parts of the training command: schedule, decay groups, loss scale, logs, and the options that contradict each other."""

from __future__ import annotations

import math
import sys
import types

import pytest
from training_cases import base, text, words

from megatron_kernels import cli
from megatron_kernels.models import GPT2, GPT2Config
from megatron_kernels.training.logs import COLUMNS, Log, Row, clock, open_csv
from megatron_kernels.training.options import Decay, Options
from megatron_kernels.training.schedule import LossScale, decay_groups, learning_rate

__all__ = ["base", "text", "words"]  # fixtures


class TestLearningRate:
    @pytest.mark.parametrize(("updates", "expected"), [
        (0, 0.0), (5, 0.5), (10, 1.0), (35, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))), (60, 0.55), (110, 0.1), (500, 0.1)])
    def test_cosine(self, updates, expected):
        options = Options(data=[], lr=1.0, min_lr=0.1, warmup=10, iterations=110)
        assert learning_rate(options, updates) == pytest.approx(expected, rel=1e-12)

    def test_linear_constant_and_an_end_of_its_own(self):
        linear = Options(data=[], lr=1.0, min_lr=0.2, warmup=10, iterations=999, decay_iterations=50, decay=Decay.linear)
        assert [learning_rate(linear, n) for n in (30, 50, 51, 998)] == pytest.approx([0.6, 0.2, 0.2, 0.2])
        constant = Options(data=[], lr=1.0, min_lr=0.2, warmup=4, iterations=10, decay=Decay.constant)
        assert [learning_rate(constant, n) for n in (1, 4, 9, 99)] == [0.25, 1.0, 1.0, 1.0]
        assert learning_rate(Options(data=[], lr=1.0, iterations=10), 0) == 1.0

    @pytest.mark.parametrize("decay", list(Decay))
    @pytest.mark.parametrize("warmup", [0, 7])
    def test_megatron(self, decay, warmup):
        """The rates that Megatron-core's scheduler sets, step by step."""
        theirs = pytest.importorskip("megatron.core.optimizer_param_scheduler", exc_type=ImportError)
        options = Options(data=[], lr=3e-4, min_lr=1e-5, warmup=warmup, iterations=60, decay_iterations=40, decay=decay)
        groups = [{"params": [], "lr": 0.0}]
        scheduler = theirs.OptimizerParamScheduler(
            types.SimpleNamespace(param_groups=groups), init_lr=0.0, max_lr=3e-4, min_lr=1e-5, lr_warmup_steps=warmup,
            lr_decay_steps=40, lr_decay_style=decay.value, start_wd=0.01, end_wd=0.01, wd_incr_steps=60, wd_incr_style="constant")
        for updates in range(60):
            assert learning_rate(options, updates) == pytest.approx(groups[0]["lr"], rel=1e-12, abs=1e-18), updates
            scheduler.step(1)


def test_decay_groups():
    """Matrices and tables are decayed; biases and layer norms, which have one dimension, are not."""
    model = GPT2(GPT2Config(num_layers=2, hidden_size=32, num_attention_heads=2, max_position_embeddings=8, vocab_size=64))
    decayed, others = decay_groups([model], 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layer = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    expected = {"embedding.word_embeddings.weight", "embedding.position_embeddings.weight",
                *(f"decoder.layers.{i}.{name}.weight" for i in range(2) for name in layer)}
    assert {names[id(p)] for p in decayed["params"]} == expected
    assert {names[id(p)] for p in others["params"]} == set(names.values()) - expected
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_loss_scale():
    scale = LossScale(value=8.0, interval=3)
    for finite, value in ((True, 8), (True, 8), (False, 4), (True, 4), (True, 4), (True, 8), (True, 8), (False, 4), (False, 2),
                          (False, 1)):
        scale.update(finite)
        assert scale.value == value
    with pytest.raises(ArithmeticError, match="overflow float16 at a loss scale of 1"):
        scale.update(False)


def row(iteration: int, **changes) -> Row:
    return Row(**{"iteration": iteration, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "loss_scale": 1.0, "skipped": 0,
                  "tokens_per_s": 1000.0, "elapsed": 3725.0 + iteration, **changes})


class TestLogs:
    def test_lines(self, capsys):
        with Log(40, 2, None, None, 0) as log:
            for entry in (row(1, loss=3.0), row(2, loss=2.0, tokens_per_s=500.0), row(3), row(4, valid_loss=2.25)):
                log.row(entry)
        lines = capsys.readouterr().out.splitlines()
        assert lines == [" iteration       2/40  loss 2.5000  lr 1.000e-03  grad norm 0.500  667 tokens/s  1:02:07",
                         " iteration       4/40  loss 2.5000  lr 1.000e-03  grad norm 0.500  1,000 tokens/s  1:02:09",
                         "validation       4/40  loss 2.2500"]
        assert clock(59.9) == "0:00:59"

    def test_skipped_iterations(self, capsys):
        with Log(40, 2, None, None, 0) as log:
            log.row(row(1, loss=float("inf"), skipped=1, loss_scale=1024.0))
            log.row(row(2, loss=2.0, loss_scale=512.0))
        assert capsys.readouterr().out.endswith("loss 2.0000  lr 1.000e-03  grad norm 0.500  1,000 tokens/s  1:02:07  "
                                                "scale 512, skipped 1\n")

    def test_csv_is_continued(self, tmp_path):
        path = tmp_path / "deep" / "log.csv"
        with Log(9, 100, path, None, 0) as log:
            for i in range(1, 6):
                log.row(row(i))
        with open(path, "a") as file:
            file.write("6,2.5,0.0")  # a process was killed within the row
        with Log(9, 100, path, None, 3) as log:
            log.row(row(4, loss=7.0))
        content = path.read_text().splitlines()
        assert content[0] == ",".join(COLUMNS)
        assert [line.split(",")[:2] for line in content[1:]] == [["1", "2.5"], ["2", "2.5"], ["3", "2.5"], ["4", "7.0"]]
        assert [entry.name for entry in path.parent.iterdir()] == ["log.csv"]
        path.write_text("")  # created, and killed before the first row
        open_csv(path, 0).close()
        assert path.read_text() == ",".join(COLUMNS) + "\n"
        path.write_text("step,loss\n1,2\n")
        with pytest.raises(ValueError, match=r"log.csv: has the columns step,loss, expected iteration,loss,lr"):
            open_csv(path, 1)
        assert path.read_text() == "step,loss\n1,2\n"

    def test_tensorboard(self, tmp_path, monkeypatch):
        written, made = [], []

        class Writer:
            def __init__(self, directory, *, purge_step):
                made.append((directory, purge_step))

            def add_scalar(self, *what):
                written.append(what)

            def flush(self):
                written.append("flush")

            def close(self):
                written.append("close")

        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
        with Log(9, 100, None, tmp_path / "board", 3) as log:
            log.row(row(4, valid_loss=2.0))
            log.sync()
        assert made == [(str(tmp_path / "board"), 4)]  # what came after the checkpoint is not shown
        assert ("train/loss", 2.5, 4) in written and ("train/valid_loss", 2.0, 4) in written and written[-2:] == ["flush", "close"]

    def test_without_tensorboard(self, tmp_path, monkeypatch, capsys):
        """Said before anything is read."""
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert "--tensorboard needs the tensorboard package (pip install tensorboard)" in fails(
            capsys, "nowhere.txt", "--tensorboard", tmp_path)


def fails(capsys, *arguments) -> str:
    code = cli.run(["train", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


class TestWrongOptions:
    @pytest.mark.parametrize(("options", "message"), [
        (["--model", "x", "--num-layers", "2"], "--num-layers: the sizes are those of --model"),
        (["--config", "c.json"], "--config is for --model"),
        (["--valid-fraction", "0.1", "--valid-data", "y"], "give --valid-data or --valid-fraction, not both"),
        (["--min-lr", "1"], "--min-lr 1 is above --lr 0.00015"),
        (["--warmup", "50", "--iterations", "50"], "--warmup 50 must be below the 50 iterations of the decay"),
        (["--beta2", "1"], "--beta1 and --beta2 must be below 1, got 0.9 and 1"),
        (["--sequence-parallel"], "--sequence-parallel needs --tensor-parallel"),
        (["--sequence-parallel", "--tensor-parallel", "3"], "--seq-length 1024 is not a multiple of --tensor-parallel 3"),
        (["--pipeline-parallel", "2", "--dtype", "float16"], "use bfloat16 with --pipeline-parallel"),
        (["--pipeline-parallel", "2", "--fuse-linear-loss"], "leave it out with --pipeline-parallel"),
        (["--tensor-parallel", "2"], "--tensor-parallel 2: needs several processes, as in torchrun --nproc-per-node N"),
        (["--data-parallel", "fsdp"], "--data-parallel fsdp: needs several processes"),
        (["--resume"], "--save-interval, --keep and --resume need --save"), (["--keep", "1"], "need --save"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"), (["--decay", "steps"], "steps"),
        (["--micro-batch-size", "0"], "--micro-batch-size"), (["--dtype", "int8"], "int8"), (["--surprise"], "No such option")])
    def test_one_line_each(self, capsys, options, message):
        assert message in fails(capsys, "nowhere.txt", *options)

    def test_what_does_not_fit_the_data(self, capsys, text, words, tmp_path):
        small = ["--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 2, "--seq-length", 16]
        given = [text, "--tokenizer", words, "--data-cache", tmp_path, *small]
        assert "nowhere.txt: no such file" in fails(capsys, "nowhere.txt")
        assert "Missing argument" in fails(capsys)
        assert "a text needs a tokenizer" in fails(capsys, text)
        assert "too few for one sample of 99999 + 1" in fails(capsys, *given, "--seq-length", 99999)
        assert "--seq-length 16 is more than the model's 8 positions" in fails(capsys, *given, "--max-position-embeddings", 8)
        assert "of a vocabulary of 300, but the model's has 299" in fails(capsys, *given, "--vocab-size", 299)
        assert "--global-batch-size 6 is not a multiple of --micro-batch-size 4 x 1 replicas" in fails(
            capsys, *given, "--global-batch-size", 6)
        assert "samples to score are fewer than a global batch of 64" in fails(
            capsys, *given, "--valid-fraction", 0.05, "--micro-batch-size", 64)
        assert "hidden_size 32 is not a multiple of num_attention_heads 3" in fails(capsys, *given, "--num-attention-heads", 3)
        assert "2 heads and 2 layers can't be shared out over 3 tensor-parallel and 1 pipeline ranks" in fails(
            capsys, *given, "--export-megatron", tmp_path / "m", "--export-tensor-parallel", 3)
        full = tmp_path / "full"
        (full / "step_00000001").mkdir(parents=True)
        assert "exists and is not empty; the model is exported to a new directory" in fails(
            capsys, *given, "--export-huggingface", full)
        assert "full: has checkpoints; go on from the last with --resume, or save elsewhere" in fails(
            capsys, *given, "--save", full)
        (tmp_path / "log.csv").write_text("x")
        assert "log.csv: exists; --resume continues it" in fails(capsys, *given, "--log-csv", tmp_path / "log.csv")

    def test_help_names_every_option(self, capsys):
        assert cli.run(["train", "--help"]) == 0
        out = capsys.readouterr().out
        assert all(option in out for option in ("--tensor-parallel", "--export-megatron", "--resume", "--warmup", "--dtype"))
