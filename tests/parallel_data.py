"""Cases for four ranks: data parallelism by DDP and FSDP2, alone and with tensor parallelism, against the serial model."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from parallel_pipeline import CONFIG, batch, gradient_error, mean_over, own, serial
from parallel_worker import mesh

from megatron_kernels import parallel
from megatron_kernels.models import GPT2
from megatron_kernels.parallel.data import checksum

LAST = "decoder.layers.3.mlp.linear_fc2.bias"


def model_on(where, **options) -> GPT2:
    return GPT2(CONFIG, where, dtype=torch.float64, seed=3, **options)


def against_serial(shape, kind: str, pieces: int = 1, **options):
    """One step on this replica's part of the batch, in as many pieces; then the norm."""
    where = mesh(*shape)["dp", "tp"]
    model = parallel.data_parallel(model_on(where, **options), where, kind)
    group = parallel.group_of(where, "dp")
    ids, labels = (own(x, group) for x in scored_evenly())
    loss = torch.zeros((), dtype=torch.float64)
    for i, (some, theirs) in enumerate(zip(ids.chunk(pieces), labels.chunk(pieces), strict=True)):
        if i < pieces - 1:
            with parallel.no_sync(model):
                part = model(some, labels=theirs) / pieces
                part.backward()
        else:
            part = model(some, labels=theirs) / pieces
            part.backward()
        loss += part.detach()
    parallel.finish_gradients(model)
    expected, gradients, norm = serial_evenly()
    result = {"loss": abs(mean_over(loss, group) - expected), "gradients": gradient_error([model], gradients)}
    found = parallel.clip_grad_norm_(model, 0.5).item()
    return result | {"norm": abs(found - norm), "clipped": gradient_error([model], gradients, 0.5 / (norm + 1e-6)),
                     "something to clip": norm > 0.5}


def scored_evenly():
    """Every row has as many labels that count, so that means of means are means."""
    ids, _ = batch()
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, 1 + row:4 + row] = -100
    return ids, labels


@functools.cache
def serial_evenly():
    model = GPT2(CONFIG, dtype=torch.float64, seed=3)
    ids, labels = scored_evenly()
    loss = model(ids, labels=labels)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return loss.item(), gradients, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()


def synchronises():
    """Inside no_sync replicas do differ, and the last backward makes up for it."""
    where = mesh(1, 4, 1)
    result = {}
    for kind in ("ddp", "fsdp"):
        model = parallel.data_parallel(model_on(where), where, kind)
        group = parallel.group_of(where, "dp")
        ids, labels = (own(x, group) for x in scored_evenly())
        with parallel.no_sync(model):
            model(ids, labels=labels).backward()
        weight = next(parameter for name, parameter in model.named_parameters() if name.endswith(LAST))
        result[f"{kind} waits"] = (weight.grad is None if kind == "fsdp" else not alike(weight.grad, group))
        model(ids, labels=labels).backward()
        result[f"{kind} sums"] = gradient_error([model], serial_evenly()[1], 2.0)
    return result


def alike(x: torch.Tensor, group: parallel.Group) -> bool:
    return bool((parallel.collectives.all_gather(x[None], group, 0) == x).all())


def differs():
    """A rank with other weights: every rank says which parameter, in which group, and who."""
    result = {}

    def check(name: str, call, *words: str) -> None:
        before = "nothing"
        try:
            call()
        except ValueError as error:
            before = str(error)
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, before)
        result[name] = all(word in before for word in words) or before
        result[f"{name}, on every rank"] = len(set(texts)) == 1

    replicas, both, stages = mesh(1, 4, 1), mesh(1, 2, 2), mesh(2, 1, 2)
    model = model_on(replicas)
    if dist.get_rank() == 2:
        with torch.no_grad():
            model.decoder.layers[1].mlp.linear_fc1.weight[3, 4] *= 1 + 2e-16
    before = checksum(torch.nn.utils.parameters_to_vector(model.parameters()))
    check("replicas", lambda: parallel.data_parallel(model, replicas, "fsdp"),
          "decoder.layers.1.mlp.linear_fc1.weight within group 'dp' (ranks 0, 1, 2, 3): rank 2 from ranks 0, 1, 3")
    result["weights are only read"] = checksum(torch.nn.utils.parameters_to_vector(model.parameters())) == before
    model = model_on(both)
    if dist.get_rank() == 3:
        with torch.no_grad():
            model.decoder.layers[3].mlp.linear_fc2.bias[0] = 1.0
            model.decoder.final_layernorm.weight[:2] = torch.tensor([1.5, 0.5])
    check("replicas of shares", lambda: parallel.data_parallel(model, both, "ddp"),
          f"{LAST} within group 'dp' (ranks 1, 3): rank 3 from rank 1; and 3 more")
    if dist.get_rank() == 1:  # now the replicas agree
        with torch.no_grad():
            model.decoder.layers[3].mlp.linear_fc2.bias[0] = 1.0
            model.decoder.final_layernorm.weight[:2] = torch.tensor([1.5, 0.5])
    check("replicated within tensor parallelism", lambda: parallel.check_same_weights(model, both),
          f"{LAST} within group 'tp' (ranks 0, 1): rank 1 from rank 0; and 3 more")
    pipeline = parallel.Pipeline(CONFIG, stages, microbatches=4, dtype=torch.float64, seed=3)
    if dist.get_rank() == 1:
        with torch.no_grad():
            pipeline.stages[0].embedding.word_embeddings.weight[[0, 1]] = \
                pipeline.stages[0].embedding.word_embeddings.weight[[1, 0]].clone()
    check("tied", lambda: pipeline.wrap_with(lambda stage: stage),
          "embedding.word_embeddings.weight within group 'pp' (ranks 1, 3): rank 3 from rank 1")
    other = GPT2(CONFIG, replicas, dtype=torch.float32 if dist.get_rank() == 1 else torch.float64, seed=3)
    check("dtype", lambda: parallel.data_parallel(other, replicas), "within group 'dp'", "rank 1 from ranks 0, 2, 3")
    return result


def refused():
    where = mesh(1, 2, 2)
    result = {}
    for words, call in {
        "kind must be 'ddp' or 'fsdp', got 'zero'": lambda: parallel.data_parallel(model_on(where), where, "zero"),
        "must have the dimension 'dp', got ('tp',)": lambda: parallel.data_parallel(model_on(where), where["tp"]),
    }.items():
        try:
            call()
        except ValueError as error:
            result[words] = words in str(error) or str(error)
        else:
            result[words] = False
    try:
        parallel.finish_gradients(torch.nn.Linear(2, 2))
    except TypeError as error:
        result["no GPT2"] = "got Linear" in str(error)
    return result


def finishing_is_needed():
    """Under sequence parallelism the gradients are wrong before finish_gradients: the check above can fail."""
    where = mesh(1, 2, 2)
    model = model_on(where, sequence_parallel=True)
    ids, labels = batch()
    model(ids, labels=labels).backward()
    wrong = gradient_error([model], serial()[1])
    parallel.finish_gradients(model)
    return {"before": wrong > 1e-4, "after": gradient_error([model], serial()[1])}


def cases():
    run = functools.partial
    found = {}
    for kind in ("ddp", "fsdp"):
        found |= {
            f"{kind} 2": run(against_serial, (2, 2, 1), kind),
            f"{kind} 4": run(against_serial, (1, 4, 1), kind),
            f"{kind} 2, in four pieces": run(against_serial, (2, 2, 1), kind, 4),
            f"{kind} 2, layers run again": run(against_serial, (2, 2, 1), kind, activation_checkpointing=True),
            f"{kind} 2, tp 2": run(against_serial, (1, 2, 2), kind),
            f"{kind} 2, tp 2, sequence parallel": run(against_serial, (1, 2, 2), kind, sequence_parallel=True),
            f"{kind} 2, tp 2, sequence parallel, in two pieces, layers run again":
                run(against_serial, (1, 2, 2), kind, 2, sequence_parallel=True, activation_checkpointing=True),
        }
    return found | {"synchronises": synchronises, "differs": differs, "refused": refused,
                    "finishing is needed": finishing_is_needed}
