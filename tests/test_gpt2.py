"""GPT-2 against an independent float64 computation, Hugging Face's model, and its own promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import disturbed
from torch.nn import functional as F

from megatron_kernels.models import GPT2, GPT2Config

SMALL = GPT2Config(num_layers=2, hidden_size=48, num_attention_heads=4, max_position_embeddings=24, vocab_size=61,
                   padded_vocab_size=64, hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0, init_method_std=0.3)
KINDS = ("softmax", "sdpa")


def make(dtype=torch.float32, seed=3, **changes) -> GPT2:
    return disturbed(GPT2(dataclasses.replace(SMALL, **changes), dtype=dtype, seed=seed))


def tokens(batch=2, length=13, seed=5) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(weights: dict, config: GPT2Config, ids: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """GPT-2 written out once more, in the dtype of its weights, with torch functions only."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layernorm_epsilon)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    b, s = ids.shape
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    keep = torch.ones(b, s, dtype=torch.bool) if keep is None else keep.bool()
    allowed = torch.ones(s, s, dtype=torch.bool).tril() & keep[:, None, None, :] | torch.eye(s, dtype=torch.bool)
    positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    x = weights["embedding.word_embeddings.weight"][ids] + weights["embedding.position_embeddings.weight"][positions]
    for i in range(config.num_layers):
        layer = f"decoder.layers.{i}"
        qkv = linear(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attention.linear_qkv").reshape(b, s, heads, 3, size)
        q, k, v = (qkv[:, :, :, j].transpose(1, 2) for j in range(3))
        scores = (q @ k.transpose(2, 3) / size**0.5).masked_fill(~allowed, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1)
        x = x + linear(y, f"{layer}.self_attention.linear_proj")
        y = linear(norm(x, f"{layer}.pre_mlp_layernorm"), f"{layer}.mlp.linear_fc1")
        x = x + linear(F.gelu(y, approximate=config.gelu_approximate), f"{layer}.mlp.linear_fc2")
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    return (norm(x, "decoder.final_layernorm") @ head.T)[..., :config.vocab_size]


def plain_weights(model: GPT2) -> dict:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def relative(value: torch.Tensor, true: torch.Tensor) -> float:
    return ((value.double() - true).abs().max() / true.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"fuse_linear_loss": True}, {"gelu_approximate": "none"},
                                     {"untie_embeddings_and_output_weights": True},
                                     {"padded_vocab_size": None, "layernorm_epsilon": 0.1, "ffn_hidden_size": 80}])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 8e-2)])
def test_logits_loss_and_gradients(kind, changes, dtype, limit):
    model = make(dtype, attention=kind, **changes)
    weights, ids = plain_weights(model), tokens()
    labels = ids.clone()
    labels[0, :4] = -100
    true_logits = plain(weights, model.config, ids)
    logits = model(ids)
    assert logits.shape == (2, 13, SMALL.vocab_size) and logits.dtype == dtype
    assert relative(logits, true_logits) < limit
    true_loss, loss = plain_loss(true_logits, labels), model(ids, labels=labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(loss, true_loss) < limit
    true_loss.backward()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, weights[name].grad) < limit, name


def test_gradient_through_the_logits():
    """The head's product and the shared gradient of the table also serve a loss that the model did not compute."""
    model = make(torch.float64)
    weights, ids = plain_weights(model), tokens()
    for logits in (model(ids), plain(weights, model.config, ids)):
        logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, weights[name].grad) < 1e-12, name


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_table_gradient_with_more_rows_than_one_block(dtype, limit):
    model = make(dtype, vocab_size=9000, padded_vocab_size=9088, num_layers=1, init_method_std=0.05)
    weights, ids = plain_weights(model), tokens()
    loss, true = model(ids, labels=ids), plain_loss(plain(weights, model.config, ids), ids)
    loss.backward()
    true.backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, weights[name].grad) < limit, name
    assert not model.embedding.word_embeddings.weight.grad[9000:].any()


def test_gradients_accumulate_and_the_graph_can_be_kept():
    model, ids = make(torch.float64), tokens()
    model(ids, labels=ids).backward()
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model(ids, labels=ids).backward()
    logits = model(ids)
    kept = [torch.autograd.grad(logits.square().sum(), list(model.parameters()), retain_graph=True) for _ in range(2)]
    for (name, parameter), first, second in zip(model.named_parameters(), *kept, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-12, atol=1e-14)
        assert torch.equal(first, second), name


def test_loss_is_the_shifted_cross_entropy_of_the_logits():
    model, ids = make(), tokens()
    labels = ids.clone()
    labels[1, 5:9] = -100
    torch.testing.assert_close(model(ids, labels=labels), plain_loss(model(ids), labels), rtol=1e-6, atol=1e-6)
    assert model(ids, labels=torch.full_like(ids, -100)).item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(kind, side):
    """Real tokens see no padding: their logits are those of the row alone. Padding gives finite numbers and gradients."""
    model, ids = make(torch.float64, attention=kind), tokens(3, 12)
    keep = torch.ones(3, 12, dtype=torch.long)
    for row, length in enumerate((12, 7, 1)):
        keep[row, slice(0, 12 - length) if side == "left" else slice(length, 12)] = 0
    logits = model(ids, attention_mask=keep)
    assert logits.isfinite().all()
    for row in range(3):
        real = keep[row].bool()
        torch.testing.assert_close(logits[row, real], model(ids[row, real][None])[0], rtol=1e-10, atol=1e-10)
    weights = plain_weights(model)
    labels = ids.masked_fill(keep == 0, -100)
    model(ids, labels=labels, attention_mask=keep).backward()
    plain_loss(plain(weights, model.config, ids, keep), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    if side == "right":  # a first token that follows padding is scored from padding's output, which differs by kind
        for name, parameter in model.named_parameters():
            assert relative(parameter.grad, weights[name].grad) < 1e-10, name


def test_attention_probabilities():
    model, ids = make(torch.float64), tokens(2, 9)
    keep = torch.ones_like(ids)
    keep[1, :3] = 0
    logits, probs = model(ids, attention_mask=keep, return_attention_probs=True)
    assert torch.equal(logits, model(ids, attention_mask=keep))
    assert len(probs) == SMALL.num_layers
    for p in probs:
        assert p.shape == (2, SMALL.num_attention_heads, 9, 9)
        assert not p.triu(1).any() and not p[1, :, :, :3].any()
        torch.testing.assert_close(p.sum(-1)[1, :, 3:], torch.ones(SMALL.num_attention_heads, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="sdpa"):
        make(attention="sdpa")(ids, return_attention_probs=True)


@pytest.mark.parametrize("where", ["hidden_dropout", "embedding_dropout", "attention_dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_seed_and_is_off_in_eval(where, kind):
    model, ids = make(torch.float64, attention=kind, **{where: 0.25}), tokens(1, 6)

    def draw(seed):
        torch.manual_seed(seed)
        return model(ids)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    model.eval()
    assert torch.equal(model(ids), make(torch.float64, attention=kind).eval()(ids))


def test_dropout_keeps_the_mean_and_drops_its_share():
    model = make(torch.float64, hidden_dropout=0.25)
    layer = model.decoder.layers[0]
    x = torch.randn(1, 4, SMALL.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.mlp.linear_fc2.weight.zero_()  # what is left of the mlp is its bias, so a dropped element shows as an exact x
        torch.manual_seed(0)
        change = torch.stack([layer(x)[0] for _ in range(400)])
        layer.eval()
        torch.testing.assert_close(change.mean(0), layer(x)[0], rtol=0, atol=0.35)
        layer.train()
        layer.self_attention.linear_proj.weight.zero_()
        layer.self_attention.linear_proj.bias.zero_()
        dropped = torch.stack([(layer(x)[0] == x).double().mean() for _ in range(200)]).mean()
    assert abs(dropped.item() - 0.25) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_is_bitwise_the_same(kind):
    ids, results = tokens(), []
    for on in (False, True):
        model = make(attention=kind, hidden_dropout=0.1, embedding_dropout=0.1, attention_dropout=0.1)
        model.activation_checkpointing = on
        torch.manual_seed(7)
        loss = model(ids, labels=ids)
        loss.backward()
        results.append([loss.detach(), torch.rand(3), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_activation_checkpointing_saves_less():
    def saved(on: bool) -> int:
        model, ids = GPT2(SMALL, seed=0, activation_checkpointing=on), tokens(2, 20)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.__setitem__(t.data_ptr(), t.nbytes) or t, lambda t: t):
            model(ids, labels=ids)
        return sum(sizes.values())
    assert saved(True) < 0.6 * saved(False)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    model, ids = make(attention=kind), tokens()
    keep = torch.ones_like(ids)
    keep[1, :4] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for options in ({}, {"attention_mask": keep}):
        torch.testing.assert_close(compiled(ids, **options), model(ids, **options), rtol=1e-5, atol=1e-5)
    grads = []
    for f in (model, compiled):
        model.zero_grad()
        f(ids, labels=ids).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for eager, graph in zip(*grads, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-6)


def test_autocast_runs_the_products_in_bfloat16():
    model, ids = make(), tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(ids), model(ids, labels=ids)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(loss, model(ids, labels=ids), rtol=5e-2, atol=0)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_parameter_names_and_shapes():
    h, heads = SMALL.hidden_size, SMALL.num_attention_heads
    layer = {"input_layernorm": (h,), "self_attention.linear_qkv": (3 * h, h), "self_attention.linear_proj": (h, h),
             "pre_mlp_layernorm": (h,), "mlp.linear_fc1": (4 * h, h), "mlp.linear_fc2": (h, 4 * h)}
    expected = {"embedding.word_embeddings.weight": (64, h), "embedding.position_embeddings.weight": (24, h),
                "decoder.final_layernorm.weight": (h,), "decoder.final_layernorm.bias": (h,)}
    for i in range(SMALL.num_layers):
        for name, shape in layer.items():
            expected |= {f"decoder.layers.{i}.{name}.weight": shape, f"decoder.layers.{i}.{name}.bias": shape[:1]}
    assert heads * make().decoder.layers[0].self_attention.head_dim == h
    assert {name: tuple(t.shape) for name, t in make().state_dict().items()} == expected
    untied = make(untie_embeddings_and_output_weights=True)
    assert {n: tuple(t.shape) for n, t in untied.state_dict().items()} == expected | {"output_layer.weight": (64, h)}


def test_initial_weights():
    config = GPT2Config(num_layers=8, hidden_size=128, num_attention_heads=2, vocab_size=900, padded_vocab_size=1024)
    model = GPT2(config, seed=1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.03 and abs(parameter.mean().item()) < 0.03 * std, name
    assert abs(model.embedding.word_embeddings.weight[900:].std().item() / 0.02 - 1) < 0.05
    again, other = GPT2(config, seed=1), GPT2(config, seed=2)
    deeper = GPT2(dataclasses.replace(config, num_layers=9), seed=1)
    name = "decoder.layers.7.mlp.linear_fc1.weight"
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert torch.equal(model.get_parameter(name), deeper.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))
    weights = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        weights.append(GPT2(SMALL).embedding.word_embeddings.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_meta_device_makes_no_weights():
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in GPT2(GPT2Config()).parameters())


def huggingface(model: GPT2):
    """Hugging Face's GPT-2 with the same weights, renamed and transposed here, not by our checkpoint layer."""
    transformers = pytest.importorskip("transformers")
    c, weights = model.config, model.state_dict()
    heads, size, h = c.num_attention_heads, c.hidden_size // c.num_attention_heads, c.hidden_size
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=c.num_layers, n_embd=h, n_head=heads, n_positions=c.max_position_embeddings, vocab_size=c.vocab_size,
        n_inner=c.ffn_hidden_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        layer_norm_epsilon=c.layernorm_epsilon)).eval()
    state = {"transformer.wte.weight": weights["embedding.word_embeddings.weight"][:c.vocab_size],
             "transformer.wpe.weight": weights["embedding.position_embeddings.weight"]}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    pairs = {"input_layernorm": "ln_1", "self_attention.linear_proj": "attn.c_proj", "pre_mlp_layernorm": "ln_2",
             "mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj", "self_attention.linear_qkv": "attn.c_attn"}
    names = {f"decoder.layers.{i}.{a}": f"transformer.h.{i}.{b}" for i in range(c.num_layers) for a, b in pairs.items()}
    for ours, name in (names | {"decoder.final_layernorm": "transformer.ln_f"}).items():
        weight, bias = weights[f"{ours}.weight"], weights[f"{ours}.bias"]
        if ours.endswith("linear_qkv"):
            weight, bias = (t.view(heads, 3, size, -1).transpose(0, 1).reshape(t.shape) for t in (weight, bias))
        state[f"{name}.weight"], state[f"{name}.bias"] = weight.T if weight.dim() == 2 else weight, bias
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_huggingface_gives_the_same_logits(kind):
    model, ids = make(attention=kind).eval(), tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), huggingface(model)(ids).logits, rtol=1e-4, atol=1e-4)


def test_logits_to_keep():
    model, ids = make(), tokens()
    torch.testing.assert_close(model(ids, logits_to_keep=3), model(ids)[:, -3:])
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(ids, logits_to_keep=14)


@pytest.mark.parametrize("arguments, message", [
    ({"input_ids": torch.zeros(1, 25, dtype=torch.long)}, "25 tokens are more than max_position_embeddings 24"),
    ({"input_ids": torch.zeros(1, 5)}, r"input_ids must be \[batch, seq\] of int64 or int32, got \[1, 5\] of float32"),
    ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"input_ids must be .* got \[5\] of int64"),
    ({"input_ids": tokens(), "labels": tokens()[:, 1:]}, r"labels must be \[2, 13\], got \[2, 12\]"),
    ({"input_ids": tokens(), "labels": tokens().float()}, "labels must be int64 or int32, got .*float32"),
    ({"input_ids": tokens(), "attention_mask": torch.ones(2, 1, 1, 13)}, r"attention_mask must be \[2, 13\]"),
    ({"input_ids": tokens(), "position_ids": torch.arange(13)}, r"position_ids must be \[2, 13\], got \[13\]"),
])
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_the_same_model(tmp_path, dtype):
    model, ids = make(dtype).eval(), tokens()
    model.save_megatron(tmp_path / "megatron", tensor_parallel=2, pipeline_parallel=2)
    model.save_huggingface(tmp_path / "huggingface")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with torch.no_grad():
        expected = model(ids)
    for loaded in (GPT2.from_megatron(tmp_path / "megatron"), GPT2.from_huggingface(tmp_path / "huggingface")):
        assert loaded.config.vocab_size == SMALL.vocab_size and not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded(ids), expected)
        loaded(ids, labels=ids).backward()
        torch.optim.SGD(loaded.parameters(), lr=0.1).step()  # parameters can be written, and the files stay as they are
        assert not torch.equal(loaded(ids), expected)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    other = GPT2.from_huggingface(tmp_path / "huggingface", dtype=torch.float64, attention="sdpa", hidden_dropout=0.5)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float64}
    assert other.config.attention == "sdpa" and other.config.hidden_dropout == 0.5
    limit = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(other(ids).float(), expected.float(), rtol=limit, atol=limit)


def test_stages_one_after_the_other_are_the_model():
    whole, ids = make(torch.float64, num_layers=2), tokens()
    stages = [GPT2(whole.config, dtype=torch.float64, seed=3, stage=(i, 2)) for i in range(2)]
    logits = stages[1](stages[0](ids))
    assert set(stages[0].state_dict()) | set(stages[1].state_dict()) == set(whole.state_dict())
    whole.load_state_dict(stages[0].state_dict() | stages[1].state_dict())
    torch.testing.assert_close(logits.view(*ids.shape, -1)[..., :whole.config.vocab_size], whole(ids), rtol=0, atol=1e-14)
    for arguments in ({"labels": ids}, {"attention_mask": torch.ones_like(ids)}, {"return_attention_probs": True}):
        with pytest.raises(ValueError, match="GPT2: stage 0 of 2 takes token ids or hidden states and nothing else"):
            stages[0](ids, **arguments)
    with pytest.raises(ValueError, match=r"number, count"):
        GPT2(whole.config, stage=(2, 2))
    with pytest.raises(ValueError, match="3 pipeline stages do not divide num_layers 2"):
        GPT2(whole.config, stage=(0, 3))


@pytest.mark.parametrize("changes", [{}, {"fuse_linear_loss": True}, {"max_position_embeddings": 200}])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind, changes):
    model = make(attention=kind, **changes)
    ids = torch.zeros(0, model.config.max_position_embeddings, dtype=torch.int64)
    assert model(ids).shape == (*ids.shape, SMALL.vocab_size) and model.score(ids, ids)[0].shape == (0,)
    loss = model(ids, labels=ids)
    loss.backward()
    assert loss == 0 and all(parameter.grad.count_nonzero() == 0 for parameter in model.parameters())
