"""Cases for four ranks: training state saved at one parallel layout and loaded at another, and models read and written in parts.

The truth is a serial model, trained a little. Its state goes into a layout and comes out in another, and there every parameter and
every optimizer tensor must have kept its bits. 97 rows of the vocabulary are no multiple of anything.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron_checkpoints import Form, Model, truth, write
from parallel_worker import mesh
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from megatron_kernels import checkpoint, parallel
from megatron_kernels.checkpoint import CheckpointError
from megatron_kernels.models import GPT2, GPT2Config
from megatron_kernels.parallel.layout import shares

CONFIG = GPT2Config(num_layers=4, hidden_size=32, num_attention_heads=4, max_position_embeddings=24, vocab_size=97)
UNTIED = dataclasses.replace(CONFIG, untie_embeddings_and_output_weights=True)
LAYOUTS = ("tp2 x pp2", "tp4", "fsdp dp2 x tp2", "fsdp dp4", "tp2 x pp2, two stages each", "dp4")


@functools.cache
def shared_folder() -> Path:
    """A directory that all ranks see, removed with the first one's process."""
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return Path(box[0])


@functools.cache
def folder(name: str) -> Path:
    return shared_folder() / name


def build(layout: str, config: GPT2Config = CONFIG):
    """(models, optimizer, mesh) of this rank, with weights and a learning rate of their own."""
    shape = {"tp2 x pp2": (2, 1, 2), "tp4": (1, 1, 4), "fsdp dp2 x tp2": (1, 2, 2), "fsdp dp4": (1, 4, 1), "dp4": (1, 4, 1),
             "tp2 x pp2, two stages each": (2, 1, 2)}.get(layout)
    own = mesh(*shape) if shape else None
    at = own.get_local_rank("pp") if own else 0
    numbers, count = {"tp2 x pp2": ([at], 2), "tp2 x pp2, two stages each": ([at, 3 - at], 4)}.get(layout, ([0], 1))
    models = [GPT2(config, own, stage=(number, count), seed=99) for number in numbers]
    if layout.startswith("fsdp"):
        for layer in models[0].decoder.layers:
            fully_shard(layer, mesh=own["dp"])
        fully_shard(models[0], mesh=own["dp"])
    optimizer = torch.optim.AdamW([p for model in models for p in model.parameters()], lr=0.5)
    if layout == "dp4":
        models = [DistributedDataParallel(models[0], process_group=own.get_group("dp"))]
    return models, optimizer, own


def batch(seed: int = 0):
    return torch.randint(CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = batch(step)
        loss = model(ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@functools.cache
def trained(config: GPT2Config = CONFIG):
    """The serial model after three steps, its optimizer, and where they are saved."""
    torch.manual_seed(7)
    model = GPT2(config, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.03)
    train(model, optimizer, range(3))
    path = folder(f"serial {config.untie_embeddings_and_output_weights}")
    if dist.get_rank() == 0:
        checkpoint.save_training(path, model, optimizer, step=3, extra={"tokens": 96, "state": [torch.arange(3)]})
    dist.barrier()
    return model, optimizer, path


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_as_serial(models, optimizer, config: GPT2Config = CONFIG) -> dict[str, bool]:
    """Bits of parameters, optimizer tensors and options, against the serial truth."""
    truth_model, truth_optimizer, _ = trained(config)
    true = {name: (parameter, truth_optimizer.state[parameter]) for name, parameter, _ in shares(truth_model)}
    result = {"parameters": True, "state": True, "options": True}
    for model in models:
        for name, parameter, share in shares(model):
            expected, expected_state = true[name]
            result["parameters"] &= torch.equal(whole(parameter), share.of(expected))
            state = optimizer.state[parameter]
            result["state"] &= set(state) == set(expected_state) and state["step"].item() == expected_state["step"].item()
            for slot in ("exp_avg", "exp_avg_sq"):
                result["state"] &= torch.equal(whole(state[slot]), share.of(expected_state[slot]))
    result["options"] = {**optimizer.param_groups[0], "params": 0} == {**truth_optimizer.param_groups[0], "params": 0}
    return result


def reshard(source: str, config: GPT2Config = CONFIG) -> dict[str, bool]:
    """Serial into `source`, saved there, and loaded at the next layout, there again, and serially."""
    *_, path = trained(config)
    models, optimizer, _ = build(source, config)
    restored = checkpoint.load_training(path, models, optimizer)
    result = {f"from serial: {key}": value for key, value in same_as_serial(models, optimizer, config).items()}
    result["step and extra"] = restored.step == 3 and restored.extra["tokens"] == 96
    result["says that random states are left alone"] = not restored.random and "random states" in restored.notes[0]
    saved = folder(f"{source} {config.untie_embeddings_and_output_weights}")
    checkpoint.save_training(saved, models, optimizer, step=4)
    for target in (source, LAYOUTS[(LAYOUTS.index(source) + 1) % len(LAYOUTS)], "serial"):
        models, optimizer, _ = build(target, config)
        restored = checkpoint.load_training(saved, models, optimizer)
        result |= {f"to {target}: {key}": value for key, value in same_as_serial(models, optimizer, config).items()}
        result[f"to {target}: step"] = restored.step == 4 and restored.random == (target == source)
    return result


def continues() -> dict[str, bool]:
    """TP 2 x DP 2 under DDP with dropout, interrupted and not: the same losses and weights, bit for bit."""
    def fresh(seed):
        own = mesh(1, 2, 2)
        model = GPT2(CONFIG, own, seed=seed)
        parallel.seed(seed, own, model)
        wrapped = DistributedDataParallel(model, process_group=own.get_group("dp"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return wrapped, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    model, optimizer, scheduler = fresh(1)
    checkpoint.save_training(folder("not begun"), model, optimizer, step=0)
    begun = train(model, optimizer, range(2))
    scheduler.step()
    checkpoint.save_training(folder("continues"), model, optimizer, step=2, extra={"scheduler": scheduler.state_dict()})
    losses = train(model, optimizer, range(2, 5))
    again, optimizer, scheduler = fresh(2)
    checkpoint.load_training(folder("not begun"), again, optimizer)
    from_the_start = begun == train(again, optimizer, range(2))
    restored = checkpoint.load_training(folder("continues"), again, optimizer)
    scheduler.load_state_dict(restored.extra["scheduler"])
    return {"restored": restored.random and not restored.notes, "losses from the start": from_the_start,
            "losses": losses == train(again, optimizer, range(2, 5)),
            "parameters": all(map(torch.equal, again.parameters(), model.parameters())),
            "learning rate": scheduler.get_last_lr()[0] == optimizer.param_groups[0]["lr"] < 1e-2}


def parts() -> dict[str, bool]:
    """Each rank's part of a Megatron and of a Hugging Face checkpoint, in tensor- and pipeline-parallel models."""
    small = Model(layers=4, heads=4, head_dim=4, vocab=102, dtype=torch.float32)
    source = folder("megatron")
    if dist.get_rank() == 0:
        write(source, Form(2.0, "encoder", tp=2, pp=2), small, truth(small))
    dist.barrier()
    serial = GPT2.from_megatron(source)
    if dist.get_rank() == 0:
        serial.save_huggingface(folder("hf"))
    dist.barrier()
    expected, result = serial.state_dict(), {}
    for own, stage in ((mesh(1, 1, 4), (0, 1)), (mesh(2, 1, 2), (mesh(2, 1, 2).get_local_rank("pp"), 2))):
        for name, model in {"megatron": GPT2.from_megatron(source, mesh=own, stage=stage),
                            "huggingface": GPT2.from_huggingface(folder("hf"), mesh=own, stage=stage)}.items():
            key = f"{name}, pp {stage[1]}"
            result[key] = all(torch.equal(parameter, share.of(expected[full])) for full, parameter, share in shares(model))
            model.save_huggingface(folder(f"hf of {key}"))
            model.save_megatron(folder(f"megatron of {key}"), tensor_parallel=2, pipeline_parallel=4)
            for path, load in (("hf", GPT2.from_huggingface), ("megatron", GPT2.from_megatron)):
                again = load(folder(f"{path} of {key}")).state_dict()
                result[f"{key}, written as {path}"] = all(torch.equal(again[full][:len(value)], value)
                                                          for full, value in expected.items())
    return result


def gathered() -> dict[str, bool]:
    """Models under fully_shard, and several stages on a rank, written by the first rank."""
    expected, result = trained()[0].state_dict(), {}
    for layout in ("fsdp dp2 x tp2", "tp2 x pp2, two stages each"):
        models, _, own = build(layout)
        checkpoint.load_training(trained()[2], models)
        path = folder(f"gathered {layout}")
        checkpoint.write_together(models, CONFIG, own, lambda whole, path=path: checkpoint.save_huggingface(whole, path))
        again = GPT2.from_huggingface(path).state_dict()
        result[layout] = all(torch.equal(again[name], value) for name, value in expected.items())
    return result


def message(call) -> str:
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "nothing raised"


def errors() -> dict[str, bool]:
    """What fails on one rank fails on all, with one error each, and changes nothing."""
    path, result = trained()[2], {}
    models, optimizer, own = build("tp4")
    before = [parameter.clone() for parameter in models[0].parameters()]
    other, other_optimizer, _ = build("tp4", dataclasses.replace(CONFIG, ffn_hidden_size=64))
    result["configuration"] = "ffn_hidden_size is 128, that of the model 64" in message(
        lambda: checkpoint.load_training(path, other, other_optimizer))
    sgd = torch.optim.SGD(models[0].parameters(), lr=0.1)
    result["optimizer"] = "saved with AdamW, expected SGD" in message(lambda: checkpoint.load_training(path, models, sgd))
    result["nothing there"] = "no training checkpoint" in message(lambda: checkpoint.load_training(folder("nothing"), models))
    damaged = folder("damaged")
    if dist.get_rank() == 0:
        shutil.copytree(checkpoint.latest(path), damaged)
        file = next(damaged.glob("*.distcp"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    result["damaged"] = "length and CRC-32 are" in message(lambda: checkpoint.load_training(damaged, models, optimizer))
    result["unchanged"] = all(map(torch.equal, before, models[0].parameters())) and not optimizer.state

    models, optimizer, own = build("tp2 x pp2")
    result["a destination that is taken"] = "exists and is not empty" in message(lambda: models[0].save_huggingface(path))
    half = models if own.get_local_rank("pp") == 0 else []
    result["a stage is missing"] = "decoder.layers.2" in message(
        lambda: checkpoint.save_training(folder("half"), half, step=0, mesh=own))
    result["nothing was written"] = not folder("half").exists() or not any(folder("half").iterdir())
    if dist.get_rank() == 3:  # one rank's own failure, in the middle
        optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.zeros(3)))
    text = message(lambda: checkpoint.save_training(folder("half"), models, optimizer, step=0))
    result["one rank's failure"] = "is in none of the models" in text and text.startswith("rank 3: ") == (dist.get_rank() != 3)
    return result


def some_ranks() -> dict[str, bool]:
    """A mesh of two of the ranks: the other two take no part."""
    pairs = [DeviceMesh("cpu", pair, mesh_dim_names=("tp",)) for pair in ([0, 1], [2, 3])]
    own = pairs[dist.get_rank() // 2]
    model = GPT2(CONFIG, own, seed=1)
    checkpoint.load_training(trained()[2], model)
    result = {"loaded": all(torch.equal(parameter, share.of(dict(trained()[0].named_parameters())[name]))
                            for name, parameter, share in shares(model))}
    if dist.get_rank() >= 2:
        checkpoint.save_training(folder("pair"), model, step=0)
    dist.barrier()
    again = GPT2(CONFIG, seed=2)
    checkpoint.load_training(folder("pair"), again)
    return {**result, "saved": all(map(torch.equal, again.parameters(), trained()[0].parameters()))}


def cases():
    return {**{f"reshard {source}": functools.partial(reshard, source) for source in LAYOUTS},
            "reshard untied": functools.partial(reshard, "tp2 x pp2", UNTIED), "continues": continues, "parts": parts,
            "gathered": gathered, "errors": errors, "some ranks": some_ranks, "clean up": clean_up}


def clean_up() -> dict[str, bool]:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(shared_folder())
    return {"done": True}
