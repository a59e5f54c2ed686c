"""Hugging Face directories in and out, Megatron checkpoints out, and the tokenizer's files beside them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_checkpoints import Form, Model, as_huggingface, truth, write
from safetensors.torch import load_file, save_file

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError, Tokenizer

MODEL = Model(layers=4, vocab=512)


def weights(directory):
    return {key: tensor for file in sorted(directory.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def directory(path, model=MODEL, tensors=None, file="model.safetensors", **fields):
    """A Hugging Face directory as transformers has it, made without the package."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = as_huggingface(truth(model), model) if tensors is None else tensors
    if file.endswith(".bin"):
        torch.save(tensors, path / file)
    else:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / file, {"format": "pt"})
    config = {"model_type": "gpt2", "vocab_size": model.vocab, "n_positions": model.positions, "n_embd": model.hidden,
              "n_layer": model.layers, "n_head": model.heads, "n_inner": model.ffn, "activation_function": "gelu_new",
              "tie_word_embeddings": not model.untied}
    (path / "config.json").write_text(json.dumps({k: v for k, v in (config | fields).items() if v is not ...}))
    return path


class TestWriting:
    @pytest.mark.parametrize("untied", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_transformers_loads_it(self, tmp_path, untied, dtype):
        """Without missing or unexpected keys, and its logits are those of the same tensors put into a model by hand."""
        transformers = pytest.importorskip("transformers")
        model = replace(MODEL, untied=untied, dtype=dtype)
        changes = {"layernorm_epsilon": 1e-2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        checkpoint.save_huggingface(checkpoint.load(write(tmp_path, Form(tp=2, changes=changes), model)), tmp_path / "hf")
        loaded, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not any(report.values()), report
        assert loaded.dtype == dtype
        assert loaded.config.layer_norm_epsilon == 1e-2
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == (not untied)
        by_hand = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=512, n_positions=model.positions, n_embd=model.hidden, n_layer=4, n_head=model.heads, n_inner=model.ffn,
            layer_norm_epsilon=1e-2, tie_word_embeddings=not untied))
        by_hand.load_state_dict(as_huggingface(truth(model), model), strict=untied)
        ids = torch.tensor([[1, 500, 7, 7, 2]])
        with torch.no_grad():
            assert torch.equal(loaded.float().eval()(ids).logits, by_hand.float().eval()(ids).logits)

    def test_dtype(self, tmp_path):
        source = checkpoint.load(write(tmp_path, Form(), replace(MODEL, dtype=torch.float32)))
        checkpoint.save_huggingface(source, tmp_path / "hf", dtype=torch.bfloat16)
        found = weights(tmp_path / "hf")
        expected = as_huggingface(truth(replace(MODEL, dtype=torch.float32)), MODEL)
        assert_same(found, {key: tensor.bfloat16() for key, tensor in expected.items()})
        assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"

    @pytest.mark.parametrize("limit", [1, 3000, 10_000])
    def test_shards(self, tmp_path, limit):
        transformers = pytest.importorskip("transformers")
        source = checkpoint.load(write(tmp_path, Form(), MODEL))
        checkpoint.save_huggingface(source, tmp_path / "hf", max_shard_size=limit)
        files = sorted((tmp_path / "hf").glob("*.safetensors"))
        assert len(files) > 1
        for file in files:
            held = load_file(file)
            assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= limit
        assert_same(weights(tmp_path / "hf"), as_huggingface(truth(MODEL), MODEL))
        index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(tmp_path / "hf").values())
        _, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not any(report.values())
        again = checkpoint.load(tmp_path / "hf")
        assert {name: tensor.tolist() for name, tensor in again.tensors.items()} == {
            name: tensor.tolist() for name, tensor in source.tensors.items()}

    def test_tensors_in_memory(self, tmp_path):
        """A checkpoint of plain tensors, as a model under training has them, with a non-contiguous one among them."""
        lazy = checkpoint.load(write(tmp_path, Form(), MODEL))
        plain = {name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in lazy.tensors.items()}
        checkpoint.save_huggingface(checkpoint.Checkpoint(lazy.config, plain), tmp_path / "hf")
        assert_same(weights(tmp_path / "hf"), as_huggingface(truth(MODEL), MODEL))


class TestReading:
    def expected(self, model=MODEL):
        return as_huggingface(truth(model), model)

    def reread(self, path, tmp_path):
        checkpoint.save_huggingface(checkpoint.load(path), tmp_path / "again")
        return weights(tmp_path / "again")

    @pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
    @pytest.mark.parametrize("prefix", [True, False])
    @pytest.mark.parametrize("untied", [False, True])
    def test_files(self, tmp_path, file, prefix, untied):
        model = replace(MODEL, untied=untied)
        tensors = self.expected(model)
        tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 7, 7).tril().bool() for i in range(4)}
        tensors |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(4)}
        if not untied:
            tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        if not prefix:
            tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        assert_same(self.reread(directory(tmp_path / "hf", model, tensors, file), tmp_path), self.expected(model))

    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_shards(self, tmp_path, kind):
        path = directory(tmp_path / "hf")
        (path / "model.safetensors").unlink()
        tensors, weight_map = self.expected(), {}
        stem = "model" if kind == "safetensors" else "pytorch_model"
        for part in range(3):
            keys = sorted(tensors)[part::3]
            name = f"{stem}-{part + 1:05d}-of-00003.{kind}"
            piece = {key: tensors[key].contiguous() for key in keys}
            if kind == "bin":
                torch.save(piece, path / name)
            else:
                save_file(piece, path / name)
            weight_map |= dict.fromkeys(keys, name)
        (path / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert_same(self.reread(path, tmp_path), self.expected())

    def test_what_transformers_writes(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=50, n_positions=9, n_embd=12, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2))
        model.save_pretrained(tmp_path / "hf")
        state = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
        assert_same(self.reread(tmp_path / "hf", tmp_path), state)

    @pytest.mark.parametrize(("name", "gelu"), [("gelu_new", "tanh"), ("gelu_fast", "tanh"), ("gelu_pytorch_tanh", "tanh"),
                                                ("gelu", "none")])
    def test_activation(self, tmp_path, name, gelu):
        assert checkpoint.load(directory(tmp_path, activation_function=name)).config.gelu_approximate == gelu

    @pytest.mark.parametrize(("fields", "message"), [
        ({"activation_function": "relu"}, "activation_function 'relu' is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"model_type": "roberta"}, "model_type 'roberta', expected 'gpt2'"),
        ({"n_layer": 3}, "unknown key h.3.|unknown key transformer.h.3.|h.3"),
        ({"n_layer": 5}, "transformer.h.4.ln_1.weight is missing from the weights"),
        ({"n_embd": 16}, r"wte.weight has shape \[512, 12\], expected \[512, 16\]"),
        ({"vocab_size": 500}, r"wte.weight has shape \[512, 12\], expected \[500, 12\]"),
        ({"n_head": 5}, "num_attention_heads 5"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ])
    def test_refused(self, tmp_path, fields, message):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(directory(tmp_path / "hf", **fields))

    def test_damaged(self, tmp_path):
        path = directory(tmp_path / "hf")
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model.safetensors: truncated or damaged safetensors file"):
            checkpoint.load(path)
        file.unlink()
        with pytest.raises(CheckpointError, match=r"config.json without weights; expected one of model.safetensors, "):
            checkpoint.load(path)
        index = path / "model.safetensors.index.json"
        for target, message in (("../model.safetensors", "refused, a shard's name leaves the directory"),
                                ("gone.safetensors", "missing shard")):
            index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": target}}))
            with pytest.raises(CheckpointError, match=message):
                checkpoint.load(path)
        index.write_text("[]")
        with pytest.raises(CheckpointError, match=r"index.json: expected a JSON object"):
            checkpoint.load(path)


class TestMegatronOut:
    @pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)])
    @pytest.mark.parametrize("untied", [False, True])
    def test_files(self, tmp_path, tp, pp, untied):
        """What Megatron-LM would have written: compared with the independent builder's files, key by key."""
        model = replace(MODEL, untied=untied, dtype=torch.float32)
        source = directory(tmp_path / "hf", model)
        checkpoint.save_megatron(checkpoint.load(source), tmp_path / "out", tensor_parallel=tp, pipeline_parallel=pp)
        assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
        form = Form(3.0, tp=tp, pp=pp, box="release", legacy=False)
        write(tmp_path / "expected", form, model)
        for path in (tmp_path / "expected").rglob("model_optim_rng.pt"):
            expected = torch.load(path, weights_only=False)
            found = torch.load(tmp_path / "out" / path.relative_to(tmp_path / "expected"), weights_only=False)
            assert_same(dict(leaves(found["model"])), dict(leaves(expected["model"])))
            assert found["checkpoint_version"] == 3.0
            for name, value in vars(expected["args"]).items():
                assert getattr(found["args"], name) == value, name
            assert found["args"].untie_embeddings_and_output_weights is untied
        assert len(list((tmp_path / "out").rglob("*.*"))) == tp * pp + 1

    @settings(max_examples=15, deadline=None)
    @given(vocab=st.integers(1, 600), tp=st.sampled_from([1, 2, 4]), untied=st.booleans())
    def test_padding_comes_and_goes(self, tmp_path_factory, vocab, tp, untied):
        root = tmp_path_factory.mktemp("pad")
        model = Model(vocab=vocab, untied=untied)
        checkpoint.save_megatron(checkpoint.load(directory(root / "hf", model)), root / "out", tensor_parallel=tp)
        loaded = checkpoint.load(root / "out")
        rows = loaded.config.padded_vocab_size
        assert rows % (128 * tp) == 0 and 0 <= rows - vocab < 128 * tp
        table = loaded.tensors["embedding.word_embeddings.weight"]
        assert torch.equal(table[vocab:], table[vocab - 1:vocab].expand(rows - vocab, -1))
        checkpoint.save_huggingface(loaded, root / "again")
        assert_same(weights(root / "again"), as_huggingface(truth(model), model))

    @pytest.mark.parametrize(("sizes", "message"), [
        ({"tensor_parallel": 3}, "tensor_parallel 3 does not divide num_attention_heads 4"),
        ({"tensor_parallel": 0}, "tensor_parallel must be at least 1, got 0"),
        ({"pipeline_parallel": 3}, "pipeline_parallel 3 does not divide num_layers 4")])
    def test_sizes_that_do_not_divide(self, tmp_path, sizes, message):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save_megatron(checkpoint.load(directory(tmp_path / "hf")), tmp_path / "out", **sizes)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]

    def test_iteration_and_erf_survive(self, tmp_path):
        flags = {"bias_gelu_fusion": False, "hidden_dropout": 0.25, "layernorm_epsilon": 1e-4}
        first = checkpoint.load(write(tmp_path, Form(changes=flags), MODEL))
        checkpoint.save_megatron(first, tmp_path / "out")
        second = checkpoint.load(tmp_path / "out")
        assert (second.config, second.iteration) == (first.config, 1000)


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A small byte-level BPE: vocab.json and merges.txt, as GPT-2's are distributed."""
    from tokenizers import ByteLevelBPETokenizer

    path = tmp_path_factory.mktemp("bpe")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["the quick brown fox jumps over the lazy dog, they say"] * 50, vocab_size=300, min_frequency=1,
                                special_tokens=["<|endoftext|>"])
    trained.save_model(str(path))
    return path


class TestTokenizer:
    TEXT = "the quick fox says: they jump.\n"

    def ids(self, bpe):
        from tokenizers import ByteLevelBPETokenizer

        return ByteLevelBPETokenizer(str(bpe / "vocab.json"), str(bpe / "merges.txt")).encode(self.TEXT).ids

    @pytest.mark.parametrize("given", ["files", "directory", "tokenizer.json"])
    def test_autotokenizer_finds_it_offline(self, tmp_path, bpe, given, monkeypatch):
        transformers = pytest.importorskip("transformers")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        tokenizer = Tokenizer(vocab_file=bpe / "vocab.json", merges_file=bpe / "merges.txt")
        if given == "directory":
            tokenizer = Tokenizer(bpe)
        if given == "tokenizer.json":
            (tmp_path / "t").mkdir()
            tokenizer.load().save(str(tmp_path / "t/tokenizer.json"))
            tokenizer = Tokenizer(tmp_path / "t")
        checkpoint.save_huggingface(checkpoint.load(directory(tmp_path / "hf")), tmp_path / "out", tokenizer=tokenizer)
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert found(self.TEXT)["input_ids"] == self.ids(bpe)
        assert found.decode(self.ids(bpe)) == self.TEXT
        assert found.eos_token == "<|endoftext|>" and found.model_max_length == MODEL.positions
        config = json.loads((tmp_path / "out/config.json").read_text())
        assert config["eos_token_id"] == found.eos_token_id == 0
        assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 0

    def test_beside_megatron(self, tmp_path, bpe):
        checkpoint.save_megatron(checkpoint.load(directory(tmp_path / "hf")), tmp_path / "out", tokenizer=Tokenizer(bpe))
        assert Tokenizer(tmp_path / "out").load().encode(self.TEXT).ids == self.ids(bpe)
        assert checkpoint.load(tmp_path / "out").config.num_layers == 4

    def test_refused(self, tmp_path, bpe):
        small = checkpoint.load(directory(tmp_path / "hf", replace(MODEL, vocab=200)))
        highest = len(json.loads((bpe / "vocab.json").read_text())) - 1
        with pytest.raises(CheckpointError, match=f"highest id is {highest}, but the model's vocabulary has 200 rows"):
            checkpoint.save_huggingface(small, tmp_path / "out", tokenizer=Tokenizer(bpe))
        assert not (tmp_path / "out").exists()
        (tmp_path / "empty").mkdir()
        (tmp_path / "bad.json").write_text("{}")
        (tmp_path / "bad.txt").write_text("a b\n")
        for make, message in ((lambda: Tokenizer(tmp_path / "empty"), "no tokenizer found; expected tokenizer.json, or"),
                              (lambda: Tokenizer(tmp_path / "nowhere"), "no such directory"),
                              (lambda: Tokenizer(vocab_file=bpe / "vocab.json"), "go together"),
                              (lambda: Tokenizer(bpe, bpe / "vocab.json"), "not both"),
                              (lambda: Tokenizer(None, tmp_path / "no.json", tmp_path / "no.txt").load(), "no.json: no such file"),
                              (lambda: Tokenizer(None, bpe / "vocab.json", tmp_path / "no.txt").load(), "no.txt: no such file"),
                              (lambda: Tokenizer(None, tmp_path / "bad.json", tmp_path / "bad.txt").load(), "not a byte-level")):
            with pytest.raises(CheckpointError, match=message):
                make()
