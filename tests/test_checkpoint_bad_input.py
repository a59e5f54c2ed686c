"""Bad checkpoints: each ends in one line that names the file, key or shard and what was expected."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron_checkpoints import Form, Model, folder, save, shard, truth, write

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError

MODEL = Model(vocab=512)


def refused(path, match, config=None):
    """Loading, and assembling every tensor, must end in a CheckpointError of one line."""
    with pytest.raises(CheckpointError, match=match) as caught:
        dict(checkpoint.load(path, config).tensors)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change) -> None:
    """Rewrite one shard after change(content)."""
    content = torch.load(path, weights_only=False)
    change(content)
    save(content, path)


def model_file(root: Path, form: Form, t: int = 0, p: int = 0) -> Path:
    return root / "iter_0001000" / folder(form, t, p) / "model_optim_rng.pt"


def flat_of(content):
    return content["model"]["language_model"]["encoder"]


class Runs:
    """A pickle with code in it: unpickling it the usual way makes the file `ran`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestDamage:
    @pytest.mark.parametrize("box", ["zip", "file"])
    @pytest.mark.parametrize("part", [0.02, 0.5, 0.98])
    @pytest.mark.parametrize("legacy", [False, True])
    def test_truncated(self, tmp_path, box, part, legacy):
        source = write(tmp_path, Form(1.0, "transformer", box=box, legacy=legacy), MODEL)
        source.write_bytes(source.read_bytes()[:int(source.stat().st_size * part)])
        refused(source, f"{source.name}: (truncated or damaged|not a readable PyTorch)")

    def test_truncated_file_inside_an_archive(self, tmp_path):
        source = write(tmp_path, Form(box="zip"), MODEL)
        with zipfile.ZipFile(source) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data[:len(data) // 2] if name.endswith(".pt") else data)
        refused(source, "checkpoint.zip!release/mp_rank_00/model_optim_rng.pt: truncated or damaged")

    def test_flipped_bits_inside_an_archive(self, tmp_path):
        source = write(tmp_path, Form(box="zip"), MODEL)
        data = bytearray(source.read_bytes())
        data[len(data) // 2] ^= 0xFF
        source.write_bytes(data)
        refused(source, r"release/mp_rank_00/model_optim_rng.pt: truncated or damaged \((BadZipFile|error)")

    @pytest.mark.parametrize(("data", "message"), [(b"", "empty file"), (b"hello, world", "not a readable PyTorch|truncated"),
                                                   (b"PK\x03\x04junk", "truncated or damaged")])
    def test_no_checkpoint_at_all(self, tmp_path, data, message):
        (tmp_path / "x.pt").write_bytes(data)
        refused(tmp_path / "x.pt", f"x.pt: {message}")

    @pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"model": 3}, {"model": {}}, {}])
    def test_no_megatron_checkpoint(self, tmp_path, content):
        save(content, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", "x.pt: ")

    def test_missing_path_and_empty_directory(self, tmp_path):
        refused(tmp_path / "nowhere", "nowhere: no such file or directory")
        refused(tmp_path, r"no checkpoint found; expected config.json \(Hugging Face\), or model_optim_rng.pt, mp_rank_\*/")

    def test_torch_dist_checkpoint_is_named(self, tmp_path):
        (tmp_path / "iter_0000010").mkdir()
        (tmp_path / "iter_0000010" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        refused(tmp_path, "torch_dist checkpoint.*--ckpt-convert-format torch")

    def test_zip_without_a_checkpoint(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("readme.txt", "nothing")
        refused(tmp_path / "x.zip", "x.zip: no checkpoint found in the archive; expected members like release/mp_rank_00")


class TestUnsafe:
    @pytest.mark.parametrize("legacy", [False, True])
    @pytest.mark.parametrize("box", ["file", "zip"])
    def test_pickle_with_code(self, tmp_path, legacy, box):
        form = Form(box=box, legacy=legacy)
        content = shard(truth(MODEL), form, MODEL, 0, 0) | {"optimizer": Runs(tmp_path / "ran")}
        path = write(tmp_path, form, MODEL)
        inner = path if box == "file" else tmp_path / "release/mp_rank_00/model_optim_rng.pt"
        save(content, inner, legacy)
        if box == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.write(inner, "release/mp_rank_00/model_optim_rng.pt")
        message = refused(path, r"model_optim_rng.pt: refused, the pickle refers to posix.mkdir")
        assert str(path) in message
        assert not (tmp_path / "ran").exists()
        torch.load(inner, weights_only=False)
        assert (tmp_path / "ran").exists()  # the trap was armed

    def test_plain_pickle_with_code(self, tmp_path):
        (tmp_path / "x.pt").write_bytes(pickle.dumps(Runs(tmp_path / "ran"), 2))
        refused(tmp_path / "x.pt", "x.pt: (refused, the pickle refers to posix.mkdir|truncated|not a readable)")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["torch.hub.load", "builtins.eval", "collections.ChainMap"])
    def test_functions_that_torch_does_not_allow_are_named(self, tmp_path, name):
        """Also below the names that torch answers for itself."""
        module, _, attribute = name.rpartition(".")
        body = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", body)
            archive.writestr("archive/version", "3\n")
        refused(tmp_path / "x.pt", f"x.pt: refused, the pickle refers to {name},")

    @pytest.mark.parametrize("owner", ["collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "builtins\nset"])
    def test_getattr_is_for_enums_alone(self, tmp_path, owner):
        body = b"\x80\x02cbuiltins\ngetattr\nc" + owner.encode() + b"\nX\x08\x00\x00\x00__init__\x86R."
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", body)
            archive.writestr("archive/version", "3\n")
        refused(tmp_path / "x.pt", "x.pt: not a readable PyTorch checkpoint .*getattr of .*, which is no enum")

    def test_signals_by_name_are_harmless(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02csignal\nSIGTERM\n.")
            archive.writestr("archive/version", "3\n")
        refused(tmp_path / "x.pt", "x.pt: expected a dictionary with 'model', got type")

    @pytest.mark.parametrize("name", ["../../evil/mp_rank_00/model_optim_rng.pt", "/abs/mp_rank_00/model_optim_rng.pt",
                                      "a\\..\\b.pt", "C:/x.pt", "release/../../x"])
    def test_archive_with_names_that_leave_it(self, tmp_path, name):
        source = write(tmp_path, Form(box="zip"), MODEL)
        info = zipfile.ZipInfo("placeholder")
        info.filename = name  # the constructor would tidy it
        with zipfile.ZipFile(source, "a") as archive:
            archive.writestr(info, b"x")
        refused(source, "refused, the archive has a member that leaves it: ")


class TestShards:
    FORM = Form(3.0, tp=2, pp=2)

    @pytest.fixture
    def root(self, tmp_path):
        return write(tmp_path, self.FORM, MODEL)

    @pytest.mark.parametrize("rank", [(0, 0), (1, 1)])
    def test_missing(self, root, rank):
        shutil.rmtree(model_file(root, self.FORM, *rank).parent)
        name = folder(self.FORM, *rank)
        refused(root, rf"iter_0001000/?: missing 1 of 4 shards: {name} \(args in .* tensor parallel 2 x pipeline parallel 2\)")

    @pytest.mark.parametrize("pp", [1, 2])
    def test_missing_without_args(self, tmp_path, pp):
        form = Form(2.0, tp=2, pp=pp, args=False)
        root = write(tmp_path, form, MODEL)
        for p in range(pp):
            shutil.rmtree(model_file(root, form, 1, p).parent)
        config = tmp_path / "c.json"
        config.write_text(json.dumps({"n_head": MODEL.heads, "vocab_size": MODEL.vocab}))
        refused(root, "is 6 wide, one of 2 tensor-parallel shards of 12, but 1 found: shards are missing", config)

    def test_missing_last_stage_without_args(self, tmp_path):
        form = Form(2.0, pp=2, args=False)
        root = write(tmp_path, form, MODEL)
        shutil.rmtree(model_file(root, form, 0, 1).parent)
        refused(root, "the last stage lacks final_layernorm.weight")

    def test_surplus(self, root):
        shutil.copytree(model_file(root, self.FORM, 1, 1).parent, root / "iter_0001000" / "mp_rank_02_001")
        refused(root, "mp_rank_02_001/model_optim_rng.pt: one shard too many")

    def test_the_same_shard_twice(self, root):
        shutil.copy(model_file(root, self.FORM, 0, 0), model_file(root, self.FORM, 1, 0))
        refused(root, r"mp_rank_01_000/.*: holds the same .*layers.0.self_attention.query_key_value.weight as .*mp_rank_00_000")

    @pytest.mark.parametrize(("change", "message"), [
        (lambda c: c.update(iteration=2000), "iteration is 2000, but 1000 in"),
        (lambda c: c.update(checkpoint_version=2.0), "checkpoint_version is 2.0, but 3.0 in"),
        (lambda c: c.pop("args"), "whether it has args is False, but True in"),
        (lambda c: setattr(c["args"], "num_attention_heads", 2), "args.num_attention_heads is 2, but 4 in"),
        (lambda c: setattr(c["args"], "layernorm_epsilon", 1e-6), "args.layernorm_epsilon is 1e-06"),
        (lambda c: flat_of(c)["layers.0.input_layernorm.weight"].add_(1), "layers.0.input_layernorm.weight differs from"),
        (lambda c: flat_of(c)["layers.0.mlp.dense_4h_to_h.bias"].add_(1), "layers.0.mlp.dense_4h_to_h.bias differs from"),
        (lambda c: flat_of(c).update({"layers.0.mlp.dense_h_to_4h.bias": torch.zeros(10)}), "has dtype torch.float32, but"),
        (lambda c: c["model"]["word_embeddings_for_head"]["weight"].add_(1), "differs from the word embeddings of the first"),
    ])
    def test_of_another_run(self, root, change, message):
        edit(model_file(root, self.FORM, 1, 1), change)
        assert "mp_rank_01_001" in refused(root, f"a shard of another run: .*{message}")

    def test_of_another_size(self, root):
        other = write(root / "other", self.FORM, replace(MODEL, ffn=24))
        shutil.copy(model_file(other, self.FORM, 1, 0), model_file(root, self.FORM, 1, 0))
        refused(root, "args.ffn_hidden_size is 24, but 20")

    def test_of_another_size_without_args(self, tmp_path):
        form = replace(self.FORM, version=2.0, args=False, pp=1)
        root, other = write(tmp_path, form, MODEL), write(tmp_path / "other", form, replace(MODEL, ffn=24))
        shutil.copy(model_file(other, form, 1, 0), model_file(root, form, 1, 0))
        config = tmp_path / "c.json"
        config.write_text(json.dumps({"n_head": MODEL.heads, "vocab_size": MODEL.vocab}))
        refused(root, r"mp_rank_01/.*dense_h_to_4h.weight has shape \[12, 12\], expected \[10, 12\]", config)

    def test_missing_layer(self, tmp_path):
        root = write(tmp_path, Form(), replace(MODEL, layers=3))
        edit(model_file(root, Form()), lambda c: [flat_of(c).pop(k) for k in list(flat_of(c)) if k.startswith("layers.1.")])
        refused(root, "layer 1 is missing; found layers 0, 2")

    def test_missing_last_layer(self, tmp_path):
        root = write(tmp_path, Form(), replace(MODEL, layers=3))
        edit(model_file(root, Form()), lambda c: [flat_of(c).pop(k) for k in list(flat_of(c)) if k.startswith("layers.2.")])
        refused(root, "args in .* say num_layers = 3, but the tensors.* say 2")

    @pytest.mark.parametrize(("key", "message"), [
        ("layers.1.mlp.dense_h_to_4h.weight", "layer 1 lacks mlp.dense_h_to_4h.weight, expected in every GPT-2"),
        ("layers.0.input_layernorm.bias", "layer 0 lacks input_layernorm.bias.*RMSNorm"),
        ("final_layernorm.bias", "the last stage lacks final_layernorm.bias")])
    def test_missing_tensor(self, tmp_path, key, message):
        root = write(tmp_path, Form(), MODEL)
        edit(model_file(root, Form()), lambda c: flat_of(c).pop(key))
        refused(root, message)

    def test_tracker(self, root):
        tracker = root / "latest_checkpointed_iteration.txt"
        tracker.write_text("2000")
        refused(root, r"names iter_0002000/, which is missing or holds no model_optim_rng.pt; found iter_0001000/")
        tracker.write_text("soon")
        refused(root, "expected an iteration number or 'release', got 'soon'")
        tracker.unlink()
        shutil.copytree(root / "iter_0001000", root / "iter_0002000")
        refused(root, "several checkpoints and no latest_checkpointed_iteration.txt.*iter_0001000/, iter_0002000/")


class TestUnsupported:
    @pytest.mark.parametrize(("changes", "message"), [
        ({"swiglu": True}, "args.swiglu = True asks for SwiGLU"),
        ({"swiglu": "True"}, "SwiGLU"),
        ({"squared_relu": True}, "squared ReLU"),
        ({"relu": True}, "ReLU"),
        ({"position_embedding_type": "rope"}, "position embeddings other than learned absolute"),
        ({"use_rotary_position_embeddings": True}, "rotary position embeddings"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm.*post-layernorm"),
        ({"normalization": "RMSNorm"}, "a normalization other than LayerNorm"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p"),
        ({"group_query_attention": True, "num_query_groups": 2}, "grouped-query attention is not supported"),
        ({"attention_head_type": "multiquery"}, "multi-query attention"),
        ({"num_experts": 8}, "mixture of experts"), ({"num_experts": [8]}, "mixture of experts"),
        ({"add_bias_linear": False}, "linear layers without biases"),
        ({"qk_layernorm": True}, "queries and keys"),
        ({"kv_channels": 5}, "args.kv_channels = 5"),
    ])
    def test_by_args(self, tmp_path, changes, message):
        refused(write(tmp_path, Form(changes=changes), MODEL), message)

    @pytest.mark.parametrize("changes", [
        {"position_embedding_type": "learned_absolute"}, {"group_query_attention": True, "num_query_groups": 4},
        {"group_query_attention": False, "num_query_groups": 1}, {"num_experts": None}, {"num_experts": [1]},
        {"normalization": "LayerNorm"}, {"attention_head_type": "multihead"}, {"add_bias_linear": True}, {"window_size": None}])
    def test_harmless_args_are_accepted(self, tmp_path, changes):
        assert checkpoint.load(write(tmp_path, Form(changes=changes), MODEL)).config.num_layers == 2

    @pytest.mark.parametrize(("key", "feature"), [
        ("layers.0.self_attention.rotary_emb.inv_freq", "rotary"),
        ("layers.0.mlp.experts.0.dense_h_to_4h.weight", "mixture of experts"),
        ("layers.0.mlp.router.weight", "mixture of experts"), ("layers.0.inter_attention.dense.weight", "encoder-decoder"),
        ("layers.0.attention.key_value.weight", "grouped-query"),
        ("layers.0.self_attention.q_layernorm.weight", "queries and keys"),
        ("layers.0.attention.lora_a.weight", "adapter")])
    def test_by_key(self, tmp_path, key, feature):
        root = write(tmp_path, Form(), MODEL)
        edit(model_file(root, Form()), lambda c: flat_of(c).update({key: torch.zeros(3)}))
        refused(root, f"{key} belongs to .*{feature}.*not supported")

    def test_bert(self, tmp_path):
        root = write(tmp_path, Form(), MODEL)
        edit(model_file(root, Form()), lambda c: c["model"].update(lm_head={"bias": torch.zeros(512)}))
        refused(root, "the last stage lacks lm_head.dense.weight, expected in every BERT")

    def test_unknown_key(self, tmp_path):
        root = write(tmp_path, Form(), MODEL)
        edit(model_file(root, Form()), lambda c: flat_of(c).update({"layers.0.surprise.weight": torch.zeros(3)}))
        refused(root, "unknown key language_model.encoder.layers.0.surprise.weight; expected the parameters of a GPT-2")

    def test_by_shape(self, tmp_path):
        """Without args, the shapes give a gated activation and grouped queries away."""
        form = Form(3.0, args=False)
        gated = write(tmp_path / "gated", form, MODEL)
        def double(c):
            for kind in ("weight", "bias"):
                name = f"layers.0.mlp.dense_h_to_4h.{kind}"
                flat_of(c)[name] = torch.cat([flat_of(c)[name]] * 2)
        edit(model_file(gated, form), double)
        refused(gated, "dense_h_to_4h.weight has 40 rows where 20 are expected: a gated activation such as SwiGLU")
        grouped = write(tmp_path / "grouped", form, MODEL)
        narrow = {"layers.0.self_attention.query_key_value.weight": torch.zeros(24, 12, dtype=torch.float16)}
        edit(model_file(grouped, form), lambda c: flat_of(c).update(narrow))
        refused(grouped, "has 24 rows where 36 are expected: multi-query or grouped-query attention")

    @pytest.mark.parametrize("version", [4.0, 0.5, -1, "3.0", float("nan"), True])
    def test_unknown_version(self, tmp_path, version):
        root = write(tmp_path, Form(), MODEL)
        edit(model_file(root, Form()), lambda c: c.update(checkpoint_version=version))
        refused(root, r"unknown checkpoint_version .*; known are 0.0, 1.0, 2.0, 3.0")

    def test_version_that_contradicts_the_keys(self, tmp_path):
        refused(write(tmp_path, Form(1.0, "core"), MODEL), "checkpoint_version 1.0 contradicts the key")

    @pytest.mark.parametrize("value", [torch.zeros(2, 2, dtype=torch.int8), "a string", 3])
    def test_values_that_are_no_weights(self, tmp_path, value):
        root = write(tmp_path, Form(), MODEL)
        edit(model_file(root, Form()), lambda c: flat_of(c).update({"layers.0.mlp.dense_h_to_4h.weight": value}))
        refused(root, "dense_h_to_4h.weight (is a|has dtype)")


class TestContradictions:
    @pytest.mark.parametrize(("name", "value"), [("num_layers", 3), ("hidden_size", 24), ("ffn_hidden_size", 48),
                                                 ("max_position_embeddings", 8), ("padded_vocab_size", 1024)])
    def test_args_and_tensors(self, tmp_path, name, value):
        changes = {name: value} | ({"kv_channels": ...} if name == "hidden_size" else {})
        source = write(tmp_path, Form(changes=changes), MODEL)
        refused(source, f"args in .*model_optim_rng.pt say {name} = {value}, but the tensors.* say ")

    def test_heads_that_do_not_divide(self, tmp_path):
        refused(write(tmp_path, Form(changes={"num_attention_heads": 5, "kv_channels": ...}), MODEL), "num_attention_heads 5")

    @pytest.mark.parametrize(("content", "message"), [
        ({"vocab_size": 600}, "vocab_size = 600, but the word embeddings in .* have only 512 rows"),
        ({"n_layer": 12}, "num_layers = 12"), ({"n_head": 2}, "num_attention_heads = 2"),
        ({"layer_norm_epsilon": 1e-6}, "layernorm_epsilon = 1e-06"),
        ({"activation_function": "gelu"}, "gelu_approximate = 'none'"),
        ({"activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ({"n_head": "four"}, "n_head must be of type int"),
        ({"model_type": "llama"}, "model_type 'llama', expected 'gpt2'"), ([1], "expected a JSON object")])
    def test_config_file(self, tmp_path, content, message):
        config = tmp_path / "c.json"
        config.write_text(json.dumps(content))
        assert "c.json" in refused(write(tmp_path, Form(), MODEL), message, config)

    def test_config_file_that_is_no_json(self, tmp_path):
        config = tmp_path / "c.json"
        config.write_text("{")
        refused(write(tmp_path, Form(), MODEL), "c.json: not readable as JSON", config)
        refused(tmp_path, "nowhere.json: no such file", tmp_path / "nowhere.json")

    def test_untied(self, tmp_path):
        root = write(tmp_path, Form(changes={"untie_embeddings_and_output_weights": True}), MODEL)
        refused(root, "untie_embeddings_and_output_weights = True, but the tensors.* say False")
        model = replace(MODEL, untied=True)
        root = write(tmp_path / "b", Form(changes={"untie_embeddings_and_output_weights": False}), model)
        refused(root, "output_layer.weight differs from the word embeddings, but args say")
