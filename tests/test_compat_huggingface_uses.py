"""A patched Hugging Face GPT-2 in use: masks, checkpointing, torch.compile, dtypes, copies, adapters and training."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from patched_gpt2 import (
    ATTENTION,
    LENGTH,
    MASK_IS_WHOLE,
    PADDING,
    VOCAB,
    assert_near,
    assert_same_gradients,
    assert_step_agrees,
    batch,
    fused,
    make,
    ops_of,
    pair,
)

from megatron_kernels.compat.huggingface import patch, unpatch


@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_draws_the_same(attention):
    theirs, ours = pair(attention, attn_pdrop=0.2, resid_pdrop=0.1, embd_pdrop=0.1)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        losses.append(model(**batch("right")[0]).loss)
    assert_near(*losses)


def additive(kind):
    """A mask [3, 1, s, s] as a user would hand it in."""
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).expand(3, 1, LENGTH, LENGTH)
    low = {"-inf": -torch.inf, "distance": -torch.inf}.get(kind, torch.finfo(torch.float32).min)
    mask = torch.zeros(3, 1, LENGTH, LENGTH).masked_fill(future, low)
    if kind == "distance":
        mask = mask - 0.1 * (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    if kind == "row":
        mask[1, 0, 4] = low
    return mask


@pytest.mark.parametrize("kind, ours_runs", [("minimum", True), ("-inf", True), ("distance", False), ("row", False)])
def test_a_mask_of_the_users(kind, ours_runs):
    """Only a mask of zeros and minima is a boolean one; anything else, or a row with nothing left, is for Hugging Face's code."""
    if not MASK_IS_WHOLE:
        pytest.skip("this transformers takes no mask of four dimensions in eager attention")
    theirs, ours = pair("eager")
    inputs, keep = batch()
    inputs["attention_mask"] = additive(kind)
    assert_step_agrees(ours, theirs, inputs, keep)
    assert ("megatron_kernels::scaled_masked_softmax_forward" in ops_of(lambda: ours(**inputs))) == ours_runs
    inputs["attention_mask"][:, :, 5, :3] = -0.5  # in place: what was found about the tensor before no longer holds
    assert_near(ours(**inputs).logits, theirs(**inputs).logits, 1e-4)
    assert "megatron_kernels::scaled_masked_softmax_forward" not in ops_of(lambda: ours(**inputs))


def test_packed_sequences():
    theirs, ours = pair("eager")
    inputs, keep = batch()
    inputs["position_ids"] = torch.cat((torch.arange(5), torch.arange(LENGTH - 5))).expand(3, -1)
    assert_step_agrees(ours, theirs, inputs, keep)


@pytest.mark.parametrize("attention", ATTENTION)
def test_cross_attention(attention):
    theirs, ours = pair(attention, add_cross_attention=True)
    inputs, keep = batch("right")
    draw = torch.Generator().manual_seed(2)
    inputs["encoder_hidden_states"] = torch.randn(3, 7, 48, generator=draw)
    for mask in (None, torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])):
        ours.zero_grad()
        theirs.zero_grad()
        assert_step_agrees(ours, theirs, inputs | {"encoder_attention_mask": mask}, keep)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention, padding", [("eager", "left"), ("eager", None), ("sdpa", "right")])
def test_gradient_checkpointing(attention, padding, reentrant):
    _, plain = pair(attention)
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs, _ = batch(padding)
    for each in (plain, model):
        each(**inputs).loss.backward()
    assert_same_gradients(model, plain, 0 if not reentrant else 1e-6)


@pytest.mark.parametrize("attention, padding, linear, checkpointing", [
    ("eager", "left", False, False), ("eager", None, True, False), ("sdpa", "right", False, False),
    ("eager", "right", False, True)])
def test_compiles_to_one_graph(attention, padding, linear, checkpointing):
    theirs, ours = pair(attention, fuse_linear_loss=linear)
    if checkpointing:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    inputs, keep = batch(padding)
    torch._dynamo.reset()
    found = torch._dynamo.explain(ours)(**inputs)
    assert found.graph_break_count == 0 and found.graph_count == 1, found.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_step_agrees(ours, theirs, inputs, keep, compiled)
    softmax = attention == "eager" and (MASK_IS_WHOLE or padding is None)
    names = {"layer_norm_forward", "bias_gelu_forward", "layer_norm_backward", "bias_gelu_backward"}
    names |= {"cross_entropy_forward"} | ({"scaled_masked_softmax_forward"} if softmax else set())
    assert fused(*names) <= ops_of(lambda: compiled(**inputs).loss.backward())


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDING)
def test_compiles_with_inductor(padding):
    torch._dynamo.reset()
    theirs, ours = pair("eager")
    assert_step_agrees(ours, theirs, *batch(padding), torch.compile(ours, fullgraph=True))


def test_compiled_before_patching():
    theirs, ours = make("eager"), make("eager")
    compiled = torch.compile(ours, backend="aot_eager")
    inputs, keep = batch()
    compiled(**inputs)
    patch(compiled)
    assert "megatron_kernels::layer_norm_forward" in ops_of(lambda: compiled(**inputs))
    assert_step_agrees(ours, theirs, inputs, keep, compiled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("linear", [False, True])
def test_other_dtypes(dtype, linear):
    theirs, ours = pair("eager", fuse_linear_loss=linear)
    exact = copy.deepcopy(theirs)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    inputs, _ = batch("right")
    true, found, expected = (model(**inputs).loss for model in (exact, ours, theirs))
    limit = 1e-5 if dtype == torch.float64 else max(2 * abs(expected - true).item(), 0.02)
    assert abs(found - true) <= limit
    if not linear:
        assert found.dtype == expected.dtype
    found.backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("linear", [False, True])
def test_autocast(linear):
    theirs, ours = pair("eager", fuse_linear_loss=linear)
    inputs, _ = batch("right")
    true = theirs(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(**inputs).loss, theirs(**inputs).loss
    assert abs(found - true) <= max(2 * abs(expected - true).item(), 0.02)
    found.backward()


@pytest.mark.parametrize("linear", [False, True])
def test_copies_and_pickles_are_patched_and_can_be_unpatched(linear):
    theirs, ours = pair("eager", fuse_linear_loss=linear)
    inputs, _ = batch()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    models = {"pickle": torch.load(file, weights_only=False), "copy": copy.deepcopy(ours)}
    unpatch(ours)
    for name, model in models.items():
        assert fused("scaled_masked_softmax_forward", "layer_norm_forward") <= ops_of(lambda m=model: m(**inputs))
        assert (model(**inputs).logits is None) == (linear and name == "copy")
        unpatch(model)
        assert torch.equal(model(**inputs).logits, theirs(**inputs).logits)
        assert "forward" not in model.__dict__ and type(model.transformer.ln_f) is torch.nn.LayerNorm


def test_where_there_are_no_kernels():
    _, ours = pair("eager")
    output = ours.to("meta")(**{name: value.to("meta") for name, value in batch("right")[0].items()})
    assert output.logits.shape == (3, LENGTH, VOCAB) and output.loss.shape == ()


def text() -> torch.Tensor:
    """Bytes of the Python manual that comes with the standard library."""
    topics = pytest.importorskip("pydoc_data.topics").topics
    return torch.tensor(list("".join(topics[key] for key in sorted(topics))[:200_000].encode("ascii", "replace")))


@pytest.mark.parametrize("attention, linear", [("eager", False), ("sdpa", True)])
def test_two_hundred_steps_on_real_text(attention, linear):
    theirs, ours = pair(attention, vocab_size=128, n_positions=48, fuse_linear_loss=linear)
    data, curves = text(), []
    for model in (theirs, ours):
        torch.manual_seed(11)
        with torch.no_grad():
            for parameter in model.parameters():  # as a model starts: the pair was made for tests of single steps
                parameter.copy_(0.02 * torch.randn(parameter.shape) if parameter.dim() > 1 else torch.zeros(parameter.shape))
            for module in model.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.weight.fill_(1)
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
        for _ in range(200):
            starts = torch.randint(0, data.numel() - 48, (8,))
            rows = torch.stack([data[i:i + 48] for i in starts])
            loss = model(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert_near(*curves, 1e-3, "the loss curve")
    assert curves[1][-10:].mean() < curves[1][:3].mean() - 1.5  # it learns


def adapted(model, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False, lora_dropout=0.0)
    torch.manual_seed(7)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc", "c_attn"]])
@pytest.mark.parametrize("patched_first", [False, True])
def test_adapters(attention, targets, patched_first):
    models = [make(attention), make(attention)]
    if patched_first:
        patch(models[1])
    theirs, ours = (adapted(model, targets) for model in models)
    report = patch(ours)
    for target in targets:
        assert any(name.endswith(target) and "peft" in why for name, why in report.kept.items())
    assert any(why == "bias and GeLU" for why in report.replaced.values()) == ("c_fc" not in targets)
    inputs, keep = batch("right")
    assert_step_agrees(ours, theirs, inputs, keep)
    whole = ours.merge_and_unload()
    assert "megatron_kernels::bias_gelu_forward" in ops_of(lambda: whole(**inputs))
    assert_near(whole(**inputs).logits[keep], theirs(**inputs).logits[keep], 1e-4)
