"""Training state of one process: it continues bit for bit, and what is damaged or does not fit is one clear error."""

from __future__ import annotations

import dataclasses
import os
import pickle
import resource
import shutil
import stat

import pytest
import torch
from torch import nn

from megatron_kernels import checkpoint
from megatron_kernels.checkpoint import CheckpointError
from megatron_kernels.models import GPT2, GPT2Config

CONFIG = GPT2Config(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=24, vocab_size=97)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(step))
        loss = model(ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def groups(model):
    """Weight decay for the matrices alone."""
    matrices, others = ([p for p in model.parameters() if (p.dim() == 2) == matrix] for matrix in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


OPTIMIZERS = {
    "AdamW": lambda model, lr=1e-2: torch.optim.AdamW(model.parameters(), lr=lr, amsgrad=True),
    "AdamW in two groups": lambda model, lr=1e-2: torch.optim.AdamW(groups(model), lr=lr),
    "AdamW, lr a tensor": lambda model, lr=1e-2: torch.optim.AdamW(model.parameters(), lr=torch.tensor(lr), foreach=False),
    "AdamW, names": lambda model, lr=1e-2: torch.optim.AdamW(model.named_parameters(), lr=lr),
    "SGD": lambda model, lr=1e-2: torch.optim.SGD(model.parameters(), lr=lr),
    "SGD with momentum": lambda model, lr=1e-2: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "NAdam": lambda model, lr=1e-2: torch.optim.NAdam(model.parameters(), lr=lr),
    "Adagrad": lambda model, lr=1e-2: torch.optim.Adagrad(model.parameters(), lr=lr),
    "Adafactor": lambda model, lr=1e-2: torch.optim.Adafactor(model.parameters(), lr=lr),
    "ASGD": lambda model, lr=1e-2: torch.optim.ASGD(model.parameters(), lr=lr, t0=2.0),
}


def fresh(kind="AdamW", seed=1, lr=1e-2, config=CONFIG):
    model = GPT2(config, seed=seed)
    return model, OPTIMIZERS[kind](model, lr)


@pytest.fixture
def saved(tmp_path):
    """A run with two checkpoints, of steps 2 and 4."""
    model, optimizer = fresh()
    for step in (2, 4):
        train(model, optimizer, range(step - 2, step))
        checkpoint.save_training(tmp_path / "run", model, optimizer, step=step, extra={"tokens": 64 * step})
    return tmp_path / "run"


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_continues_bitwise(tmp_path, kind):
    torch.manual_seed(5)
    model, optimizer = fresh(kind)
    train(model, optimizer, range(2))
    path = checkpoint.save_training(tmp_path, model, optimizer, step=2)
    assert path == tmp_path / "step_00000002"
    losses = train(model, optimizer, range(2, 5))
    torch.manual_seed(6)
    again, optimizer2 = fresh(kind, seed=2, lr=0.3)
    restored = checkpoint.load_training(tmp_path, again, optimizer2)
    assert (restored.step, restored.extra, restored.path, restored.random, restored.notes) == (2, None, path, True, ())
    assert train(again, optimizer2, range(2, 5)) == losses
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    for one, other in zip(optimizer2.param_groups, optimizer.param_groups, strict=True):
        assert {**one, "params": 0} == {**other, "params": 0}
        assert type(one["lr"]) is type(other["lr"])


def test_before_the_first_step(tmp_path):
    model, optimizer = fresh()
    checkpoint.save_training(tmp_path, model, optimizer, step=0)
    again, optimizer2 = fresh(seed=2)
    train(again, optimizer2, range(1))
    assert checkpoint.load_training(tmp_path, again, optimizer2).step == 0
    assert not optimizer2.state
    assert all(map(torch.equal, again.parameters(), model.parameters()))


def test_extra_and_scheduler(tmp_path):
    model, optimizer = fresh()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 20)
    train(model, optimizer, range(1))
    scheduler.step()
    extra = {"scheduler": {k: v for k, v in scheduler.state_dict().items() if not callable(v) and k != "_anneal_func_type"},
             "seen": torch.arange(5), "names": ["a", ("b", None)]}
    checkpoint.save_training(tmp_path, model, optimizer, step=1, extra=extra)
    again, optimizer2 = fresh()
    found = checkpoint.load_training(tmp_path, again, optimizer2).extra
    assert found["scheduler"] == extra["scheduler"] and found["names"] == extra["names"]
    assert torch.equal(found["seen"], extra["seen"])
    assert optimizer2.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert optimizer2.param_groups[0]["initial_lr"] == optimizer.param_groups[0]["initial_lr"]


def test_wrapped_by_compile_and_any_module(tmp_path):
    model, _ = fresh()
    checkpoint.save_training(tmp_path / "c", torch.compile(model), step=0)
    again, _ = fresh(seed=2)
    checkpoint.load_training(tmp_path / "c", again)
    assert all(map(torch.equal, again.parameters(), model.parameters()))

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    net(torch.randn(5, 3))
    checkpoint.save_training(tmp_path / "n", net, step=0)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    checkpoint.load_training(tmp_path / "n", other)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())
    assert other[1].num_batches_tracked == 1


def test_stages_in_one_process(tmp_path):
    """First and last stage have a copy of the table each: it is written once and read into both."""
    model, optimizer = fresh()
    train(model, optimizer, range(2))
    checkpoint.save_training(tmp_path / "whole", model, optimizer, step=2)
    stages = [GPT2(CONFIG, stage=(number, 2), seed=9) for number in (0, 1)]
    both = torch.optim.AdamW([p for stage in stages for p in stage.parameters()], amsgrad=True)
    restored = checkpoint.load_training(tmp_path / "whole", stages, both)
    assert not restored.random and "stages [[[0, 1]]], loaded on" in restored.notes[0]
    tables = [stage.embedding.word_embeddings.weight for stage in stages]
    for table in tables:
        assert torch.equal(table, model.embedding.word_embeddings.weight)
        assert torch.equal(both.state[table]["exp_avg"], optimizer.state[model.embedding.word_embeddings.weight]["exp_avg"])
    assert both.state[tables[0]]["exp_avg"].data_ptr() != both.state[tables[1]]["exp_avg"].data_ptr()
    checkpoint.save_training(tmp_path / "stages", stages, both, step=2)
    again, optimizer2 = fresh(seed=4)
    checkpoint.load_training(tmp_path / "stages", again, optimizer2)
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    with pytest.raises(CheckpointError, match=r"decoder.layers.1.input_layernorm.weight is on no rank: the stages"):
        checkpoint.save_training(tmp_path / "half", stages[0], step=0)
    assert not (tmp_path / "half").exists()


def test_latest_and_replacing(saved):
    assert checkpoint.latest(saved) == saved / "step_00000004"
    assert checkpoint.latest(saved / "step_00000002") == saved / "step_00000002"
    assert checkpoint.latest(saved.parent) is None and checkpoint.latest(saved / "nothing") is None
    model, optimizer = fresh(seed=3)
    assert checkpoint.load_training(saved / "step_00000002", model, optimizer).extra == {"tokens": 128}
    (saved / ".step_00000007.tmp-left").mkdir()
    checkpoint.save_training(saved, model, optimizer, step=4)
    assert sorted(path.name for path in saved.iterdir()) == ["step_00000002", "step_00000004"]
    again, optimizer2 = fresh(seed=5)
    assert checkpoint.load_training(saved, again, optimizer2).extra is None
    assert all(map(torch.equal, again.parameters(), model.parameters()))
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((saved / "step_00000004").stat().st_mode) == 0o777 & ~umask


def test_a_full_disk_leaves_the_old_checkpoint(saved):
    model, optimizer = fresh()
    train(model, optimizer, range(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1000, 20_000, 200_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError):
                checkpoint.save_training(saved, model, optimizer, step=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(path.name for path in saved.iterdir()) == ["step_00000002", "step_00000004"]
        assert checkpoint.load_training(saved, *fresh(seed=3)).extra == {"tokens": 256}


def test_what_cannot_be_saved(tmp_path):
    model, optimizer = fresh()
    with pytest.raises(CheckpointError, match="extra must be made of numbers, strings, tensors"):
        checkpoint.save_training(tmp_path, model, step=0, extra=CONFIG)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        checkpoint.save_training(tmp_path, model, step=-1)
    with pytest.raises(CheckpointError, match=r"AdamW: a parameter of shape \[97, 32\] is in none of the models"):
        checkpoint.save_training(tmp_path, GPT2(CONFIG), optimizer, step=0)
    (tmp_path / "step_00000003").mkdir()
    with pytest.raises(CheckpointError, match="step_00000003: exists and is no training checkpoint"):
        checkpoint.save_training(tmp_path, model, step=3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file"):
        checkpoint.save_training(tmp_path / "file", model, step=3)


@pytest.mark.parametrize(("change", "text"), [
    ({"num_layers": 4}, "num_layers is 2, that of the model 4"), ({"vocab_size": 96}, "vocab_size is 97, that of the model 96"),
    ({"padded_vocab_size": 128}, "padded_vocab_size is 97, that of the model 128"),
    ({"num_attention_heads": 8}, "num_attention_heads is 4, that of the model 8"),
    ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon is 1e-05, that of the model 1e-06"),
    ({"gelu_approximate": "none"}, "gelu_approximate is 'tanh', that of the model 'none'")])
def test_another_configuration(saved, change, text):
    with pytest.raises(CheckpointError, match=f"of another configuration: its {text}"):
        checkpoint.load_training(saved, GPT2(dataclasses.replace(CONFIG, **change)))


def test_dropout_may_change(saved):
    checkpoint.load_training(saved, GPT2(dataclasses.replace(CONFIG, hidden_dropout=0.0, attention="sdpa")))


def test_what_does_not_fit(saved, tmp_path):
    model, optimizer = fresh()
    with pytest.raises(CheckpointError, match=r"is \[97, 32\] of torch.float32, expected \[97, 32\] of torch.bfloat16"):
        checkpoint.load_training(saved, GPT2(CONFIG, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="was saved with AdamW, expected SGD"):
        checkpoint.load_training(saved, model, torch.optim.SGD(model.parameters()))
    checkpoint.save_training(tmp_path / "groups", model, OPTIMIZERS["AdamW in two groups"](model), step=0)
    with pytest.raises(CheckpointError, match="of one group of this AdamW, have different options"):
        checkpoint.load_training(tmp_path / "groups", model, optimizer)
    checkpoint.save_training(tmp_path / "weights", model, step=0)
    with pytest.raises(CheckpointError, match="word_embeddings.weight has no optimizer state"):
        checkpoint.load_training(tmp_path / "weights", model, optimizer)
    with pytest.raises(CheckpointError, match=r"0.weight is missing"):
        checkpoint.load_training(saved, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match="no training checkpoint, expected step_NNNNNNNN"):
        checkpoint.load_training(tmp_path, model)


def test_every_damaged_file(saved):
    """A flipped bit, a missing end, a missing file: for each file an error that names it, and nothing is overwritten."""
    model, optimizer = fresh(seed=8)
    before = [parameter.clone() for parameter in model.parameters()]
    path = checkpoint.latest(saved)
    files = sorted(path.iterdir())
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "checksums.json", "training.pt"]
    for file in files:
        content = file.read_bytes()
        places = range(5, len(content), max(len(content) // 9, 1))
        flips = [content[:at] + bytes([content[at] ^ 4]) + content[at + 1:] for at in places]
        for damaged in [*flips, content[:-1], content[:len(content) // 2], b"", None]:
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(CheckpointError) as caught:
                checkpoint.load_training(saved, model, optimizer)
            assert "\n" not in str(caught.value)
            assert file.name in str(caught.value) or file.name == "checksums.json" or damaged is None
            file.write_bytes(content)
    assert all(map(torch.equal, before, model.parameters())) and not optimizer.state
    checkpoint.load_training(saved, model, optimizer)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "training.pt"])
def test_truncated_and_not_verified(saved, name):
    file = checkpoint.latest(saved) / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") if name != "__0_0.distcp" else "damaged or unreadable"):
        checkpoint.load_training(saved, fresh()[0], verify=False)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-run",)


def test_nothing_in_a_file_is_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.latest(saved)
    good = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"\.metadata: refused, the pickle refers to \w+\.system"):
        checkpoint.load_training(saved, fresh()[0], verify=False)
    (path / ".metadata").write_bytes(pickle.dumps({"no": "metadata"}))
    with pytest.raises(CheckpointError, match="expected the metadata of torch.distributed.checkpoint, got dict"):
        checkpoint.load_training(saved, fresh()[0], verify=False)
    (path / ".metadata").write_bytes(good)
    torch.save(Evil(), path / "training.pt")
    with pytest.raises(CheckpointError, match=r"training.pt: refused, the pickle refers to \w+\.system"):
        checkpoint.load_training(saved, fresh()[0], verify=False)
    assert not (tmp_path / "evil-was-run").exists()


def test_another_format(saved):
    path = checkpoint.latest(saved)
    torch.save({"format": 2}, path / "training.pt")
    with pytest.raises(CheckpointError, match="training.pt: of format 2, expected 1"):
        checkpoint.load_training(saved, fresh()[0], verify=False)


def test_moved_directory(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    assert checkpoint.load_training(tmp_path / "elsewhere", *fresh(seed=2)).step == 4
