"""BERT against transformers: converted checkpoints give its models' logits, and its directories come back bit for bit."""

from __future__ import annotations

import json

import bert_checkpoints
import pytest
import torch
from megatron_checkpoints import Form, Model
from safetensors.torch import load_file, save_file

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError
from megatron_kernels.models import Bert, BertConfig

transformers = pytest.importorskip("transformers")

MODEL = Model(layers=3, vocab=512, positions=20, dtype=torch.float32)
SIZES = {"vocab_size": 500, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80,
         "max_position_embeddings": 24, "attn_implementation": "eager"}
CLASSES = {False: ("MegatronBert", "megatron-bert"), True: ("Bert", "bert")}
ORDERINGS = pytest.mark.parametrize("post", [False, True], ids=["pre-norm", "post-norm"])


def theirs(post: bool, head: str = "ForPreTraining", **changes):
    """Hugging Face's model of that ordering, with biases and norms that are not at their initial values."""
    name, _ = CLASSES[post]
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def open_theirs(path, post: bool, head: str = "ForPreTraining"):
    model, info = getattr(transformers, f"{CLASSES[post][0]}{head}").from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), info


def inputs(length=13, vocab=500):
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(0, vocab, (3, length), generator=draw)
    keep = torch.ones_like(ids)
    keep[1, 8:], keep[2, 3:] = 0, 0
    return ids, keep, torch.randint(0, 2, ids.shape, generator=draw)


@torch.no_grad()
def compare(ours: Bert, model, limit=1e-4, length=13):
    """The largest difference of the logits at real positions, which must be within the limit; and of the binary logits."""
    ids, keep, types = inputs(length)
    has_binary = hasattr(model.cls, "seq_relationship")
    out = model(ids, attention_mask=keep, token_type_ids=types)
    found = ours(ids, attention_mask=keep, tokentype_ids=types if ours.config.num_tokentypes else None,
                 return_binary_logits=has_binary)
    logits, binary = found if has_binary else (found, None)
    expected = out.prediction_logits if has_binary else out.logits
    assert expected.abs().max() > 0.5
    assert (logits - expected)[keep.bool()].abs().max() < limit
    if has_binary:
        assert (binary - out.seq_relationship_logits).abs().max() < limit
    assert logits.isfinite().all()


@ORDERINGS
@pytest.mark.parametrize("head", ["ForPreTraining", "ForMaskedLM"])
@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 0.01, "type_vocab_size": 3}])
@pytest.mark.parametrize("attention", ["softmax", "sdpa"])
def test_random_models(tmp_path, post, head, changes, attention):
    """A directory of transformers, read by us, gives its logits; and written by us, its tensors and its logits again."""
    model = theirs(post, head, **changes)
    model.save_pretrained(tmp_path / "theirs")
    ours = Bert.from_huggingface(tmp_path / "theirs", attention=attention)
    assert ours.config.add_binary_head == (head == "ForPreTraining")
    assert ours.config.apply_residual_connection_post_layernorm is post
    compare(ours, model)
    ours.save_huggingface(tmp_path / "ours")
    again, info = open_theirs(tmp_path / "ours", post, head)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert again.config.model_type == CLASSES[post][1] and again.config.architectures == [f"{CLASSES[post][0]}{head}"]
    for name in ("hidden_act", "layer_norm_eps", "type_vocab_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        assert getattr(again.config, name) == getattr(model.config, name), name


@ORDERINGS
def test_loss_is_theirs(post, tmp_path):
    model = theirs(post, "ForMaskedLM")
    model.save_pretrained(tmp_path)
    ids, keep, types = inputs()
    labels = ids.masked_fill(torch.arange(13)[None] % 3 > 0, -100).masked_fill(keep == 0, -100)
    expected = model(ids, attention_mask=keep, token_type_ids=types, labels=labels).loss
    found = Bert.from_huggingface(tmp_path)(ids, labels, attention_mask=keep, tokentype_ids=types)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@ORDERINGS
@pytest.mark.parametrize("form", [Form(0, "transformer", args=False, box="zip"), Form(1.0, "transformer", tp=2),
                                  Form(2.0, box="file"), Form(3.0, tp=2, pp=3)])
def test_converted_megatron_checkpoints(tmp_path, post, form):
    """Megatron-LM's checkpoint as we run it, against what transformers makes of its conversion."""
    if form.args:
        form = Form(**{**vars(form), "changes": {"apply_residual_connection_post_layernorm": post, "orig_vocab_size": 500}})
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"model_type": CLASSES[post][1], "num_attention_heads": 4, "vocab_size": 500,
                                  "layer_norm_eps": 1e-5}))
    source = bert_checkpoints.write(tmp_path / "m", form, MODEL)
    checkpoint.save_huggingface(checkpoint.load(source, config), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    expected = bert_checkpoints.as_huggingface(bert_checkpoints.truth(MODEL), MODEL, 500, post)
    assert set(tensors) == set(expected) and all(torch.equal(tensors[key], expected[key]) for key in expected)
    ours = Bert.from_megatron(source, config)
    for head in ("ForPreTraining", "ForMaskedLM"):
        model, info = open_theirs(tmp_path / "hf", post, head)
        assert not info["missing_keys"]
        compare(ours, model, length=20)
    assert transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").config.model_type == CLASSES[post][1]


def test_without_binary_head_and_token_types(tmp_path):
    """As --bert-no-binary-head trains it; Hugging Face gets token types that add nothing."""
    tensors = bert_checkpoints.truth(MODEL, types=0, binary=False)
    source = bert_checkpoints.write(tmp_path / "m", Form(3.0, tp=2), MODEL, tensors)
    ours = Bert.from_megatron(source)
    assert (ours.config.num_tokentypes, ours.config.add_binary_head) == (0, False)
    ours.save_huggingface(tmp_path / "hf")
    model, info = open_theirs(tmp_path / "hf", False, "ForMaskedLM")
    assert not info["missing_keys"]
    compare(ours, model)


def test_fully_padded_rows_are_finite_as_in_transformers(tmp_path):
    model = theirs(False, "ForMaskedLM")
    model.save_pretrained(tmp_path)
    ids, keep, _ = inputs()
    keep[1] = 0
    logits = Bert.from_huggingface(tmp_path)(ids, attention_mask=keep)
    assert logits.isfinite().all()
    with torch.no_grad():
        expected = model(ids, attention_mask=keep).logits
    assert (logits - expected)[keep.bool()].abs().max() < 1e-4


def test_names_of_old_files(tmp_path):
    """gamma and beta, the tied decoder, the buffer of positions; and pickled weights."""
    model = theirs(True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for key, value in tensors.items()}
    old |= {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
            "bert.embeddings.position_ids": torch.arange(24)[None]}
    (tmp_path / "model.safetensors").unlink()
    torch.save(old, tmp_path / "pytorch_model.bin")
    compare(Bert.from_huggingface(tmp_path), model)


def test_a_rank_reads_a_part(tmp_path):
    """Any range of rows of the query-key-value matrix, put together from three."""
    theirs(False).save_pretrained(tmp_path)
    opened = checkpoint.load(tmp_path)
    for kind in ("weight", "bias"):
        name = f"encoder.layers.1.self_attention.linear_qkv.{kind}"
        whole = opened.tensors[name]
        for start, stop in ((0, 36), (36, 72), (5, 141), (0, 144), (50, 50)):
            assert torch.equal(opened.part(name, 0, start, stop), whole[start:stop])


class TestRefused:
    def directory(self, tmp_path, post=False, head="ForPreTraining", drop=(), add=(), **fields):
        theirs(post, head).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "config.json").read_text()) | fields
        (tmp_path / "config.json").write_text(json.dumps(content))
        tensors = load_file(tmp_path / "model.safetensors")
        tensors = {key: value for key, value in tensors.items() if not key.startswith(tuple(drop))}
        save_file(tensors | {key: torch.zeros(3) for key in add}, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    @pytest.mark.parametrize(("fields", "message"), [
        ({"hidden_act": "relu"}, "config.json: hidden_act 'relu' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder = True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is not supported"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers must be of type int, got 'three'"),
        ({"num_hidden_layers": 4}, "bert.encoder.layer.3.attention.ln.weight is missing from the weights"),
        ({"num_hidden_layers": 2}, "unknown key bert.encoder.layer.2.attention.ln.bias; expected the parameters of a megatron-bert "
         "with 2 layers"),
        ({"vocab_size": 400}, r"word_embeddings.weight has shape \[500, 48\], expected \[400, 48\]"),
        ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ({"model_type": "bert"}, "bert.embeddings.LayerNorm.weight is missing")])
    def test_configuration(self, tmp_path, fields, message):
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoint.load(self.directory(tmp_path, **fields))
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("drop", "add", "message"), [
        (("cls.predictions.transform",), (), "cls.predictions.transform.dense.weight is missing from the weights"),
        (("bert.pooler",), (), "bert.pooler.dense.weight is missing"),
        ((), ("bert.surprise",), "unknown key bert.surprise"),
        (("bert.encoder.layer.1.attention.self.key.weight",), (), "layer.1.attention.self.key.weight is missing")])
    def test_weights(self, tmp_path, drop, add, message):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(self.directory(tmp_path, drop=drop, add=add))

    def test_query_and_key_of_other_dtypes(self, tmp_path):
        path = self.directory(tmp_path) / "model.safetensors"
        tensors = load_file(path)
        name = "bert.encoder.layer.0.attention.self.key.weight"
        tensors[name] = tensors[name].half()
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"self.key.weight is of torch.float16, but .*query.weight of torch.float32"):
            checkpoint.load(tmp_path)

    def test_contradicting_configuration(self, tmp_path):
        directory = self.directory(tmp_path)
        with pytest.raises(CheckpointError, match="config says apply_residual_connection_post_layernorm = True, but .* says False"):
            checkpoint.load(directory, BertConfig(
                num_layers=3, hidden_size=48, num_attention_heads=4, ffn_hidden_size=80, max_position_embeddings=24, vocab_size=500,
                layernorm_epsilon=1e-12, apply_residual_connection_post_layernorm=True))
