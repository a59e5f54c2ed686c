"""The settings of a training run, and that they reach the model. What a run then does is in test_benchmarks_scaling_ranks.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import trainer
from benchmarks.trainer import PRESETS, Settings


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    trainer.add_arguments(parser)
    return parser.parse_args(words)


def test_settings_go_through_json_and_the_command_line():
    odd = replace(PRESETS["small-2"], batch=8, microbatches=2, sequence_parallel=True, recompute=True, dtype="bf16", dropout=0.1,
                  schedule="GPipe", data_parallel="fsdp", master_weights=True, learning_rate=3e-5, vocab=1000, attention="sdpa")
    for settings in (*PRESETS.values(), odd):
        assert Settings.from_json(json.loads(json.dumps(settings.as_json()))) == settings
        assert trainer.from_args(arguments(trainer.to_arguments(settings))) == settings
    assert trainer.from_args(arguments(["--preset", "8.3B", "--no-recompute"])) == replace(PRESETS["8.3B"], recompute=False)
    assert odd.config.padded_vocab_size == 1024 and replace(odd, tensor_parallel=1).config.padded_vocab_size == 1024
    assert replace(odd, vocab=1025).config.padded_vocab_size == 1280  # a multiple of 128 x 2
    with pytest.raises(ValueError, match=r"missing \['seed'\], unknown \['speed'\]"):
        Settings.from_json({**{k: v for k, v in odd.as_json().items() if k != "seed"}, "speed": 1})


def test_every_setting_reaches_the_model(monkeypatch):
    given, wrapped = {}, []

    class Enough(Exception):
        pass

    def pipeline(config, mesh, **options):
        given.update(options, config=config)
        options["wrap"]("the stage")
        raise Enough

    monkeypatch.setattr(trainer.parallel, "Pipeline", pipeline)
    monkeypatch.setattr(trainer.parallel, "data_parallel", lambda stage, mesh, kind, **more: wrapped.append((stage, kind, more)))
    odd = replace(Settings(), layers=6, hidden=96, heads=6, vocab=700, sequence=32, microbatches=2, tensor_parallel=2, dropout=0.1,
                  sequence_parallel=True, pipeline_parallel=2, schedule="GPipe", data_parallel="fsdp", recompute=True, dtype="bf16",
                  master_weights=True, attention="sdpa", seed=5)
    with pytest.raises(Enough):
        trainer.Training(odd, None, torch.device("cpu"))
    expected = {"microbatches": 2, "schedule": "GPipe", "sequence_parallel": True, "seed": 5, "activation_checkpointing": True}
    assert {name: given[name] for name in expected} == expected
    assert given["dtype"] == torch.float32 and given["hidden_dtype"] == torch.bfloat16
    c = given["config"]
    assert (c.num_layers, c.hidden_size, c.num_attention_heads, c.vocab_size, c.padded_vocab_size) == (6, 96, 6, 700, 768)
    assert (c.max_position_embeddings, c.attention, c.fuse_linear_loss) == (32, "sdpa", False)
    assert c.hidden_dropout == c.embedding_dropout == c.attention_dropout == 0.1
    (stage, kind, options), = wrapped
    assert (stage, kind) == ("the stage", "fsdp") and options["mp_policy"].param_dtype == torch.bfloat16
    assert options["mp_policy"].reduce_dtype == torch.float32
    with pytest.raises(TypeError, match="not callable"):  # a replica that is alone is not wrapped
        trainer.Training(Settings(fuse_linear_loss=True), None, torch.device("cpu"))
    assert given["config"].fuse_linear_loss and given["dtype"] == torch.float32 and given["wrap"] is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"microbatches": 3}, "microbatches must divide the batch of a replica, 4, got 3"),
    ({"batch": 0}, "batch must be at least 1, got 0"),
    ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16, fp64, got 'int8'"),
    ({"data_parallel": "zero"}, "data_parallel must be one of ddp, fsdp, got 'zero'"),
    ({"master_weights": True}, "master_weights needs data_parallel='fsdp', got 'ddp'"),
    ({"fuse_linear_loss": True, "pipeline_parallel": 2}, "fuse_linear_loss is not for pipeline_parallel > 1"),
    ({"sequence_parallel": True, "tensor_parallel": 2, "sequence": 63}, "multiple of tensor_parallel 2, got 63")])
def test_settings_that_no_run_can_have(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(Settings(), **changes)
