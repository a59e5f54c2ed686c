"""Generation: with the cache as without it, as Hugging Face does it, and the draws it promises."""

from __future__ import annotations

import pytest
import torch
from test_gpt2 import KINDS, SMALL, huggingface, make, tokens

from megatron_kernels.models import KVCache


def argmax_loop(model, ids, n, keep=None):
    """Greedy without a cache: the whole sequence again for every token."""
    for _ in range(n):
        ids = torch.cat([ids, model(ids, attention_mask=keep)[:, -1].argmax(-1, keepdim=True)], 1)
        keep = None if keep is None else torch.cat([keep, torch.ones_like(keep[:, :1])], 1)
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_with_cache_is_greedy_without(kind, padded):
    model, ids, keep = make(torch.float64, attention=kind).eval(), tokens(3, 6), None
    if padded:
        keep = torch.ones_like(ids)
        keep[0, :4], keep[1, :1] = 0, 0
    out = model.generate(ids, max_new_tokens=18, attention_mask=keep)
    assert out.dtype == torch.int64 and torch.equal(out, argmax_loop(model, ids, 18, keep))
    assert len(out[:, 6:].unique()) > 4  # a model that repeats one token would prove little
    if padded:  # a padded row continues as it does alone
        assert torch.equal(out[0, 4:], model.generate(ids[:1, 4:], max_new_tokens=18)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_huggingface_greedy(kind):
    model, ids = make(attention=kind).eval(), tokens(2, 5)
    theirs = huggingface(model)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, max_new_tokens=15), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_cache_in_pieces_gives_the_whole(kind):
    """Several tokens after cached ones: the causal mask is aligned at the bottom right."""
    model, ids = make(torch.float64, attention=kind).eval(), tokens(2, 11)
    keep = torch.ones_like(ids)
    keep[1, :2] = 0
    with torch.no_grad():
        for mask in (None, keep):
            cache = KVCache(model.config, 2, 11, dtype=torch.float64)
            parts = [model(ids[:, i:j], cache=cache, attention_mask=None if mask is None else mask[:, :j])
                     for i, j in ((0, 4), (4, 5), (5, 11))]
            real = slice(None) if mask is None else keep.bool()
            torch.testing.assert_close(torch.cat(parts, 1)[real], model(ids, attention_mask=mask)[real], rtol=1e-10, atol=1e-10)
            assert cache.length == 11


def test_eos_fills_the_row_and_ends_early():
    model, ids = make(torch.float64).eval(), tokens(3, 6)
    free = model.generate(ids, max_new_tokens=12)
    eos = free[0, 8].item()
    out = model.generate(ids, max_new_tokens=12, eos_token_id=eos)
    assert out.shape == free.shape
    for row, unbounded in zip(out[:, 6:].tolist(), free[:, 6:].tolist(), strict=True):
        end = unbounded.index(eos) + 1 if eos in unbounded else len(unbounded)
        assert row[:end] == unbounded[:end] and all(token == eos for token in row[end:])
    assert out[0, 8:].eq(eos).all()

    class Counter(torch.nn.Module):
        calls = 0

        def forward(self, *args):
            self.calls += 1
            return model_embedding(*args)

    model_embedding, model.embedding = model.embedding, Counter()
    model.generate(ids[:1], max_new_tokens=12, eos_token_id=eos)
    assert model.embedding.calls == free[0, 6:].tolist().index(eos) + 1


def test_seeded_sampling_repeats():
    model, ids = make(hidden_dropout=0.5).train(), tokens(2, 4)
    options = {"max_new_tokens": 15, "do_sample": True, "temperature": 2.0}
    first = model.generate(ids, seed=1, **options)
    state = torch.get_rng_state()
    assert torch.equal(model.generate(ids, seed=1, **options), first)
    assert torch.equal(torch.get_rng_state(), state), "a seeded draw must leave the default generator alone"
    assert not torch.equal(model.generate(ids, seed=2, **options), first)
    torch.manual_seed(4)
    unseeded = model.generate(ids, **options)
    torch.manual_seed(4)
    assert torch.equal(model.generate(ids, **options), unseeded)
    assert model.training and torch.equal(first[:, :4], ids)


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    model, ids = make(torch.float64).eval(), tokens(2, 4)
    greedy = model.generate(ids, max_new_tokens=10)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=True, seed=0, **options), greedy), options


def frequencies(model, prompt, draws=4000, **options):
    out = model.generate(prompt.expand(draws, -1), max_new_tokens=1, do_sample=True, seed=0, **options)
    return torch.bincount(out[:, -1], minlength=SMALL.vocab_size) / draws


def test_draws_follow_the_distribution():
    model, prompt = make(torch.float64).eval(), tokens(1, 5)
    with torch.no_grad():
        logits = model(prompt)[0, -1].float()
    for options in ({}, {"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.5}):
        probs = (logits / 3.0).softmax(0)
        order = probs.argsort(descending=True)
        if "top_k" in options:
            probs[order[options["top_k"]:]] = 0
            probs /= probs.sum()
        if "top_p" in options:
            kept, total = [], 0.0
            for token in order.tolist():
                kept.append(token)
                total += probs[token].item()
                if total >= options["top_p"]:
                    break
            probs = torch.zeros_like(probs).index_copy(0, torch.tensor(kept), probs[kept]) / probs[kept].sum()
        drawn = frequencies(model, prompt, temperature=3.0, **options)
        assert not drawn[probs == 0].any(), options
        assert (drawn - probs).abs().max() < 0.03, options


def test_zero_tokens_and_int32_ids():
    model, ids = make().eval(), tokens(2, 4)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert torch.equal(model.generate(ids.int(), max_new_tokens=3), model.generate(ids, max_new_tokens=3))


@pytest.mark.parametrize("options, message", [
    ({"max_new_tokens": 21}, r"4 prompt \+ 21 new tokens are more than max_position_embeddings 24"),
    ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ({"eos_token_id": 61}, r"eos_token_id must be in \[0, vocab_size = 61\), got 61"),
    ({"attention_mask": torch.ones(2, 5)}, r"attention_mask must be \[2, 4\], got \[2, 5\]"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}, "must end in a token in every row"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"at least one token, got \[2, 0\]"),
])
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make().generate(**{"input_ids": tokens(2, 4), "max_new_tokens": 2, **options})


def test_cache_refuses_what_does_not_fit():
    model = make()
    with pytest.raises(ValueError, match="capacity must be in"):
        KVCache(SMALL, 1, 25)
    with pytest.raises(ValueError, match="2 rows of 4 tokens do not fit into 1 rows of 8"):
        model(tokens(2, 4), cache=KVCache(SMALL, 1, 8))
