"""Token files and the order of samples: what is read is what was written, and every sample comes once an epoch."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from training_cases import END, corpus, text, words

from megatron_kernels.checkpoint import Tokenizer
from megatron_kernels.training import tokens as token_files
from megatron_kernels.training.data import Batches, Samples, split
from megatron_kernels.training.prepare import in_vocabulary
from megatron_kernels.training.tokens import DataError, TokenFile, Tokens, open_tokens

__all__ = ["text", "words"]  # fixtures


def stream(*arrays) -> Tokens:
    return Tokens([TokenFile(Path(f"{i}.bin"), np.asarray(array), None, str(i)) for i, array in enumerate(arrays)])


def all_of(tokens: Tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist()


class TestTexts:
    @pytest.mark.parametrize("chunk", [3, 7, 50, 1000, 1 << 20])
    def test_pieces_have_the_tokens_of_the_whole(self, tmp_path, monkeypatch, chunk):
        """Also where runs of spaces and line ends are tokens of their own."""
        content = corpus() + "a\n\n\n\nb  \n c\n\n   \n\nd \n\n\n" * 20
        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator([content[-500:]], vocab_size=280, min_frequency=1, special_tokens=["<|endoftext|>"])
        trained.save_model(str(tmp_path))
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        monkeypatch.setattr(token_files, "CHUNK", chunk)
        found = open_tokens([tmp_path / "a.txt"], Tokenizer(tmp_path))
        assert all_of(found) == [*Tokenizer(tmp_path).load().encode(content).ids, END]
        assert found.files[0].ids.dtype == np.uint16

    def test_end_of_text_within_a_text(self, words, tmp_path):
        (tmp_path / "two.txt").write_text("the fox<|endoftext|>lazy")
        ids = all_of(open_tokens([tmp_path / "two.txt"], Tokenizer(words)))
        assert Counter(ids)[END] == 2 and ids[-1] == END

    def test_json_lines(self, words, tmp_path):
        path = tmp_path / "documents.jsonl"
        path.write_text('{"text": "the quick"}\n\n{"text": "brown\\nfox", "more": 1}\n')
        encode = Tokenizer(words).load().encode
        assert all_of(open_tokens([path], Tokenizer(words))) == [*encode("the quick").ids, END, *encode("brown\nfox").ids, END]
        path.write_text('{"text": "the quick"}\n{"txt": "no"}\n')
        with pytest.raises(DataError, match=r"documents.jsonl: line 2 is no JSON object with a string .text."):
            open_tokens([path], Tokenizer(words))

    def test_large_vocabulary(self, tmp_path):
        vocabulary = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 66000)}}
        content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
                   "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w1"}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "a.txt").write_text("w65999 w5")
        found = open_tokens([tmp_path / "a.txt"], Tokenizer(tmp_path))
        assert all_of(found) == [65999, 5, END] and found.files[0].ids.dtype == np.uint32 and found.files[0].vocab_size == 66000

    def test_tokenised_once(self, words, tmp_path, monkeypatch):
        path = tmp_path / "a.txt"
        path.write_text("the fox")
        first = open_tokens([path], Tokenizer(words))
        written = sorted(tmp_path.glob("a.txt.*.bin"))
        assert len(written) == 1
        with monkeypatch.context() as patch:
            patch.setattr(token_files._Texts, "_write", lambda *_: pytest.fail("tokenised again"))
            again = open_tokens([path], Tokenizer(words))
            assert again.digest == first.digest and all_of(again) == all_of(first)
            directly = open_tokens([written[0]], None)  # the token file itself needs no tokenizer
            assert all_of(directly) == all_of(first) and directly.files[0].vocab_size == first.files[0].vocab_size
        path.write_text("the fox jumps")
        changed = open_tokens([path], Tokenizer(words))
        assert len(changed) > len(first) and changed.digest != first.digest
        assert sorted(tmp_path.glob("a.txt.*.bin")) == written
        with pytest.raises(DataError, match=r"a.txt: a text needs a tokenizer: give --tokenizer, or --vocab-file"):
            open_tokens([path], None)

    def test_names_in_a_cache_do_not_clash(self, words, tmp_path):
        for folder, content in (("x", "the fox"), ("y", "lazy dogs jump")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "a.txt").write_text(content)
        found = open_tokens([tmp_path / "x/a.txt", tmp_path / "y/a.txt"], Tokenizer(words), tmp_path / "cache")
        assert Tokenizer(words).load().decode(all_of(found)) == "the foxlazy dogs jump"
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.txt"]

    def test_an_interruption_leaves_nothing(self, text, words, tmp_path, monkeypatch):
        monkeypatch.setattr(token_files, "CHUNK", 100)
        pieces = token_files._pieces

        def breaks(path):
            for number, piece in enumerate(pieces(path)):
                if number == 5:
                    raise KeyboardInterrupt
                yield piece
        monkeypatch.setattr(token_files, "_pieces", breaks)
        with pytest.raises(KeyboardInterrupt):
            open_tokens([text], Tokenizer(words), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_bad_files(self, words, tmp_path):
        (tmp_path / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
        with pytest.raises(DataError, match="latin.txt: not UTF-8 text"):
            open_tokens([tmp_path / "latin.txt"], Tokenizer(words))
        for path, message in ((tmp_path / "none.txt", "none.txt: no such file"), (tmp_path, "no such file, but a directory")):
            with pytest.raises(DataError, match=message):
                open_tokens([path], Tokenizer(words))
        (tmp_path / "t.bin").write_bytes(b"\0\0")
        with pytest.raises(DataError, match=r"t.bin: expected t.json or t.idx beside it"):
            open_tokens([tmp_path / "t.bin"], None)
        for about, message in (("{", "does not describe a token file"), ('{"format": 1}', "does not describe a token file"),
                               (json.dumps({"format": token_files.FORMAT, "dtype": "uint16"}), "damaged"),
                               (json.dumps({"format": token_files.FORMAT, "dtype": "uint16", "tokens": 2, "vocab_size": 5,
                                            "sha256": ""}), "t.bin: 2 bytes, expected 4 by t.json")):
            (tmp_path / "t.json").write_text(about)
            with pytest.raises(DataError, match=message):
                open_tokens([tmp_path / "t.bin"], None)


def write_megatron(stem: Path, sequences: list[list[int]], code: int, dtype: str, **changes: object) -> None:
    """As megatron/core/datasets/indexed_dataset.py lays the files out."""
    size = np.dtype(dtype).itemsize
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    places = changes.get("places", np.cumsum(lengths, dtype="<i8") * size - lengths * size)
    documents = np.arange(len(sequences) + 1, dtype="<i8")
    header = struct.pack("<9sQBQQ", changes.get("magic", b"MMIDIDX\0\0"), changes.get("version", 1), code, len(sequences),
                         len(documents))
    stem.with_suffix(".idx").write_bytes((header + lengths.tobytes() + np.asarray(places, "<i8").tobytes()
                                          + documents.tobytes())[:changes.get("cut")])
    stem.with_suffix(".bin").write_bytes(np.array([token for sequence in sequences for token in sequence], dtype).tobytes())


class TestMegatron:
    SEQUENCES = ([5, 6, 7], [8], [], [9, 10, 250])

    @pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
    @pytest.mark.parametrize("name", ["d", "d.bin", "d.idx"])
    def test_every_dtype(self, tmp_path, code, dtype, name):
        write_megatron(tmp_path / "d", self.SEQUENCES, code, dtype)
        found = open_tokens([tmp_path / name], None)
        assert all_of(found) == [5, 6, 7, 8, 9, 10, 250] and found.files[0].vocab_size is None

    def test_files_of_megatron_core(self, tmp_path):
        indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
        for vocabulary in (50000, 100000):
            stem = str(tmp_path / f"d{vocabulary}")
            builder = indexed.IndexedDatasetBuilder(f"{stem}.bin", dtype=indexed.DType.optimal_dtype(vocabulary))
            for sequence in self.SEQUENCES:
                builder.add_document(np.array(sequence, np.int64), [len(sequence)])
            builder.finalize(f"{stem}.idx")
            assert all_of(open_tokens([Path(stem)], None)) == [5, 6, 7, 8, 9, 10, 250]

    @pytest.mark.parametrize(("changes", "message"), [
        ({"magic": b"MMIDIDY\0\0"}, "d.idx: not an index of Megatron-LM's mmap format"), ({"cut": 20}, "d.idx: not an index"),
        ({"cut": 0}, "d.idx: not an index"), ({"version": 2}, "d.idx: version 2 with dtype code 8, expected version 1"),
        ({"code": 7}, "d.idx: version 1 with dtype code 7"), ({"cut": 60}, "d.idx: 60 bytes are too few for its 4 sequences"),
        ({"places": [0, 2, 8, 8]}, "d.idx: its sequences do not follow each other in d.bin")])
    def test_damaged(self, tmp_path, changes, message):
        write_megatron(tmp_path / "d", self.SEQUENCES, changes.pop("code", 8), "<u2", **changes)
        with pytest.raises(DataError, match=message):
            open_tokens([tmp_path / "d"], None)

    def test_truncated_data(self, tmp_path):
        write_megatron(tmp_path / "d", self.SEQUENCES, 8, "<u2")
        (tmp_path / "d.bin").write_bytes((tmp_path / "d.bin").read_bytes()[:-1])
        with pytest.raises(DataError, match=r"d.bin: 13 bytes, expected 14 by d.idx"):
            open_tokens([tmp_path / "d.bin"], None)


class TestSamples:
    def test_windows_go_over_files_and_share_one_token(self):
        samples, _ = split(stream(range(5), [], range(5, 11), range(11, 14)), 4, 0.0, seed=1)
        assert samples.count == 3
        found = samples[range(3)]
        order = [samples.number(i) for i in range(3)]
        assert sorted(order) == [0, 1, 2]
        assert [row.tolist() for row in found] == [list(range(4 * i, 4 * i + 5)) for i in order]

    def test_every_sample_once_an_epoch(self):
        samples, scored = split(stream(np.arange(10 * 37 + 1)), 10, 0.1, seed=3)
        assert (samples.count, scored.count) == (33, 4)
        epochs = [[samples.number(epoch * 33 + i) for i in range(33)] for epoch in range(3)]
        assert all(sorted(epoch) == list(range(33)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
        assert scored[range(2)][:, 0].tolist() == [330, 340]  # in their order, after all the others

    def test_order_is_a_function_of_seed_and_position(self):
        tokens = stream(np.arange(8 * 1000 + 1))
        samples = Samples(tokens, 8, 1000, seed=5)
        late = [samples.number(position) for position in (2999, 17, 1000)]
        assert [Samples(tokens, 8, 1000, seed=5).number(position) for position in (2999, 17, 1000)] == late
        assert [Samples(tokens, 8, 1000, seed=6).number(position) for position in (2999, 17, 1000)] != late
        # What NumPy's frozen RandomState draws: an order that changed would spoil every run that is to be resumed.
        assert [Samples(tokens, 8, 10, seed=5).number(position) for position in range(20)] == [
            5, 1, 7, 3, 4, 6, 8, 9, 2, 0, 0, 7, 9, 4, 1, 6, 8, 2, 5, 3]

    @pytest.mark.parametrize(("replicas", "micro"), [(1, 1), (1, 4), (2, 2), (4, 3), (2, 6), (12, 1)])
    def test_layouts_share_a_batch_out(self, replicas, micro):
        """Replicas have disjoint parts, and together the positions that follow those of the iteration before."""
        for iteration in (0, 1, 7):
            parts = [Batches(12, micro, replicas, replica).positions(iteration) for replica in range(replicas)]
            assert {len(part) for part in parts} == {12 // (micro * replicas)}
            assert all(len(piece) == micro for part in parts for piece in part)
            found = [position for part in parts for piece in part for position in piece]
            assert sorted(found) == list(range(12 * iteration, 12 * iteration + 12))

    def test_refused(self):
        with pytest.raises(DataError, match=r"0.bin: 16 tokens are too few for one sample of 16 \+ 1"):
            split(stream(range(16)), 16, 0.0, seed=1)
        with pytest.raises(DataError, match=r"0.bin, 1.bin: --valid-fraction 0.1 of 2 samples is none"):
            split(stream(range(30), range(3)), 16, 0.1, seed=1)
        for bad in (-1, 9):
            with pytest.raises(DataError, match=f"the data has the token id {bad}, expected 0 to 8"):
                in_vocabulary([torch.tensor([[3, 8]]), torch.tensor([[3, bad]])], 9)
