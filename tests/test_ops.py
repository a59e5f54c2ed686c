"""What holds for every op: its schema, gradients, compilation, repeatability, and the choice of implementation."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import cases
import pytest
import torch
from cases import leaf, randn

import megatron_kernels as mk

OPS = torch.ops.megatron_kernels
# Each implementation that has raw ops, as it runs where these tests do.
NAMES = [pytest.param(name, marks=[] if available else pytest.mark.skip(reason=why))
         for name, (available, why) in mk.implementations().items() if name in ("cpu", "simt", "triton")]
NAMES += [pytest.param("cuda", marks=pytest.mark.gpu)]

MASK = torch.rand(2, 1, 5, generator=torch.Generator().manual_seed(1)) < 0.3
TARGET = torch.tensor([1, -100, 4])
ALL = {"vocab_size": 6, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "sum"}


# name -> (public function of its floating inputs, shapes of those)
PUBLIC = {
    "softmax": (lambda x: mk.scaled_masked_softmax(x, None, 0.5), [(2, 4, 5)]),
    "softmax masked causal": (lambda x: mk.scaled_masked_softmax(x, MASK.to(x.device), 0.5, True), [(2, 4, 5)]),
    "bias_gelu tanh": (lambda x, b: mk.bias_gelu(x, b), [(3, 7), (7,)]),
    "bias_gelu erf": (lambda x, b: mk.bias_gelu(x, b, "none"), [(3, 7), (7,)]),
    "layer_norm": (lambda x, w, b: mk.layer_norm(x, w, b), [(3, 7), (7,), (7,)]),
    "layer_norm plain": (lambda x: mk.layer_norm(x), [(3, 7)]),
    "cross_entropy": (lambda x: mk.cross_entropy(x, TARGET.to(x.device)), [(3, 7)]),
    "cross_entropy all": (lambda x: mk.cross_entropy(x, TARGET.to(x.device), **ALL), [(3, 7)]),
    "cross_entropy inplace": (lambda x: mk.cross_entropy(x * 1, TARGET.to(x.device), inplace_backward=True, **ALL), [(3, 7)]),
}
x, w, rows = torch.randn(3, 7), torch.randn(7), torch.randn(3)
target, rest = TARGET, (0, 6, -100, 0.1, 0.2)
RAW = {
    "scaled_masked_softmax_forward": [(x, None, 0.5, True), (x, torch.zeros(3, 1, dtype=torch.bool), 0.5, False)],
    "scaled_masked_softmax_backward": [(x, x, 0.5, True)],
    "bias_gelu_forward": [(x, w, True), (x.half(), w, False)],
    "bias_gelu_backward": [(x, x, w, True), (x.bfloat16(), x.bfloat16(), w, False)],
    "layer_norm_forward": [(x, w, w, 1e-5), (x.half(), None, w, 1e-5), (x.double(), None, None, 1e-5)],
    "layer_norm_backward": [(x, x, w, w, rows, rows), (x, x, None, None, rows, rows), (x.half(), x.half(), w, None, rows, rows)],
    "cross_entropy_forward": [(x, target, 6, -100, 0.1, 0.2), (x.double(), target, 7, -100, 0.0, 0.0)],
    "cross_entropy_partial": [(x, target, 0, 6, -100, 0.1)],
    "cross_entropy_backward": [(rows, x, target, rows, *rest), (rows, x.half(), target, rows, *rest)],
    "cross_entropy_backward_": [(rows, x.clone(), target, rows, *rest)],
}


def device_of(name):
    return "cuda" if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else "cpu"


def inputs(shapes, dtype, seed=0):
    return [leaf(randn(*shape, seed=seed + i, dtype=dtype, outliers=False)) for i, shape in enumerate(shapes)]


def test_every_op_is_opchecked():
    schemas = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("megatron_kernels::")}
    assert {name for name in schemas if not name.startswith("_")} == set(RAW)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", RAW)
def test_opcheck(name, op):
    for arguments in RAW[op]:
        if name != "cpu":
            arguments = [a.to(device_of(name), torch.float32 if a.dtype == torch.float64 else a.dtype)
                         if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(getattr(getattr(torch.ops, mk.backend._NAMESPACES[name][0]), op), tuple(arguments))


# gradcheck runs one graph backward several times, which an in-place backward refuses
@pytest.mark.parametrize("name", sorted(set(PUBLIC) - {"cross_entropy inplace"}))
def test_gradcheck(implementation, name):
    if not cases.FLOAT64:
        pytest.skip("float64 is for CPUs")
    function, shapes = PUBLIC[name]
    assert torch.autograd.gradcheck(function, inputs(shapes, torch.float64))


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("implementation", NAMES)
def test_compile(implementation, name, dynamic):
    function, shapes = PUBLIC[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager, traced = ([leaf(x.to(device_of(implementation))) for x in inputs(shapes, torch.float32)] for _ in range(2))
    with mk.use(implementation):
        a, b = function(*eager), compiled(*traced)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(a, b)
    for p, q in zip(eager, traced, strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("name", ["softmax masked causal", "bias_gelu tanh", "layer_norm", "cross_entropy"])
def test_compile_with_inductor(name):
    function, shapes = PUBLIC[name]
    torch._dynamo.reset()
    values = inputs(shapes, torch.float32)
    assert torch.allclose(torch.compile(function, fullgraph=True)(*values), function(*values), rtol=1e-6)


@pytest.mark.parametrize("name", PUBLIC)
def test_repeats_bitwise_at_any_number_of_threads(implementation, name):
    function, shapes = PUBLIC[name]
    sizes = {5: 300, 7: 300, 4: 290, 3: 1500}
    if name.startswith("cross_entropy"):
        sizes = {7: 4000, 3: 3}
    values = []
    before = torch.get_num_threads()
    masked = "masked" in name
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        given = inputs([shape if masked else tuple(sizes.get(n, n) for n in shape) for shape in shapes], torch.float32)
        y = function(*given)
        y.backward(torch.ones_like(y))
        values.append([y.detach(), *(v.grad for v in given)])
    torch.set_num_threads(before)
    for other in values[1:]:
        assert all(torch.equal(p, q) for p, q in zip(values[0], other, strict=True))


@pytest.mark.parametrize("name", PUBLIC)
def test_inputs_are_not_modified(name):
    function, shapes = PUBLIC[name]
    values = inputs(shapes, torch.float32)
    before = [v.detach().clone() for v in values]
    function(*values).sum().backward()
    assert all(torch.equal(v, b) for v, b in zip(values, before, strict=True))


@pytest.mark.parametrize("name", PUBLIC)
def test_second_derivative_is_refused(name):
    function, shapes = PUBLIC[name]
    values = inputs(shapes, torch.float32)
    (g,) = torch.autograd.grad(function(*values).sum(), values[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        g.sum().backward()


def test_no_grad_and_inference_mode():
    values = inputs([(3, 7)], torch.float32)
    with torch.no_grad():
        assert not mk.layer_norm(*values).requires_grad
    with torch.inference_mode():
        mk.scaled_masked_softmax(torch.randn(2, 2))


def test_autocast_leaves_the_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mk.layer_norm(torch.randn(2, 3)).dtype == torch.float32
        assert mk.bias_gelu(torch.randn(2, 3, dtype=torch.bfloat16), torch.zeros(3)).dtype == torch.bfloat16


def test_use_chooses_nests_and_ends():
    x = torch.full((1, 3), 5.0)
    calls = []
    original = mk.reference.layer_norm
    mk.reference.layer_norm = lambda *a: calls.append(1) or original(*a)
    try:
        with mk.use("reference"):
            mk.layer_norm(x)
            with mk.use("cpu"):
                mk.layer_norm(x)
            mk.layer_norm(x)
            thread = threading.Thread(target=lambda: mk.layer_norm(x))
            thread.start()
            thread.join()
        mk.layer_norm(x)
        with pytest.raises(KeyError), mk.use("reference"):
            raise KeyError
        mk.layer_norm(x)
    finally:
        mk.reference.layer_norm = original
    assert len(calls) == 2


def test_use_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="use: unknown implementation 'fast'; known are cpu, cuda, triton, simt, reference"):
        mk.use("fast")


def test_use_compiles():
    torch._dynamo.reset()

    def f(x):
        with mk.use("reference"):
            return mk.layer_norm(x)

    x = torch.randn(3, 8)
    assert torch.allclose(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_another_device_is_refused_by_name():
    with pytest.raises(RuntimeError, match="layer_norm: no implementation for device meta"):
        mk.layer_norm(torch.zeros(2, 3, device="meta"))


def test_implementations_name_the_instruction_set():
    assert mk.implementations()["cpu"].available
    OPS._set_isa("baseline")
    assert "baseline" in mk.implementations()["cpu"].detail
    OPS._set_isa("best")
    with pytest.raises(RuntimeError, match="no build named 'sse9'"):
        OPS._set_isa("sse9")


def test_import_without_the_library(tmp_path):
    """A source tree that was not built still imports, runs the specification, and says what to do."""
    package = Path(mk.__file__).parent
    script = f"""
import sys, pathlib, importlib.machinery
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: False if self.name.startswith("_C_cpu") else exists(self)
sys.path.insert(0, {str(package.parent)!r})
import torch, megatron_kernels as mk
assert not mk.implementations()["cpu"].available
with mk.use("reference"):
    mk.layer_norm(torch.zeros(2, 3))
try:
    mk.layer_norm(torch.zeros(2, 3))
except RuntimeError as error:
    assert "pip install --no-build-isolation" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["softmax", "bias_gelu", "layer_norm", "cross_entropy"])
def test_more_than_2_31_elements(op):
    """bfloat16, 4 GB; the first and the last row agree with the same rows computed alone."""
    cols = 1 << 16
    rows = (1 << 15) + 3
    x = torch.zeros(rows, cols, dtype=torch.bfloat16)
    ends = [0, rows - 1]
    x[ends] = torch.randn(2, cols).bfloat16()
    v, t = torch.randn(cols).bfloat16(), torch.zeros(rows, dtype=torch.long)
    small, ones = x[ends].clone(), torch.ones(2)

    def forward(x, t):
        return {"softmax": lambda: OPS.scaled_masked_softmax_forward(x, None, 1.0, False),
                "bias_gelu": lambda: OPS.bias_gelu_forward(x, v, True),
                "layer_norm": lambda: OPS.layer_norm_forward(x, v, v, 1e-5)[0],
                "cross_entropy": lambda: OPS.cross_entropy_forward(x, t, cols, -100, 0.0, 0.0)[0]}[op]()

    def backward(x, t, stat):
        return {"softmax": lambda: OPS.scaled_masked_softmax_backward(x, x, 1.0, False),
                "bias_gelu": lambda: OPS.bias_gelu_backward(x, x, v, True)[0],
                "layer_norm": lambda: OPS.layer_norm_backward(x, x, v, v, stat, stat)[0],
                "cross_entropy": lambda: OPS.cross_entropy_backward(stat, x, t, stat, 0, cols, -100, 0.0, 0.0)}[op]()

    assert x.numel() > 2**31
    assert torch.equal(forward(x, t)[ends], forward(small, t[ends]))
    assert torch.equal(backward(x, t, torch.ones(rows))[ends], backward(small, t[ends], ones))
