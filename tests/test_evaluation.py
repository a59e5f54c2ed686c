"""Evaluation against the definitions of its measures."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from evaluations import POSITIONS, close, evaluate, lambada, model, stop_after, truth, wiki
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import fails, run

from megatron_kernels import cli
from megatron_kernels.evaluation import datasets, detokenizer, scoring
from megatron_kernels.evaluation.ledger import Ledger
from megatron_kernels.models import GPT2, GPT2Config

__all__ = ["lambada", "model", "truth", "wiki"]  # the fixtures


class TestDetokenizer:
    @pytest.mark.parametrize(("text", "joined"), [
        ("the dogs ' tails", "the dogs' tails"), ("one @-@ two 1 @,@ 000 3 @.@ 5", "one-two 1,000 3.5"),
        ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"), ("( a ) [ b ] { c } \" d \" ' e '", "(a) [b] {c} \"d\" 'e'"),
        ("( a\n b ", "( a\nb "), ("= = = a = = = = = b = =", "=== a ===== b =="), ("5 ° C", "5°C"),
        (" \n = A = \n \n b \n", "\n= A =\n\nb\n"), ("an N is N times", "an 1 is 1 times"), ("it 's", "it's"),
        ("a /' 9/ b", "a /'[0-9]/ b"), ("\\1 \\g<0> ( \\1 )", "\\1 \\g<0> (\\1)"), ("", "")])
    def test_wiki(self, text, joined):
        assert detokenizer.wiki(text) == joined

    @pytest.mark.parametrize(("text", "joined"), [
        ("it 's", "it's"), ("did n't", "didn't"), ("an N is", "an1 is"), ("$ 1 # 1", "$1 #1"), (" a \n b", " a\nb")])
    def test_ptb(self, text, joined):
        assert detokenizer.ptb(text) == joined

    def test_names(self):
        assert detokenizer.DETOKENIZERS["none"](" a . \n") == detokenizer.DETOKENIZERS["lambada"](" a . \n") == " a . \n"
        assert detokenizer.DETOKENIZERS["wiki"] is detokenizer.wiki and detokenizer.DETOKENIZERS["ptb"] is detokenizer.ptb


class TestWindows:
    @given(st.integers(2, 200), st.integers(1, 40), st.data())
    @settings(max_examples=60, deadline=None)
    def test_every_target_once_and_from_the_right_start(self, count, length, data):
        stride = data.draw(st.integers(1, length))
        windows = datasets.Windows(list(range(1000, 1000 + count)), length, stride)
        seen = {}
        for k, own in enumerate(windows.lengths()):
            ids, targets = windows.batch([k])
            assert ids.shape == targets.shape == (1, own) and own <= length
            for position in (targets[0] != -100).nonzero()[:, 0].tolist():
                target = targets[0, position].item()
                assert ids[0, position] == target - 1 and ids[0, 0] == 1000 + k * stride and target not in seen
                seen[target] = position + 1  # tokens before it
            assert (targets != -100).any()
        assert sorted(seen) == list(range(1001, 1000 + count))
        for target, context in seen.items():
            j = target - 1000
            assert context == j - (0 if j <= length else math.ceil((j - length) / stride) * stride)

    def test_a_batch_is_its_windows_beside_each_other(self):
        windows = datasets.Windows(list(range(23)), 8, 4)
        ids, targets = windows.batch([2, 4])
        assert ids.tolist() == [[*range(8, 16)], [*range(16, 22), 0, 0]]
        assert targets.tolist() == [[-100] * 4 + [13, 14, 15, 16], [-100] * 4 + [21, 22, -100, -100]]

    def test_wikitext_has_31_windows_less_than_megatron_makes(self):
        assert len(datasets.Windows(torch.zeros(270330, dtype=torch.int64), 1024, 32)) == 8417 == math.ceil((270329 - 32) / 32) - 30

    @pytest.mark.parametrize("stride", [0, 9])
    def test_stride_out_of_range(self, stride):
        with pytest.raises(ValueError, match=rf"--overlapping-eval must be in \[1, the sequence length 8\], got {stride}"):
            datasets.Windows([1, 2, 3], 8, stride)


class TestScore:
    """`GPT2.score`, in float64."""

    @pytest.fixture
    def gpt2(self, model):
        return GPT2.from_huggingface(model, torch.float64)

    @pytest.mark.parametrize("attention", ["softmax", "sdpa"])
    def test_losses_and_hits(self, model, truth, attention, poisoned):
        gpt2 = GPT2.from_huggingface(model, torch.float64, attention=attention)
        ids = torch.randint(250, (3, 12), generator=torch.Generator().manual_seed(0))
        targets = torch.randint(250, (3, 12), generator=torch.Generator().manual_seed(1))
        likely = [[int(truth.logits(row[:i + 1]).argmax()) for i in range(12)] for row in ids.tolist()]
        targets[0, 5], targets[2, 11] = likely[0][5], likely[2][11]
        targets[1, :9] = targets[2, 2:5] = -100
        losses, hits = gpt2.score(ids, targets)
        expected = [(-truth.logits(ids[b, :i + 1].tolist()).log_softmax(-1)[targets[b, i]].item(), likely[b][i] == targets[b, i])
                    for b in range(3) for i in range(12) if targets[b, i] != -100]
        assert losses.dtype == torch.float64 and len(losses) == len(expected) == 24
        assert losses.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-12)
        assert hits.tolist() == [bool(hit) for _, hit in expected] and hits.sum() >= 2

    def test_padding_rows_are_no_classes_and_the_first_of_equals_wins(self):
        gpt2 = GPT2(GPT2Config(num_layers=1, hidden_size=8, num_attention_heads=2, max_position_embeddings=8, vocab_size=10,
                               padded_vocab_size=16), seed=0)
        with torch.no_grad():
            gpt2.decoder.final_layernorm.weight.zero_()
            gpt2.decoder.final_layernorm.bias.fill_(1.0)
            gpt2.embedding.word_embeddings.weight[:, 0] = torch.tensor([0.0, 0, 0, 5, 0, 5, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9])
            gpt2.embedding.word_embeddings.weight[:, 1:] = 0.0
        losses, hits = gpt2.score(torch.tensor([[1, 2]]), torch.tensor([[3, 5]]))
        assert hits.tolist() == [True, False]
        assert losses.tolist() == pytest.approx([math.log(2 * math.exp(5) + 8) - 5] * 2)

    def test_dropout_is_off_and_the_mode_stays(self, gpt2):
        ids = torch.arange(12)[None]
        expected = gpt2.score(ids, ids)[0]
        gpt2.train()
        assert torch.equal(gpt2.score(ids, ids)[0], expected) and gpt2.training
        gpt2.eval()

    def test_more_rows_than_are_held_at_a_time(self, gpt2):
        ids = torch.randint(250, (24, 40), generator=torch.Generator().manual_seed(0))
        losses, hits = gpt2.score(ids, ids.roll(-1, 1))
        assert len(losses) == len(hits) == 960
        logits = gpt2(ids)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none")
        assert torch.allclose(losses, expected, rtol=1e-12) and torch.equal(hits, logits.argmax(-1).eq(ids.roll(-1, 1)).flatten())

    def test_nothing_to_score(self, gpt2):
        losses, hits = gpt2.score(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -100))
        assert losses.shape == hits.shape == (0,) and hits.dtype == torch.bool

    def test_refused(self, gpt2):
        ids = torch.zeros(2, 3, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"targets must be \[2, 3\] of int64 or int32, got \[2, 2\] of int64"):
            gpt2.score(ids, ids[:, 1:])
        with pytest.raises(ValueError, match="GPT2.score: needs the whole model, this is stage 0 of 2"):
            GPT2(GPT2Config(num_layers=2, hidden_size=8, num_attention_heads=2, vocab_size=8), stage=(0, 2)).score(ids, ids)
        with pytest.raises(ValueError, match="max_position_embeddings"):
            gpt2.score(torch.zeros(1, POSITIONS + 1, dtype=torch.int64), torch.zeros(1, POSITIONS + 1, dtype=torch.int64))


class TestPerplexity:
    @pytest.mark.parametrize(("stride", "attention"), [(5, "sdpa"), (5, "softmax"), (20, "sdpa"), (None, "sdpa")])
    def test_wikitext(self, model, truth, wiki, capsys, tmp_path, stride, attention):
        """--sequence-length 20, every kind of overlap; by default 32, at most the length."""
        raw = wiki.read_bytes().decode()
        tokens, words = truth.encode(detokenizer.wiki(raw)), len(raw.strip().split(" "))
        overlap = [] if stride is None else ["--overlapping-eval", stride]
        found, out = evaluate(capsys, tmp_path, "wikitext103", "--data", wiki, "--model", model, "--sequence-length", 20, *overlap,
                              "--attention", attention)
        stride = stride or 20
        expected = truth.perplexity(tokens, words, 20, stride)
        close(found, expected)
        windows = 1 + math.ceil((len(tokens) - 1 - 20) / stride)
        assert {name: found[name] for name in ("tokens", "original_tokens", "windows", "scored_targets")} == {
            "tokens": len(tokens), "original_tokens": words, "windows": windows, "scored_targets": len(tokens) - 1}
        assert found["settings"]["overlapping_eval"] == stride and found["settings"]["detokenizer"] == "wiki"
        assert found["model_tokens"] == sum(min(20, len(tokens) - 1 - k * stride) for k in range(windows))
        assert found["tokens_per_second"] == pytest.approx(found["model_tokens"] / found["seconds"])
        for name in ("loss", "perplexity", "adjusted_perplexity"):
            shown = re.search(rf"{name.replace('_', ' ')} +([\d,.]+)\n", out)[1].replace(",", "")
            assert float(shown) == pytest.approx(expected[name], rel=1e-3)
        assert "tokens through the model in" in out and "a second" in out

    @pytest.mark.parametrize("text", ["the cat", "a\r\n\r\nb  c ", "日本 " * 60, "x" * 10 + " the"])
    def test_text_of_any_length(self, model, truth, capsys, tmp_path, text):
        """As it is: also shorter than a window, and with line ends of another system."""
        (tmp_path / "t.txt").write_bytes(text.encode())
        tokens, words = truth.encode(text), len(text.strip().split(" "))
        found, _ = evaluate(capsys, tmp_path, "text", "--data", tmp_path / "t.txt", "--model", model)
        expected = truth.perplexity(tokens, words, POSITIONS, 32)
        close(found, expected, 1e-5 if "x" in text else 1e-6)  # exp(loss * 11): 11 times the loss's own error
        assert found["settings"]["sequence_length"] == POSITIONS and found["settings"]["overlapping_eval"] == 32

    @pytest.mark.parametrize(("length", "windows"), [(20, 1), (21, 1), (22, 2), (26, 2), (27, 3)])
    def test_around_one_window(self, model, truth, capsys, tmp_path, length, windows):
        text = "; " * length
        text = text[:length]
        (tmp_path / "t.txt").write_text(text)
        tokens = truth.encode(text)
        assert len(tokens) == length
        found, _ = evaluate(capsys, tmp_path, "text", "--data", tmp_path / "t.txt", "--model", model, "--sequence-length", 20,
                            "--overlapping-eval", 5)
        assert found["windows"] == windows and found["scored_targets"] == length - 1
        close(found, truth.perplexity(tokens, len(text.strip().split(" ")), 20, 5))

    def test_detokenizer_of_a_text(self, model, truth, wiki, capsys, tmp_path):
        for name, rule in detokenizer.DETOKENIZERS.items():
            found, _ = evaluate(capsys, tmp_path, "text", "--data", wiki, "--model", model, "--detokenizer", name)
            raw = wiki.read_bytes().decode()
            assert found["tokens"] == len(truth.encode(rule(raw))) and found["original_tokens"] == len(raw.strip().split(" "))

    def test_batching_changes_next_to_nothing(self, model, wiki, capsys, tmp_path):
        found = [evaluate(capsys, tmp_path, "wikitext103", "--data", wiki, "--model", model, "--sequence-length", 20,
                          "--overlapping-eval", 3, "--batch-size", size)[0] for size in (1, 3, 64)]
        assert found[0]["windows"] > 64
        for other in found[1:]:
            close(other, {name: found[0][name] for name in ("loss", "perplexity", "adjusted_perplexity")})

    def test_figures_without_a_number(self, model, capsys, tmp_path):
        """One word has no ratio, and exp of a large ratio no float64: null, never infinity."""
        (tmp_path / "t.txt").write_text("\n" + "b" * 30 + "\n")
        found, out = evaluate(capsys, tmp_path, "text", "--data", tmp_path / "t.txt", "--model", model)
        assert found["adjusted_perplexity"] is found["token_ratio"] is None and "undefined for one word" in out
        (tmp_path / "t.txt").write_text("b" * 3000 + " b")
        found, out = evaluate(capsys, tmp_path, "text", "--data", tmp_path / "t.txt", "--model", model)
        assert found["adjusted_perplexity"] is None and found["token_ratio"] > 1000 and "beyond 1e308" in out

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_is_near(self, model, wiki, capsys, tmp_path, dtype):
        exact, half = (evaluate(capsys, tmp_path, "wikitext103", "--data", wiki, "--model", model, "--dtype", name,
                                "--attention", "softmax")[0] for name in ("float32", dtype))
        assert half["loss"] == pytest.approx(exact["loss"], rel=1e-2) and half["loss"] != exact["loss"]

    def test_losses_that_are_no_numbers(self, model, wiki, capsys, tmp_path):
        gpt2 = GPT2.from_huggingface(model)
        with torch.no_grad():
            gpt2.decoder.layers[1].mlp.linear_fc2.bias[0] = math.nan
        gpt2.save_huggingface(tmp_path / "broken")
        error = fails(capsys, "evaluate", "wikitext103", "--data", wiki, "--model", tmp_path / "broken", "--tokenizer", model,
                      "--json", tmp_path / "out.json")
        assert "a loss of windows 0 to " in error and "is nan: damaged weights" in error
        assert not (tmp_path / "out.json").exists()


class TestLambada:
    @pytest.mark.parametrize("strict", [True, False])
    def test_accuracy(self, model, truth, lambada, capsys, tmp_path, strict):
        path, texts = lambada
        right = targets = longer = 0
        for text in texts:
            if strict:
                word = text.split()[-1]
                passage, target = truth.encode(text.rstrip()[:-len(word)].strip()), truth.encode(" " + word)
            else:
                passage, target = truth.encode(text)[:-1], truth.encode(text)[-1:]
            right += truth.right(passage, target)
            targets += len(target)
            longer += len(target) > 1
        found, out = evaluate(capsys, tmp_path, "lambada", "--data", path, "--model", model, *["--strict"] * strict,
                              "--batch-size", 5)
        assert 0 < right < len(texts) and (longer > 5 if strict else longer == 0)
        assert {name: found[name] for name in ("accuracy", "correct", "examples", "scored_targets")} == {
            "accuracy": right / len(texts), "correct": right, "examples": len(texts), "scored_targets": targets}
        assert found["settings"]["strict"] is strict
        assert f"{right / len(texts):.2%}" in out and ("whole last word" if strict else "last token") in out

    def test_a_word_is_right_only_if_all_its_tokens_are(self):
        task = datasets.LastWords([([1], [2, 3])])
        assert [task.value([0.0, 0.0], hits) for hits in ([True, True], [True, False], [False, True])] == [1.0, 0.0, 0.0]

    def test_only_the_target_is_scored(self):
        ids, targets = datasets.LastWords([([1, 2, 3], [4, 5]), ([6], [7])]).batch([0, 1])
        assert ids.tolist() == [[1, 2, 3, 4], [6, 0, 0, 0]]
        assert targets.tolist() == [[-100, -100, 4, 5], [7, -100, -100, -100]]

    @pytest.mark.parametrize(("line", "message"), [
        (b"{'text': 'a b'}", "not JSON"), (b'["text"]', 'expected a JSON object with a string "text", got ["text"]'),
        (b'{"text": 3}', "expected a JSON object"), (b'{"text": " \\n"}', '"text" is empty'),
        (b'{"text": "lonely"}', "a word alone, nothing to predict it from"),
        (b'{"text": "a \\ud800"}', "half of a surrogate pair at character 2"),
        (b'{"text": "' + b"b c " * 40 + b'"}', f"tokens, but the sequence length allows {POSITIONS + 1}")])
    def test_bad_lines_are_named(self, model, capsys, tmp_path, line, message):
        path = tmp_path / "l.jsonl"
        path.write_bytes(b'{"text": "the cat sat"}\n\n' + line + b"\n")
        error = fails(capsys, "evaluate", "lambada", "--data", path, "--model", model, "--strict")
        assert f"{path}:3: " in error and message in error

    def test_no_examples(self, model, capsys, tmp_path):
        (tmp_path / "l.jsonl").write_text("\n\n")
        assert "no examples; expected JSON lines" in fails(capsys, "evaluate", "lambada", "--data", tmp_path / "l.jsonl", "--model",
                                                           model)


def test_fingerprints_tell_what_differs():
    windows = [datasets.Windows(tokens, 4, 2).fingerprint() for tokens in ([1, 2, 3], [1, 2, 4], [1, 2, 3, 3])]
    examples = [datasets.LastWords(examples).fingerprint()
                for examples in ([([1, 2], [3])], [([1], [2, 3])], [([1, 2], [3]), ([1], [2])])]
    assert len({*windows, *examples}) == 6


def test_figures():
    ledger = Ledger(3)
    ledger.enter([0, 1, 2], [1.0, 2.0, 3.0], 1.0)
    found = scoring.perplexity(ledger, tokens=13, words=7)
    assert found["loss"] == 0.5 and found["token_ratio"] == 2.0
    assert found["perplexity"] == math.exp(0.5) and found["adjusted_perplexity"] == math.exp(1.0)


SEVERAL = """
import json, sys
import torch.distributed as dist
from megatron_kernels import cli
dist.init_process_group("gloo")  # once: a command leaves alone what it finds
sys.exit(max(cli.run(arguments) for arguments in json.loads(sys.argv[1])))
"""


def torchrun(*command):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks(model, wiki, lambada, tmp_path, capsys, monkeypatch):
    """They share each layer, then the windows, going on from what one process had done; the first alone speaks and writes."""
    windows = ["wikitext103", "--data", str(wiki), "--model", str(model), "--sequence-length", "20", "--overlapping-eval", "4",
               "--batch-size", "8"]
    words = ["lambada", "--data", str(lambada[0]), "--model", str(model), "--strict"]
    serial, right = (evaluate(capsys, tmp_path, *arguments)[0] for arguments in (windows, words))
    assert math.ceil(serial["windows"] / 8) == 7  # five are left, so that in the last round one of two replicas has nothing
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(capsys, "evaluate", *windows, "--device", "cpu", "--resume", tmp_path / "part")[0] == 130
    (tmp_path / "several.py").write_text(SEVERAL)
    runs = {"tensor": [*windows, "--tensor-parallel", "2"], "tensor_words": [*words, "--tensor-parallel", "2"],
            "data": [*windows, "--resume", str(tmp_path / "part")], "data_words": words}
    out = torchrun(str(tmp_path / "several.py"), json.dumps([
        ["evaluate", *arguments, "--device", "cpu", "--json", str(tmp_path / name)] for name, arguments in runs.items()]))
    found = {name: json.loads((tmp_path / name).read_text()) for name in runs}
    close(found["tensor"], {name: serial[name] for name in ("loss", "perplexity", "adjusted_perplexity")})
    assert found["data"]["loss"] == serial["loss"]  # the same batches, whoever computes them
    for name, counted in found.items():
        replicas = 2 if name.startswith("data") else 1
        assert counted["settings"]["data_parallel"] == replicas and counted["settings"]["tensor_parallel"] == 2 // replicas
        same = ("accuracy", "correct", "examples") if "words" in name else ("windows", "scored_targets")
        assert {key: counted[key] for key in same} == {key: (right if "words" in name else serial)[key] for key in same}
    assert out.count("adjusted perplexity") == out.count("accuracy") == 2
    assert {path.name for path in tmp_path.iterdir()} == {*runs, "out.json", "part", "several.py", wiki.name, lambada[0].name}


@pytest.mark.slow
def test_the_command_under_torchrun(model, lambada, tmp_path, capsys):
    options = ["evaluate", "lambada", "--data", str(lambada[0]), "--model", str(model), "--strict"]
    serial, _ = evaluate(capsys, tmp_path, *options[1:])
    torchrun("-m", "megatron_kernels.cli", *options, "--device", "cpu", "--tensor-parallel", "2", "--json",
             str(tmp_path / "2.json"))
    assert json.loads((tmp_path / "2.json").read_text())["correct"] == serial["correct"]


@pytest.mark.gpu
def test_on_a_gpu(model, wiki, lambada, capsys, tmp_path):
    for arguments in (["wikitext103", "--data", wiki], ["lambada", "--data", lambada[0], "--strict"]):
        found = []
        for device in ("cpu", "cuda"):
            assert cli.run(["evaluate", *map(str, arguments), "--model", str(model), "--device", device, "--json",
                            str(tmp_path / f"{device}.json")]) == 0
            found.append(json.loads((tmp_path / f"{device}.json").read_text()))
        close(found[1], {name: found[0][name] for name in ("loss", "adjusted_perplexity", "accuracy") if name in found[0]}, 1e-5)
