"""The command line, as users meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from megatron_checkpoints import Form, Model, as_huggingface, truth, write
from safetensors.torch import load_file
from test_checkpoint_huggingface import bpe

from megatron_kernels import cli

__all__ = ["bpe"]  # the fixture
MODEL = Model(layers=4, vocab=512)


def run(capsys, *arguments):
    code = cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, *arguments):
    """Exit code 1, nothing on stdout, and one line on stderr; returns the line."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


COMMANDS = ["inspect", "convert", "generate", "evaluate", "train", "demo"]


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help(capsys, arguments):
    code, out, _ = run(capsys, *arguments, "--help")
    assert code == 0 and "Usage: megatron-kernels" in out
    assert arguments or all(command in out for command in COMMANDS)


class TestConvert:
    def test_defaults(self, tmp_path, capsys, monkeypatch):
        """`convert FILE DIR` from any directory, with relative paths."""
        monkeypatch.chdir(tmp_path)
        write(tmp_path, Form(1.0, "transformer", box="zip"), MODEL)
        code, out, err = run(capsys, "convert", "checkpoint.zip", "out/")
        assert (code, out) == (0, "")
        assert "note: the original vocabulary size is unknown" in err and "wrote out: huggingface, " in err
        found = load_file(tmp_path / "out/model.safetensors")
        expected = as_huggingface(truth(MODEL), MODEL)
        assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in found)

    def test_megatron_and_back(self, tmp_path, capsys):
        write(tmp_path, Form(), MODEL)
        config = tmp_path / "c.json"
        config.write_text(json.dumps({"vocab_size": 500}))
        assert run(capsys, "convert", tmp_path, tmp_path / "m", "--to", "megatron", "--tensor-parallel", 2, "--pipeline-parallel",
                   2, "--config", config, "--dtype", "float32")[0] == 0
        shards = sorted(path.parent.name for path in (tmp_path / "m").rglob("*.pt"))
        assert shards == ["mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"]
        assert run(capsys, "convert", tmp_path / "m", tmp_path / "hf", "--dtype", "float16")[0] == 0
        found, expected = load_file(tmp_path / "hf/model.safetensors"), as_huggingface(truth(MODEL), MODEL, 500)
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_shard_size_and_tokenizer(self, tmp_path, capsys, bpe):
        write(tmp_path, Form(), MODEL)
        assert run(capsys, "convert", tmp_path, tmp_path / "hf", "--max-shard-size", "0.01MB", "--vocab-file", bpe / "vocab.json",
                   "--merges-file", bpe / "merges.txt")[0] == 0
        names = {path.name for path in (tmp_path / "hf").iterdir()}
        assert {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= names

    def test_force(self, tmp_path, capsys):
        write(tmp_path, Form(), MODEL)
        assert run(capsys, "convert", tmp_path, tmp_path / "hf")[0] == 0
        assert "exists and is not empty; force replaces it" in fails_after_notes(capsys, "convert", tmp_path, tmp_path / "hf")
        assert run(capsys, "convert", tmp_path, tmp_path / "hf", "--force")[0] == 0

    @pytest.mark.parametrize(("options", "message"), [
        (["--tensor-parallel", "2"], "--tensor-parallel and --pipeline-parallel need --to megatron"),
        (["--max-shard-size", "huge"], "--max-shard-size: expected a size such as 5GB or 500MB, got 'huge'"),
        (["--max-shard-size", "0"], "--max-shard-size"), (["--to", "onnx"], "onnx"), (["--dtype", "int8"], "int8"),
        (["--vocab-file", "v.json"], "go together"), (["--surprise"], "No such option"),
        (["--config", "nowhere.json"], "nowhere.json: no such file"), (["--tokenizer", "nowhere"], "nowhere: no such directory")])
    def test_wrong_options(self, tmp_path, capsys, options, message):
        write(tmp_path, Form(), MODEL)
        assert message in fails(capsys, "convert", tmp_path, tmp_path / "hf", *options)
        assert not (tmp_path / "hf").exists()

    def test_errors_are_one_printable_line(self, tmp_path, capsys):
        assert "nowhere: no such file or directory" in fails(capsys, "convert", tmp_path / "nowhere", tmp_path / "out")
        assert "Missing argument" in fails(capsys, "convert")
        (tmp_path / "bad\x1b[31m\nname.pt").write_bytes(b"hello")
        assert "bad?[31m name.pt" in fails(capsys, "convert", tmp_path / "bad\x1b[31m\nname.pt", tmp_path / "out")

    def test_a_mistake_in_the_program_is_not_hidden(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(cli, "parse_size", lambda text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.run(["convert", "a", "b"])

    def test_ctrl_c_is_130(self, monkeypatch):
        def interrupt(text):
            raise KeyboardInterrupt
        monkeypatch.setattr(cli, "parse_size", interrupt)
        assert cli.run(["convert", "a", "b"]) == 130

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
    def test_signals(self, tmp_path, number, code):
        """A real signal, while the output is half written: the exit code says so and nothing is left."""
        write(tmp_path / "in", Form(), Model(layers=8))
        (tmp_path / "out").mkdir()
        slowly = ("import signal, time; from megatron_kernels import cli; "
                  "from megatron_kernels.checkpoint import huggingface as h; "
                  "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job's is ignored, and inherited
                  "make = h._to_huggingface; h._to_huggingface = lambda *a: (time.sleep(0.5), make(*a))[1]; cli.main()")
        command = [sys.executable, "-c", slowly, "convert", str(tmp_path / "in"), str(tmp_path / "out/hf")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not any((tmp_path / "out").glob(".hf.tmp-*/*")):
                time.sleep(0.001)
            process.send_signal(number)
            _, err = process.communicate()
        assert process.returncode == code
        assert "Traceback" not in err
        assert os.listdir(tmp_path / "out") == []


def fails_after_notes(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "") and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    return err.splitlines()[-1]


class TestInspect:
    def test_tables(self, tmp_path, capsys):
        write(tmp_path, Form(2.0, tp=2), MODEL)
        code, out, _ = run(capsys, "inspect", tmp_path)
        assert code == 0
        lines = {" ".join(line.replace("│", " ").split()) for line in out.splitlines()}
        total = sum(tensor.numel() for tensor in truth(MODEL).values())
        for expected in ("format megatron", "checkpoint_version 2.0", "tensor parallel 2", "iteration 1000", "num_layers 4",
                         "decoder.layers.*.self_attention.linear_qkv.weight x 4 [36, 12] float16 1,728", f"52 tensors {total:,}"):
            assert expected in lines, expected

    def test_every_layer(self, tmp_path, capsys):
        _, out, _ = run(capsys, "inspect", write(tmp_path, Form(), MODEL), "--all")
        assert all(f"decoder.layers.{i}.mlp.linear_fc1.bias" in out for i in range(4))

    def test_without_args(self, tmp_path, capsys):
        """What the shapes tell is shown, and what is missing is asked for, though conversion would need it."""
        code, out, _ = run(capsys, "inspect", write(tmp_path, Form(None, "transformer", args=False), MODEL))
        assert code == 0 and "give n_head and vocab_size with a configuration file" in out
        assert "num_attention_heads │ unknown" in " ".join(out.split())

    def test_huggingface(self, tmp_path, capsys):
        run(capsys, "convert", write(tmp_path, Form(), MODEL), tmp_path / "hf")
        code, out, _ = run(capsys, "inspect", tmp_path / "hf")
        assert code == 0 and "model.safetensors" in out and "huggingface" in out

    def test_refused(self, tmp_path, capsys):
        assert "SwiGLU" in fails(capsys, "inspect", write(tmp_path, Form(changes={"swiglu": True}), MODEL))


class TestGenerate:
    @pytest.fixture
    def model(self, tmp_path, bpe, capsys):
        small = Model(layers=2, positions=40, vocab=512)
        write(tmp_path / "m", Form(tp=2), small)
        assert run(capsys, "convert", tmp_path / "m", tmp_path / "hf", "--tokenizer", bpe)[0] == 0
        return tmp_path / "hf"

    def expected(self, model, bpe, prompt, **options):
        from tokenizers import ByteLevelBPETokenizer

        from megatron_kernels.models import GPT2

        words = ByteLevelBPETokenizer(str(bpe / "vocab.json"), str(bpe / "merges.txt"))
        gpt2 = GPT2.from_huggingface(model, torch.float32)
        return words.decode(gpt2.generate(torch.tensor([words.encode(prompt).ids]), eos_token_id=0, **options)[0].tolist())

    def test_greedy(self, model, bpe, capsys):
        code, out, _ = run(capsys, "generate", model, "--prompt", "the fox", "--max-new-tokens", 8)
        assert (code, out) == (0, self.expected(model, bpe, "the fox", max_new_tokens=8) + "\n")

    def test_sampling_repeats(self, model, bpe, capsys):
        options = ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "8"]
        code, out, _ = run(capsys, "generate", model, "--prompt", "the fox", *options)
        expected = self.expected(model, bpe, "the fox", max_new_tokens=8, do_sample=True, temperature=0.8, top_k=50, top_p=0.9,
                                 seed=7)
        assert (code, out) == (0, expected + "\n")

    def test_from_megatron_with_a_tokenizer(self, model, bpe, capsys, tmp_path):
        out = run(capsys, "generate", tmp_path / "m", "--prompt", "the fox", "--tokenizer", bpe, "--max-new-tokens", 4)[1]
        assert out == self.expected(model, bpe, "the fox", max_new_tokens=4) + "\n"

    def test_refused(self, model, capsys, tmp_path):
        assert "no tokenizer found" in fails(capsys, "generate", tmp_path / "m", "--prompt", "x")
        assert "--prompt is empty" in fails(capsys, "generate", model, "--prompt", "")
        assert "max_position_embeddings" in fails(capsys, "generate", model, "--prompt", "the", "--max-new-tokens", 100)
        assert "top_k" in fails(capsys, "generate", model, "--prompt", "the", "--max-new-tokens", 3, "--top-k", 0)


def test_demo(monkeypatch):
    ran = []
    monkeypatch.setitem(sys.modules, "megatron_kernels.demo", types.SimpleNamespace(main=ran.append))
    assert cli.run(["demo"]) == 0 and cli.run(["demo", "--out", "kept"]) == 0 and ran == [None, Path("kept")]


def test_closed_pipe():
    """`megatron-kernels --help | head -1` ends without a traceback."""
    result = subprocess.run(f"{sys.executable} -m megatron_kernels.cli convert --help | head -1", shell=True,
                            capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
