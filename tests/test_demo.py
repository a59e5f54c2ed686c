"""The demo, shortened: every part runs, and what it prints was computed."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from megatron_kernels import checkpoint, demo
from megatron_kernels.models import GPT2


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100, force_terminal=False)


def test_the_whole_demo(tmp_path, console, monkeypatch):
    every = demo.documentation
    monkeypatch.setattr(demo, "documentation", lambda console: every(console, limit=60))
    monkeypatch.setattr(demo, "_medians", lambda contestants: {name: step() and 1.0 for name, step in contestants.items()})
    demo.main(tmp_path / "out", steps=25, compiled=False, console=console)
    printed = console.file.getvalue()

    before, after = map(float, re.search(r"not trained on: ([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < before - 0.5
    assert printed.count("identical") == 2 and "Hugging Face's own model of that directory: largest difference" in printed
    assert "Return a list of" in printed and "not asked for" in printed
    for op in ("causal softmax", "bias-GeLU", "layer norm", "cross-entropy"):
        assert len(re.findall(rf"{op} .*(?:fp32|bf16)", printed)) == 2

    root = tmp_path / "out"
    assert len(list((root / "megatron" / "release").glob("mp_rank_0?/model_optim_rng.pt"))) == 2
    model = GPT2.from_huggingface(root / "huggingface")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids), GPT2.from_megatron(root / "megatron")(ids))
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "huggingface")
    assert tokenizer.decode(tokenizer("Return a list of").input_ids) == "Return a list of"


def test_a_directory_that_holds_something_is_refused(tmp_path, console):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="not empty"):
        demo.main(tmp_path, console=console)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_logits_that_differ_end_the_demo(tmp_path, console, monkeypatch):
    texts = ["Return the number of items.", "Raise an error if the value is missing."] * 20
    tokenizer, ids = demo.tokenize(texts, tmp_path / "tokenizer", console, vocab_size=300)
    model = demo.train(ids.repeat(10), tokenizer, 1, console)
    save = checkpoint.save_huggingface

    def broken(source, directory, **options):
        tensors = dict(source.tensors)
        tensors["decoder.final_layernorm.bias"] = tensors["decoder.final_layernorm.bias"] + 1e-3
        save(checkpoint.Checkpoint(source.config, tensors), directory, **options)

    monkeypatch.setattr(checkpoint, "save_huggingface", broken)
    with pytest.raises(RuntimeError, match="Hugging Face directory: logits differ from the trained model's"):
        demo.save_and_load(model, ids[None, :20], tmp_path, console)


def test_each_op_is_compared_with_the_same_function():
    for name, shape, ours, plain, make in demo._ops():
        small = (*shape[:-2], 8, shape[-1]) if name != "causal softmax" else (1, 2, 16, 16)
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in make(small, torch.float32)]
        torch.testing.assert_close(ours(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4, msg=name)
