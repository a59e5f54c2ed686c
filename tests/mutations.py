"""Breaks the CPU kernels, one line at a time in a copy of the tree, and tells which breaks the C++ tests notice.

    python tests/mutations.py [WORD ...]     all of them, or those whose file or line contains a word

Ends with 1 if a break survives on every instruction set of this processor, with 2 if a line to break is no longer there once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
TIMEOUT = 120  # seconds; a test that hangs has noticed
LACKS_INSTRUCTION_SET = 77


class Mutation(NamedTuple):
    file: str  # below csrc/
    old: str
    new: str
    test: str = ""  # the test program that must notice; by default that of the file's name

    @property
    def program(self) -> str:
        return self.test or Path(self.file).stem

    def __str__(self) -> str:
        return f"{self.file}: {self.old} -> {self.new or 'nothing'}"


SOFTMAX, GELU, NORM, LOSS = (f"cpu/{op}.cpp" for op in ("scaled_masked_softmax", "bias_gelu", "layer_norm", "cross_entropy"))

MUTATIONS = [
    # Causality: the diagonal at the top left, what lies right of it left as it was.
    Mutation(SOFTMAX, "row % queries + cols - queries + 1", "row % queries + 1"),
    Mutation(SOFTMAX, "clear(y + n, a.cols - n);", ""),
    Mutation(SOFTMAX, "clear(dx + n, a.cols - n);", ""),
    # Masks: negated, the wrong row's, a whole row's taken for no mask.
    Mutation(SOFTMAX, "scale < 0 ? A(-1) : A(1)", "A(1)"),
    Mutation(SOFTMAX, "(load(x + j, width) - top * sign) * factor", "load(x + j, width) * factor"),
    Mutation(SOFTMAX, "if (!masked_so_far && !((found - top) * sign * factor > A(64))) break;", "break;"),
    Mutation(SOFTMAX, "if (!masked_so_far && ", "if ("),
    Mutation(SOFTMAX, "select(load_mask<A>(mask + j, width), otherwise, v)", "select(load_mask<A>(mask + j, width), v, otherwise)"),
    Mutation(SOFTMAX, "row /= mask.size[d];", ""),
    Mutation(SOFTMAX, "(whole_row && *mask)", "(whole_row && !*mask)"),
    # The sum: tail lanes, scale, the sign of a term.
    Mutation(SOFTMAX, "return keep(v, otherwise, width);", "return v;"),
    Mutation(SOFTMAX, "scale * load(y + j, width) *", "load(y + j, width) *"),
    Mutation(SOFTMAX, "(load(dy + j, width) - dot)", "(load(dy + j, width) + dot)"),

    Mutation(GELU, "store(dbias + j, load(dbias + j, width) + d, width);", "store(dbias + j, d, width);"),
    Mutation(GELU, "clear(dbias, a.cols);", "clear(dbias, a.cols - 1);"),
    Mutation(GELU, "A* dbias = partials + b * a.cols;", "A* dbias = partials;"),
    Mutation(GELU, "row < block_begin(b + 1, blocks, a.rows);", "row < block_begin(b + 1, blocks, a.rows) - 1;"),
    Mutation(GELU, "store(dx + j, d, width);", "store(dx + j, d, Whole{});"),  # writes past the row's end
    Mutation("scalar.h", "A(0.044715)", "A(0.0447)", "bias_gelu"),
    Mutation("scalar.h", "return s + s * s * e * v", "return s + s * e * v", "bias_gelu"),
    Mutation("scalar.h", "A(6) * kAlpha * kCubic", "A(2) * kAlpha * kCubic", "bias_gelu"),
    Mutation("scalar.h", "tail, A(1) - tail)", "A(1) - tail, tail)", "bias_gelu"),

    Mutation(NORM, "rsqrt(squares / A(a.cols) + A(a.eps))", "rsqrt(squares / A(a.cols))"),
    Mutation(NORM, "keep(load(x + j, width) - mean, V{}, width)", "load(x + j, width) - mean"),  # tail lanes in the variance
    Mutation(NORM, "(a.bias, a.bias_dtype, a.cols, A(0), bias)", "(a.bias, a.bias_dtype, a.cols, A(1), bias)"),
    Mutation(NORM, "j < 2 * a.cols; ++j) dweight[j] = 0;", "j < a.cols; ++j) dweight[j] = 0;"),
    Mutation(NORM, "A* dweight = partials + b * 2 * a.cols;", "A* dweight = partials + b * a.cols;"),  # blocks overlap
    Mutation(NORM, "dots += g * keep(xhat, V{}, width);", "dots += d * xhat;"),
    Mutation(NORM, "rstd * (g - sum - xhat * dot)", "rstd * (g - sum + xhat * dot)"),
    Mutation(NORM, "sum_partials(pf, partials + a.cols,", "sum_partials(pf, partials,"),
    Mutation("cpu/rows.h", "rows / blocks * block + min(block, rows % blocks)", "rows / blocks * block", "layer_norm"),
    Mutation("cpu/rows.h", "total += sum;", "total = sum;", "layer_norm"),

    # The online sum: what came before a new maximum not rescaled, the tail's empty lanes counted.
    Mutation(LOSS, "s.exps *= math::exp2_one<A>((s.top - top) * kLog2e<A>);", ""),
    Mutation(LOSS, "exps += keep(math::exp2((v - shift) * kLog2e<A>), V{}, width);",
             "exps += math::exp2((v - shift) * kLog2e<A>);"),
    # Smoothing and z-loss; shards and padding.
    Mutation(LOSS, "alpha * (s.sum / A(a.vocab_size) - s.top)", "alpha * (s.sum / A(a.cols) - s.top)"),
    Mutation(LOSS, "uniform = dloss * alpha / A(a.vocab_size)", "uniform = dloss * alpha / A(a.cols)"),
    Mutation(LOSS, "A(1) + A(2) * A(a.z_loss) * lse", "A(1) + A(a.z_loss) * lse"),
    Mutation(LOSS, "- uniform - dloss * (A(1) - alpha)", "- uniform - dloss"),
    Mutation(LOSS, "min(a.cols, a.vocab_size - a.vocab_start)", "min(a.cols, a.vocab_size)"),
    Mutation(LOSS, "clear(dx + cols, a.cols - cols);", ""),
    Mutation(LOSS, "bool here = column >= 0 && column < cols;", "bool here = column >= 0 && column <= cols;"),
    # Targets that are no class.
    Mutation(LOSS, "target >= 0 && target < a.vocab_size", "target >= 0 && target <= a.vocab_size"),
    Mutation(LOSS, "if (bad) out[2] = kNaN<A>;", ""),
    Mutation(LOSS, "while (row < seen &&", "while (row > seen &&"),

    # Rounding, ties, overflow, subnormals.
    Mutation("cpu/vec.h", "+ 0x7fffu + ((bits >> 16) & 1u)", "+ 0x8000u", "vec"),
    Mutation("cpu/vec.h", "magnitude >= 0x47800000u", "magnitude >= 0x47900000u", "vec"),
    Mutation("cpu/vec.h", "magnitude < 0x00800000u", "magnitude < 0x00000001u", "vec"),
    Mutation("cpu/vec.h", "+ 0.240229836f", "+ 0.240228f", "vec"),
]


def misfits(root: Path = ROOT) -> list[str]:
    """Mutations whose line does not occur exactly once."""
    counts = ((mutation, (root / "csrc" / mutation.file).read_text(encoding="utf-8").count(mutation.old)) for mutation in MUTATIONS)
    return [f"{mutation.file}: occurs {count} times, must once: {mutation.old}" for mutation, count in counts if count != 1]


@contextlib.contextmanager
def broken(path: Path, mutation: Mutation) -> Iterator[None]:
    """The file with its line broken; afterwards as before, time stamp too, so that only what was built meanwhile is new."""
    before, text = path.stat(), path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def build(tree: Path, target: str) -> None:
    done = subprocess.run(["cmake", "--build", tree / "build", "--target", target], env=ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{target} can't be built:\n{done.stdout[-3000:]}")


def fails(tree: Path, program: str, isa: str) -> bool:
    command = [tree / "build" / f"test_{program}", isa]
    try:
        code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=TIMEOUT).returncode
    except subprocess.TimeoutExpired:
        return True
    return code not in (0, LACKS_INSTRUCTION_SET)


def noticed(tree: Path, mutation: Mutation, instruction_sets: list[str]) -> str:
    """The first instruction set on which the test fails, or nothing. Only that one object is compiled anew."""
    source = "tests/cpp/vec_loops" if mutation.program == "vec" else f"csrc/cpu/{mutation.program}"
    for isa in instruction_sets:
        target = f"CMakeFiles/kernels_{isa}.dir/{source}.cpp.o"
        with broken(tree / "csrc" / mutation.file, mutation):
            build(tree, target)
        build(tree, f"test_{mutation.program}")
        failed = fails(tree, mutation.program, isa)
        (tree / "build" / target).unlink()
        if failed:
            return isa
    return ""


def main(words: list[str]) -> int:
    if wrong := misfits():
        print("Lines to break that are no longer there; mend tests/mutations.py:", *wrong, sep="\n  ")
        return 2
    chosen = [mutation for mutation in MUTATIONS if not words or any(word in str(mutation) for word in words)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        shutil.copytree(ROOT / "tests/cpp", tree / "tests/cpp")
        shutil.copy(ROOT / "CMakeLists.txt", tree)
        subprocess.run(["cmake", "-S", tree, "-B", tree / "build", "-G", "Ninja"], check=True, env=ENVIRONMENT,
                       stdout=subprocess.DEVNULL)
        kernels = sorted((tree / "build/CMakeFiles").glob("kernels_*.dir"))
        instruction_sets = [path.stem.removeprefix("kernels_") for path in kernels]
        for program in sorted({mutation.program for mutation in chosen}):
            build(tree, f"test_{program}")
            if failing := [isa for isa in instruction_sets if fails(tree, program, isa)]:
                print(f"test_{program} fails on {', '.join(failing)} with nothing broken")
                return 1
        for mutation in chosen:
            isa = noticed(tree, mutation, instruction_sets)
            survivors += not isa
            print(f"{'noticed on ' + isa if isa else 'SURVIVED':22} {mutation}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
