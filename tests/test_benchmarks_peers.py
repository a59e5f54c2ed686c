"""The libraries beside which ops are measured: each adapter computes the op, and whatever is missing or fails is named in one line.

Megatron-core and transformers run here. The others are for GPUs: modules with their functions' names and arguments, as read in
quack 0.6.5, Liger-Kernel 0.8.5, Transformer Engine 2.20, flash-attn 2.8.4 and apex at 6424da3, stand in for them.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from test_benchmarks import MATRICES, SMALL_CASES, one_thread
from test_benchmarks_gpu import small

from benchmarks import measure, ops, peers
from benchmarks.cases import DTYPES, MODES, Case, Truth, prepare
from benchmarks.peers import BY_NAME, PEERS, Peer
from benchmarks.rows import Results

assert one_thread and small  # fixtures
CASES = [replace(case, shape=(2, 4, 32, 32)) if case.title == "causal softmax" else case for case in (*SMALL_CASES, MATRICES[0])]
BY_TITLE = {case.title: case for case in CASES}


def run(name: str, case: Case, dtype: str) -> str:
    """How the adapter's function is off, after it was run in every mode as the benchmark does, on inputs that stay as they are."""
    inputs, gradient = prepare(case, case.shape, DTYPES[dtype], "cpu")
    before = [x.detach().clone() for x in inputs]
    made = peers.make(name, case, inputs)
    assert [x.numel() for x in made.inputs] == [x.numel() for x in inputs]
    off = Truth(case, inputs, gradient).peer_mismatch(made)
    for mode in MODES:
        with torch.set_grad_enabled(mode != "forward"):
            contestant = measure.contestant_of(name, made, gradient, mode)
            for _ in range(2):
                contestant.run()
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    return off


@pytest.fixture
def megatron():
    """Without torch.compile, which its functions are wrapped in, and without a process group afterwards."""
    pytest.importorskip("megatron.core")
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
    if torch.distributed.is_initialized():
        peers.alone_no_more()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "title"), [
    ("megatron-unfused", "causal softmax"), ("megatron-unfused", "cross-entropy"), ("megatron-fused", "bias-GeLU")])
def test_megatron(megatron, name, title, dtype):
    assert run(name, BY_TITLE[title], dtype) == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatrons_fused_gradient_is_rounded_to_bf16(megatron, dtype):
    """Whatever the dtype of the logits; in float32 the check finds it."""
    off = run("megatron-fused", BY_TITLE["cross-entropy"], dtype)
    assert ("gradient of input 0" in off) == (dtype == "fp32")


@pytest.mark.parametrize(("title", "dtype", "why"), [
    ("causal softmax", "fp32", "does not take this shape or dtype"), ("causal softmax", "bf16", "scaled_masked_softmax_cuda"),
    ("layer norm", "fp32", "Apex must be installed")])
def test_what_megatron_lacks_is_named(megatron, title, dtype, why):
    inputs, _ = prepare(BY_TITLE[title], BY_TITLE[title].shape, DTYPES[dtype], "cpu")
    with pytest.raises((peers.NotApplicable, ImportError, ValueError), match=why):
        peers.make("megatron-fused", BY_TITLE[title], inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_megatron_compiled(dtype):
    pytest.importorskip("megatron.core")
    assert run("megatron-fused", BY_TITLE["bias-GeLU"], dtype) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("title", ["causal softmax", "bias-GeLU"])
def test_transformers(title, dtype):
    pytest.importorskip("transformers")
    assert run("transformers", BY_TITLE[title], dtype) == ""


def test_transformers_softmax_is_what_its_eager_attention_does():
    """With keys and values that are the identity, its products pass the scores in and the probabilities out."""
    modeling = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    case = replace(BY_TITLE["causal softmax"], shape=(1, 2, 8, 8))
    (x, future), _ = prepare(case, case.shape, torch.float32, "cpu")
    made = peers.make("transformers", case, (x, future))
    one = torch.eye(8).expand(1, 2, 8, 8)
    mask = torch.zeros(8, 8).masked_fill(future, torch.finfo(torch.float32).min)[None, None]
    attention, weights = modeling.eager_attention_forward(torch.nn.Module().eval(), x, one, one, mask, scaling=1.0)
    assert torch.equal(weights, made.function(*made.inputs)) and torch.equal(attention.transpose(1, 2), weights)


def loss_of(logits, target):
    return F.cross_entropy(logits.float(), target, reduction="none")


def fake_modules() -> dict[str, dict[str, object]]:
    """Module -> what the adapters take from it, with the arguments of the real one, computing in PyTorch."""
    def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
        assert x.dim() == 2 and weight.dtype == bias.dtype == torch.float32
        mean = x.float().mean(-1)
        rstd = (x.float().var(-1, correction=0) + eps).rsqrt()
        y = ((x.float() - mean[:, None]) * rstd[:, None] * weight + bias).to(x.dtype)
        return (y, rstd, mean) if return_rstd and return_mean else y

    def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
        xhat, dy = (x.float() - mean[:, None]) * rstd[:, None], dout.float()
        g = dy * weight
        dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd[:, None]
        return dx.to(x.dtype), (dy * xhat).sum(0), dy.sum(0)

    def quack_loss(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean", inplace_backward=False):
        assert x.dim() == 2 and reduction == "none"
        return loss_of(x, target)

    class InPlace(torch.autograd.Function):
        """A loss that leaves its gradient where its input was, as Liger-Kernel's does when the input wants one."""

        @staticmethod
        def forward(ctx, logits, target):
            loss = loss_of(logits, target)
            if logits.requires_grad:
                logits.copy_(torch.softmax(logits.float(), -1) - F.one_hot(target, logits.shape[-1]))
                ctx.save_for_backward(logits.detach())
            return loss.to(logits.dtype)

        @staticmethod
        def backward(ctx, dloss):
            return ctx.saved_tensors[0] * dloss[:, None], None

    def liger_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
        assert reduction == "none"
        return InPlace.apply(input, target)

    class VocabParallel:
        def __call__(self, vocab_parallel_logits, target, tp_group=None):
            assert vocab_parallel_logits.dim() == 3 and target.shape == vocab_parallel_logits.shape[:2]
            return loss_of(vocab_parallel_logits.transpose(1, 2), target)

    class TESoftmax:
        def __init__(self, mask_func, softmax_in_fp32=True):
            self.mask_func = mask_func

        def __call__(self, inp, mask, attn_mask_type, scale=None):
            assert attn_mask_type == "arbitrary" and mask.shape == (1, 1, *inp.shape[2:])
            return torch.softmax(self.mask_func(inp.float(), mask), -1).to(inp.dtype)

    class TELayerNorm(torch.nn.LayerNorm):
        def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
                     hidden_size=None, **kwargs):
            super().__init__(normalized_shape, eps, **kwargs)

    def bgrad_dgelu_fused(grad_output, inp, bias):
        with torch.enable_grad():
            x = (inp.float() + bias.float()).requires_grad_()
            dx, = torch.autograd.grad(F.gelu(x, approximate="tanh"), x, grad_output.float())
        return dx.sum(0).to(bias.dtype), dx.to(inp.dtype)

    def parallel_cross_entropy(inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None, ignore_idx=-100,
                               is_cg_capturable=False):
        assert inp.dim() == 3 and target.shape == inp.shape[:2]
        return loss_of(inp.transpose(1, 2), target)

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    class FastLayerNormFN:
        @staticmethod
        def apply(x, gamma, beta, epsilon, memory_efficient=False):
            return F.layer_norm(x, x.shape[-1:], gamma, beta, epsilon)

    class ApexLoss:
        @staticmethod
        def apply(logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
            assert (smoothing, padding_idx) == (0.0, -100) and half_to_float == (logits.dtype != torch.float32)
            return loss_of(logits, labels)

    def layer_norm_fn(x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def cross_entropy_loss(logits, labels, precomputed_lse=None, label_smoothing=0.0):
        return loss_of(logits, labels), torch.zeros(len(labels))

    return {
        "quack.softmax": {"softmax": lambda x: torch.softmax(x, -1)}, "quack.cross_entropy": {"cross_entropy": quack_loss},
        "quack.rmsnorm": {"layernorm_fwd": layernorm_fwd, "layernorm_bwd": layernorm_bwd},
        "liger_kernel.transformers.functional": {
            "liger_softmax": lambda x: torch.softmax(x, -1), "liger_cross_entropy": liger_loss,
            "liger_layer_norm": lambda X, W, B, eps: F.layer_norm(X, X.shape[-1:], W, B, eps)},
        "liger_kernel.megatron": {"LigerMegatronCrossEntropy": VocabParallel},
        "transformer_engine.pytorch": {"LayerNorm": TELayerNorm},
        "transformer_engine.pytorch.utils": {"attention_mask_func": lambda scores, mask: scores.masked_fill(mask, -10000.0)},
        "transformer_engine.pytorch.attention.dot_product_attention.softmax": {"FusedScaleMaskSoftmax": TESoftmax},
        "transformer_engine.pytorch.jit": {"bgrad_dgelu_fused": bgrad_dgelu_fused, "bias_gelu_fused": lambda inp, bias: F.gelu(
            inp.float() + bias.float(), approximate="tanh").to(inp.dtype)},
        "transformer_engine.pytorch.cross_entropy": {"parallel_cross_entropy": parallel_cross_entropy},
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": fused_layer_norm_affine},
        "apex.contrib.layer_norm.layer_norm": {"FastLayerNormFN": FastLayerNormFN},
        "apex.contrib.xentropy.softmax_xentropy": {"SoftmaxCrossEntropyLoss": ApexLoss},
        "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn},
        "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": cross_entropy_loss}}


@pytest.fixture
def libraries(monkeypatch):
    for name, contents in fake_modules().items():
        parts = name.split(".")
        for parent in itertools.accumulate(parts, lambda left, right: f"{left}.{right}"):
            if parent not in sys.modules or not hasattr(sys.modules[parent], "fake"):
                module = ModuleType(parent)
                module.fake, module.__path__ = True, []
                monkeypatch.setitem(sys.modules, parent, module)
        vars(sys.modules[name]).update(contents)
    installed = {peer.distribution for peer in PEERS}
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3" if name in installed else version(name))


FOR_GPUS = [(peer.name, title) for peer in PEERS if not peer.runs_on_cpu for title in peer.adapters]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "title"), FOR_GPUS)
def test_adapters_call_what_the_libraries_have(libraries, name, title, dtype):
    if (name, title, dtype) == ("te", "causal softmax", "fp32"):
        with pytest.raises(peers.NotApplicable, match="16 bits only"):
            run(name, BY_TITLE[title], dtype)
        return
    assert run(name, BY_TITLE[title], dtype) == ""


def test_every_op_has_peers():
    assert {title for peer in PEERS for title in peer.adapters} == set(BY_TITLE)
    assert len(BY_NAME) == len(PEERS) and all(peer.on_cpu for peer in PEERS)


def test_peers_in_a_run(libraries, small, tmp_path, capsys):
    """All that have the op are compared on a GPU; versions are stored."""
    assert small("--ops", "cross_entropy", "--shapes", "vocabulary", "--dtypes", "fp32", "--peers", "eager", "quack", "liger",
                 "liger-vocab-parallel", "te", "apex", "apex-fast", "flash-attn", "--json", str(tmp_path / "r.json")) == 0
    found = Results.load(tmp_path / "r.json")
    assert all(row.libraries == ["quack", "liger", "liger-vocab-parallel", "te", "apex", "flash-attn"] and not row.missing
               and not row.inexact for row in found.rows)
    assert found.peers["quack"] == {"version": "1.2.3", "why_not": ""}
    assert found.peers["megatron-fused"]["why_not"] == "not asked for"
    shown = capsys.readouterr().out
    assert "quack" in shown and "1.2.3" in shown and "not asked for" in shown


def test_peer_that_cannot_be_imported_is_named_and_the_run_goes_on(libraries, small, tmp_path, monkeypatch, capsys):
    (tmp_path / "quack").mkdir()
    (tmp_path / "quack" / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open\\nshared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "quack"]:
        monkeypatch.delitem(sys.modules, name)
    assert small("--ops", "cross_entropy", "--shapes", "main", "--dtypes", "fp32", "--modes", "both", "--peers", "eager", "quack",
                 "--json", str(tmp_path / "r.json")) == 0
    assert "cannot be imported: OSError: libcuda.so.1: cannot open" in capsys.readouterr().out
    row, = Results.load(tmp_path / "r.json").rows
    assert row.peers == ["eager"] and not row.missing


@pytest.mark.parametrize("at", ["made", "called"])
def test_peer_that_fails_is_named_and_the_run_goes_on(libraries, small, tmp_path, monkeypatch, at):
    def call(*inputs):
        raise RuntimeError("no kernel image is available")

    def adapter(case, inputs):
        if at == "made":
            raise AttributeError("module has no attribute\nx")
        return peers.Made(call, inputs)

    monkeypatch.setitem(BY_NAME, "quack", replace(BY_NAME["quack"], adapters={"cross-entropy": adapter}))
    assert small("--ops", "cross_entropy", "--shapes", "main", "--dtypes", "fp32", "--peers", "eager", "quack", "--json",
                 str(tmp_path / "r.json")) == 0
    why = {"made": "AttributeError: module has no attribute", "called": "RuntimeError: no kernel image is available"}[at]
    assert all(row.missing == {"quack": why} and row.peers == ["eager"] for row in Results.load(tmp_path / "r.json").rows)


def test_reasons():
    absent = Peer("nothing", "no-such-distribution", "no_such_module", {}, "needs a GPU")
    assert absent.why_not("cpu") == "not applicable: needs a GPU"
    assert absent.why_not("cuda") == "not installed (pip install no-such-distribution)"
    assert replace(absent, runs_on_cpu=True, install="from there").why_not("cpu") == "not installed (from there)"
    found = peers.status(("eager",), "cpu")
    assert list(found) == list(peers.NAMES) and found["eager"]["why_not"] == "" and found["compile"]["why_not"] == "not asked for"
    assert all(found[peer.name]["why_not"].startswith("not applicable: ") for peer in PEERS)
    assert peers.reason(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"


def test_peers_are_known_to_the_command_line(capsys):
    assert ops.parse(["--device", "cpu", "--peers", "quack"]).peers == ["quack"]
    with pytest.raises(SystemExit):
        ops.parse(["--peers", "abacus"])
    assert "liger-vocab-parallel" in capsys.readouterr().err
