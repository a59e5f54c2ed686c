"""Conversion of a directory of cases with known truth: pytest --checkpoints DIR.

Each case is a directory with input/ (a zip, a .pt or an iteration directory and its tracker file), truth.pt (tensors under Hugging
Face's names, an untied head as `output_layer`), truth_logits.pt (input_ids, logits_f32, logits_f64) and perhaps config_file.json.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_kernels import checkpoint


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        given = metafunc.config.getoption("--checkpoints", default=None)
        cases = sorted(path.parent for path in Path(given).glob("*/truth.pt")) if given else []
        reason = "no cases given: pytest --checkpoints DIR"
        metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in cases]
                             or [pytest.param(None, marks=pytest.mark.skip(reason), id="none")])


def opened(case: Path) -> checkpoint.Checkpoint:
    archives = list((case / "input").glob("*.zip"))
    config = case / "config_file.json"
    return checkpoint.load(archives[0] if archives else case / "input", config if config.exists() else None)


def test_bitwise(case, tmp_path):
    """Equal to the truth with the dtype kept; rows that pad the vocabulary are gone only where its size is known."""
    from safetensors.torch import load_file

    model = opened(case)
    checkpoint.save_huggingface(model, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    truth = torch.load(case / "truth.pt")
    if "output_layer" in truth:
        truth["lm_head.weight"] = truth.pop("output_layer")
    assert set(found) == set(truth)
    for key, tensor in truth.items():
        expected = tensor[:model.config.vocab_size] if key in ("transformer.wte.weight", "lm_head.weight") else tensor
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], expected), key
    columns = torch.load(case / "truth_logits.pt")["logits_f32"].shape[-1]
    assert model.config.vocab_size == columns


def test_transformers(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint.save_huggingface(opened(case), tmp_path / "hf")
    model, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    logits = torch.load(case / "truth_logits.pt")
    with torch.no_grad():
        found = model.eval()(logits["input_ids"]).logits
    assert (found - logits["logits_f32"]).abs().max() < 1e-4


def test_our_model(case):
    from megatron_kernels.models import GPT2

    logits = torch.load(case / "truth_logits.pt")
    with torch.no_grad():
        found = GPT2.from_checkpoint(opened(case)).float().eval()(logits["input_ids"])
    assert found.shape == logits["logits_f32"].shape
    assert (found - logits["logits_f32"]).abs().max() < 1e-4


def test_there_and_back(case, tmp_path):
    """Megatron -> Hugging Face -> Megatron at tensor parallel 2 (and pipeline parallel 2) -> Hugging Face changes no bit."""
    checkpoint.save_huggingface(opened(case), tmp_path / "one")
    first = checkpoint.load(tmp_path / "one")
    pipeline = 2 if first.config.num_layers % 2 == 0 else first.config.num_layers
    checkpoint.save_megatron(first, tmp_path / "megatron", tensor_parallel=2, pipeline_parallel=pipeline)
    checkpoint.save_huggingface(checkpoint.load(tmp_path / "megatron"), tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
