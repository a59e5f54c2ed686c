"""A patched Hugging Face GPT-2 against the same model unpatched: steps, generation, heads, the report, and what stays behind."""

from __future__ import annotations

import weakref

import pytest
import torch
from patched_gpt2 import (
    ATTENTION,
    PADDING,
    assert_near,
    assert_same_gradients,
    assert_step_agrees,
    batch,
    fused,
    make,
    modeling_gpt2,
    ops_of,
    pair,
    transformers,
)

from megatron_kernels.compat import huggingface_gpt2
from megatron_kernels.compat.huggingface import Report, patch, unpatch

GPT2Model, GPT2LMHeadModel, GPT2DoubleHeadsModel = (
    getattr(transformers, name) for name in ("GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel"))
HEADS = (GPT2Model, GPT2LMHeadModel, GPT2DoubleHeadsModel, transformers.GPT2ForSequenceClassification,
         transformers.GPT2ForTokenClassification, transformers.GPT2ForQuestionAnswering)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_training_step(attention, padding, linear):
    theirs, ours = pair(attention, fuse_linear_loss=linear)
    assert_step_agrees(ours, theirs, *batch(padding))


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("attention", ATTENTION)
def test_evaluation_and_generation(attention, padding):
    theirs, ours = (model.eval() for model in pair(attention, use_cache=True))
    inputs, keep = batch(padding)
    with torch.no_grad():
        assert_near(ours(**inputs).logits[keep], theirs(**inputs).logits[keep], 1e-4, "logits")
    del inputs["labels"]
    inputs.setdefault("attention_mask", keep.long())
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
        texts = [model.generate(**inputs, max_new_tokens=12, do_sample=False, **options) for model in (ours, theirs)]
        assert torch.equal(*texts), options


def test_every_part_is_replaced_and_runs():
    theirs, ours = pair("eager")
    inputs, _ = batch("right")
    softmax, loss, rest = {"aten::_softmax"}, {"aten::_log_softmax"}, {"aten::native_layer_norm", "aten::tanh"}
    assert softmax | loss | rest <= ops_of(lambda: theirs(**inputs))
    mine = ops_of(lambda: ours(**inputs).loss.backward())
    names = ("scaled_masked_softmax", "layer_norm", "bias_gelu", "cross_entropy")
    assert not (softmax | loss | rest) & mine
    assert fused(*(f"{name}_{way}" for name in names for way in ("forward", "backward"))) <= mine
    if hasattr(ours, "set_attn_implementation"):
        ours.set_attn_implementation("sdpa")
        mine = ops_of(lambda: ours(**inputs))
        assert fused("layer_norm_forward") <= mine and not fused("scaled_masked_softmax_forward") & mine


@pytest.mark.parametrize("padding", PADDING)
def test_flash_attention_gets_what_it_got(padding, monkeypatch):
    """A stand-in under the name of a kernel that needs a GPU: it gets a mask [b, s] or none, and no keyword of ours."""
    seen = []

    def stand_in(module, query, key, value, attention_mask, **kwargs):
        seen.append(sorted(kwargs))
        hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if attention_mask is not None:
            hidden = hidden & attention_mask.bool()[:, None, None] | torch.eye(query.shape[-2], dtype=torch.bool)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, hidden)
        return output.transpose(1, 2), None
    monkeypatch.setitem(modeling_gpt2.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", stand_in)
    theirs, ours = pair("eager")
    for model in (theirs, ours):
        model.config._attn_implementation = "flash_attention_2"
        for inner in model.modules():
            if hasattr(inner, "_attn_implementation"):
                inner._attn_implementation = "flash_attention_2"
    inputs, keep = batch(padding)
    assert_step_agrees(ours, theirs, inputs, keep)
    assert len(seen) == 4 and len({tuple(names) for names in seen}) == 1


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_head(attention, kind):
    theirs, ours = pair(attention, kind=kind)
    inputs, keep = batch("right")
    labels = inputs.pop("labels")
    if kind is GPT2DoubleHeadsModel:
        inputs = {name: value[None] for name, value in inputs.items()}
        inputs |= {"labels": labels[None], "mc_labels": torch.tensor([1]), "mc_token_ids": torch.tensor([[3, 11, 8]])}
    elif "Sequence" in kind.__name__:
        inputs["labels"] = torch.tensor([0, 1, 1])
    elif "Token" in kind.__name__:
        inputs["labels"] = torch.where(labels == -100, -100, labels % 2)
    elif "Question" in kind.__name__:
        inputs |= {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])}
    else:
        inputs |= {"labels": labels} if kind is GPT2LMHeadModel else {}
    expected, found = theirs(**inputs), ours(**inputs)
    assert type(found) is type(expected) and list(found) == list(expected)
    if kind is GPT2Model:
        assert_near(found[0][keep], expected[0][keep], 1e-4)
        (expected[0][keep].square().mean()).backward()
        (found[0][keep].square().mean()).backward()
    else:
        tuples = ours(**inputs, return_dict=False), theirs(**inputs, return_dict=False)
        for a, b, c in zip(found.to_tuple(), expected.to_tuple(), tuples[0], strict=True):
            assert_near(a, b, 1e-4) if a.dim() < 2 else assert_near(a, c, 0)
        assert len(tuples[0]) == len(tuples[1])
        sum(value for name, value in expected.items() if "loss" in name).backward()
        sum(value for name, value in found.items() if "loss" in name).backward()
    assert_same_gradients(ours, theirs)
    assert ("megatron_kernels::cross_entropy_forward" in ops_of(lambda: ours(**inputs))) == (kind in (GPT2LMHeadModel,
                                                                                                       GPT2DoubleHeadsModel))


def state(model):
    """Everything that is set on the modules, deep enough to tell whether something stayed behind."""
    def shape(value):
        return {key: shape(item) for key, item in value.items()} if isinstance(value, dict) else id(value)
    return [(name, type(module), {key: shape(value) for key, value in module.__dict__.items()})
            for name, module in model.named_modules()]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("linear", [False, True])
def test_unpatch_leaves_nothing_behind(kind, linear, monkeypatch):
    original = huggingface_gpt2._their_attention  # as if no other test had a patched model alive
    monkeypatch.setattr(huggingface_gpt2, "_attached", weakref.WeakSet())
    monkeypatch.setattr(modeling_gpt2, "eager_attention_forward", original)
    model = make("eager", kind=kind, attn_pdrop=0.1)
    keys, before = list(model.state_dict()), state(model)
    inputs = {"input_ids": batch()[0]["input_ids"][:1]}

    def first():
        torch.manual_seed(3)
        return model(**inputs)[0]
    expected = first()
    report = patch(model, fuse_linear_loss=linear)
    assert report.replaced and list(model.state_dict()) == keys and model.__class__ is kind
    assert state(model) != before and not torch.equal(first(), expected)
    assert patch(model, fuse_linear_loss=linear) == report  # again: the same, not twice
    assert [len(module._forward_pre_hooks) for module in model.modules() if isinstance(module, GPT2Model)] == [1]
    unpatch(model)
    assert state(model) == before and list(model.state_dict()) == keys
    assert modeling_gpt2.eager_attention_forward is original
    assert torch.equal(first(), expected)
    unpatch(model)


def test_another_model_keeps_its_own_code():
    theirs, ours = pair("eager")
    inputs, _ = batch("right")
    assert not any(name.startswith("megatron_kernels") for name in ops_of(lambda: theirs(**inputs)))
    unpatch(ours)


@pytest.mark.parametrize("what", [torch.nn.Linear(2, 2), "gpt2", None])
def test_no_gpt2(what):
    with pytest.raises(TypeError, match=r"patch: model must be a Hugging Face GPT-2 .* got (Linear|str|NoneType)"):
        patch(what)


def test_report():
    report = patch(make("sdpa", activation_function="relu"))
    assert isinstance(report, Report) and report.replaced["transformer.ln_f"] == "layer norm" and report.replaced[""] == "loss"
    assert "activation" in report.kept["transformer.h.0.mlp"] and "'sdpa'" in report.kept["transformer.h.1.attn"]
    assert "replaced layer norm: transformer.h.0.ln_1, transformer.h.0.ln_2 and 3 more" in str(report)
    assert "kept activation" in str(report)
    model = make("eager", reorder_and_upcast_attn=True)
    model.loss_function = torch.nn.functional.cross_entropy
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda module, args, output: None)
    model.transformer.h[1].ln_1.forward = model.transformer.h[1].ln_1.forward
    kept = patch(model, fuse_linear_loss=True).kept
    assert kept == {"": "loss cross_entropy", "transformer.h.0.attn": "softmax of reorder_and_upcast_attn",
                    "transformer.h.1.attn": "softmax of reorder_and_upcast_attn",
                    "transformer.h.1.ln_1": "LayerNorm whose forward was replaced",
                    "transformer.h.0.mlp.c_fc": "product, bias and GeLU (Conv1D with hooks)"}


@pytest.mark.parametrize("fields", [{"activation_function": "gelu"}, {"activation_function": "relu"}, {"n_inner": 40},
                                    {"reorder_and_upcast_attn": True}, {"scale_attn_weights": False},
                                    {"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": False}])
def test_configurations(fields):
    theirs, ours = pair("eager", **fields)
    inputs, keep = batch("left")
    assert_step_agrees(ours, theirs, inputs, keep)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("keywords", [{"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"ignore_index": 5},
                                      {"ignore_index": 5, "num_items_in_batch": 30}, {"shift": True}, {"another": 3}])
def test_loss_keywords(keywords, linear):
    if "another" in keywords and int(transformers.__version__.split(".")[0]) < 5:
        keywords = {}
    theirs, ours = pair("sdpa", fuse_linear_loss=linear)
    inputs, keep = batch()
    inputs["labels"][0, :4] = 5
    keywords = dict(keywords)
    inputs["labels"][1, 3:5] = keywords.get("ignore_index", -100)
    if keywords.pop("shift", False):
        keywords["shift_labels"] = inputs["labels"].flip(1)
    assert_step_agrees(ours, theirs, inputs | keywords, keep)


@pytest.mark.parametrize("linear", [False, True])
def test_nothing_to_score(linear):
    theirs, ours = pair("sdpa", fuse_linear_loss=linear)
    inputs, _ = batch()
    inputs["labels"].fill_(-100)
    assert ours(**inputs).loss.isnan() and theirs(**inputs).loss.isnan()
    assert ours(**inputs, num_items_in_batch=4).loss == 0


def test_linear_loss_returns_no_logits():
    theirs, ours = pair("sdpa", fuse_linear_loss=True)
    inputs, _ = batch()
    output = ours(**inputs, output_hidden_states=True)
    assert output.logits is None and len(output.hidden_states) == 3
    assert len(ours(**inputs, return_dict=False)) == 1
    assert_near(ours(inputs["input_ids"]).logits, theirs(inputs["input_ids"]).logits, 1e-4)
    assert not any(name in ops_of(lambda: ours(**inputs)) for name in ("aten::_log_softmax", "megatron_kernels::linear"))


def test_a_wrapped_forward_is_not_taken_out_from_below():
    _, ours = pair("sdpa", fuse_linear_loss=True)
    before, inner = ours.forward, ours.forward

    def wrapped(self, *args, **kwargs):
        return inner(*args, **kwargs)
    wrapped.__wrapped__ = inner.__func__
    ours.forward = wrapped.__get__(ours)
    with pytest.raises(RuntimeError, match="unpatch: the forward of GPT2LMHeadModel was wrapped after patch"):
        unpatch(ours)
    ours.forward = before
    unpatch(ours)
