"""Megatron BERT checkpoints, read and written: every version, style and layout, bit for bit; and what is said where that fails."""

from __future__ import annotations

import json
from dataclasses import replace

import bert_checkpoints
import pytest
import torch
from bert_checkpoints import as_huggingface, truth, write
from megatron_checkpoints import Form, Model, save
from megatron_checkpoints import write as write_gpt2
from safetensors.torch import load_file

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError, MissingConfigurationError
from megatron_kernels.models import GPT2, Bert, BertConfig, GPT2Config

MODEL = Model(layers=4, vocab=512)
POST_NORM = "apply_residual_connection_post_layernorm"


def through_huggingface(source, tmp_path, config=None, **options):
    checkpoint.save_huggingface(checkpoint.load(source, config), tmp_path / "hf", **options)
    return load_file(tmp_path / "hf" / "model.safetensors")


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(("version", "style"), [(None, "transformer"), (0, "encoder"), (1.0, "transformer"), (2.0, "encoder"),
                                                (3.0, "encoder"), (3.0, "norm"), (3.0, "core"), (3.0, "core_te")])
def test_versions_and_styles(tmp_path, version, style, tp):
    form = Form(version, style, tp=tp, args=version is not None and version >= 2)
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"num_attention_heads": MODEL.heads, "vocab_size": MODEL.vocab}))
    assert_same(through_huggingface(write(tmp_path / "m", form, MODEL), tmp_path, config), as_huggingface(truth(MODEL), MODEL))


@pytest.mark.parametrize("style", ["encoder", "core"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 4)])
def test_pipelines(tmp_path, style, tp, pp):
    found = through_huggingface(write(tmp_path / "m", Form(3.0, style, tp=tp, pp=pp), MODEL), tmp_path)
    assert_same(found, as_huggingface(truth(MODEL), MODEL))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("box", ["zip", "file", "directory", "release"])
def test_boxes(tmp_path, box, legacy):
    form = Form(1.0, "transformer", box=box, legacy=legacy, flat_embedding=legacy)
    assert_same(through_huggingface(write(tmp_path / "m", form, MODEL), tmp_path), as_huggingface(truth(MODEL), MODEL))


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_written_and_read_again(tmp_path, post, tp, pp):
    """Bit for bit through Megatron-LM's format at any parallel size, the configuration included."""
    form = Form(2.0, tp=2, changes={POST_NORM: post, "orig_vocab_size": 500, "bias_gelu_fusion": post,
                                    "layernorm_epsilon": 1e-4, "hidden_dropout": 0.2})
    first = checkpoint.load(write(tmp_path / "m", form, MODEL))
    checkpoint.save_megatron(first, tmp_path / "out", tensor_parallel=tp, pipeline_parallel=pp)
    again = checkpoint.load(tmp_path / "out")
    rows = -(-500 // (128 * tp)) * 128 * tp
    assert again.config == replace(first.config, padded_vocab_size=rows)
    assert_same(dict(again.tensors.items()), dict(first.tensors.items()) if rows == 512 else dict(again.tensors.items()))
    assert_same(through_huggingface(tmp_path / "out", tmp_path), as_huggingface(truth(MODEL), MODEL, 500, post))


def test_padding_repeats_the_last_class(tmp_path):
    """Table and bias alike: rows of zeros would outrank the classes."""
    source = write(tmp_path / "m", Form(changes={"orig_vocab_size": 300}), replace(MODEL, vocab=384))
    checkpoint.save_megatron(checkpoint.load(source), tmp_path / "out", tensor_parallel=4)
    loaded = checkpoint.load(tmp_path / "out")
    for name in ("embedding.word_embeddings.weight", "output_layer.bias"):
        tensor = loaded.tensors[name]
        assert tensor.shape[0] == 512 and (tensor[384:] == tensor[299]).all()


@pytest.mark.parametrize("post", [False, True])
def test_model_saves_and_loads(tmp_path, post):
    model = Bert(BertConfig(num_layers=2, hidden_size=24, num_attention_heads=4, max_position_embeddings=16, vocab_size=300,
                            gelu_approximate="tanh", lm_head_gelu_approximate="none", **{POST_NORM: post}),
                 seed=1).eval()
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    model.save_megatron(tmp_path / "m", tensor_parallel=2, pipeline_parallel=2)
    again = Bert.from_megatron(tmp_path / "m")
    assert again.config == replace(model.config, padded_vocab_size=512)
    assert torch.equal(again(ids), model(ids))
    assert Bert.from_megatron(tmp_path / "m", dtype=torch.float64, attention="sdpa").config.attention == "sdpa"
    model.save_huggingface(tmp_path / "hf")
    assert_same(Bert.from_huggingface(tmp_path / "hf").state_dict(), model.state_dict())


class TestConfiguration:
    def load(self, tmp_path, config=None, form=None, model=MODEL, **changes):
        return checkpoint.load(write(tmp_path / "m", form or Form(changes=changes), model), config)

    @pytest.mark.parametrize(("flags", "layers", "head"), [
        ({"bias_gelu_fusion": False}, "none", "none"), ({"bias_gelu_fusion": True}, "tanh", "none"),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, "tanh", "tanh"),
        ({"bias_gelu_fusion": ..., "openai_gelu": ...}, "none", "none")])
    def test_activations(self, tmp_path, flags, layers, head):
        """Megatron-LM's fused bias-GeLU reaches the layers and not the masked-LM head."""
        loaded = self.load(tmp_path, **flags)
        assert (loaded.config.gelu_approximate, loaded.config.lm_head_gelu_approximate) == (layers, head)
        assert any("hidden_act for both" in note for note in loaded.notes) == (layers != head)

    @pytest.mark.parametrize(("said", "post"), [(True, True), (False, False), (..., False)])
    def test_ordering(self, tmp_path, said, post):
        assert getattr(self.load(tmp_path, **{POST_NORM: said}).config, POST_NORM) is post

    def test_ordering_from_the_model_type(self, tmp_path):
        file = tmp_path / "c.json"
        for kind, post in (("bert", True), ("megatron-bert", False)):
            file.write_text(json.dumps({"model_type": kind, "num_attention_heads": 4, "vocab_size": 500, "type_vocab_size": 2}))
            config = self.load(tmp_path, file, Form(None, "transformer", args=False)).config
            assert config.apply_residual_connection_post_layernorm is post and config.vocab_size == 500

    @pytest.mark.parametrize(("vocab", "rows", "tp"), [(28996, 29056, 1), (30522, 30592, 1), (30522, 30720, 4)])
    def test_the_345m_releases(self, tmp_path, vocab, rows, tp):
        """Only with their shapes. Zero tensors share one element's storage."""
        h = 1024

        def zeros(*shape):
            return torch.zeros((), dtype=torch.float16).expand(shape)
        layer = {"input_layernorm.weight": (h,), "input_layernorm.bias": (h,), "attention.dense.bias": (h,),
                 "attention.query_key_value.weight": (3 * h // tp, h), "attention.query_key_value.bias": (3 * h // tp,),
                 "attention.dense.weight": (h, h // tp), "mlp.dense_h_to_4h.weight": (4 * h // tp, h),
                 "mlp.dense_h_to_4h.bias": (4 * h // tp,), "mlp.dense_4h_to_h.weight": (h, 4 * h // tp),
                 "mlp.dense_4h_to_h.bias": (h,), "post_attention_layernorm.weight": (h,), "post_attention_layernorm.bias": (h,)}
        flat = {f"layers.{i}.{name}": zeros(*shape) for i in range(24) for name, shape in layer.items()}
        flat |= {"final_layernorm.weight": zeros(h), "final_layernorm.bias": zeros(h)}
        embedding = {"word_embeddings": {"weight": zeros(rows // tp, h)}, "position_embeddings": {"weight": zeros(512, h)},
                     "tokentype_embeddings": {"weight": zeros(2, h)}}
        head = {"bias": zeros(rows // tp), "dense.weight": zeros(h, h), "dense.bias": zeros(h), "layernorm.weight": zeros(h),
                "layernorm.bias": zeros(h)}
        pooler = {"dense.weight": zeros(h, h), "dense.bias": zeros(h)}
        content = {"language_model": {"embedding": embedding, "transformer": flat, "pooler": pooler}, "lm_head": head,
                   "binary_head": {"weight": zeros(2, h), "bias": zeros(2)}}
        for rank in range(tp):
            save({"model": content}, tmp_path / f"mp_rank_{rank:02d}/model_optim_rng.pt")
        loaded = checkpoint.load(tmp_path)
        config = loaded.config
        assert (config.num_layers, config.num_attention_heads, config.vocab_size, config.padded_vocab_size) == (24, 16, vocab, rows)
        assert (config.gelu_approximate, config.layernorm_epsilon, config.apply_residual_connection_post_layernorm) == (
            "none", 1e-5, False)
        assert any("345M release's" in note and f"({vocab})" in note for note in loaded.notes)

    def test_no_args_asks_for_what_is_missing(self, tmp_path):
        with pytest.raises(MissingConfigurationError, match=r"no args.*give num_attention_heads and vocab_size with") as error:
            self.load(tmp_path, form=Form(None, "transformer", args=False))
        assert error.value.kind is BertConfig
        shown = checkpoint.load(tmp_path / "m", BertConfig(**error.value.config)).config
        assert (shown.num_layers, shown.hidden_size, shown.num_tokentypes) == (4, 12, 2)

    @pytest.mark.parametrize(("config", "message"), [
        (GPT2Config(), "config is a GPT2Config, but the checkpoint is a BERT: expected a BertConfig"),
        (BertConfig(num_layers=5), "config say num_layers = 5, but the tensors in .* say 4"),
        ({"model_type": "gpt2"}, "c.json: model_type 'gpt2', expected 'megatron-bert' or 'bert'"),
        ({"hidden_act": "silu"}, "c.json: hidden_act 'silu' is not supported"),
        ({"vocab_size": 600}, "c.json says vocab_size = 600, but the word embeddings in .* have only 512 rows")])
    def test_refused(self, tmp_path, config, message):
        if isinstance(config, dict):
            (tmp_path / "c.json").write_text(json.dumps(config))
            config = tmp_path / "c.json"
        with pytest.raises(CheckpointError, match=message):
            self.load(tmp_path, config)

    def test_erf_layers_with_a_tanh_head_have_no_command_line(self, tmp_path):
        config = BertConfig(num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=20, max_position_embeddings=4,
                            gelu_approximate="none", lm_head_gelu_approximate="tanh")
        with pytest.raises(CheckpointError, match="Megatron-LM has no option for erf GELU in the layers and tanh"):
            Bert(config).save_megatron(tmp_path / "m")
        assert not (tmp_path / "m").exists()


class TestRefused:
    def edited(self, tmp_path, edit, form=None, rank="mp_rank_00"):
        root = write(tmp_path / "m", form or Form(), MODEL)
        path = root / "iter_0001000" / rank / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        edit(content["model"])
        save(content, path)
        return root

    @pytest.mark.parametrize(("edit", "message"), [
        (lambda m: m["lm_head"].pop("dense.bias"), "the last stage lacks lm_head.dense.bias, expected in every BERT"),
        (lambda m: m["lm_head"].pop("bias"), "the last stage lacks lm_head.bias, expected in every BERT"),
        (lambda m: m.pop("binary_head"), "the last stage lacks binary_head.weight, expected in every BERT"),
        (lambda m: m["language_model"].pop("pooler"), "the last stage lacks pooler.dense.weight, expected in every BERT"),
        (lambda m: m["language_model"]["encoder"].pop("layers.2.mlp.dense_h_to_4h.bias"), "layer 2 lacks mlp.dense_h_to_4h.bias, "
         "expected in every BERT"),
        (lambda m: m["lm_head"].update(surprise=torch.zeros(3)), "unknown key lm_head.surprise; expected the parameters of a "
         "GPT-2 or a BERT"),
        (lambda m: m["lm_head"].update(bias=torch.zeros(500)), r"lm_head.bias has shape \[500\], expected \[512\]"),
        (lambda m: m["language_model"].update(output_layer={"weight": torch.zeros(512, 12)}), "an output layer with weights of its "
         "own, which is not supported in a BERT"),
        (lambda m: m.update(classification_head={"weight": torch.zeros(2, 12)}), "classification_head.weight belongs to a "
         "classifier made of a BERT, which is not supported")])
    def test_models(self, tmp_path, edit, message):
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoint.load(self.edited(tmp_path, edit))
        assert "\n" not in str(error.value)

    def test_replicated_heads_must_agree(self, tmp_path):
        root = self.edited(tmp_path, lambda m: m["lm_head"].update({"dense.weight": torch.zeros(12, 12, dtype=torch.float16)}),
                           Form(3.0, tp=2), "mp_rank_01")
        with pytest.raises(CheckpointError, match=r"mp_rank_01.*a shard of another run: lm_head.dense.weight differs"):
            checkpoint.load(root)

    @pytest.mark.parametrize("changes", [{"swiglu": True}, {"use_rotary_position_embeddings": True}, {"apply_layernorm_1p": True}])
    def test_features(self, tmp_path, changes):
        with pytest.raises(CheckpointError, match="not supported"):
            checkpoint.load(write(tmp_path / "m", Form(changes=changes), MODEL))

    def test_post_norm_gpt2_stays_refused(self, tmp_path):
        form = Form(changes={"apply_residual_connection_post_layernorm": True})
        with pytest.raises(CheckpointError, match="asks for the residual connection taken after the layer norm"):
            checkpoint.load(write_gpt2(tmp_path, form, MODEL))

    def test_nothing_in_a_file_is_run(self, tmp_path):
        class Bad:
            def __reduce__(self):
                return (open, (str(tmp_path / "made"), "w"))

        content = bert_checkpoints.content(truth(MODEL), Form(), MODEL, 0, 0) | {"extra": Bad()}
        save(content, tmp_path / "m/model_optim_rng.pt")
        with pytest.raises(CheckpointError, match="refused, the pickle refers to"):
            checkpoint.load(tmp_path / "m")
        assert not (tmp_path / "made").exists()


def test_each_model_names_the_other(tmp_path):
    bert, gpt2 = write(tmp_path / "bert", Form(), MODEL), write_gpt2(tmp_path / "gpt2", Form(), MODEL)
    for reader, path, message in ((GPT2, bert, "bert: a BERT, expected a GPT-2; models.Bert is what reads it"),
                                  (Bert, gpt2, "gpt2: a GPT-2, expected a BERT; models.GPT2 is what reads it")):
        with pytest.raises(CheckpointError, match=message) as error:
            reader.from_megatron(path)
        assert "\n" not in str(error.value)
        checkpoint.save_huggingface(checkpoint.load(path), tmp_path / f"hf-{path.name}")
        with pytest.raises(CheckpointError, match=message):
            reader.from_huggingface(tmp_path / f"hf-{path.name}")


def test_details_name_the_model(tmp_path):
    assert checkpoint.load(write(tmp_path, Form(), MODEL)).details["model"] == "BERT"
    checkpoint.save_huggingface(checkpoint.load(tmp_path), tmp_path / "hf")
    assert checkpoint.load(tmp_path / "hf").details["model"] == "BERT (megatron-bert)"
