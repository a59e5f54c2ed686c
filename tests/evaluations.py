"""What tests of the evaluation share: a small trained model with its tokenizer, texts, and the measures by their definitions.

The latter are full matrices in float64, one forward per target: no windows, no batches, and nothing of the package.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from test_cli import run
from torch.nn import functional as F

HEADS, HIDDEN, LAYERS, POSITIONS, PADDING = 4, 32, 2, 48, 7
WORDS = ["the", "cat", "naïve", "Übergröße", "日本", "constellation", "sat", "don't", "under", "a", "lighthouse", "😀", "co-op",
         "Yes"]
WIKI = ("\n = Übergröße = \n \n the cat sat @-@ under a \" lighthouse \" , 1 @,@ 000 times . \n \n \n"
        " = = the = = \n \n naïve 日本 ( a co-op ) don't ; the cat 's 😀 : Yes ! \n ")


def passages(count: int, seed: int) -> list[str]:
    """Some words, often the same few in a row, so that last words can be learned; the last is one of them."""
    draw = random.Random(seed)
    return [" ".join(WORDS[(start + i * step) % len(WORDS)] for i in range(draw.randrange(2, 6)))
            for start, step in ((draw.randrange(len(WORDS)), draw.choice([1, 1, 1, 3])) for _ in range(count))]


def make(directory: Path) -> Path:
    """A Hugging Face directory with weights, vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    from megatron_kernels.models import GPT2, GPT2Config

    torch.manual_seed(1)
    texts = passages(300, 1)
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(texts, vocab_size=300, min_frequency=2, special_tokens=["<|endoftext|>"])
    size = words.get_vocab_size()
    config = GPT2Config(num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, max_position_embeddings=POSITIONS,
                        vocab_size=size + PADDING)
    model = GPT2(config, seed=1)
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [torch.tensor(words.encode(text).ids[:POSITIONS]) for text in texts]
    for step in range(60):
        batch = rows[step * 16 % 288:][:16]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        model(ids, labels=torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_huggingface(directory)
    words.save_model(str(directory))
    return directory


class Truth:
    """The model of a directory, by its definition."""

    def __init__(self, directory: Path):
        from safetensors.torch import load_file
        from tokenizers import ByteLevelBPETokenizer

        self.w = {name.removeprefix("transformer."): tensor.double() for name, tensor in load_file(directory / "model.safetensors")
                  .items()}
        self.config = json.loads((directory / "config.json").read_text())
        words = ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
        self.encode = lambda text: words.encode(text).ids

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of what follows the last of ids, [V]."""
        w, n = self.w, len(ids)
        x = w["wte.weight"][ids] + w["wpe.weight"][:n]
        for i in range(LAYERS):
            part = {name.removeprefix(f"h.{i}."): tensor for name, tensor in w.items() if name.startswith(f"h.{i}.")}
            y = F.layer_norm(x, (HIDDEN,), part["ln_1.weight"], part["ln_1.bias"], 1e-5)
            q, k, v = (y @ part["attn.c_attn.weight"] + part["attn.c_attn.bias"]).view(n, 3, HEADS, -1).permute(1, 2, 0, 3)
            scores = q @ k.mT / math.sqrt(HIDDEN // HEADS)
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
            y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, HIDDEN)
            x = x + y @ part["attn.c_proj.weight"] + part["attn.c_proj.bias"]
            y = F.layer_norm(x, (HIDDEN,), part["ln_2.weight"], part["ln_2.bias"], 1e-5)
            y = F.gelu(y @ part["mlp.c_fc.weight"] + part["mlp.c_fc.bias"], approximate="tanh")
            x = x + y @ part["mlp.c_proj.weight"] + part["mlp.c_proj.bias"]
        return F.layer_norm(x[-1], (HIDDEN,), w["ln_f.weight"], w["ln_f.bias"], 1e-5) @ w["wte.weight"].T

    def losses(self, tokens: list[int], length: int, stride: int) -> list[float]:
        """Token j is predicted from the tokens since the start of the first window that reaches it."""
        starts = [0 if j <= length else math.ceil((j - length) / stride) * stride for j in range(1, len(tokens))]
        return [-self.logits(tokens[start:j]).log_softmax(-1)[tokens[j]].item() for j, start in enumerate(starts, 1)]

    def perplexity(self, tokens: list[int], words: int, length: int, stride: int) -> dict[str, float]:
        loss = sum(self.losses(tokens, length, stride)) / (len(tokens) - 1)
        return {"loss": loss, "perplexity": math.exp(loss),
                "adjusted_perplexity": math.exp(loss * (len(tokens) - 1) / (words - 1))}

    def right(self, passage: list[int], target: list[int]) -> bool:
        return all(int(self.logits(passage + target[:i]).argmax()) == target[i] for i in range(len(target)))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture(scope="session")
def truth(model):
    return Truth(model)


@pytest.fixture
def wiki(tmp_path):
    """Longer than a window, not a whole number of strides."""
    path = tmp_path / "wiki.test.tokens"
    path.write_text(WIKI + " ".join(passages(12, 5)) + " \n", encoding="utf-8", newline="")
    return path


@pytest.fixture
def lambada(tmp_path):
    path = tmp_path / "lambada_test.jsonl"
    texts = [*passages(40, 7), " \n the  cat sat\u2028under a\nlighthouse \n", "日本 constellation 日本 constellation"]
    lines = [json.dumps({"text": text, "more": 1}, ensure_ascii=i % 2 == 1) for i, text in enumerate(texts)]
    path.write_text("\n".join([*lines[:3], "", "  ", *lines[3:]]) + "\n", encoding="utf-8")
    return path, texts


def evaluate(capsys, tmp_path, *arguments):
    """The JSON that a run writes, and what it prints."""
    code, out, err = run(capsys, "evaluate", *arguments, "--json", tmp_path / "out.json", "--device", "cpu")
    assert code == 0, err
    return json.loads((tmp_path / "out.json").read_text()), out


def close(found, expected, tolerance=1e-6):
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=tolerance, abs=0), name


def stop_after(monkeypatch, batches: int) -> list[torch.Tensor]:
    """Ctrl-C while the batch after so many is computed; the list fills with the batches that were."""
    from megatron_kernels.models import GPT2

    score, seen = GPT2.score, []

    def stopped(self, ids, targets):
        if len(seen) == batches:
            raise KeyboardInterrupt
        seen.append(ids)
        return score(self, ids, targets)

    monkeypatch.setattr(GPT2, "score", stopped)
    return seen
