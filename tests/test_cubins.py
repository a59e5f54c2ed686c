"""The compiled CUDA kernels, without a GPU: tests/cubins.py measures, tests/budgets.csv says what is accepted.

A change of registers, accesses or instructions shows as a difference here, and in the diff of the budget once it is accepted with
`python tests/cubins.py --write`. What no budget may accept: local memory (spills, arrays that are indexed at run time), packets
that are not moved in 128 bits, and, of a kernel that walks rows in packets, more instructions per element than take as long as the
element's bytes. For the last, an H100 issues 132 multiprocessors x 4 schedulers x 32 lanes x 1.7 GHz = 29e12 thread instructions
in the second in which its memory moves 3.35e12 bytes: 9 per byte. Kernels above that are listed below with the reason.
"""

from __future__ import annotations

import re
from pathlib import Path

import cubins
import pytest
import sass

needs_nvcc = pytest.mark.skipif(bool(cubins.missing()), reason=cubins.missing())

# Kernels with packets that store none.
STORES_NOTHING = {"cross_entropy_forward", "layer_norm_backward_means"}
# Not bound by memory, by this count: kernels (a pattern, to be found in "op,kernel"), and why that is accepted.
ABOVE_LIMIT = {
    r",layer_norm_forward<bf16 W8 team=32 packets=1> on sm_100":
        "just above. Rows of at most 32 packets: a thread has one, and what is done once per row counts in full",
}


@pytest.fixture(scope="module")
def measured():
    return cubins.measure_all()


def every(measured):
    return [(f"{op},{kernel.name} on {architecture}", kernel) for op, kernels in measured.items()
            for by_architecture in kernels.values() for architecture, kernel in by_architecture.items()]


def differences(budget: cubins.Rows, found: cubins.Rows, slack: float | None = None) -> list[str]:
    """Between a budget and what was measured. With slack only what is more than that factor above the budget."""
    lines = [f"{key}: not in the budget" for key in found if key not in budget]
    lines += [f"{key}: in the budget, but no such kernel" for key in budget if key not in found]
    for key in [key for key in found if key in budget]:
        for column in ("registers", "shared", "instructions") if slack else cubins.COLUMNS:
            for architecture, old, new in zip(cubins.ARCHITECTURES, budget[key][column], found[key][column], strict=True):
                if old != new and not (slack and "-" not in (old, new) and float(new) <= slack * float(old)):
                    lines.append(f"{key}: {column} on {architecture}: {new}, the budget has {old}")
    return lines


def unfit(name: str, kernel: cubins.Kernel) -> list[str]:
    """What no budget may accept, but for the number of instructions."""
    lines, base = [], kernel.name.split("<")[0]
    if kernel.spilling:
        lines.append(f"{name}: {kernel.stack} bytes of stack, {kernel.local} of local memory, {kernel.spills} accesses to it")
    if kernel.width == "full":
        lines += [f"{name}: no 128-bit load"] if not kernel.loads else []
        lines += [f"{name}: no 128-bit store"] if not kernel.stores and base not in STORES_NOTHING else []
        lines += [f"{name}: {kernel.halves} stores of 64 bits, half a packet"] if kernel.halves else []
    if kernel.width == "partial":
        lines.append(f"{name}: packets are neither 16 bytes nor one element")
    if kernel.width == "single" and (kernel.loads or kernel.stores):
        lines.append(f"{name}: {kernel.loads} 128-bit loads and {kernel.stores} stores, but packets of one element")
    return lines


@needs_nvcc
def test_kernels_keep_their_budget(measured):
    version, budget = cubins.load(cubins.BUDGETS)
    found = differences(budget, cubins.rows(measured), None if version == cubins.compiler() else 1.1)
    assert not found, f"{len(found)} differences; `python tests/cubins.py --write` accepts them\n" + "\n".join(found)


@needs_nvcc
def test_no_kernel_spills_and_full_packets_are_128_bits(measured):
    found = [line for name, kernel in every(measured) for line in unfit(name, kernel)]
    assert not found, "\n".join(found)
    widths = [kernel.width for _, kernel in every(measured)]
    assert widths.count("full") > widths.count("single") > 0


@needs_nvcc
def test_kernels_are_bound_by_memory(measured):
    above = {name: kernel for name, kernel in every(measured) if kernel.limit and kernel.instructions > kernel.limit}
    unknown = [f"{name}: {kernel.instructions} instructions per element, memory takes as long as {kernel.limit}"
               for name, kernel in above.items() if not any(re.search(pattern, name) for pattern in ABOVE_LIMIT)]
    assert not unknown, "\n".join(unknown)
    assert [pattern for pattern in ABOVE_LIMIT if not any(re.search(pattern, name) for name in above)] == []
    counted = {kernel.name.split("<")[0] for _, kernel in every(measured) if kernel.limit}
    assert counted == cubins.TRAFFIC.keys()


def compile_and_read(tmp_path: Path, body: str) -> dict[str, cubins.Kernel]:
    source = tmp_path / "planted.cu"
    head = f'#include "{cubins.ROOT}/csrc/simt/simt.h"\nnamespace mk {{\nnamespace {{\nusing namespace simt;\n'
    source.write_text(head + body + "\n}\n", encoding="utf-8")
    cubins.parameters.cache_clear()
    return {kernel.name: kernel for kernel in cubins.read(cubins.compile_cubin(source, "sm_90", tmp_path), "sm_90", source)}


LAUNCH = '}}\nError run(const float* x, float* y) {{ return launch("planted", {{}}, 1, 256, {{}}, {0}, x, y, 256, 2.f); }}'


def planted(tmp_path: Path, arguments: str, body: str, bounds: str = "256") -> cubins.Kernel:
    """The one kernel of a file: planted<T, W, kSteps, ...>, with packets of floats."""
    kernels = compile_and_read(tmp_path, f"""
template <class T, int W, int kSteps>
MK_FN Floats<W> work(Packet<T, W> packet, float a) {{
  Floats<W> v = widen(packet);
  MK_UNROLL
  for (float& e : v.v) {{
    MK_UNROLL
    for (int i = 0; i < kSteps; ++i) e = e * e + a;
  }}
  return v;
}}
template <class T, int W, int kSteps>
MK_KERNEL MK_MAX_THREADS({bounds}) void planted_kernel(const T* x, T* y, int64_t cols, float a) {{
{body}
}}
""" + LAUNCH.format(f"planted_kernel<{arguments}>"))
    kernel, = kernels.values()
    return kernel


IN_A_LOOP = """  for_each_packet(span<W>(x, cols), whole_block(), [&](int64_t j, auto width) {
    store_once(y + j, work<T, decltype(width)::value, kSteps>(load(x + j, width), a));
  });"""
HELD = """  auto row = load_row<4>(x, span<W>(x, cols), whole_block());
  row.for_each([&](int64_t j, auto& packet) { store_once(y + j, work<T, decltype(packet.width())::value, kSteps>(packet, a)); });"""


@needs_nvcc
@pytest.mark.parametrize(("body", "packets", "addresses"), [(IN_A_LOOP, 1, 0), (HELD, 4, 20)], ids=["loop", "registers"])
def test_instructions_are_counted(body, packets, addresses, tmp_path):
    """Each further step is one instruction more per element; single elements' code does not count. How ptxas computes addresses may
    differ between two kernels that are compiled as a whole."""
    few, many = (planted(tmp_path, f"float, 4, {steps}", body).regions for steps in (10, 30))
    (few, loads, stores), = few
    (many, *accesses), = many
    assert (loads, stores) == (packets, packets) and [loads, stores] == accesses
    assert abs(many - few - 20 * 4 * packets) <= addresses
    assert 10 * 4 * packets < few < 10 * 4 * packets + (20 if packets == 1 else 170)


@needs_nvcc
def test_planted_spill_is_found(tmp_path):
    body = """  auto row = load_row<50>(x, span<W>(x, cols), whole_block());
  sync_block();
  row.for_each([&](int64_t j, auto& packet) { store_once(y + j, work<T, decltype(packet.width())::value, kSteps>(packet, a)); });"""
    assert len(unfit("planted", planted(tmp_path, "float, 4, 1", body, "1024, 2"))) == 1
    assert unfit("planted", planted(tmp_path, "float, 4, 1", HELD)) == []


@needs_nvcc
def test_planted_narrow_accesses_are_found(tmp_path):
    narrow = """  for (int64_t j = thread() * W; j < cols; j += threads() * W) {
    MK_UNROLL
    for (int i = 0; i < W; ++i) store_one(y + j + i, load_one(x + j + i) * a);
  }"""
    found = unfit("planted", planted(tmp_path, "float, 4, 1", narrow))
    assert found == ["planted: no 128-bit load", "planted: no 128-bit store"]
    assert "neither 16 bytes" in unfit("planted", planted(tmp_path, "float, 2, 1", narrow))[0]
    halves = """  for (int64_t j = thread() * W; j < cols; j += threads() * W) {
    Floats<W> v = widen(load(x + j, Width<W>{}));
    store_once(y + j, v);
    for (int i = 0; i < W; i += 2) store_once(y + (i + 1) * cols + j + i, Floats<2>{{v[i], v[i + 1]}});
  }"""
    assert unfit("planted", planted(tmp_path, "float, 4, 1", halves)) == ["planted: 2 stores of 64 bits, half a packet"]
    wide = "  for (int64_t j = thread() * 4; j < cols; j += threads() * 4) store(y + j, load(x + j, Width<4>{}));"
    assert "packets of one element" in unfit("planted", planted(tmp_path, "float, 1, 1", wide))[0]


@needs_nvcc
def test_planted_rise_is_found(tmp_path):
    """More registers, more instructions: named with kernel, column and architecture."""
    def table(body: str) -> cubins.Rows:
        kernel = planted(tmp_path, "float, 4, 10", body)
        return cubins.rows({"planted": {kernel.name: dict.fromkeys(cubins.ARCHITECTURES, kernel)}})

    budget, found = table(IN_A_LOOP), table(HELD)
    assert differences(budget, budget) == []
    lines = differences(budget, found)
    assert re.search(r"^planted,planted<fp32 W4 steps=10>: registers on sm_80: \d+, the budget has \d+$", "\n".join(lines), re.M)
    assert any("registers on sm_120" in line for line in differences(budget, found, slack=1.1))


def row(**values: str) -> dict[str, list[str]]:
    return {column: [values.get(column, "1")] * len(cubins.ARCHITECTURES) for column in cubins.COLUMNS}


def test_differences():
    budget = {"op,a": row(registers="40", instructions="20.0"), "op,b": row()}
    assert differences(budget, budget) == differences(budget, budget, slack=1.1) == []
    assert differences(budget, {"op,a": budget["op,a"], "op,c": row()}) == [
        "op,c: not in the budget", "op,b: in the budget, but no such kernel"]
    assert len(differences(budget, {**budget, "op,b": row(loads="2")})) == len(cubins.ARCHITECTURES)
    other = {**budget, "op,b": row(loads="2"), "op,a": row(registers="44", instructions="22.0")}
    assert differences(budget, other, slack=1.1) == []
    assert differences(budget, {**budget, "op,a": row(registers="45", instructions="20.0")}, slack=1.1)[0] == (
        "op,a: registers on sm_80: 45, the budget has 40")
    uncounted = {**budget, "op,a": row(registers="40", instructions="-")}
    assert len(differences(budget, uncounted, slack=1.1)) == len(cubins.ARCHITECTURES)


def test_budget_file_returns_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cubins, "compiler", lambda: "V13.0.88")
    mixed = {**row(), "registers": ["40", "41", "42", "43"], "instructions": ["-"] * 4}
    cubins.write(tmp_path / "budgets.csv", {"op,a<bf16 W8>": mixed, "op,b": row()})
    assert cubins.load(tmp_path / "budgets.csv") == ("V13.0.88", {"op,a<bf16 W8>": mixed, "op,b": row()})


@pytest.mark.parametrize(("architecture", "threads", "registers", "shared", "percent"), [
    ("sm_90", 1024, 64, 128, 50), ("sm_90", 1024, 32, 0, 100), ("sm_90", 512, 65, 0, 25), ("sm_90", 128, 40, 0, 75),
    ("sm_90", 32, 16, 0, 50),         # 32 blocks
    ("sm_120", 1024, 40, 0, 67), ("sm_120", 32, 16, 0, 50), ("sm_120", 128, 64, 49152, 17), ("sm_80", 256, 32, 33024, 50)])
def test_occupancy(architecture, threads, registers, shared, percent):
    """As cudaOccMaxActiveBlocksPerMultiprocessor of the toolkit's cuda_occupancy.h has it."""
    assert cubins.occupancy(architecture, threads, registers, shared) == percent


def regions(*lines: str) -> list[list[int]]:
    """Of machine code in which every line is an instruction, 16 bytes long."""
    text = "Function : kernel\n" + "".join(f"        /*{16 * i:04x}*/ {line} ;\n" for i, line in enumerate(lines))
    return [[one.instructions, one.loads, one.stores] for one in sass.Graph(sass.parse(text)["kernel"]).regions()]


LOAD, STORE, SINGLE, ADD = "LDG.E.128 R4, [R2.64]", "STG.E.EF.128 [R2.64], R4", "LDG.E.U16 R4, [R2.64]", "FADD R4, R4, R4"


@pytest.mark.parametrize(("lines", "expected"), [
    pytest.param([LOAD, ADD, STORE, "EXIT", "BRA 0x40"], [4, 1, 1], id="straight"),
    pytest.param(["S2R R0, SR_TID.X", "@P0 BRA 0x60", LOAD, ADD, STORE, "@!P1 BRA 0x20", "EXIT"], [4, 1, 1], id="loop"),
    pytest.param(["@P0 BRA 0x40", LOAD, STORE, "BRA 0x0", "EXIT"], [4, 1, 1], id="loop with its test ahead"),
    pytest.param([LOAD, STORE, "@P0 CALL.REL.NOINC 0x40", "BRA 0x0", "EXIT"], [4, 1, 1], id="loop left by a call"),
    pytest.param([LOAD, "@P0 BRA 0x50", SINGLE, ADD, ADD, STORE, "EXIT"], [4, 1, 1], id="single element"),
    pytest.param([LOAD, "@P0 BRA 0x50", "CALL.REL.NOINC 0x70", ADD, "NOP", STORE, "EXIT", "RET.REL.NODEC R2 0x0"],
                 [4, 1, 1], id="subroutine that may be missed"),
    pytest.param([LOAD, ADD, STORE, "@!P0 EXIT", SINGLE, ADD, "EXIT"], [4, 1, 1], id="single element behind an exit"),
    pytest.param([LOAD, "CALL.REL.NOINC 0x40", STORE, "EXIT", ADD, "RET.REL.NODEC R2 0x0"], [6, 1, 1], id="subroutine"),
    pytest.param([LOAD, "@P0 BRA 0x40", ADD, "BRA 0x50", "NOP", STORE, "EXIT"], [6, 1, 1], id="longer branch"),
    pytest.param([LOAD, "BRA.U !UP0, 0x30", "NOP", STORE, "EXIT"], [5, 1, 1], id="uniform branch"),
    pytest.param([LOAD, "BRA.DIV UR4, 0x40", STORE, "EXIT", "NOP", "BRA 0x20"], [4, 1, 1], id="threads that have parted"),
    pytest.param([LOAD, STORE, STORE, "@P0 BRA 0x20", "EXIT"], [5, 1, 1], id="loop that fills"),
    pytest.param(["NOP", LOAD, LOAD, LOAD, LOAD, "@P0 BRA 0x10", "NOP", LOAD, "@P1 BRA 0x60", "EXIT"], [5, 4, 0], id="remainder"),
    pytest.param(["NOP", LOAD, STORE, "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT"], [3, 1, 1], id="innermost loop"),
])
def test_paths_through_machine_code(lines, expected):
    assert regions(*lines) == [expected]


def test_loops_one_after_the_other_all_count():
    assert regions(LOAD, "@P0 BRA 0x0", "NOP", LOAD, "NOP", STORE, "@P1 BRA 0x30", "EXIT") in (
        [[2, 1, 0], [4, 1, 1]], [[4, 1, 1], [2, 1, 0]])


def test_a_jump_that_is_not_understood_is_named():
    with pytest.raises(AssertionError, match="BRX at 0x10"):
        regions(LOAD, "BRX R2 -0x10", "EXIT")
