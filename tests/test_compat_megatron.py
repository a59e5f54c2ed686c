"""Megatron-core's own GPTModel with and without patch_megatron: on a CPU, in one process and with its layers spread over two.

Each case runs in processes of its own: Megatron-core keeps its groups in module variables, and asks for CUDA where a CPU would do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_kernels import compat

LAYERS, HIDDEN, HEADS, VOCABULARY, LENGTH, BATCH = 2, 32, 4, 64, 16, 2
installed = importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None
needs_megatron = pytest.mark.skipif(not installed, reason="megatron.core is not installed: pip install megatron-core")


class OurOps(TorchDispatchMode):
    """Counts the raw ops of ours that run inside it, backward included."""

    def __enter__(self):
        self.calls: Counter[str] = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "megatron_kernels":
            self.calls[function._opname] += 1
        return function(*args, **(kwargs or {}))


def stand_in_for_cuda() -> None:
    """What Megatron-core needs to run on a CPU: a current device, and a generator for dropout, which is off here."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()
    torch.compiler.set_stance("force_eager")  # its fusions are torch.compile: what they compute is wanted, not the compiler


def run(**options) -> tuple[torch.Tensor, dict[str, torch.Tensor], Counter[str]]:
    """Losses, gradients and the ops of ours that ran, of one step of a GPTModel with the local specification."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(**{
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "use_cpu_initialization": True,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "masked_softmax_fusion": True, "bias_activation_fusion": True,
        "persist_layer_norm": False, "tensor_model_parallel_size": dist.get_world_size(), "init_method_std": 0.2, **options})
    torch.manual_seed(0)
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and name.endswith("weight"):  # not the 1 (or 0) they start as
                parameter.fill_(0.25 if config.layernorm_zero_centered_gamma else 1.25)
            elif name.endswith("bias"):
                parameter.fill_(0.1)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1).repeat(BATCH, 1, 1, 1)
    mask[1, :, :, -3:] = True  # padding
    with OurOps() as ours:
        loss = model(tokens[:, :-1], torch.arange(LENGTH).expand(BATCH, -1), mask, labels=tokens[:, 1:])
        loss.mean().backward()
    for parameter in model.parameters():  # of these each rank saw its part of the sequence only, which training sums up
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad)
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, ours.calls


def same(a, b) -> None:
    """Within float32's rounding, of values of order 1 and sums of a few hundred of them."""
    torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=1e-5)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def compare(world: int) -> None:
    upstream = run()
    assert not upstream[2]
    assert any(g.abs().max() > 1e-2 for g in upstream[1].values())
    rebound = compat.patch_megatron()
    assert "megatron.core.transformer.dot_product_attention.FusedScaleMaskSoftmax" in rebound
    assert "megatron.core.transformer.mlp.bias_gelu_impl" in rebound and compat.patch_megatron() == []
    patched = run()
    same(patched, upstream)
    cross_entropy = "cross_entropy_forward" if world == 1 else "cross_entropy_partial"
    assert patched[2] == {"scaled_masked_softmax_forward": LAYERS, "scaled_masked_softmax_backward": LAYERS,
                          "bias_gelu_forward": LAYERS, "bias_gelu_backward": LAYERS,
                          "layer_norm_forward": 2 * LAYERS + 1, "layer_norm_backward": 2 * LAYERS + 1,
                          cross_entropy: 1, "cross_entropy_backward": 1}
    fused = run(cross_entropy_loss_fusion=True)
    same(fused, upstream)  # its own fused loss rounds gradients to bfloat16
    assert fused[2] == patched[2]
    same(run(memory_efficient_layer_norm=True, persist_layer_norm=True), upstream)  # refused without apex, as are these:
    same(run(layernorm_zero_centered_gamma=True), upstream)
    if world > 1:
        import megatron.core.tensor_parallel as tensor_parallel

        same(run(sequence_parallel=True), upstream)
        smoothed_alike(tensor_parallel.vocab_parallel_cross_entropy)
    assert sorted(compat.unpatch_megatron()) == rebound and compat.unpatch_megatron() == []
    again = run()
    assert not again[2] and torch.equal(again[0], upstream[0])


def smoothed_alike(loss_function) -> None:
    """With smoothing every rank has the loss of the whole vocabulary, and its own columns of the gradient."""
    generator = torch.Generator().manual_seed(2)
    logits, target = torch.randn(5, 1, 12, generator=generator), torch.randint(12, (5, 1), generator=generator)
    rank, part = dist.get_rank(), 12 // dist.get_world_size()
    mine = logits[..., rank * part:(rank + 1) * part].clone().requires_grad_()
    loss = loss_function(mine, target, 0.1)
    loss.sum().backward()
    whole = logits.double().requires_grad_()
    p = torch.log_softmax(whole, -1)
    weights = torch.full_like(p, 0.1 / 11).scatter(-1, target.unsqueeze(-1), 0.9)
    exact = -(weights * p).sum(-1)
    exact.sum().backward()
    torch.testing.assert_close(loss.double(), exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mine.grad.double(), whole.grad[..., rank * part:(rank + 1) * part], atol=1e-6, rtol=1e-6)


def worker(rank: int, world: int, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    stand_in_for_cuda()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(world)
    try:
        compare(world)
    finally:
        dist.destroy_process_group()


@needs_megatron
@pytest.mark.parametrize("world", [1, 2])
def test_gpt_model(world, tmp_path):
    mp.spawn(worker, (world, str(tmp_path / "rendezvous")), nprocs=world)


@needs_megatron
def test_modules_and_specifications_that_hold_a_name_are_rebound_and_restored():
    """In a fresh process: a module imported before the patch, one imported after it, and a specification made at import."""
    code = """
import warnings; warnings.simplefilter("ignore")
import megatron.core.models.bert.bert_layer_specs as before
from megatron.core.transformer.torch_norm import WrappedTorchNorm as theirs
from megatron_kernels import compat
from megatron_kernels.compat import megatron as ours
compat.patch_megatron()
import megatron.core.models.T5.t5_spec as after
spec = before.bert_layer_local_spec.submodules
assert before.LNImpl is after.LNImpl is spec.input_layernorm is spec.pre_mlp_layernorm is ours.WrappedTorchNorm
compat.unpatch_megatron()
assert before.LNImpl is after.LNImpl is spec.input_layernorm is spec.pre_mlp_layernorm is theirs
import sys
assert not any(value is ours.WrappedTorchNorm for name, module in sys.modules.items() if name.startswith("megatron.")
               for value in vars(module).values())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_megatron
def test_megatrons_own_functions_run_on_the_registered_modules():
    """Not patched: its Python code imports the extension modules when it needs them."""
    code = """
import warnings; warnings.simplefilter("ignore")
import torch
from megatron.core.fusions import fused_softmax
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import attention_mask_func
from megatron_kernels import compat
assert set(compat.install().values()) == {"registered"}
for mask_type, masked in ((AttnMaskType.causal, False), (AttnMaskType.padding, True), (AttnMaskType.padding, False)):
    op = fused_softmax.FusedScaleMaskSoftmax(False, True, mask_type, True, attention_mask_func, True, 2.0)
    assert type(op).__module__ == "megatron.core.fusions.fused_softmax"
    x, dy = torch.randn(2, 4, 32, 32).bfloat16().requires_grad_(), torch.randn(2, 4, 32, 32).bfloat16()
    mask = torch.rand(2, 1, 32, 32) < 0.3
    mask[..., 0] = False
    assert op.is_kernel_available(mask, 2, 4, 32, 32)
    y = op(x, mask if masked else None)
    (dx,) = torch.autograd.grad(y, x, dy)
    out = mask if masked else torch.ones(32, 32, dtype=torch.bool).triu(1) if mask_type is AttnMaskType.causal else mask & False
    p = torch.softmax((2.0 * x.detach().double()).masked_fill(out, -torch.inf), -1)
    torch.testing.assert_close(y.double(), p, atol=4e-3, rtol=1e-2)
    torch.testing.assert_close(dx.double(), 2 * p * (dy - (p * dy).sum(-1, keepdim=True)), atol=2e-2, rtol=2e-2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_megatron
def test_norms_that_are_not_layer_norm_stay_megatrons():
    code = """
import warnings; warnings.simplefilter("ignore")
import torch
from types import SimpleNamespace
from megatron_kernels import compat
compat.patch_megatron()
from megatron.core.transformer.torch_norm import WrappedTorchNorm
config = SimpleNamespace(normalization="RMSNorm", layernorm_zero_centered_gamma=False, persist_layer_norm=False,
                         sequence_parallel=False, memory_efficient_layer_norm=False)
assert isinstance(WrappedTorchNorm(config, 8), torch.nn.RMSNorm)
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
try:
    FusedLayerNorm(config, 8)
except AssertionError as error:
    assert "config.normalization must be 'LayerNorm', got 'RMSNorm'" in str(error)
else:
    raise SystemExit("not refused")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_megatron():
    code = """
import sys
sys.modules["megatron"] = None
from megatron_kernels import compat
try:
    compat.patch_megatron()
except ModuleNotFoundError as error:
    assert "needs an installed megatron.core" in str(error) and "pip install megatron-core" in str(error), error
else:
    raise SystemExit("not refused")
assert compat.unpatch_megatron() == []
"""
    subprocess.run([sys.executable, "-c", code], check=True)
