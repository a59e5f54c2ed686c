"""The commands of Hugging Face's removed conversion scripts: their arguments, their files, and not their faults.

Expected tensors come from `megatron_checkpoints`, which shares nothing with the package.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron_checkpoints import Form, Model, as_huggingface, chunk, truth, write
from test_checkpoint_huggingface import assert_same, bpe, directory, weights

from megatron_kernels import checkpoint
from megatron_kernels.compat import checkpoint_reshaping_and_interoperability as reshaping
from megatron_kernels.compat import convert_megatron_gpt2_checkpoint as converter

__all__ = ["bpe"]  # the fixture
ROOT = Path(__file__).resolve().parent.parent
MODEL = Model(layers=4, vocab=16)
TO_HUGGINGFACE = "--convert_checkpoint_from_megatron_to_transformers"


def run(capsys, command, *arguments):
    code = converter.run(command, [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def succeeds(capsys, command, *arguments):
    code, out, err = run(capsys, command, *arguments)
    assert code == 0, err
    return out, err


def fails(capsys, command, *arguments):
    """Exit code 2, nothing on stdout, one line on stderr; returns the line."""
    code, out, err = run(capsys, command, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


def pickled(root):
    """What pytorch_model*.bin hold together."""
    return {key: tensor for path in sorted(root.glob("pytorch_model*.bin")) for key, tensor in
            torch.load(path, weights_only=True).items()}


def expected(model=MODEL, dtype=None, vocab=None):
    tensors = as_huggingface(truth(model), model, vocab)
    tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
    return {key: tensor.to(dtype or tensor.dtype) for key, tensor in tensors.items()}


def same_logits_in_transformers(root, model, tensors, activation="gelu_new"):
    """from_pretrained finds all it wants, and computes what the same tensors compute that were put into a model by hand."""
    transformers = pytest.importorskip("transformers")
    loaded, report = transformers.GPT2LMHeadModel.from_pretrained(root, output_loading_info=True)
    assert not any(report.values()), report
    by_hand = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=tensors["lm_head.weight"].shape[0], n_positions=model.positions, n_embd=model.hidden, n_layer=model.layers,
        n_head=model.heads, n_inner=model.ffn, activation_function=activation, tie_word_embeddings=not model.untied))
    by_hand.load_state_dict(tensors)
    ids = torch.tensor([[1, 15, 7, 7, 2]])
    with torch.no_grad():
        found = loaded.float().eval()(ids).logits
        assert found.std() > 1 and torch.equal(found, by_hand.float().eval()(ids).logits)


class TestConverter:
    @pytest.mark.parametrize("form", [
        Form(None, "transformer", args=False, box="zip"), Form(0, "transformer", box="zip"), Form(1.0, "transformer", box="zip"),
        Form(2.0, "encoder", box="zip", noise=True), Form(3.0, "encoder", box="file", noise=True), Form(3.0, "norm", box="file"),
        Form(3.0, "te", box="zip"), Form(3.0, "core_te", box="file"), Form(0, "transformer", tp=2, box="zip"),
        Form(3.0, tp=2, pp=2, box="zip"), Form(None, "transformer", args=False, box="file", legacy=True)], ids=str)
    @pytest.mark.parametrize("untied", [False, True])
    def test_every_kind_of_checkpoint(self, tmp_path, capsys, form, untied):
        """Bit for bit beside the checkpoint, and loadable here and there."""
        model = replace(MODEL, untied=untied)
        path = write(tmp_path, form, model)
        config = []
        if not form.args:
            (tmp_path / "sizes.json").write_text(json.dumps({"n_head": 4, "vocab_size": 16}))
            config = ["--config_file", tmp_path / "sizes.json"]
        succeeds(capsys, converter.convert, path, *config)
        assert_same(pickled(tmp_path), expected(model))
        assert checkpoint.load(tmp_path).format == "huggingface"
        same_logits_in_transformers(tmp_path, model, expected(model))
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    @pytest.mark.parametrize("flags", [(False, False, "gelu"), (True, False, "gelu_new"), (False, True, "gelu_new")])
    def test_activation(self, tmp_path, capsys, flags):
        fusion, openai, activation = flags
        succeeds(capsys, converter.convert, write(tmp_path, Form(box="zip", changes={
            "bias_gelu_fusion": fusion, "openai_gelu": openai, "layernorm_epsilon": 1e-5}), MODEL))
        assert json.loads((tmp_path / "config.json").read_text())["activation_function"] == activation
        same_logits_in_transformers(tmp_path, MODEL, expected(), activation)

    def test_files(self, tmp_path, capsys):
        """Each tensor once (a tied head shares its storage), no causal masks, the epsilon of the args."""
        succeeds(capsys, converter.convert, write(tmp_path, Form(box="zip", changes={"layernorm_epsilon": 1e-3}), MODEL))
        shutil.rmtree(tmp_path / "release")
        assert {path.name for path in tmp_path.iterdir()} == {
            "checkpoint.zip", "latest_checkpointed_iteration.txt", "config.json", "pytorch_model.bin"}
        found = pickled(tmp_path)
        assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
        assert all(tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["layer_norm_epsilon"] == 1e-3 and config["architectures"] == ["GPT2LMHeadModel"]

    def test_original_vocabulary(self, tmp_path, capsys):
        (tmp_path / "c.json").write_text(json.dumps({"vocab_size": 11}))
        out, err = succeeds(capsys, converter.convert, write(tmp_path, Form(box="zip"), MODEL))
        assert (out, "--config_file FILE" in err) == ("", True)
        succeeds(capsys, converter.convert, tmp_path / "checkpoint.zip", "--config_file", tmp_path / "c.json")
        assert_same(pickled(tmp_path), expected(vocab=11))
        succeeds(capsys, converter.convert, write(tmp_path / "2", Form(box="zip", changes={"orig_vocab_size": 13}), MODEL))
        assert_same(pickled(tmp_path / "2"), expected(vocab=13))

    def test_structure(self, tmp_path, capsys):
        out, _ = succeeds(capsys, converter.convert, write(tmp_path, Form(box="zip"), MODEL), "--print-checkpoint-structure",
                          "--config_file", "")
        lines = out.splitlines()
        assert lines[0] == "# transformer.wte.weight                           : torch.Size([16, 12])"
        shapes = {name: tuple(tensor.shape) for name, tensor in expected().items()}
        assert {line.split()[1]: tuple(json.loads(line.partition("Size(")[2][:-1])) for line in lines} == shapes

    def test_relative_path_without_modules(self, tmp_path):
        """As the documentation has it, from the checkpoint's directory, in a process of its own and with nothing to download."""
        write(tmp_path, Form(1.0, "transformer", box="zip", noise=True), MODEL)
        command = [sys.executable, "-m", "megatron_kernels.compat.convert_megatron_gpt2_checkpoint", "checkpoint.zip"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT), "HTTPS_PROXY": "http://127.0.0.1:9"})
        assert (result.returncode, result.stdout) == (0, ""), result.stderr
        assert "wrote config.json and pytorch_model.bin to ." in result.stderr and "no tokenizer" in result.stderr
        assert_same(pickled(tmp_path), expected())

    def test_a_tokenizer_that_lies_there(self, tmp_path, capsys, bpe, monkeypatch):
        transformers = pytest.importorskip("transformers")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(bpe / name, tmp_path)
        path = write(tmp_path, Form(box="zip"), replace(MODEL, vocab=512))
        assert "note: no tokenizer" not in succeeds(capsys, converter.convert, path)[1]
        found = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert found.decode(found("the fox")["input_ids"]) == "the fox"

    def test_twice(self, tmp_path, capsys):
        """Other files stay, one's own are replaced, and what transformers would prefer to them is not left there unnoticed."""
        write(tmp_path, Form(box="zip"), MODEL)
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "pytorch_model.bin").write_bytes(b"old")
        for _ in range(2):
            succeeds(capsys, converter.convert, tmp_path / "checkpoint.zip")
        assert_same(pickled(tmp_path), expected())
        assert (tmp_path / "notes.txt").read_text() == "mine"
        (tmp_path / "model.safetensors").write_bytes(b"another model")
        assert "model.safetensors" in fails(capsys, converter.convert, tmp_path / "checkpoint.zip")

    def test_refused(self, tmp_path, capsys):
        path = write(tmp_path, Form(args=False, box="zip"), MODEL)
        assert "n_head and vocab_size with a configuration file (--config_file FILE" in fails(capsys, converter.convert, path)
        assert "checkpoint_reshaping_and_interoperability" in fails(capsys, converter.convert, tmp_path)
        assert "no such file" in fails(capsys, converter.convert, tmp_path / "absent.zip")
        assert "c.json: no such file" in fails(capsys, converter.convert, path, "--config_file", tmp_path / "c.json")
        assert "path_to_checkpoint" in fails(capsys, converter.convert)
        assert "--depth" in fails(capsys, converter.convert, path, "--depth")
        (tmp_path / "damaged.zip").write_bytes(path.read_bytes()[:-100])
        assert "damaged.zip" in fails(capsys, converter.convert, tmp_path / "damaged.zip")
        shutil.copy(path, tmp_path / "pytorch_model.bin")
        assert "rename it" in fails(capsys, converter.convert, tmp_path / "pytorch_model.bin")
        gated = write(tmp_path / "2", Form(box="file", changes={"swiglu": True}), MODEL)
        assert "SwiGLU" in fails(capsys, converter.convert, gated)
        write(tmp_path / "3", Form(tp=2, box="release"), MODEL)
        assert "missing 1 of 2 shards" in fails(capsys, converter.convert, tmp_path / "3/release/mp_rank_00/model_optim_rng.pt")
        assert not list(tmp_path.rglob("config.json"))

    def test_help(self, capsys):
        for command in (converter.convert, reshaping.convert):
            with pytest.raises(SystemExit) as stop:
                command(["--help"])
            assert stop.value.code == 0 and "usage: python -m megatron_kernels.compat." in capsys.readouterr().out


class TestToHuggingFace:
    @pytest.mark.parametrize("form", [Form(3.0, tp=2, pp=2, noise=True), Form(3.0, "core", tp=4), Form(0, "transformer", tp=2),
                                      Form(3.0, pp=2, vp=2)], ids=str)
    @pytest.mark.parametrize("untied", [False, True])
    def test_every_layout(self, tmp_path, capsys, form, untied):
        model = replace(MODEL, untied=untied)
        write(tmp_path / "in", form, model)
        _, err = succeeds(capsys, reshaping.convert, TO_HUGGINGFACE, "--load_path", tmp_path / "in/iter_0001000", "--save_path",
                          tmp_path / "made/out", "--megatron-path", "absent")
        assert "wrote" in err and "error" not in err
        assert_same(pickled(tmp_path / "made/out"), expected(model, torch.float32))
        same_logits_in_transformers(tmp_path / "made/out", model, expected(model))

    def test_shards_tokenizer_and_dtype(self, tmp_path, capsys, bpe, monkeypatch):
        transformers = pytest.importorskip("transformers")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        model = replace(MODEL, vocab=512)
        arguments = [TO_HUGGINGFACE, "--load_path", write(tmp_path / "in", Form(tp=2), model), "--save_path", tmp_path / "out",
                     "--tokenizer_name", bpe]
        succeeds(capsys, reshaping.convert, *arguments)
        out, _ = succeeds(capsys, reshaping.convert, *arguments, "--max_shard_size", "13KB", "--target_params_dtype", "bf16",
                          "--print-checkpoint-structure")
        assert_same(pickled(tmp_path / "out"), expected(model, torch.bfloat16))
        assert len(out.splitlines()) == len(expected(model))
        files = {path.name for path in (tmp_path / "out").glob("pytorch_model*")}
        assert len(files) > 2 and "pytorch_model.bin" not in files
        index = json.loads((tmp_path / "out/pytorch_model.bin.index.json").read_text())
        assert set(index["weight_map"].values()) == files - {"pytorch_model.bin.index.json"}
        assert set(index["weight_map"]) == set(expected(model))
        assert all(key in torch.load(tmp_path / "out" / file) for key, file in index["weight_map"].items())
        same_logits_in_transformers(tmp_path / "out", model, expected(model, torch.bfloat16))
        assert checkpoint.load(tmp_path / "out").dtype == torch.bfloat16
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert found.decode(found("the fox")["input_ids"]) == "the fox"
        succeeds(capsys, reshaping.convert, *arguments)  # in one piece again: no index of other files stays
        same_logits_in_transformers(tmp_path / "out", model, expected(model))

    def test_refused(self, tmp_path, capsys, bpe):
        source = write(tmp_path / "in", Form(), MODEL)
        arguments = ["--load_path", source, "--save_path", tmp_path / "out"]
        assert "nothing is downloaded" in fails(capsys, reshaping.convert, TO_HUGGINGFACE, *arguments, "--tokenizer_name", "gpt2")
        assert "highest id" in fails(capsys, reshaping.convert, TO_HUGGINGFACE, *arguments, "--tokenizer_name", bpe)
        assert "--max_shard_size" in fails(capsys, reshaping.convert, TO_HUGGINGFACE, *arguments, "--max_shard_size", "10 apples")
        assert TO_HUGGINGFACE in fails(capsys, reshaping.convert, *arguments)
        assert "required: --load_path, --save_path" in fails(capsys, reshaping.convert, TO_HUGGINGFACE)
        huggingface = directory(tmp_path / "hf", MODEL)
        line = fails(capsys, reshaping.convert, TO_HUGGINGFACE, "--load_path", huggingface, "--save_path", tmp_path / "out")
        assert f"leave {TO_HUGGINGFACE} out" in line
        write(tmp_path / "2", Form(args=False), MODEL)
        assert "megatron-kernels convert" in fails(capsys, reshaping.convert, TO_HUGGINGFACE, "--load_path", tmp_path / "2",
                                                   "--save_path", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def shards(root):
    return {path.relative_to(root).as_posix(): torch.load(path, weights_only=False) for path in root.rglob("mp_rank_*/*.pt")}


def flat(tree, prefix=""):
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]


def padded(tensors, rows):
    return {key: torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), -1)]) if key in ("wte", "head") else tensor
            for key, tensor in tensors.items()}


class TestToMegatron:
    @pytest.mark.parametrize("untied", [False, True])
    @pytest.mark.parametrize(("tp", "pp", "divisible", "rows"), [
        (1, 1, None, 128), (2, 2, None, 256), (2, 1, 1, 16), (1, 2, 5, 20), (4, 2, 8, 32), (2, 4, 3, 18)])
    def test_shards(self, tmp_path, capsys, untied, tp, pp, divisible, rows):
        """Each shard holds the rows that Megatron-LM's layout gives it, padded with the last word's row, and loads back."""
        model = replace(MODEL, untied=untied, dtype=torch.float32)
        size = [] if divisible is None else ["--make_vocab_size_divisible_by", divisible]
        _, err = succeeds(capsys, reshaping.convert, "--load_path", directory(tmp_path / "hf", model), "--save_path",
                          tmp_path / "out", "--target_tensor_model_parallel_size", tp, "--target_pipeline_model_parallel_size", pp,
                          *size)
        assert err == f"wrote {tmp_path / 'out'}: megatron, fp32\n"
        assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release"
        form, tensors, table = Form(tp=tp, pp=pp), padded(truth(model), rows), replace(model, vocab=rows)
        found = shards(tmp_path / "out")
        assert len(found) == tp * pp
        for t in range(tp):
            for p in range(pp):
                folder = f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}"
                content = found[f"release/{folder}/model_optim_rng.pt"]
                assert_same(dict(flat(content["model"])), dict(flat(chunk(tensors, form, table, t, p, 0))))
                args = content["args"]
                assert isinstance(args, argparse.Namespace) and content["checkpoint_version"] == 3.0
                assert (args.padded_vocab_size, args.orig_vocab_size) == (rows, 16)
                assert (args.make_vocab_size_divisible_by, args.params_dtype) == (divisible or 128, torch.float32)
                assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.rank) == (tp, pp, p * tp + t)
        succeeds(capsys, reshaping.convert, TO_HUGGINGFACE, "--load_path", tmp_path / "out/release", "--save_path",
                 tmp_path / "back")
        assert_same(pickled(tmp_path / "back"), expected(model))

    @pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
    @pytest.mark.parametrize("divisible", [128, 4])
    def test_dtype(self, tmp_path, capsys, name, dtype, divisible):
        source = directory(tmp_path / "hf", MODEL, file="pytorch_model.bin")
        succeeds(capsys, reshaping.convert, "--load_path", source, "--save_path", tmp_path / "out", "--target_params_dtype", name,
                 "--make_vocab_size_divisible_by", divisible)
        content = shards(tmp_path / "out")["release/mp_rank_00/model_optim_rng.pt"]
        assert {tensor.dtype for _, tensor in flat(content["model"])} == {content["args"].params_dtype} == {dtype}

    @pytest.mark.parametrize("pp", [1, 2])
    def test_distributed_optimizer(self, tmp_path, capsys, pp):
        succeeds(capsys, reshaping.convert, "--load_path", directory(tmp_path / "hf", MODEL), "--save_path", tmp_path / "out",
                 "--target_tensor_model_parallel_size", 2, "--target_pipeline_model_parallel_size", pp,
                 "--target_data_parallel_size", 2, "--use_distributed_optimizer")
        found = shards(tmp_path / "out")
        ranks = [f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "") for t in range(2) for p in range(pp)]
        assert set(found) == {f"release/{rank}/model_rng.pt" for rank in ranks} | {
            f"release/{rank}_{d:03d}/optim.pt" for rank in ranks for d in range(2)}
        assert all(found[f"release/{rank}/model_rng.pt"]["args"].data_parallel_size == 2 for rank in ranks)
        assert all("optimizer" in content for name, content in found.items() if name.endswith("optim.pt"))
        loaded = checkpoint.load(tmp_path / "out")
        assert loaded.config.vocab_size == 16
        assert (loaded.details["tensor parallel"], loaded.details["pipeline parallel"]) == ("2", str(pp))
        checkpoint.save_huggingface(loaded, tmp_path / "back", dtype=torch.float16)
        assert_same(weights(tmp_path / "back"), as_huggingface(truth(MODEL), MODEL))

    def test_structure(self, tmp_path, capsys):
        out, _ = succeeds(capsys, reshaping.convert, "--load_path", directory(tmp_path / "hf", MODEL), "--save_path",
                          tmp_path / "out", "--print-checkpoint-structure", "--target_tensor_model_parallel_size", 2)
        lines = [line.rstrip() for line in out.splitlines()]
        assert [line for line in lines if line.startswith("TP")] == ["TP rank 0, PP rank 0:", "TP rank 1, PP rank 0:"]
        assert "# model" in lines and "..# language_model" in lines and "....# embedding" in lines
        assert f"........# {'weight':40} : torch.Size([128, 12])" in lines
        assert any(line.startswith("# args ") and "num_attention_heads=4" in line for line in lines)

    def test_again_in_another_layout(self, tmp_path, capsys):
        """No shard of the first layout is left between those of the second, and other files are not touched."""
        arguments = ["--load_path", directory(tmp_path / "hf", MODEL), "--save_path", tmp_path / "out"]
        succeeds(capsys, reshaping.convert, *arguments, "--target_tensor_model_parallel_size", 4)
        (tmp_path / "out/notes.txt").write_text("mine")
        succeeds(capsys, reshaping.convert, *arguments, "--target_tensor_model_parallel_size", 2)
        assert sorted(path.name for path in (tmp_path / "out/release").iterdir()) == ["mp_rank_00", "mp_rank_01"]
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"latest_checkpointed_iteration.txt", "notes.txt", "release"}
        assert checkpoint.load(tmp_path / "out").details["tensor parallel"] == "2"

    def test_notes_what_has_no_effect(self, tmp_path, capsys):
        _, err = succeeds(capsys, reshaping.convert, "--load_path", directory(tmp_path / "hf", MODEL), "--save_path",
                          tmp_path / "out", "--tokenizer_name", "gpt2", "--max_shard_size", "10GB")
        assert "note: without effect in this direction: --tokenizer_name\n" in err
        _, err = succeeds(capsys, reshaping.convert, TO_HUGGINGFACE, "--load_path", tmp_path / "out", "--save_path",
                          tmp_path / "back", "--target_data_parallel_size", 2, "--target_tensor_model_parallel_size", 1)
        assert "note: without effect in this direction: --target_data_parallel_size\n" in err

    def test_refused(self, tmp_path, capsys):
        arguments = ["--load_path", directory(tmp_path / "hf", MODEL), "--save_path", tmp_path / "out"]
        for option in ("--target_tensor_model_parallel_size", "--target_pipeline_model_parallel_size"):
            assert "3 does not divide" in fails(capsys, reshaping.convert, *arguments, option, 3)
        for option in ("--target_data_parallel_size", "--make_vocab_size_divisible_by", "--target_tensor_model_parallel_size"):
            for value in ("0", "-1", "two"):
                assert f"{option}: expected a whole number" in fails(capsys, reshaping.convert, *arguments, f"{option}={value}")
        assert "--target_params_dtype" in fails(capsys, reshaping.convert, *arguments, "--target_params_dtype", "float16")
        (tmp_path / "file").write_text("")
        assert "no directory" in fails(capsys, reshaping.convert, *arguments[:3], tmp_path / "file")
        inside = directory(tmp_path / "m/release/hf", MODEL)
        assert "would be replaced" in fails(capsys, reshaping.convert, "--load_path", inside, "--save_path", tmp_path / "m")
        assert not (tmp_path / "out").exists() and (inside / "model.safetensors").exists()


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("direction", ["beside", "huggingface", "megatron"])
def test_disk_full_at_every_size(tmp_path, capsys, direction, crowded):
    """One line, and everything is as it was, wherever a write fails."""
    model = replace(MODEL, layers=2)
    form = Form(box="file" if direction == "beside" else "release")
    write(tmp_path / "in", form, model)
    out = tmp_path / "in" if direction == "beside" else tmp_path / "out"
    command, arguments = {
        "beside": (converter.convert, [tmp_path / "in/model_optim_rng.pt"]),
        "huggingface": (reshaping.convert, [TO_HUGGINGFACE, "--load_path", tmp_path / "in/release", "--save_path", out]),
        "megatron": (reshaping.convert, ["--load_path", directory(tmp_path / "hf", model), "--save_path", out,
                                         "--make_vocab_size_divisible_by", 4]),
    }[direction]
    if crowded:
        out.mkdir(exist_ok=True)
        (out / "notes.txt").write_text("mine")
    state = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}  # noqa: E731
    before, failures = state(), 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in [*range(0, 25_000, 2500), *range(25_000, 60_000, 7000), 10**9]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            code, _, err = run(capsys, command, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if code == 0:
            break
        failures += 1
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert (code, len(lines)) == (2, 1), err
        assert lines == [f"error: {out}: cannot write: File too large"]
        assert state() == before
    assert failures >= 3 and checkpoint.load(out if direction != "beside" else tmp_path / "in").config.num_layers == 2


def test_interrupted(tmp_path, capsys, monkeypatch):
    """Ctrl-C while the weights are written leaves nothing behind."""
    def half(content, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    write(tmp_path, Form(box="zip"), MODEL)
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(converter, "save_torch", half)
    assert run(capsys, converter.convert, tmp_path / "checkpoint.zip")[0] == 130
    assert {path.name for path in tmp_path.iterdir()} == before


def test_failed_exchange(tmp_path, capsys, monkeypatch):
    """When `release` can't be put in place, the one that was there is put back."""
    def refuse(source, target):
        if Path(target).name == "release":
            raise OSError(5, "Input/output error")
        replace_file(source, target)

    arguments = ["--load_path", directory(tmp_path / "hf", MODEL), "--save_path", tmp_path / "out"]
    succeeds(capsys, reshaping.convert, *arguments, "--target_tensor_model_parallel_size", 2)
    replace_file = os.replace
    monkeypatch.setattr(os, "replace", refuse)
    assert fails(capsys, reshaping.convert, *arguments) == f"error: {tmp_path / 'out'}: cannot write: Input/output error\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"latest_checkpointed_iteration.txt", "release"}
    assert checkpoint.load(tmp_path / "out").details["tensor parallel"] == "2"


def test_terminated(tmp_path):
    """So does SIGTERM, to a process."""
    write(tmp_path, Form(box="zip"), MODEL)
    before = {path.name for path in tmp_path.iterdir()}
    code = ("import time; from megatron_kernels.compat import convert_megatron_gpt2_checkpoint as c\n"
            "c.save_torch = lambda content, path: (path.write_bytes(b'half'), print('here', flush=True), time.sleep(60))\n"
            "c.main(c.convert)")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "checkpoint.zip")], stdout=subprocess.PIPE,
                          cwd=ROOT) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert {path.name for path in tmp_path.iterdir()} == before
