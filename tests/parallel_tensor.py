"""Cases for four ranks: a tensor-parallel GPT-2, with sequence parallelism or without, against the serial one in float64."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.distributed as dist
from parallel_worker import mesh
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_kernels import parallel
from megatron_kernels.models import GPT2, GPT2Config
from megatron_kernels.parallel.layout import shares

CONFIG = GPT2Config(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=160, vocab_size=97,
                    hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)
DROPOUT = dataclasses.replace(CONFIG, hidden_dropout=0.2, embedding_dropout=0.2, attention_dropout=0.2)
SHAPES = {1: (1, 4, 1), 2: (1, 2, 2), 4: (1, 1, 4)}  # pp, dp, tp


def batch(rows: int = 2, length: int = 24, seed: int = 0):
    ids = torch.randint(CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, 5:9] = -100
    return ids, labels


@torch.no_grad()
def draw(model: GPT2) -> GPT2:
    """Give the biases and layer norms, 0 and 1 at first, values of their own: a bias added on every rank would add nothing."""
    for i, (_, parameter, share) in enumerate(sorted(shares(model), key=lambda row: row[0])):
        if parameter.dim() == 1:
            start, stop = (0, share.shape[0]) if share.dim is None else share.group.range(share.shape[0])
            drawn = torch.randn(share.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) * 0.1
            parameter.add_(drawn[start:stop])
    return model


@functools.cache
def serial(config: GPT2Config = CONFIG, length: int = 24):
    """Loss, gradients by name and logits of the serial model."""
    model = draw(GPT2(config, dtype=torch.float64, seed=3))
    ids, labels = batch(length=length)
    loss = model(ids, labels=labels)
    loss.backward()
    with torch.no_grad():
        logits = model.eval()(ids)
    return loss.item(), {name: parameter.grad for name, parameter, _ in shares(model)}, logits


def model_of(tp: int, config: GPT2Config = CONFIG, dtype=torch.float64, **options) -> GPT2:
    return GPT2(config, mesh(*SHAPES[tp]), dtype=dtype, seed=3, **options)


def gradient_error(model, gradients) -> float:
    return max((parameter.grad - share.of(gradients[name])).abs().max().item() for name, parameter, share in shares(model))


def against_serial(tp: int, sequence: bool, config: GPT2Config = CONFIG, length: int = 24, compiled: str = "", **options):
    loss, gradients, logits = serial(config, length)
    model = draw(model_of(tp, config, sequence_parallel=sequence, **options))
    ids, labels = batch(length=length)
    call = torch.compile(model, fullgraph=True, backend=compiled) if compiled else model
    found = call(ids, labels=labels)
    found.backward()
    parallel.finish_gradients(model)
    result = {"loss": abs(found.item() - loss), "gradients": gradient_error(model, gradients)}
    if not compiled:
        with torch.no_grad():
            result["logits"] = (model.eval()(ids) - logits).abs().max().item()
    return result


class Counter(TorchDispatchMode):
    """Counts functional collectives: (kind, group, bytes that this rank puts in) -> how often."""

    def __init__(self):
        super().__init__()
        self.calls: dict[tuple[str, str, int], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and "wait" not in func.__name__:
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            name = next(arg for arg in reversed(args) if isinstance(arg, str))
            key = (func.__name__.split(".")[0], name, sum(t.numel() * t.element_size() for t in tensors))
            self.calls[key] = self.calls.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(tp: int, sequence: bool):
    """Collectives of one step by kind, group and bytes: exactly those of the papers, whatever else the step does."""
    model = model_of(tp, dtype=torch.float32, sequence_parallel=sequence)
    ids, labels = batch(2, 24)
    tokens, h, layers = ids.numel(), CONFIG.hidden_size, CONFIG.num_layers
    group = model.tensor_group.name
    with Counter() as forward:
        loss = model(ids, labels=labels)
    with Counter() as backward:
        loss.backward()
    with Counter() as finish:
        parallel.finish_gradients(model)
    whole = tokens * h * 4
    partials = ("all_gather_into_tensor", group, tokens * 3 * 4)  # max, sum of exp, smoothed logit
    if not sequence:
        reduce = ("all_reduce", group, whole)
        expected = {reduce: 1 + 2 * layers, partials: 1}, {reduce: 1 + 2 * layers}, {}
    else:
        gather, scatter = ("all_gather_into_tensor", group, whole // tp), ("reduce_scatter_tensor", group, whole)
        replicated = sum(parameter.numel() for _, parameter, share in shares(model) if share.dim is None)
        each = {scatter: 1 + 2 * layers, gather: 1 + 2 * layers}
        expected = ({**each, partials: 1}, each, {("all_reduce", group, replicated * 4): 1})
    if tp == 1:
        expected = {}, {}, {}
    found = forward.calls, backward.calls, finish.calls
    assert found == expected, f"found {found}, expected {expected}"
    return {"as in the papers": found == expected}


def same_on_all_ranks(tensor: torch.Tensor, group: parallel.Group) -> bool:
    return bool((parallel.collectives.all_gather(tensor.reshape(1, -1), group, 0) == tensor.reshape(1, -1)).all())


def dropout(sequence: bool):
    """Replicated tensors lose the same elements on every rank, shares different ones, and a layer run again the same as before."""
    ids, labels = batch()
    losses, gradients = [], []
    for recompute in (False, True):
        model = model_of(2, DROPOUT, sequence_parallel=sequence, activation_checkpointing=recompute)
        parallel.seed(11, model.mesh, model)
        losses.append(model(ids, labels=labels))
        losses[-1].backward()
        parallel.finish_gradients(model)
        gradients.append([parameter.grad for parameter in model.parameters()])
        second = model(ids, labels=labels)
    replicated = [parameter.grad for _, parameter, share in shares(model) if share.dim is None]
    own = torch.rand(8, dtype=torch.float64)
    serial_loss = serial()[0]
    return {"recomputed bitwise": all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)),
            "same loss on all ranks": same_on_all_ranks(losses[0].detach(), model.tensor_group),
            "same replicated gradients": all(same_on_all_ranks(grad, model.tensor_group) for grad in replicated),
            "own numbers": not same_on_all_ranks(own, model.tensor_group),
            "something was dropped": abs(losses[0].item() - serial_loss) > 1e-4 and losses[0].item() != second.item()}


def generates(sequence: bool):
    model, whole = model_of(2, sequence_parallel=sequence), GPT2(CONFIG, dtype=torch.float64, seed=3)
    prompt = batch(2, 7)[0]
    keep = torch.ones_like(prompt)
    keep[0, :3] = 0
    options = {"greedy": {"attention_mask": keep}, "sampled": {"do_sample": True, "top_p": 0.9, "seed": 5}}
    found, expected = ({name: m.generate(prompt, max_new_tokens=12, **option) for name, option in options.items()}
                       for m in (model, whole))
    return {name: torch.equal(found[name], expected[name]) for name in found}


def probabilities():
    model, whole = model_of(4), GPT2(CONFIG, dtype=torch.float64, seed=3)
    ids = batch()[0]
    _, probs = model(ids, return_attention_probs=True)
    _, expected = whole(ids, return_attention_probs=True)
    start, stop = model.tensor_group.range(CONFIG.num_attention_heads)
    return {f"layer {i}": (p - e[:, start:stop]).abs().max().item() for i, (p, e) in enumerate(zip(probs, expected, strict=True))}


def same_weights_at_every_size():
    """The weights of a seed are the same at every size, and those without one are agreed on."""
    whole = dict(GPT2(CONFIG, seed=3).named_parameters())
    result = {}
    for tp in SHAPES:
        model = model_of(tp, dtype=torch.float32)
        result[f"tp {tp}"] = all(
            torch.equal(parameter, whole[name] if share.dim is None else whole[name].chunk(tp, share.dim)[model.tensor_group.rank])
            for name, parameter, share in shares(model))
    torch.manual_seed(dist.get_rank())
    model = GPT2(CONFIG, mesh(*SHAPES[4]))
    result["drawn"] = same_on_all_ranks(model.embedding.position_embeddings.weight.detach(), model.tensor_group)
    return result


def refused():
    """What can't be divided is refused with the same words on every rank, before anything is sent."""
    result = {}
    for change, words in (({"num_attention_heads": 2}, "does not divide num_attention_heads 2"),
                          ({"ffn_hidden_size": 30}, "does not divide ffn_hidden_size 30"),
                          ({"vocab_size": 9}, "leave the last rank without any")):
        try:
            model_of(4, dataclasses.replace(CONFIG, padded_vocab_size=None, **change))
        except ValueError as error:
            result[words] = words in str(error)
        else:
            result[words] = False
    for arguments, words in (({"tensor_parallel": 3}, "but there are 4"), ({"data_parallel": 0}, "at least 1, got 0")):
        try:
            parallel.make_mesh(device_type="cpu", **arguments)
        except ValueError as error:
            result[words] = words in str(error)
        else:
            result[words] = False
    try:
        model_of(4, sequence_parallel=True)(batch(length=22)[0])
    except ValueError as error:
        result["sequence"] = "multiple of the 4 tensor-parallel ranks, got 22" in str(error)
    for token in (-1, CONFIG.vocab_size):
        for model in (model_of(4), GPT2(CONFIG)):
            try:
                model(torch.full((1, 4), token))
            except IndexError:
                result[f"token {token} of {model.tensor_group.size}"] = True
            else:
                result[f"token {token} of {model.tensor_group.size}"] = False
    return result


def cases():
    run = functools.partial
    found = {f"tp {tp}, sequence parallel {sequence}": run(against_serial, tp, sequence)
             for tp in SHAPES for sequence in (False, True) if tp > 1 or not sequence}
    for sequence in (False, True):
        label = f"sequence parallel {sequence}"
        found |= {
            f"blocks of queries, {label}": run(against_serial, 2, sequence, length=160),
            f"sdpa, {label}": run(against_serial, 2, sequence, dataclasses.replace(CONFIG, attention="sdpa")),
            f"untied, {label}": run(against_serial, 4, sequence, dataclasses.replace(
                CONFIG, untie_embeddings_and_output_weights=True, padded_vocab_size=110)),
            f"linear loss, {label}": run(against_serial, 4, sequence, dataclasses.replace(CONFIG, fuse_linear_loss=True)),
            f"recomputed, {label}": run(against_serial, 2, sequence, activation_checkpointing=True),
            f"dropout, {label}": run(dropout, sequence),
            f"generate, {label}": run(generates, sequence),
            f"compiled, {label}": run(against_serial, 2, sequence, dataclasses.replace(CONFIG, num_layers=1),
                                      compiled="inductor" if sequence else "aot_eager"),
            **{f"collectives, tp {tp}, {label}": run(counted, tp, sequence) for tp in SHAPES},
        }
    return found | {"attention probabilities": probabilities, "same weights": same_weights_at_every_size, "refused": refused}
