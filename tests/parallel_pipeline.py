"""Cases for four ranks: a pipeline on every schedule, alone and mixed with the other parallelisms, against the serial model."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from parallel_tensor import Counter
from parallel_worker import mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from megatron_kernels import parallel
from megatron_kernels.models import GPT2, GPT2Config
from megatron_kernels.parallel.layout import shares

CONFIG = GPT2Config(num_layers=4, hidden_size=32, num_attention_heads=4, max_position_embeddings=32, vocab_size=93,
                    padded_vocab_size=96, hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)
LONG = dataclasses.replace(CONFIG, max_position_embeddings=160)
UNTIED = dataclasses.replace(CONFIG, untie_embeddings_and_output_weights=True)
ONE_BACKWARD = ("GPipe", "1F1B", "LoopedBFS", "Interleaved1F1B")  # a microbatch; the others split it
SCHEDULES = (*ONE_BACKWARD, "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def batch(length: int = 12):
    """Eight rows; what is not scored is spread unevenly over the microbatches, evenly over two replicas."""
    ids = torch.randint(CONFIG.vocab_size, (8, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0] = labels[5] = -100  # a replica has a microbatch without any
    labels[1, 3:8] = labels[7, 1:6] = -100
    return ids, labels


@functools.cache
def serial(config: GPT2Config = CONFIG, length: int = 12, dtype=torch.float64):
    """Loss, gradients by name, and their norm, of the serial model."""
    model = GPT2(config, dtype=dtype, seed=3)
    ids, labels = batch(length)
    loss = model(ids, labels=labels)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter, _ in shares(model)}
    return loss.item(), gradients, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()


def gradient_error(models, expected, factor: float = 1.0) -> float:
    errors = []
    for model in models:
        for name, parameter, share in shares(model):
            found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            errors.append((found - share.of(expected[name]) * factor).abs().max())
    return torch.stack(errors).max().item()


def own(x: torch.Tensor, group: parallel.Group) -> torch.Tensor:
    return x.chunk(group.size)[group.rank]


def mean_over(loss: torch.Tensor, group: parallel.Group) -> float:
    return parallel.collectives.all_reduce(loss, group).item() / group.size


def against_serial(shape, schedule: str, data: str = "", config: GPT2Config = CONFIG, microbatches: int = 4, steps: int = 1,
                   length: int = 12, **options):
    """data: "" gives every replica the whole batch, "ddp" and "fsdp" its part."""
    where = mesh(*shape)
    wrap = (lambda stage: parallel.data_parallel(stage, where, data)) if data else options.pop("wrap", None)
    pipeline = parallel.Pipeline(config, where, microbatches=microbatches, schedule=schedule, dtype=torch.float64, seed=3,
                                 wrap=wrap, **options)
    replicas = parallel.group_of(where, "dp") if data else parallel.Group()
    result = {}
    for step in range(steps):
        if step == 2:  # another shape, and gradients that start anew
            length = 20
            for parameter in pipeline.parameters():
                parameter.grad = None
        expected, gradients, norm = serial(config, length)
        ids, labels = (own(x, replicas) for x in batch(length))
        loss = mean_over(pipeline.step(ids, labels), replicas)
        result |= {f"loss {step}": abs(loss - expected),
                   f"gradients {step}": gradient_error(pipeline.stages, gradients, 1 + (step == 1))}
    if steps == 1:
        found = parallel.clip_grad_norm_(pipeline.models, 0.5, where if data else where["pp", "tp"]).item()
        result |= {"norm": abs(found - norm), "clipped": gradient_error(pipeline.stages, gradients, 0.5 / (norm + 1e-6)),
                   "something to clip": norm > 0.5}
    return result


def evaluates(shape, schedule: str, data: str = "", **options):
    """The serial model's loss without dropout, from a pipeline that is training with it; no gradients, and its mode stays."""
    where, config = mesh(*shape), dataclasses.replace(CONFIG, hidden_dropout=0.5, embedding_dropout=0.5)
    wrap = (lambda stage: parallel.data_parallel(stage, where, data)) if data else None
    pipeline = parallel.Pipeline(config, where, microbatches=4, schedule=schedule, dtype=torch.float64, seed=3, wrap=wrap,
                                 **options)
    replicas = parallel.group_of(where, "dp") if data else parallel.Group()
    norms = [p for model in pipeline.models for name, p in model.named_parameters() if "final_layernorm" in name]
    result = {}
    for length in (12, 20):
        loss = pipeline.evaluate(*(own(x, replicas) for x in batch(length)))
        result[f"loss of {length}"] = abs(mean_over(loss, replicas) - serial(CONFIG, length)[0])
    group = parallel.group_of(where, "pp")
    same = (parallel.collectives.all_gather(loss[None], group, 0) == loss).all().item() if group.size > 1 else True
    with torch.no_grad():
        for parameter in norms:  # as an optimizer has them
            parameter.zero_()
    loss = pipeline.evaluate(*(own(x, replicas) for x in batch()))
    result["of changed weights"] = abs(mean_over(loss, replicas) - math.log(config.vocab_size))
    return result | {"on every rank": same, "nothing else": not loss.requires_grad and all(
        model.training and all(p.grad is None for p in model.parameters()) for model in pipeline.models)}


def trains():
    """Three steps of an optimizer over all of it; the two copies of the tied table stay bitwise equal."""
    where = mesh(2, 2, 1)
    pipeline = parallel.Pipeline(CONFIG, where, microbatches=4, schedule="ZBVZeroBubble", dtype=torch.float64, seed=3,
                                 wrap=lambda stage: parallel.data_parallel(stage, where, "fsdp"))
    whole = GPT2(CONFIG, dtype=torch.float64, seed=3)
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (pipeline, whole))
    ids, labels = batch()
    group = parallel.group_of(where, "dp")
    result = {}
    for step in range(3):
        loss = pipeline.step(own(ids, group), own(labels, group))
        norm = parallel.clip_grad_norm_(pipeline.models, 1.0)
        expected = whole(ids, labels=labels)
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        result |= {f"loss {step}": abs(mean_over(loss, group) - expected.item()),
                   f"norm {step}": abs((norm - expected_norm).item())}
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
    weights = dict(whole.named_parameters())
    result["weights"] = max((parameter.full_tensor() - weights[name]).abs().max().item()
                            for stage in pipeline.stages for name, parameter in stage.named_parameters())
    parallel.check_same_weights(pipeline.stages, where)
    if where.get_local_rank("pp") == 0:
        first, last = (stage.embedding.word_embeddings.weight.to_local() for stage in pipeline.stages)
        result["tied"] = torch.equal(first, last) and first is not last
    return result


def same_everywhere():
    """Initial weights without a seed, and the loss on every rank that shares the model."""
    torch.manual_seed(torch.distributed.get_rank())
    where = mesh(2, 1, 2)
    pipeline = parallel.Pipeline(CONFIG, where, microbatches=2, dtype=torch.float64)
    parallel.check_same_weights(pipeline.stages, where)
    loss = pipeline.step(*batch())
    return {"loss": all((parallel.collectives.all_gather(loss[None], parallel.group_of(where, name), 0) == loss).all().item()
                        for name in ("pp", "tp"))}


def counted(schedule: str, sequence: bool):
    """The collectives within tensor parallelism are those of the papers: a backward in two halves repeats none."""
    where, microbatches = mesh(2, 1, 2), 4
    pipeline = parallel.Pipeline(CONFIG, where, microbatches=microbatches, schedule=schedule, dtype=torch.float64, seed=3,
                                 sequence_parallel=sequence)
    name = pipeline.stages[0].tensor_group.name
    first, last = pipeline.stages[0].is_first, pipeline.stages[-1].is_last
    with Counter() as counter:
        pipeline.step(*batch())
    kinds = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    found = [sum(n for (kind, group, _), n in counter.calls.items() if (kind, group) == (wanted, name)) for wanted in kinds]
    layers = sum(len(stage.decoder.layers) for stage in pipeline.stages)
    pairs, losses = microbatches * (4 * layers + first + last), microbatches * last
    expected = [1, pairs + losses, pairs] if sequence else [pairs, losses, 0]
    assert found == expected, f"found {found}, expected {expected}"
    return {"as in the papers": found == expected}


def compiled():
    return against_serial((2, 1, 2), "1F1B", config=dataclasses.replace(CONFIG, num_layers=2),
                          wrap=lambda stage: torch.compile(stage, backend="aot_eager", fullgraph=True))


def mixed_precision():
    """FSDP2 computing in bfloat16: what stages hand on is of that dtype, gradients of the parameters'."""
    where = mesh(2, 2, 1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    pipeline = parallel.Pipeline(CONFIG, where, microbatches=4, schedule="ZBVZeroBubble", seed=3, hidden_dtype=torch.bfloat16,
                                 wrap=lambda stage: parallel.data_parallel(stage, where, "fsdp", mp_policy=policy))
    group = parallel.group_of(where, "dp")
    loss = pipeline.step(*(own(x, group) for x in batch()))
    expected, gradients, norm = serial(dtype=torch.float32)
    return {"dtype": loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in pipeline.parameters()),
            "loss": abs(mean_over(loss, group) - expected) < 0.01,
            "gradients": 0 < gradient_error(pipeline.stages, gradients) < 0.01 * norm}


def refused():
    """One clear error on every rank, before anything is sent."""
    where, small = mesh(2, 2, 1), dataclasses.replace(CONFIG, num_layers=6)
    fitting = parallel.Pipeline(CONFIG, where, microbatches=4, seed=3, dtype=torch.float64)
    ids, labels = batch()

    def make(config=CONFIG, **options):
        return lambda: parallel.Pipeline(config, where, **{"microbatches": 4, "seed": 3, **options})

    result = {}
    for words, call in {
        "must be one of GPipe, 1F1B": make(schedule="2F2B"),
        "microbatches must be at least 1, got 0": make(microbatches=0),
        "schedule 'ZBVZeroBubble' on 2 ranks has 4 stages, which do not divide num_layers 6": make(small, schedule="ZBVZeroBubble"),
        "'DualPipeV' on 2 ranks refuses these stages with microbatches=2": make(schedule="DualPipeV", microbatches=2),
        "schedule is not supported with stage modules that have used torch.compile": make(schedule="DualPipeV", wrap=torch.compile),
        "use FSDP2": make(schedule="ZBVZeroBubble", wrap=lambda stage: parallel.data_parallel(stage, where)),
        "a multiple of microbatches=4, got 6 rows": lambda: fitting.step(ids[:6], labels[:6]),
        "labels must be [b, s] of int64 or int32, of one shape, got [8, 11]": lambda: fitting.step(ids, labels[:, 1:]),
        "got 5 rows": lambda: fitting.evaluate(ids[:5], labels[:5]),
        "40 tokens are more than max_position_embeddings 32": lambda: fitting.step(*[ids.repeat(1, 4)[:, :40]] * 2),
    }.items():
        try:
            call()
        except ValueError as error:
            result[words] = words in str(error) or str(error)
        else:
            result[words] = False
    v = parallel.Pipeline(CONFIG, where, microbatches=4, schedule="ZBVZeroBubble", seed=3)
    if where.get_local_rank("pp") == 0:
        try:
            parallel.finish_gradients(v.stages[1])
        except ValueError as error:
            result["half a pair"] = "and so has the first stage, on this same rank" in str(error) or str(error)
        else:
            result["half a pair"] = False
    return result


def cases():
    run = functools.partial
    found = {}
    for schedule in SCHEDULES:
        found[f"{schedule}, pp 2"] = run(against_serial, (2, 2, 1), schedule)
        found[f"{schedule}, pp 2, tp 2"] = run(against_serial, (2, 1, 2), schedule)
        found[f"{schedule}, pp 2, dp 2 by fsdp"] = run(against_serial, (2, 2, 1), schedule, "fsdp")
    for schedule in ONE_BACKWARD:
        found[f"{schedule}, pp 2, dp 2 by ddp"] = run(against_serial, (2, 2, 1), schedule, "ddp")
    for schedule in ("1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"):
        found[f"{schedule}, sequence parallel"] = run(against_serial, (2, 1, 2), schedule, sequence_parallel=True)
    for schedule in ("1F1B", "ZBVZeroBubble"):
        found[f"{schedule}, layers run again"] = run(against_serial, (2, 1, 2), schedule, activation_checkpointing=True)
        found[f"{schedule}, untied"] = run(against_serial, (2, 1, 2), schedule, config=UNTIED)
        found[f"{schedule}, three steps"] = run(against_serial, (2, 1, 2), schedule, steps=3, sequence_parallel=True)
        found |= {f"{schedule}, collectives, sequence parallel {sequence}": run(counted, schedule, sequence)
                  for sequence in (False, True)}
    for schedule in SCHEDULES:
        found[f"{schedule}, evaluated"] = run(evaluates, (2, 2, 1), schedule, "fsdp" if schedule == "ZBVZeroBubble" else "")
    return found | {
        "1F1B, pp 2, tp 2, evaluated": run(evaluates, (2, 1, 2), "1F1B", sequence_parallel=True),
        "1F1B, pp 4, evaluated": run(evaluates, (4, 1, 1), "1F1B"),
        "1F1B, pp 1, evaluated": run(evaluates, (1, 2, 2), "1F1B", "ddp"),
        "1F1B, pp 4": run(against_serial, (4, 1, 1), "1F1B"),
        "1F1B, pp 1, tp 2, dp 2 by fsdp": run(against_serial, (1, 2, 2), "1F1B", "fsdp", sequence_parallel=True),
        "DualPipeV, pp 1, tp 2, dp 2 by ddp": run(against_serial, (1, 2, 2), "DualPipeV", "ddp"),
        "ZBVZeroBubble, attention by blocks": run(against_serial, (2, 1, 2), "ZBVZeroBubble", length=132, config=LONG),
        "1F1B, sdpa": run(against_serial, (2, 1, 2), "1F1B", config=dataclasses.replace(CONFIG, attention="sdpa")),
        "1F1B, compiled": compiled, "mixed precision": mixed_precision, "trains": trains, "same everywhere": same_everywhere,
        "refused": refused,
    }
