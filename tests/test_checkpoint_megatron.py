"""Reading Megatron checkpoints: every version, key style and layout gives the tensors it was made from, bit for bit."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_checkpoints import STYLES, Form, Model, as_huggingface, truth, write

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError, MissingConfigurationError

MODEL = Model(layers=4, vocab=512)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def through_huggingface(source, tmp_path, config=None, **options):
    from safetensors.torch import load_file

    checkpoint.save_huggingface(checkpoint.load(source, config), tmp_path / "hf", **options)
    return load_file(tmp_path / "hf" / "model.safetensors")


VERSIONED = [(version, style) for version in (None, 0, 1.0, 2.0, 3.0) for style in ("transformer", "encoder", "norm")]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("version", "style"), VERSIONED)
def test_versions_and_styles(tmp_path, version, style, tp):
    form = Form(version, style, tp=tp, args=version is not None and version >= 2)
    config = tmp_path / "config_file.json"
    config.write_text(json.dumps({"n_head": MODEL.heads, "vocab_size": MODEL.vocab}))
    found = through_huggingface(write(tmp_path, form, MODEL), tmp_path, config)
    assert_same(found, as_huggingface(truth(MODEL), MODEL))


def test_beside_a_library_that_allows_the_same_classes(tmp_path, monkeypatch):
    """As Megatron-core does when it is imported. Of two classes with one name torch would take either."""
    read, allowed = torch.load, []

    def load(*arguments, **options):
        allowed.append(torch.serialization.get_safe_globals())
        return read(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    write(tmp_path, Form(3.0), MODEL)
    with torch.serialization.safe_globals([argparse.Namespace, replace]):
        before = torch.serialization.get_safe_globals()
        assert checkpoint.load(tmp_path).config.num_layers == MODEL.layers
        assert set(torch.serialization.get_safe_globals()) == set(before) and argparse.Namespace in before
    assert allowed and all(argparse.Namespace not in those and replace in those for those in allowed)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("style", ["te", "core", "core_te"])
def test_newer_styles(tmp_path, style, untied, pp):
    model = replace(MODEL, untied=untied)
    found = through_huggingface(write(tmp_path, Form(3.0, style, tp=2, pp=pp), model), tmp_path)
    assert_same(found, as_huggingface(truth(model), model))


@pytest.mark.parametrize(("pp", "vp"), [(2, 1), (4, 1), (1, 2), (2, 2), (2, 4), (4, 2)])
@pytest.mark.parametrize("tp", [1, 2])
def test_pipelines(tmp_path, tp, pp, vp):
    model = replace(MODEL, layers=8)
    found = through_huggingface(write(tmp_path, Form(3.0, tp=tp, pp=pp, vp=vp), model), tmp_path)
    assert_same(found, as_huggingface(truth(model), model))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("box", ["zip", "file", "directory", "release"])
@pytest.mark.parametrize("noise", [False, True])
def test_boxes(tmp_path, box, legacy, noise, monkeypatch):
    """Zip, .pt, iteration directory and release, old and new pickles, with classes of modules that aren't installed."""
    monkeypatch.chdir(tmp_path)
    form = Form(1.0, "transformer", box=box, legacy=legacy, noise=noise)
    source = write(tmp_path, form, MODEL)
    assert_same(through_huggingface(source.relative_to(tmp_path), tmp_path), as_huggingface(truth(MODEL), MODEL))


def test_iteration_directory_and_rank_directory(tmp_path):
    write(tmp_path, Form(2.0, tp=2), MODEL)
    assert checkpoint.load(tmp_path / "iter_0001000").iteration == 1000
    with pytest.raises(CheckpointError, match=r"missing 1 of 2 shards: mp_rank_01"):
        checkpoint.load(tmp_path / "iter_0001000" / "mp_rank_00" / "model_optim_rng.pt")


def test_tracker_chooses_among_iterations(tmp_path):
    write(tmp_path, Form(), MODEL)
    (tmp_path / "iter_0001000").rename(tmp_path / "iter_0000500")
    write(tmp_path, Form(), MODEL, truth(MODEL, seed=1))
    assert_same(through_huggingface(tmp_path, tmp_path), as_huggingface(truth(MODEL, seed=1), MODEL))


def test_archive_of_shards(tmp_path):
    source = write(tmp_path, Form(3.0, tp=2, pp=2, box="zip"), MODEL)
    assert_same(through_huggingface(source, tmp_path), as_huggingface(truth(MODEL), MODEL))


def test_flat_embedding_and_module_prefix(tmp_path):
    from megatron_checkpoints import save, shard

    content = shard(truth(MODEL), Form(3.0, flat_embedding=True), MODEL, 0, 0)
    content["model"] = {"module": content["model"]}
    save(content, tmp_path / "model_optim_rng.pt")
    assert_same(through_huggingface(tmp_path, tmp_path), as_huggingface(truth(MODEL), MODEL))


def test_nothing_is_assembled_until_asked(tmp_path):
    loaded = checkpoint.load(write(tmp_path, Form(3.0, tp=2), MODEL))
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    assert loaded.meta(name) == ((3 * MODEL.hidden, MODEL.hidden), torch.float16)
    tensors = truth(MODEL)
    expected = torch.stack([tensors[f"3.{n}.weight"].unflatten(0, (MODEL.heads, -1)) for n in "qkv"], 1).flatten(0, 2)
    assert torch.equal(loaded.tensors[name], expected)
    assert len(loaded.tensors) == 4 + 12 * MODEL.layers and name in loaded.tensors and "x" not in loaded.tensors


class TestConfiguration:
    def load(self, tmp_path, config=None, model=MODEL, **changes):
        return checkpoint.load(write(tmp_path, Form(changes=changes), model), config).config

    @pytest.mark.parametrize(("flags", "gelu"), [
        ({}, "tanh"), ({"bias_gelu_fusion": False}, "none"), ({"bias_gelu_fusion": ...}, "none"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "tanh"), ({"bias_gelu_fusion": ..., "openai_gelu": ...}, "none")])
    def test_activation(self, tmp_path, flags, gelu):
        assert self.load(tmp_path, **flags).gelu_approximate == gelu

    def test_config_file_decides_where_args_are_silent(self, tmp_path):
        file = tmp_path / "c.json"
        file.write_text(json.dumps({"activation_function": "gelu_new", "vocab_size": 500, "eos_token_id": 499}))
        config = self.load(tmp_path, file, bias_gelu_fusion=..., openai_gelu=...)
        assert (config.gelu_approximate, config.eos_token_id) == ("tanh", 499)
        assert (config.vocab_size, config.padded_vocab_size) == (500, 512)

    @pytest.mark.parametrize("name", ["layernorm_epsilon", "norm_epsilon"])
    def test_epsilon(self, tmp_path, name):
        changes = {"layernorm_epsilon": ...} | {name: 1e-3}
        assert self.load(tmp_path, **changes).layernorm_epsilon == 1e-3

    def test_original_vocabulary(self, tmp_path):
        source = write(tmp_path, Form(changes={"orig_vocab_size": 500}), MODEL)
        assert_same(through_huggingface(source, tmp_path), as_huggingface(truth(MODEL), MODEL, 500))

    def test_unknown_vocabulary_is_noted_and_kept(self, tmp_path):
        loaded = checkpoint.load(write(tmp_path, Form(), MODEL))
        assert loaded.config.vocab_size == 512
        assert any("all 512 rows are kept" in note for note in loaded.notes)

    def test_dropouts_and_initialisation(self, tmp_path):
        config = self.load(tmp_path, hidden_dropout=0.25, attention_dropout=0.5, init_method_std=0.01)
        assert (config.hidden_dropout, config.embedding_dropout, config.attention_dropout) == (0.25, 0.25, 0.5)
        assert config.init_method_std == 0.01

    def test_core_style_tied_head_with_pipeline_is_tied(self, tmp_path):
        assert not checkpoint.load(write(tmp_path, Form(3.0, "core", pp=2), MODEL)).config.untie_embeddings_and_output_weights

    def test_no_args_asks_for_what_is_missing(self, tmp_path):
        source = write(tmp_path, Form(None, "transformer", args=False), MODEL)
        with pytest.raises(MissingConfigurationError, match=r"no args.*give n_head and vocab_size.*--config FILE"):
            checkpoint.load(source)
        file = tmp_path / "c.json"
        file.write_text(json.dumps({"vocab_size": 500}))
        with pytest.raises(MissingConfigurationError, match=r"give n_head with"):
            checkpoint.load(source, file)

    def test_defaults_of_the_345m(self, tmp_path):
        """Only with its shapes: 24 layers, 1024 wide, 1024 positions, 50304 rows. Zero tensors share one element's storage."""
        h = 1024

        def zeros(*shape):
            return torch.zeros((), dtype=torch.float16).expand(shape)
        layer = {"input_layernorm.weight": (h,), "input_layernorm.bias": (h,), "attention.query_key_value.weight": (3 * h, h),
                 "attention.query_key_value.bias": (3 * h,), "attention.dense.weight": (h, h), "attention.dense.bias": (h,),
                 "post_attention_layernorm.weight": (h,), "post_attention_layernorm.bias": (h,),
                 "mlp.dense_h_to_4h.weight": (4 * h, h), "mlp.dense_h_to_4h.bias": (4 * h,),
                 "mlp.dense_4h_to_h.weight": (h, 4 * h), "mlp.dense_4h_to_h.bias": (h,)}
        flat = {f"layers.{i}.{name}": zeros(*shape) for i in range(24) for name, shape in layer.items()}
        flat |= {"final_layernorm.weight": zeros(h), "final_layernorm.bias": zeros(h)}
        embedding = {"word_embeddings": {"weight": zeros(50304, h)}, "position_embeddings": {"weight": zeros(1024, h)}}
        language = {"embedding": embedding, "transformer": flat}
        torch.save({"model": {"language_model": language}}, tmp_path / "model_optim_rng.pt")
        config = checkpoint.load(tmp_path).config
        assert (config.num_layers, config.num_attention_heads) == (24, 16)
        assert (config.vocab_size, config.padded_vocab_size) == (50257, 50304)
        assert (config.gelu_approximate, config.eos_token_id, config.layernorm_epsilon) == ("tanh", 50256, 1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_combination(tmp_path_factory, data):
    tp, pp, vp = (data.draw(st.sampled_from([1, 2, 3]), label) for label in ("tp", "pp", "vp"))
    model = Model(layers=pp * vp * data.draw(st.integers(1, 2)), heads=tp * data.draw(st.integers(1, 3)),
                  head_dim=data.draw(st.integers(1, 4)), ffn=tp * data.draw(st.integers(1, 9)),
                  positions=data.draw(st.integers(1, 9)), vocab=128 * tp, untied=data.draw(st.booleans()),
                  dtype=data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])))
    style = data.draw(st.sampled_from(list(STYLES)))
    version = data.draw(st.sampled_from([2.0, 3.0] if style in ("te", "core", "core_te") else [0, 1.0, 2.0, 3.0]))
    changes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    form = Form(version, style, tp, pp, vp, flat_embedding=data.draw(st.booleans()), changes=changes)
    root = tmp_path_factory.mktemp("any")
    found = through_huggingface(write(root, form, model), root)
    assert_same(found, as_huggingface(truth(model), model))
