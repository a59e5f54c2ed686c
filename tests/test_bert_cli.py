"""The command line with a BERT, and the vocabulary that goes beside it."""

from __future__ import annotations

import json

import pytest
import torch
from bert_checkpoints import as_huggingface, truth, write
from megatron_checkpoints import Form, Model
from megatron_checkpoints import write as write_gpt2
from safetensors.torch import load_file
from test_cli import fails, run

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError, WordPiece

MODEL = Model(layers=4, vocab=512)
PIECES = ["[PAD]", *(f"[unused{i}]" for i in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "##es"]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "bert-vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return path


def test_convert_and_back(tmp_path, capsys, vocab):
    """Megatron-LM to Hugging Face with the vocabulary, and on to Megatron-LM at another parallel size."""
    write(tmp_path / "m", Form(1.0, "transformer", tp=2, changes={"orig_vocab_size": 500}), MODEL)
    code, out, err = run(capsys, "convert", tmp_path / "m", tmp_path / "hf", "--vocab-file", vocab)
    assert (code, out) == (0, "") and f"wrote {tmp_path / 'hf'}: huggingface" in err
    expected = as_huggingface(truth(MODEL), MODEL, 500)
    found = load_file(tmp_path / "hf/model.safetensors")
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in found)
    assert (tmp_path / "hf/vocab.txt").read_bytes() == vocab.read_bytes()
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "megatron-bert"
    assert not (tmp_path / "hf/generation_config.json").exists()
    assert run(capsys, "convert", tmp_path / "hf", tmp_path / "out", "--to", "megatron", "--tensor-parallel", 2,
               "--pipeline-parallel", 4, "--tokenizer", tmp_path / "hf")[0] == 0
    assert (tmp_path / "out/vocab.txt").exists() and len(list((tmp_path / "out").rglob("*.pt"))) == 8
    assert run(capsys, "convert", tmp_path / "out", tmp_path / "again", "--max-shard-size", "0.005MB")[0] == 0
    found = {key: value for file in (tmp_path / "again").glob("*.safetensors") for key, value in load_file(file).items()}
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert set(found) == set(expected) and all(torch.equal(found[key], expected[key]) for key in found)


def test_inspect(tmp_path, capsys):
    write(tmp_path / "m", Form(2.0, tp=2, changes={"apply_residual_connection_post_layernorm": True}), MODEL)
    code, out, _ = run(capsys, "inspect", tmp_path / "m")
    lines = {" ".join(line.replace("│", " ").split()) for line in out.splitlines()}
    total = sum(tensor.numel() for tensor in truth(MODEL).values())
    assert code == 0
    for expected in ("model BERT", "apply_residual_connection_post_layernorm True", "num_tokentypes 2", "add_binary_head True",
                     "encoder.layers.*.self_attention.linear_qkv.weight x 4 [36, 12] float16 1,728", f"62 tensors {total:,}"):
        assert expected in lines, expected


def test_inspect_without_args(tmp_path, capsys):
    code, out, _ = run(capsys, "inspect", write(tmp_path / "m", Form(None, "transformer", args=False), MODEL))
    assert code == 0 and "give num_attention_heads and vocab_size with a configuration file" in out
    assert "num_attention_heads │ unknown" in " ".join(out.split())


def test_errors_in_one_line(tmp_path, capsys, vocab):
    write(tmp_path / "m", Form(), MODEL)
    write_gpt2(tmp_path / "gpt2", Form(), MODEL)
    message = fails(capsys, "generate", tmp_path / "m", "--prompt", "the")
    assert "m: a BERT, expected a GPT-2; models.Bert is what reads it" in message
    assert "a BERT takes a WordPiece vocabulary" in fails(capsys, "convert", tmp_path / "m", tmp_path / "x", "--vocab-file", vocab,
                                                          "--merges-file", vocab)
    assert "go together" in fails(capsys, "convert", tmp_path / "gpt2", tmp_path / "x", "--vocab-file", vocab)
    assert "nowhere.txt: no such file" in fails(capsys, "convert", tmp_path / "m", tmp_path / "x", "--vocab-file", "nowhere.txt")
    assert not (tmp_path / "x").exists()


def test_old_commands_refuse_a_bert(tmp_path):
    from megatron_kernels.compat import convert_megatron_gpt2_checkpoint as command

    path = write(tmp_path, Form(box="file"), MODEL)
    with pytest.raises(CheckpointError, match="a BERT, expected a GPT-2"):
        command.convert([str(path)])


class TestWordPiece:
    def test_transformers_reads_it(self, tmp_path, vocab):
        transformers = pytest.importorskip("transformers")
        source = checkpoint.load(write(tmp_path / "m", Form(), MODEL))
        checkpoint.save_huggingface(source, tmp_path / "hf", tokenizer=WordPiece(vocab))
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        ids = tokenizer("The foxes [MASK]").input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "fox", "##es", "[MASK]", "[SEP]"]
        assert ids == [PIECES.index(piece) for piece in ("[CLS]", "the", "fox", "##es", "[MASK]", "[SEP]")]

    def test_case(self, tmp_path, vocab):
        assert WordPiece(vocab).lower_case
        vocab.write_text("\n".join([*PIECES, "The"]) + "\n")
        assert not WordPiece(vocab).lower_case
        WordPiece(vocab).write(tmp_path, 7)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["do_lower_case"] is False

    def test_a_directory_is_copied(self, tmp_path, vocab):
        (tmp_path / "tok").mkdir()
        vocab.rename(tmp_path / "tok/vocab.txt")
        (tmp_path / "tok/tokenizer_config.json").write_text("{}")
        (tmp_path / "out").mkdir()
        WordPiece(tmp_path / "tok").write(tmp_path / "out", 7)
        assert (tmp_path / "out/tokenizer_config.json").read_text() == "{}" and (tmp_path / "out/vocab.txt").exists()

    def test_refused(self, tmp_path, vocab):
        with pytest.raises(CheckpointError, match=r"bert-vocab.txt: 17 pieces, but the model's vocabulary has 16 rows"):
            WordPiece(vocab).check(16)
        WordPiece(vocab).check(17)
        (tmp_path / "v.txt").write_text("a\nb\n")
        with pytest.raises(CheckpointError, match=r"v.txt: no WordPiece vocabulary: it has no \[UNK\] among its 2 lines"):
            WordPiece(tmp_path / "v.txt")
        (tmp_path / "v.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(CheckpointError, match=r"v.txt: not readable as text"):
            WordPiece(tmp_path / "v.txt")

    def test_goes_with_a_bert_alone(self, tmp_path, vocab):
        gpt2 = checkpoint.load(write_gpt2(tmp_path / "gpt2", Form(), MODEL))
        bert = checkpoint.load(write(tmp_path / "bert", Form(), MODEL))
        pair = checkpoint.Tokenizer(vocab_file=vocab, merges_file=vocab)
        for save in (checkpoint.save_huggingface, checkpoint.save_megatron):
            with pytest.raises(CheckpointError, match="a WordPiece vocabulary goes with a BERT, and this is a GPT-2"):
                save(gpt2, tmp_path / "x", tokenizer=WordPiece(vocab))
            with pytest.raises(CheckpointError, match="a BERT takes a WordPiece vocabulary, vocab.txt"):
                save(bert, tmp_path / "x", tokenizer=pair)
        assert not (tmp_path / "x").exists()
