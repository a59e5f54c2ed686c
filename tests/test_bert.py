"""BERT in both orderings against an independent float64 computation and Hugging Face's models, and its own promises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import disturbed
from torch.nn import functional as F

from megatron_kernels.models import Bert, BertConfig
from megatron_kernels.models.attention import padding_mask_for

SMALL = BertConfig(num_layers=3, hidden_size=48, num_attention_heads=4, max_position_embeddings=24, vocab_size=61,
                   padded_vocab_size=64, ffn_hidden_size=80, hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0,
                   init_method_std=0.3)
KINDS = ("softmax", "sdpa")
ORDERINGS = pytest.mark.parametrize("post", [False, True], ids=["pre-norm", "post-norm"])


def make(dtype=torch.float32, seed=3, **changes) -> Bert:
    return disturbed(Bert(dataclasses.replace(SMALL, **changes), dtype=dtype, seed=seed))


def batch(rows=3, length=13, seed=5):
    """Ids, token types, a mask that hides the ends of two rows, and labels at a few real positions."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL.vocab_size, (rows, length), generator=draw)
    types = (torch.arange(length)[None] >= torch.tensor([[5], [3], [9]])[:rows]).long()
    keep = torch.ones_like(ids)
    keep[1, 8:], keep[2, :2] = 0, 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) > 0.5, -100).masked_fill(keep == 0, -100)
    return ids, types, keep, labels


def plain(weights: dict, config: BertConfig, ids, types, keep, outer=False):
    """BERT written out once more, in the dtype of its weights, with torch functions only: (masked-LM logits, binary logits).

    outer=True masks as Megatron-LM does, whole rows for padding queries as well, by adding -10000.
    """
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layernorm_epsilon)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    b, s = ids.shape
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    keep = torch.ones(b, s) if keep is None else keep
    hidden = keep[:, None, None, :] == 0
    if outer:
        hidden = (keep[:, :, None] * keep[:, None, :] == 0)[:, None]
    x = weights["embedding.word_embeddings.weight"][ids] + weights["embedding.position_embeddings.weight"][:s]
    if config.num_tokentypes:
        x = x + weights["embedding.tokentype_embeddings.weight"][torch.zeros_like(ids) if types is None else types]
    for i in range(config.num_layers):
        layer = f"encoder.layers.{i}"
        for first in (True, False):
            normed = norm(x, f"{layer}.{'input' if first else 'pre_mlp'}_layernorm")
            if first:
                qkv = linear(normed, f"{layer}.self_attention.linear_qkv").reshape(b, s, heads, 3, size)
                q, k, v = (qkv[:, :, :, j].transpose(1, 2) for j in range(3))
                scores = q @ k.transpose(2, 3) / size**0.5
                y = (scores.masked_fill(hidden, -10000.0).softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1)
                y = linear(y, f"{layer}.self_attention.linear_proj")
            else:
                y = linear(normed, f"{layer}.mlp.linear_fc1")
                y = linear(F.gelu(y, approximate=config.gelu_approximate), f"{layer}.mlp.linear_fc2")
            x = (normed if config.apply_residual_connection_post_layernorm else x) + y
    x = norm(x, "encoder.final_layernorm")
    y = norm(F.gelu(linear(x, "lm_head.dense"), approximate=config.lm_head_gelu_approximate), "lm_head.layer_norm")
    logits = y @ weights["embedding.word_embeddings.weight"].T + weights["output_layer.bias"]
    binary = linear(torch.tanh(linear(x[:, 0], "pooler.dense")), "binary_head") if config.add_binary_head else None
    return logits[..., :config.vocab_size], binary


def plain_weights(model: Bert) -> dict:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}


def plain_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def relative(value: torch.Tensor, true: torch.Tensor) -> float:
    return ((value.double() - true).norm() / true.norm()).item()


@ORDERINGS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"gelu_approximate": "tanh", "lm_head_gelu_approximate": "none"},
                                     {"gelu_approximate": "tanh", "padded_vocab_size": None, "layernorm_epsilon": 0.1},
                                     {"num_tokentypes": 0, "lm_head_gelu_approximate": "tanh"}])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 5e-5), (torch.bfloat16, 8e-2)])
def test_logits_loss_and_gradients(post, kind, changes, dtype, limit):
    if dtype == torch.bfloat16 and changes:
        pytest.skip("one shape is enough for rounding")
    if dtype == torch.bfloat16:
        changes = {"init_method_std": 0.1}  # larger weights amplify the rounding
    model = make(dtype, attention=kind, apply_residual_connection_post_layernorm=post, **changes)
    weights, (ids, types, keep, labels) = plain_weights(model), batch()
    types = types if model.config.num_tokentypes else None
    true_logits, true_binary = plain(weights, model.config, ids, types, keep)
    options = {"attention_mask": keep, "tokentype_ids": types, "return_binary_logits": True}
    logits, binary = model(ids, **options)
    real = keep.bool()
    assert logits.shape == (3, 13, SMALL.vocab_size) and logits.dtype == dtype and binary.shape == (3, 2)
    assert relative(logits[real], true_logits[real]) < limit
    assert relative(binary[:2], true_binary[:2]) < limit  # the third row starts with padding
    true_loss = plain_loss(true_logits, labels)
    loss, binary = model(ids, labels, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(loss, true_loss) < limit
    (loss + binary[:2].square().mean().to(loss.dtype)).backward()
    (true_loss + true_binary[:2].square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, weights[name].grad) < limit, name


@ORDERINGS
def test_many_rows(post):
    """Enough tokens that float32 products go to oneDNN and the table's gradient by blocks, as in real training."""
    model = make(torch.float32, vocab_size=5000, padded_vocab_size=5120, max_position_embeddings=40, init_method_std=0.05,
                 apply_residual_connection_post_layernorm=post)
    ids = torch.randint(0, 5000, (4, 40), generator=torch.Generator().manual_seed(0))
    weights = plain_weights(model)
    model(ids, ids).backward()
    plain_loss(plain(weights, model.config, ids, None, None)[0], ids).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith(("pooler", "binary")):
            assert relative(parameter.grad, weights[name].grad) < 2e-5, name


def test_a_loss_of_the_binary_head_alone():
    model, (ids, *_) = make(torch.float64), batch()
    weights = plain_weights(model)
    model(ids, return_binary_logits=True)[1].square().sum().backward()
    plain(weights, model.config, ids, None, None)[1].square().sum().backward()
    for name, parameter in model.named_parameters():
        if weights[name].grad is not None:
            assert relative(parameter.grad, weights[name].grad) < 1e-12, name


@ORDERINGS
@pytest.mark.parametrize("kind", KINDS)
def test_padding(post, kind):
    """Real tokens see no padding: their logits are those of the row without it, whatever is there, as with Megatron-LM's mask."""
    model, (ids, types, keep, _) = make(torch.float64, attention=kind, apply_residual_connection_post_layernorm=post), batch()
    logits = model(ids, attention_mask=keep, tokentype_ids=types)
    alone = model(ids[1:2, :8], tokentype_ids=types[1:2, :8])
    torch.testing.assert_close(logits[1, :8], alone[0], rtol=1e-10, atol=1e-10)
    shifted = model(ids[2:, 2:], tokentype_ids=types[2:, 2:], position_ids=torch.arange(2, 13)[None])
    torch.testing.assert_close(logits[2, 2:], shifted[0], rtol=1e-10, atol=1e-10)
    other = model(ids.masked_fill(keep == 0, 7), attention_mask=keep.bool(), tokentype_ids=types)
    assert torch.equal(other[keep.bool()], logits[keep.bool()])
    megatron, _ = plain(plain_weights(model), model.config, ids, types, keep, outer=True)
    torch.testing.assert_close(logits[keep.bool()], megatron[keep.bool()], rtol=1e-10, atol=1e-10)


def test_masks():
    """scaled_dot_product_attention promises nothing for a query that may see no key, so there is none."""
    keep = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert padding_mask_for("softmax", keep).tolist() == [[[[False, True, False]]], [[[True, True, True]]]]
    assert padding_mask_for("sdpa", keep).tolist() == [[[[True, False, True]]], [[[True, True, True]]]]
    assert padding_mask_for("softmax", None) is padding_mask_for("sdpa", None) is None


@ORDERINGS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_padding_alone_is_finite(post, kind, dtype):
    model, (ids, types, keep, labels) = make(dtype, attention=kind, apply_residual_connection_post_layernorm=post), batch()
    keep[0], labels[0] = 0, -100
    logits, binary = model(ids, attention_mask=keep, tokentype_ids=types, return_binary_logits=True)
    assert logits.isfinite().all() and binary.isfinite().all()
    loss, binary = model(ids, labels, attention_mask=keep, tokentype_ids=types, return_binary_logits=True)
    (loss + binary.float().sum()).backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())
    without = model(ids[1:], attention_mask=keep[1:], tokentype_ids=types[1:])
    assert torch.equal(logits[1:][keep[1:].bool()], without[keep[1:].bool()])
    all_padding = model(ids, torch.full_like(ids, -100), attention_mask=torch.zeros_like(ids))
    assert all_padding.item() == 0.0


def test_the_two_orderings_differ_in_the_residual_alone():
    """The same parameters in both, under the same names and with the same initial values, and another function."""
    pre, post = (make(apply_residual_connection_post_layernorm=ordering) for ordering in (False, True))
    assert {name: tensor.shape for name, tensor in pre.state_dict().items()} == {
        name: tensor.shape for name, tensor in post.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(pre.parameters(), post.parameters(), strict=True))
    ids = batch()[0]
    assert relative(pre(ids), post(ids).double()) > 0.01


def test_attention_looks_both_ways():
    model, (ids, *_) = make(torch.float64), batch()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SMALL.vocab_size
    assert (model(ids)[:, 0] - model(changed)[:, 0]).abs().max() > 1e-6


def test_defaults_of_types_and_positions():
    model, (ids, types, keep, _) = make(), batch()
    spelled_out = model(ids, attention_mask=keep, tokentype_ids=torch.zeros_like(ids), position_ids=torch.arange(13).expand(3, -1))
    assert torch.equal(model(ids, attention_mask=keep), spelled_out)
    assert relative(model(ids, tokentype_ids=types), model(ids).double()) > 1e-3
    assert torch.equal(model(ids.int()), model(ids))


@ORDERINGS
def test_encode_is_what_the_heads_start_from(post):
    model, (ids, types, keep, _) = make(apply_residual_connection_post_layernorm=post), batch()
    hidden = model.encode(ids, attention_mask=keep, tokentype_ids=types)
    assert hidden.shape == (3, 13, 48)
    _, binary = model(ids, attention_mask=keep, tokentype_ids=types, return_binary_logits=True)
    assert torch.equal(model.binary_head(model.pooler(hidden)), binary)


@ORDERINGS
def test_recomputed_layers_give_the_same_gradients(post):
    """Bitwise, dropout included."""
    gradients = []
    for again in (False, True):
        model = make(hidden_dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1,
                     apply_residual_connection_post_layernorm=post)
        model.activation_checkpointing = again
        ids, types, keep, labels = batch()
        torch.manual_seed(0)
        model(ids, labels, attention_mask=keep, tokentype_ids=types).backward()
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if not name.startswith(("pool", "bin"))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_is_for_training():
    model, (ids, *_) = make(hidden_dropout=0.1), batch()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("dropout", ["hidden_dropout", "embedding_dropout", "attention_dropout"])
def test_each_dropout_does_something(dropout):
    model, (ids, *_) = make(**{dropout: 0.5}), batch()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.slow
def test_compiles_whole():
    model, (ids, types, keep, labels) = make(num_layers=1), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, labels, attention_mask=keep, tokentype_ids=types)
    torch.testing.assert_close(loss, model(ids, labels, attention_mask=keep, tokentype_ids=types))
    loss.backward()


def test_initial_weights():
    """Megatron-LM's: 0 and 1 for biases and norms, N(0, std) for the rest, less for what writes to the residual."""
    model = Bert(BertConfig(num_layers=8, hidden_size=128, num_attention_heads=4, max_position_embeddings=64, vocab_size=300),
                 seed=0)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif parameter.numel() > 1000:
            expected = 0.02 / 4 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
    again = Bert(model.config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


class TestConfig:
    def test_defaults_are_the_cased_345m(self):
        config = BertConfig()
        assert (config.num_layers, config.hidden_size, config.num_attention_heads, config.ffn_hidden_size) == (24, 1024, 16, 4096)
        assert (config.max_position_embeddings, config.vocab_size, config.num_tokentypes) == (512, 28996, 2)
        assert config.add_binary_head and not config.apply_residual_connection_post_layernorm
        transformers = pytest.importorskip("transformers")
        with torch.device("meta"):
            ours = Bert(dataclasses.replace(config, padded_vocab_size=29056))
            theirs = transformers.MegatronBertForPreTraining(transformers.MegatronBertConfig())
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    @pytest.mark.parametrize(("changes", "message"), [
        ({"num_layers": 0}, "BertConfig: num_layers must be at least 1, got 0"),
        ({"num_attention_heads": 5}, "BertConfig: hidden_size 48 is not a multiple of num_attention_heads 5"),
        ({"padded_vocab_size": 60}, "BertConfig: padded_vocab_size 60 is below vocab_size 61"),
        ({"gelu_approximate": "erf"}, "BertConfig: gelu_approximate must be 'tanh' or 'none', got 'erf'"),
        ({"lm_head_gelu_approximate": "x"}, "BertConfig: lm_head_gelu_approximate must be 'tanh' or 'none', got 'x'"),
        ({"num_tokentypes": -1}, "BertConfig: num_tokentypes must be at least 0, got -1"),
        ({"attention": "flash"}, "BertConfig: attention must be 'softmax' or 'sdpa', got 'flash'")])
    def test_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"input_ids must be \[batch, seq\] of int64 or int32, got \[4\] of int64"),
    ({"input_ids": torch.zeros(2, 4)}, r"input_ids must be .*, got \[2, 4\] of float32"),
    ({"input_ids": torch.zeros(1, 25, dtype=torch.long)}, "25 tokens are more than max_position_embeddings 24"),
    ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must be \[2, 4\], got \[2, 3\] of float32"),
    ({"tokentype_ids": torch.ones(2, 4)}, r"tokentype_ids must be int64 or int32, got \[2, 4\] of float32"),
    ({"position_ids": torch.zeros(1, 4, dtype=torch.long)}, r"position_ids must be \[2, 4\], got \[1, 4\] of int64"),
    ({"labels": torch.zeros(2, 5, dtype=torch.long)}, r"labels must be \[2, 4\], got \[2, 5\] of int64")])
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"Bert: {message}"):
        make()(**{"input_ids": torch.zeros(2, 4, dtype=torch.long), **arguments})


def test_what_the_configuration_leaves_out():
    model, ids = make(num_tokentypes=0, add_binary_head=False), torch.zeros(2, 4, dtype=torch.long)
    assert not any(name.startswith(("pooler", "binary_head", "embedding.tokentype")) for name in model.state_dict())
    with pytest.raises(ValueError, match="Bert: tokentype_ids given, but the model has no token types"):
        model(ids, tokentype_ids=ids)
    with pytest.raises(ValueError, match="Bert: return_binary_logits needs add_binary_head=True"):
        model(ids, return_binary_logits=True)


def test_no_rows():
    model, ids = make(), torch.zeros(0, 5, dtype=torch.int64)
    assert model(ids).shape == (0, 5, SMALL.vocab_size) and model(ids, ids) == 0
