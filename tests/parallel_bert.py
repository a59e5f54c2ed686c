"""Cases for four ranks: a tensor-parallel BERT in both orderings, against the serial one in float64; read and written by ranks."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile

import torch
import torch.distributed as dist
from parallel_tensor import SHAPES, draw, gradient_error, same_on_all_ranks
from parallel_worker import mesh

from megatron_kernels import parallel
from megatron_kernels.models import Bert, BertConfig
from megatron_kernels.parallel.layout import shares

CONFIG = BertConfig(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=40, vocab_size=97,
                    padded_vocab_size=110,  # of which the last of four ranks has fewer rows than the others
                    hidden_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0)


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(CONFIG.vocab_size, (3, 24), generator=generator)
    keep = torch.ones_like(ids)
    keep[1, 15:], keep[2] = 0, 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > 0.3, -100).masked_fill(keep == 0, -100)
    return ids, labels, {"attention_mask": keep, "tokentype_ids": (torch.arange(24) > 9).long().expand(3, -1)}


def step(model: Bert):
    """Loss of both heads, with its gradients left in the model, and the logits of both."""
    ids, labels, options = batch()
    loss, binary = model(ids, labels, return_binary_logits=True, **options)
    whole = loss + binary[:2].square().sum()
    whole.backward()
    with torch.no_grad():
        return whole.detach(), model(ids, return_binary_logits=True, **options)


def against_serial(tp: int, post: bool, **changes):
    config = dataclasses.replace(CONFIG, apply_residual_connection_post_layernorm=post, **changes)
    whole = draw(Bert(config, dtype=torch.float64, seed=3))
    expected, (true_logits, true_binary) = step(whole)
    gradients = {name: parameter.grad for name, parameter, _ in shares(whole)}
    model = draw(Bert(config, mesh(*SHAPES[tp]), dtype=torch.float64, seed=3))
    loss, (logits, binary) = step(model)
    return {"loss": abs(loss - expected).item(), "gradients": gradient_error(model, gradients),
            "logits": (logits - true_logits).abs().max().item(), "binary": (binary - true_binary).abs().max().item(),
            "cut": model.output_layer.bias.numel() < config.padded_vocab_size}


def dropout():
    """Replicated tensors lose the same elements on every rank, and layers that are run again the same as before."""
    config = dataclasses.replace(CONFIG, hidden_dropout=0.2, embedding_dropout=0.2, attention_dropout=0.2)
    gradients = []
    for again in (False, True):
        model = Bert(config, mesh(*SHAPES[2]), dtype=torch.float64, seed=3, activation_checkpointing=again)
        parallel.seed(11, model.mesh, model)
        loss, _ = step(model)
        gradients.append([parameter.grad for parameter in model.parameters()])
    replicated = [parameter.grad for _, parameter, share in shares(model) if share.dim is None]
    return {"recomputed bitwise": all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)),
            "same loss": same_on_all_ranks(loss, model.tensor_group),
            "same replicated gradients": all(same_on_all_ranks(grad, model.tensor_group) for grad in replicated)}


def checkpoints():
    """Saved by the ranks of a mesh in either format, and read by those of another."""
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    config = dataclasses.replace(CONFIG, padded_vocab_size=None, apply_residual_connection_post_layernorm=True)
    model = draw(Bert(config, mesh(1, 1, 4), seed=3)).eval()
    ids, _, options = batch()
    with torch.no_grad():
        expected = draw(Bert(config, seed=3)).eval()(ids, **options)
        model.save_megatron(f"{box[0]}/m", tensor_parallel=2)
        model.save_huggingface(f"{box[0]}/hf")
        dist.barrier()
        found = {"megatron": Bert.from_megatron(f"{box[0]}/m", mesh=mesh(1, 2, 2)),
                 "huggingface": Bert.from_huggingface(f"{box[0]}/hf", mesh=mesh(1, 1, 4))}
        result = {name: bool((each(ids, **options) - expected).abs().max() < 1e-5) for name, each in found.items()}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(box[0])
    return result


def refused():
    result = {}
    for change, words in (({"num_attention_heads": 2}, "does not divide num_attention_heads 2"),
                          ({"ffn_hidden_size": 30}, "does not divide ffn_hidden_size 30")):
        try:
            Bert(dataclasses.replace(CONFIG, **change), mesh(1, 1, 4))
        except ValueError as error:
            result[words] = words in str(error)
        else:
            result[words] = False
    return result


def cases():
    run = functools.partial
    found = {f"tp {tp}, {'post' if post else 'pre'}-norm": run(against_serial, tp, post) for tp in (2, 4) for post in (False, True)}
    return found | {"sdpa": run(against_serial, 2, True, attention="sdpa"), "dropout": dropout, "checkpoints": checkpoints,
                    "refused": refused}
