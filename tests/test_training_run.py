"""Training on one process, end to end: what is resumed is what would have been, bit for bit, and exports are the trained model."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from megatron_checkpoints import Form, Model, write
from training_cases import base, corpus, rows, same, text, train, weights, words

from megatron_kernels import checkpoint, cli
from megatron_kernels.checkpoint import Tokenizer
from megatron_kernels.models import GPT2, GPT2Config
from megatron_kernels.training import logs, schedule
from megatron_kernels.training.loop import TrainingError
from megatron_kernels.training.options import Decay, DType

__all__ = ["base", "text", "words"]  # fixtures


def samples(words, numbers, seq=16):
    ids = [*Tokenizer(words).load().encode(corpus()).ids, 0]
    return torch.tensor([ids[n * seq:n * seq + seq + 1] for n in numbers])


@pytest.fixture
def stops_at(monkeypatch):
    """A function: raise this signal once that iteration is logged, so that it arrives in the middle of the loop."""
    def at(iteration: int, number: int = signal.SIGTERM) -> None:
        row = logs.Log.row

        def raising(self, entry):
            row(self, entry)
            if entry.iteration == iteration:
                signal.raise_signal(number)
        monkeypatch.setattr(logs.Log, "row", raising)
    yield at
    monkeypatch.undo()


class TestResume:
    @pytest.mark.parametrize("changes", [
        {"recompute": True, "keep": 1}, {"dtype": DType.bfloat16, "attention_dropout": 0.3}, {"dtype": DType.float16},
        {"fuse_linear_loss": True, "clip_grad": 0.0, "valid_fraction": 0.1, "eval_interval": 2, "eval_batches": 2}],
        ids=lambda changes: "-".join(changes))
    def test_bitwise(self, base, tmp_path, monkeypatch, changes):
        """Six iterations, and three times two with another process's random state in between: the same weights and rows."""
        # The first steps of float16 overflow and are skipped; the factor is then doubled every second step.
        monkeypatch.setattr(schedule.LossScale.__init__, "__defaults__", (2.0**20, 0, 2))
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert train(base, save=whole, log_csv=tmp_path / "whole.csv", **changes) == 0
        for stop in (2, 4, 6):
            torch.manual_seed(stop)
            assert train(base, save=parts, log_csv=tmp_path / "parts.csv", resume=True, decay_iterations=6,
                         **{**changes, "iterations": stop}) == 0
        whole_rows, part_rows = rows(tmp_path / "whole.csv"), rows(tmp_path / "parts.csv")
        if "eval_interval" not in changes:
            assert whole_rows == part_rows
        assert [row["loss"] for row in whole_rows] == [row["loss"] for row in part_rows]
        assert same(whole, parts)
        kept = {"step_00000006"} if changes.get("keep") else {"step_00000002", "step_00000004", "step_00000006"}
        assert {path.name for path in parts.iterdir()} == kept
        if changes.get("dtype") is DType.float16:
            skipped = [int(row["skipped"]) for row in whole_rows]
            assert 1 <= sum(skipped) < 5 and skipped[0] == 1
            done = [sum(skipped[:i]) for i in range(6)]  # an update that was left out does not advance the learning rate
            expected = [schedule.learning_rate(loop_options(base), i - done[i]) for i in range(6)]
            assert [float(row["lr"]) for row in whole_rows] == expected

    def test_killed_after_the_last_checkpoint(self, base, tmp_path):
        """Rows that the checkpoint does not know of are dropped, and written again the same."""
        run, log = tmp_path / "run", tmp_path / "log.csv"
        train(base, save=run, log_csv=log, iterations=4, decay_iterations=6)
        first = rows(log)
        with open(log, "a") as file:
            file.write(log.read_text().splitlines()[-1].replace("4,", "5,", 1) + "\n6,1.0,2")
        train(base, save=run, log_csv=log, resume=True)
        found = rows(log)
        assert [int(row["iteration"]) for row in found] == [1, 2, 3, 4, 5, 6] and found[:4] == first
        train(base, save=tmp_path / "whole", log_csv=tmp_path / "whole.csv")
        assert rows(tmp_path / "whole.csv") == found and same(run, tmp_path / "whole")

    def test_the_time_goes_on(self, base, tmp_path):
        train(base, save=tmp_path / "run", log_csv=tmp_path / "log.csv", iterations=2, decay_iterations=6)
        train(base, save=tmp_path / "run", log_csv=tmp_path / "log.csv", resume=True)
        with open(tmp_path / "log.csv", newline="") as file:
            elapsed = [float(row["elapsed"]) for row in csv.DictReader(file)]
        assert len(elapsed) == 6 and elapsed == sorted(elapsed)

    @pytest.mark.parametrize(("change", "message"), [
        ({"seq_length": 8}, "was trained with samples"), ({"global_batch_size": 2}, "--global-batch-size 4, got 2"),
        ({"seed": 8}, "--seed 7, got 8"), ({"valid_fraction": 0.5}, "was trained with samples"),
        ({"num_layers": 4}, "num_layers is 2, that of the model 4")])
    def test_another_run(self, base, tmp_path, change, message):
        train(base, save=tmp_path / "run", iterations=1, decay_iterations=6)
        before = weights(tmp_path / "run")
        with pytest.raises(ValueError, match=message):
            train({**base, "max_position_embeddings": 16}, save=tmp_path / "run", resume=True, **change)
        assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())

    def test_other_data(self, base, tmp_path):
        train(base, save=tmp_path / "run", iterations=1, decay_iterations=6)
        (tmp_path / "other.txt").write_text(corpus().replace("fox", "dogs"), encoding="utf-8")
        with pytest.raises(ValueError, match="was trained with data [0-9a-f]{16}, got [0-9a-f]{16}: the order of the samples"):
            train(base, data=[tmp_path / "other.txt"], save=tmp_path / "run", resume=True)

    def test_of_another_program(self, base, tmp_path):
        train(base, save=tmp_path / "first", iterations=1, decay_iterations=6)
        config = torch.load(tmp_path / "first/step_00000001/training.pt", weights_only=True)["config"]
        model = GPT2(GPT2Config(**config))
        optimizer = torch.optim.AdamW(schedule.decay_groups([model], 0.1))
        checkpoint.save_training(tmp_path / "run", model, optimizer, step=1, extra={"tokens": 5})
        with pytest.raises(ValueError, match="run/step_00000001: not a checkpoint of this command; export it as a model"):
            train(base, save=tmp_path / "run", resume=True)

    def test_what_may_change(self, base, tmp_path):
        """The command line has the last word on the optimizer's options."""
        train(base, save=tmp_path / "run", iterations=2, decay_iterations=6)
        train(base, save=tmp_path / "run", resume=True, weight_decay=0.5, beta2=0.9, micro_batch_size=4)
        groups = torch.load(checkpoint.latest(tmp_path / "run") / "training.pt", weights_only=True)["optimizers"]
        assert sorted((group["options"]["weight_decay"], tuple(group["options"]["betas"])) for group in groups) == [
            (0.0, (0.9, 0.9)), (0.5, (0.9, 0.9))]


def loop_options(base):
    from megatron_kernels.training.options import Options
    return Options(**base)


class TestSignals:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_saved_and_continued(self, base, tmp_path, stops_at, capsys, number, code, monkeypatch):
        run, log = tmp_path / "run", tmp_path / "log.csv"
        handlers = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
        stops_at(3, number)
        assert train(base, save=run, log_csv=log, export_huggingface=tmp_path / "hf") == code
        assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == [signal.default_int_handler, handlers[1]]
        signal.signal(signal.SIGINT, handlers[0])
        assert f"{signal.Signals(number).name}: stopped after iteration 4, saved" in capsys.readouterr().out
        assert [path.name for path in run.iterdir()] == ["step_00000004"] and not (tmp_path / "hf").exists()
        monkeypatch.undo()
        assert train(base, save=run, log_csv=log, export_huggingface=tmp_path / "hf", resume=True) == 0
        train(base, save=tmp_path / "whole", log_csv=tmp_path / "whole.csv")
        assert rows(log) == rows(tmp_path / "whole.csv") and same(run, tmp_path / "whole")
        assert (tmp_path / "hf" / "model.safetensors").is_file()

    def test_a_second_interrupt_ends_at_once(self, base, tmp_path, monkeypatch):
        row, survived = logs.Log.row, []

        def twice(self, entry):
            row(self, entry)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a batch system and torchrun may both send it: counts once
            survived.append(entry.iteration)
            signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(logs.Log, "row", twice)
        with pytest.raises(KeyboardInterrupt):
            train(base, save=tmp_path / "run")
        assert survived == [1] and not (tmp_path / "run").exists()

    def test_nothing_to_save(self, base, stops_at, capsys):
        stops_at(2)
        assert train(base) == 143
        assert "SIGTERM: stopped after iteration 3, not saved, for want of --save" in capsys.readouterr().out

    def test_a_real_process(self, base, text, words, tmp_path):
        """SIGTERM to the command itself, whenever it comes: exit code 143, and the last row is the checkpoint's."""
        log, run = tmp_path / "log.csv", tmp_path / "run"
        command = [sys.executable, "-m", "megatron_kernels.cli", "train", text, "--tokenizer", words, "--seq-length", 16,
                   "--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 2, "--save", run, "--log-csv", log,
                   "--iterations", 1_000_000, "--log-interval", 5]
        with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 10):
                time.sleep(0.01)
            process.terminate()
            out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (143, ""), err
        last = int(rows(log)[-1]["iteration"])
        assert checkpoint.latest(run) == run / f"step_{last:08d}" and f"SIGTERM: stopped after iteration {last}, saved" in out


class TestLearning:
    def test_the_command_line(self, text, words, tmp_path, capsys):
        """From scratch with every kind of output; the loss falls, and is scored on what was kept apart."""
        code = cli.run([str(word) for word in (
            "train", text, "--tokenizer", words, "--seq-length", 16, "--num-layers", 2, "--hidden-size", 32,
            "--num-attention-heads", 2, "--micro-batch-size", 8, "--global-batch-size", 16, "--iterations", 40, "--lr", 1e-2,
            "--warmup", 4, "--hidden-dropout", 0, "--attention-dropout", 0, "--valid-fraction", 0.1, "--eval-interval", 20,
            "--eval-batches", 1, "--save", tmp_path / "run", "--save-interval", 20, "--log-csv", tmp_path / "log.csv",
            "--log-interval", 10, "--export-huggingface", tmp_path / "hf", "--export-megatron", tmp_path / "m",
            "--export-tensor-parallel", 2, "--export-dtype", "float16")])
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), err
        found = rows(tmp_path / "log.csv")
        assert float(found[0]["loss"]) > 5.5 and float(found[-1]["loss"]) < 3.5
        assert [row["iteration"] for row in found if row["valid_loss"]] == ["20", "40"]
        assert out.count("\n iteration ") == 4 and out.count("\nvalidation ") == 2
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step_00000020", "step_00000040"]
        exported = GPT2.from_megatron(tmp_path / "m")
        half = {name: value.half() for name, value in weights(tmp_path / "run").items()}
        assert all(torch.equal(value[:300] if value.shape[0] > 300 and "word" in name else value,
                               half[name][:300] if value.shape[0] > 300 and "word" in name else half[name])
                   for name, value in exported.named_parameters())

        # The validation loss is the model's on the first 16 samples after those that were trained on.
        model = GPT2.from_huggingface(tmp_path / "hf", torch.float32)
        ids = [*Tokenizer(words).load().encode(corpus()).ids, 0]
        total = (len(ids) - 1) // 16
        kept = samples(words, range(total - round(total * 0.1), total))[:16]
        with torch.no_grad():
            expected = model(kept[:, :-1], labels=kept).item()
        assert abs(float(found[-1]["valid_loss"]) - expected) < 5e-3  # the export is in half precision

    def test_accumulation_is_the_whole_batch(self, base, tmp_path):
        """Pieces of one or of eight give the same losses and norms up to rounding."""
        quiet = {**base, "hidden_dropout": 0.0, "attention_dropout": 0.0, "global_batch_size": 8}
        for size in (1, 8):
            train(quiet, micro_batch_size=size, log_csv=tmp_path / f"{size}.csv")
        for one, other in zip(rows(tmp_path / "1.csv"), rows(tmp_path / "8.csv"), strict=True):
            assert abs(float(one["loss"]) - float(other["loss"])) < 1e-5
            assert abs(float(one["grad_norm"]) - float(other["grad_norm"])) < 1e-4

    def test_against_a_loop_written_out(self, base, tmp_path, words):
        """The weights after six iterations are those of a plain loop over the samples that data.py names."""
        from megatron_kernels.training.data import split
        from megatron_kernels.training.tokens import open_tokens

        quiet = {**base, "hidden_dropout": 0.0, "attention_dropout": 0.0, "micro_batch_size": 4, "weight_decay": 0.1}
        train(quiet, save=tmp_path / "run", clip_grad=0.5)
        source, _ = split(open_tokens(base["data"], Tokenizer(words)), 16, 0.0, 7)
        config = torch.load(tmp_path / "run/step_00000006/training.pt", weights_only=True)["config"]
        model = GPT2(GPT2Config(**config), seed=7)
        matrices, vectors = ([p for p in model.parameters() if p.dim() == dim] for dim in (2, 1))
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}])
        for k in range(6):
            batch = samples(words, [source.number(4 * k + i) for i in range(4)])
            logits = model(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(loop_options(base), k)
            optimizer.step()
        for name, value in weights(tmp_path / "run").items():
            torch.testing.assert_close(value, model.get_parameter(name), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float16])
    def test_16_bits(self, base, tmp_path, dtype):
        """Losses and norms near those of float32, and not the same."""
        quiet = {**base, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        for kind in (DType.float32, dtype):
            train(quiet, dtype=kind, log_csv=tmp_path / f"{kind.value}.csv")
        for one, other in zip(rows(tmp_path / "float32.csv"), rows(tmp_path / f"{dtype.value}.csv"), strict=True):
            assert abs(float(one["loss"]) - float(other["loss"])) < 5e-3
            assert 0 < abs(float(one["grad_norm"]) - float(other["grad_norm"])) < 2e-2

    def test_the_model_is_as_asked_for(self, base, tmp_path, text, words):
        from megatron_kernels.training.data import Batches
        from megatron_kernels.training.options import Options
        from megatron_kernels.training.trainee import Trainee, config_of

        train(base, iterations=0, export_huggingface=tmp_path / "hf")
        options = Options(data=[text], model=tmp_path / "hf", recompute=True, hidden_dropout=0.25, fuse_linear_loss=True)
        source = checkpoint.load(tmp_path / "hf")
        model = Trainee(options, config_of(options, source, None, None), source, Batches(4, 4), None).parts[0]
        assert model.training and model.activation_checkpointing
        assert (model.config.hidden_dropout, model.config.embedding_dropout, model.config.attention_dropout) == (0.25, 0.25, 0.1)
        assert model.config.fuse_linear_loss and model.config.vocab_size == 300

    def test_dropout_is_drawn_anew_and_seeded(self, base, tmp_path):
        for name, seed in (("a", 7), ("b", 7), ("c", 8)):
            train(base, iterations=3, seed=seed, lr=0.0, min_lr=0.0, decay=Decay.constant, log_csv=tmp_path / f"{name}.csv")
        a, b, c = (rows(tmp_path / f"{name}.csv") for name in "abc")
        assert a == b and a[0]["loss"] != c[0]["loss"] and len({row["loss"] for row in a}) == 3

    def test_a_loss_that_is_not_finite(self, base, tmp_path, capsys):
        run = tmp_path / "run"
        with pytest.raises(TrainingError, match=r"iteration [2-6]: the loss is (nan|inf|-inf|[\d.]+) and the norm of the gradients "
                                                r"(nan|inf); the weights were not changed, .*run has earlier ones"):
            train(base, lr=1e30, warmup=0, clip_grad=0.0, save=run, save_interval=1)
        assert all(value.isfinite().all() for value in weights(run).values())


class TestFineTuning:
    def test_from_hugging_face_and_back(self, base, tmp_path, words):
        """What was exported is read again with its tokenizer, and goes on from there; transformers agrees on the result."""
        transformers = pytest.importorskip("transformers")
        train(base, save=tmp_path / "first", export_huggingface=tmp_path / "hf")
        told = ("tokenizer", "num_layers", "hidden_size", "num_attention_heads")
        tuned, log = {key: value for key, value in base.items() if key not in told}, tmp_path / "log.csv"
        train(tuned, model=tmp_path / "hf", hidden_dropout=0.0, attention_dropout=0.0, log_csv=log,
              export_huggingface=tmp_path / "hf2", export_megatron=tmp_path / "m2", export_tensor_parallel=2,
              export_pipeline_parallel=2, save=tmp_path / "second")
        ids = samples(words, range(5))[:, :-1]
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf2").eval()
        ours, megatron = GPT2.from_huggingface(tmp_path / "hf2"), GPT2.from_megatron(tmp_path / "m2")
        with torch.no_grad():
            logits = ours(ids)
            torch.testing.assert_close(theirs(ids).logits, logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(megatron(ids), logits)
        first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
        assert not any(torch.equal(first[name], value) for name, value in second.items())
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf2")("the fox")["input_ids"] == (
            Tokenizer(words).load().encode("the fox").ids)

        # The first loss is that of the exported model on the first batch.
        from megatron_kernels.training.data import split
        from megatron_kernels.training.tokens import open_tokens
        source, _ = split(open_tokens(base["data"], Tokenizer(words)), 16, 0.0, 7)
        batch = samples(words, [source.number(i) for i in range(4)])
        with torch.no_grad():
            expected = GPT2.from_huggingface(tmp_path / "hf")(batch[:, :-1], labels=batch).item()
        assert abs(float(rows(log)[0]["loss"]) - expected) < 1e-5

    def test_from_a_half_precision_megatron_checkpoint(self, base, tmp_path):
        """Two shards in float16 without optimizer state, and data in Megatron-LM's format."""
        from test_training_data import write_megatron
        small = Model(layers=4, positions=24, vocab=512)
        write(tmp_path / "m", Form(3.0, tp=2), small)
        write_megatron(tmp_path / "d", [list(range(i, i + 40)) for i in range(0, 400, 7)], 8, "<u2")
        common = {"data": [tmp_path / "d.idx"], "model": tmp_path / "m", "seq_length": 16, "lr": 1e-4, "micro_batch_size": 2,
                  "log_interval": 1000}
        train(common, iterations=3, save=tmp_path / "run", export_megatron=tmp_path / "out")
        train(common, iterations=0, export_megatron=tmp_path / "same")
        before, same, after = (GPT2.from_megatron(tmp_path / name, dtype=torch.float32) for name in ("m", "same", "out"))
        assert all(map(torch.equal, before.parameters(), same.parameters()))
        assert not all(map(torch.equal, before.parameters(), after.parameters()))
        assert all(torch.equal(value, dict(after.named_parameters())[name]) for name, value in weights(tmp_path / "run").items())

    def test_an_id_beyond_the_vocabulary(self, base, tmp_path):
        from test_training_data import write_megatron
        write_megatron(tmp_path / "d", [list(range(100))], 4, "<i4")
        with pytest.raises(ValueError, match="the data does not tell its vocabulary: give --vocab-size or a tokenizer"):
            train({**base, "tokenizer": None}, data=[tmp_path / "d"])
        train(base, data=[tmp_path / "d"], iterations=1, warmup=0, export_huggingface=tmp_path / "hf")  # the tokenizer tells it
        config = GPT2.from_huggingface(tmp_path / "hf").config
        assert (config.vocab_size, config.eos_token_id) == (300, 0)
        with pytest.raises(ValueError, match="the data has the token id 9[0-9], expected 0 to 89"):
            train({**base, "tokenizer": None}, data=[tmp_path / "d"], vocab_size=90, seq_length=99, micro_batch_size=1,
                  global_batch_size=1)
