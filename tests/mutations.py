"""Breaks the kernels, one line at a time in a copy of the tree, and tells which breaks the C++ tests notice.

    python tests/mutations.py [WORD ...]     all of them, or those whose file or line contains a word

CPU kernels are tried on the instruction sets of this processor, CUDA kernels in the host build of their dialect. Ends with 1 if a
break survives everywhere, with 2 if a line to break is no longer there once or none was chosen.
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

    def builds(self, instruction_sets: list[str]) -> list[tuple[str, str]]:
        """What the test program is given, and the object that the break is compiled into."""
        if self.file.startswith("cuda/"):
            return [("simt", f"CMakeFiles/gpu_kernels.dir/csrc/cuda/{self.program}.cu.o")]
        source = "tests/cpp/vec_loops" if self.program == "vec" else f"csrc/cpu/{self.program}"
        return [(isa, f"CMakeFiles/kernels_{isa}.dir/{source}.cpp.o") for isa in instruction_sets]

    def __str__(self) -> str:
        return f"{self.file}: {self.old} -> {self.new or 'nothing'}"


OPS = ("scaled_masked_softmax", "bias_gelu", "layer_norm", "cross_entropy")
SOFTMAX, GELU, NORM, LOSS = (f"cpu/{op}.cpp" for op in OPS)
GPU_SOFTMAX, GPU_GELU, GPU_NORM, GPU_LOSS = (f"cuda/{op}.cu" for op in OPS)

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

    # CUDA kernels.
    # Who walks what: the wrong diagonal, a row beyond the last, what lies right of the diagonal.
    Mutation(GPU_SOFTMAX, "remainder + a.cols - a.queries + 1", "remainder + 1"),
    Mutation(GPU_SOFTMAX, "live = max<int64_t>(live, 0);", ""),
    Mutation(GPU_SOFTMAX, "if (number >= a.rows) return {0, 0, 0, 0};", ""),
    Mutation(GPU_SOFTMAX, "clear_rest<W>(y, row, team);", ""),
    Mutation(GPU_SOFTMAX, "clear_rest<W>(dx, row, team);", ""),
    Mutation(GPU_SOFTMAX, "k < s.singles(); k += team.size", "k < s.head; k += team.size"),
    # Rows in parts: the last part left out, single elements in every part.
    Mutation(GPU_SOFTMAX, "(s.packets + size - 1) / size", "s.packets / size"),
    Mutation(GPU_SOFTMAX, "Span<W>{0, s.packets - first, 0}", "Span<W>{0, s.packets - first, s.tail}"),
    # Offsets of 32 bits: found by the last rows of a tensor beyond 2^31 elements.
    Mutation(GPU_SOFTMAX, "return {number, number * a.cols, int(a.cols), int(live)};",
             "return {number, int(number * a.cols), int(a.cols), int(live)};"),
    Mutation(GPU_SOFTMAX, "return mask.ndim > 0 ? mask.data + offset + row * mask.stride[0]",
             "return mask.ndim > 0 ? mask.data + offset + int(row * mask.stride[0])"),
    # The mask: the wrong row's, its single bytes, its alignment, the wrong half of a word, a whole row's byte.
    Mutation(GPU_SOFTMAX, "row = q.quotient;", ""),
    Mutation(GPU_SOFTMAX, "if (load_one(masked)) row.live = 0;", ""),
    Mutation(GPU_SOFTMAX, "reinterpret_cast<uintptr_t>(mask + part.span.head) % W == 0", "true"),
    Mutation(GPU_SOFTMAX, "load_one(mask + j + e)) << e % 4 * 8", "load_one(mask + j + e)) << e % 4"),
    Mutation(GPU_SOFTMAX, "e % 2 ? 0x0000ffff : 0xffff0000", "e % 2 ? 0xffff0000 : 0x0000ffff"),
    Mutation(GPU_SOFTMAX, "if (part.has_single()) mask_packet", "if (false) mask_packet"),
    Mutation(GPU_SOFTMAX, "constexpr uint32_t kMinusInfinityBits<half> = 0xfc00;",
             "constexpr uint32_t kMinusInfinityBits<half> = 0xfbff;"),
    # The online sum: no pivot while nothing is live, the sum so far not rescaled, lanes and warps merged without scale or barrier.
    Mutation(GPU_SOFTMAX, "return top == -kInfinity<float> ? 0.f : top;", "return top;"),
    Mutation(GPU_SOFTMAX, "sum = before.sum * math::exp2((before.top - shift) * factor);", "sum = before.sum;"),
    Mutation(GPU_SOFTMAX, "own.sum * math::exp2((own.top - pivot(top)) * factor)", "own.sum"),
    Mutation(GPU_SOFTMAX, "  sync_block();\n", ""),
    Mutation(GPU_SOFTMAX, "own = {-kInfinity<float>, 0};", "own = {0, 0};"),
    Mutation(GPU_SOFTMAX, "if (lane() < warps()) own", "if (lane() <= warps()) own"),
    Mutation(GPU_SOFTMAX, "math::exp2((e - all.top) * factor) * inverse", "math::exp2(e * factor - all.top * factor) * inverse"),
    # Signs, and rows that have no softmax.
    Mutation(GPU_SOFTMAX, "for (float& e : v.v) e *= sign;", ""),
    Mutation(GPU_SOFTMAX, "scale == 0 ? 0.f : scale;", "1.f;"),
    Mutation(GPU_SOFTMAX, "float factor = scale == 0 ? 1.f : scale", "float factor = scale"),
    Mutation(GPU_SOFTMAX, "if (masked && !(all.sum > 0)) {", "if (false) {"),
    Mutation(GPU_SOFTMAX, "? 0.f : kNaN<float>", "? kNaN<float> : 0.f"),
    # Traffic: a row that registers hold is read again.
    Mutation(GPU_SOFTMAX, "if constexpr (kPackets == 0) part = load_values(", "part = load_values("),
    # Backward.
    Mutation(GPU_SOFTMAX, "more += p[e] * d[e];", "more += p[e];"),
    Mutation(GPU_SOFTMAX, "d[e] = scale * p[e] * (d[e] - dot);", "d[e] = p[e] * (d[e] - dot);"),
    Mutation(GPU_SOFTMAX, "d[e] = scale * p[e] * (d[e] - dot);", "d[e] = scale * p[e] * (d[e] + dot);"),
    Mutation(GPU_SOFTMAX, "lie_alike(dy, y) && lie_alike<T>(dx, y)", "lie_alike(dy, y)"),
    # Warps of a block that hold the same packets.
    Mutation("cuda/rows.h", "warp() * 32 * kPackets + lane()", "warp() * 32 + lane()", "scaled_masked_softmax"),

    # The run of elements: chunks, the bias by column, its wrap.
    # Chunks overlap.
    Mutation(GPU_GELU, "block(), kThreads * kPackets<W> * W);",
             "block(), kThreads * kPackets<W> * W - W);"),
    # The end of a run that begins anywhere.
    Mutation(GPU_GELU, "(n + W - 1 + kSize - 1) / kSize",
             "(n + kSize - 1) / kSize"),
    Mutation(GPU_GELU, "quotient(mine.begin + j, cols).remainder", "quotient(j, cols).remainder"),
    Mutation(GPU_GELU, "quotient(mine.begin + run.span.packet_column(thread()), cols)",
             "quotient(mine.begin + thread() * W, cols)"),  # what lies before the first packet
    Mutation(GPU_GELU, "if (column >= cols) column -= cols;", "if (column > cols) column -= cols;"),
    Mutation(GPU_GELU, "(i < left ? here : next) + i", "here + i"),
    Mutation(GPU_GELU, "int64_t(kThreads * W) % a.cols,", "int64_t(kThreads) % a.cols,"),
    Mutation(GPU_GELU, "lie_alike<T>(x, y) && a.cols >= kFull<T>", "a.cols >= kFull<T>"),
    Mutation(GPU_GELU, "lie_alike<T>(x, y) && a.cols >= kFull<T>", "lie_alike<T>(x, y)"),
    Mutation(GPU_GELU, "rows_are_aligned<T>(a.cols, x, static_cast<const T*>(a.bias))",
             "rows_are_aligned<T>(a.cols, x)"),
    # Which rows and columns a thread has, and the sum of what it had.
    Mutation(GPU_GELU, "bool inside = j < cols;", "bool inside = true;"),
    Mutation(GPU_GELU, "quotient(rows - 1 - row, step).quotient) + 1", "quotient(rows - row, step).quotient) + 1"),
    Mutation(GPU_GELU, "row = at.quotient * teams + team;", "row = at.quotient * teams;"),
    Mutation(GPU_GELU, "sum[i] += d[i];", "sum[i] = d[i];"),
    Mutation(GPU_GELU, "    sync_block();\n", ""),
    Mutation(GPU_GELU, "int half = teams / 2; half > 0;", "int half = teams / 2; half > 1;"),
    Mutation(GPU_GELU, "sums.get(thread() + half * lanes)", "sums.get(thread() + half)"),
    Mutation(GPU_GELU, "(block() * lanes + thread()) * W, round", "(at.quotient * lanes + thread()) * W, round"),
    Mutation(GPU_GELU, "rows_are_aligned<T>(a.cols, dy, x, dx) && ", "rows_are_aligned<T>(a.cols, dy, x) && "),
    Mutation(GPU_GELU, "rows_are_aligned<T>(a.cols, dy, x, dx) && reinterpret_cast<uintptr_t>(partials) % 16 == 0",
             "rows_are_aligned<T>(a.cols, dy, x, dx)"),
    Mutation(GPU_GELU, "step, step * a.cols);", "step, (step - 1) * a.cols);"),
    Mutation(GPU_GELU, "partials, g.splits, g.tiles * g.tile,", "partials, g.splits, a.cols,"),
    Mutation(GPU_GELU, "static_cast<const T*>(a.dy), x = ", "static_cast<const T*>(a.x), x = "),
    # What ops share: the sum of partial rows.
    Mutation("cuda/rows.h", "for (int i = 1; i < warps(); ++i) sum += sums",
             "for (int i = 2; i < warps(); ++i) sum += sums", "bias_gelu"),
    Mutation("cuda/rows.h", "partials + part * stride + j", "partials + part * cols + j", "bias_gelu"),

    # Forward: statistics, rows and columns that are not there, offsets beyond 2^31, parameters.
    Mutation(GPU_NORM, "part += (e - mean) * (e - mean);", "part += e * e - mean * mean;"),  # cancels
    Mutation(GPU_NORM, "mean = row_reduce<kTeam>(sum, Sum{}, 0.f, sums)", "mean = row_reduce<kTeam>(sum, Sum{}, 1.f, sums)"),
    Mutation(GPU_NORM, "row_reduce<kTeam>(about, Sum{}, 0.f, squares)", "row_reduce<kTeam>(about, Sum{}, 0.f, sums)"),  # a race
    Mutation(GPU_NORM, "if (row >= a.rows) s = {0, 0, 0};", ""),
    Mutation(GPU_NORM, "const T* x = a.x + row * a.cols;", "const T* x = a.x + int(row * a.cols);"),
    Mutation(GPU_NORM, "store_once(a.y + row * a.cols + j, v);", "store_once(a.y + int(row * a.cols) + j, v);"),
    Mutation(GPU_NORM, "load_parameter<T>(a.bias, j, packet.width(), 0.f)", "load_parameter<T>(a.bias, j, packet.width(), 1.f)"),
    # Rows that are read twice: Chan's merge.
    Mutation(GPU_NORM, "if (count == 0.f) origin = v[0];", ""),  # rounds in proportion to the mean
    Mutation(GPU_NORM, "about + shift * shift * count * ratio;", "about + shift * shift * count;"),
    Mutation(GPU_NORM, "mean += shift * ratio;", "mean += shift;"),
    Mutation(GPU_NORM, "about = seen.squares + seen.count * shift * shift;", "about = seen.squares;"),
    # Backward: the two sums of a row, and the barrier between one row's and the next one's.
    Mutation("cuda/rows.h", "if (step < size) value = op(value, other);", "value = op(value, other);", "layer_norm"),
    Mutation("cuda/rows.h", "sync_block();\n  int first = thread()", "int first = thread()", "layer_norm"),
    Mutation(GPU_NORM, "at ^= kThreads / 32;", ""),
    Mutation("cuda/rows.h", "scratch.get(at + first + i) : identity",
             "scratch.get(at + i) : identity", "layer_norm"),  # another team's
    Mutation(GPU_NORM, "PairSum{}, Pair{0, 0}, size, scratch, at)", "PairSum{}, Pair{0, 1}, size, scratch, at)"),
    Mutation(GPU_NORM, "v[i] = rstd * (d[i] * weight[i] -", "v[i] = (d[i] * weight[i] -"),
    # Who has which rows and columns.
    Mutation(GPU_NORM, "(int(a.cols) - first + stride - 1) / stride", "(int(a.cols) - first) / stride"),
    Mutation(GPU_NORM, "strip.count = row < a.rows ? count : 0;", "strip.count = count;"),
    Mutation(GPU_NORM, "for (; row - team < a.rows; row += step)", "for (; row < a.rows; row += step)"),  # teams miss a barrier
    Mutation(GPU_NORM, "load_strip(row + step, next);", "load_strip(row + 1, next);"),
    Mutation(GPU_NORM, "const int64_t at = row * a.cols + first;", "const int64_t at = int(row * a.cols) + first;"),
    # dweight and dbias of the teams of a block, and where they stay in memory.
    Mutation(GPU_NORM, "const int half = (n + 1) / 2;", "const int half = n / 2;"),
    Mutation(GPU_NORM, "for_each(team < n - half ? kPackets : 0", "for_each(team < half ? kPackets : 0"),
    Mutation(GPU_NORM, "      sync_block();\n      n = half;", "      n = half;"),
    Mutation(GPU_NORM, "      sync_block();\n      for_each(team < n", "      for_each(team < n"),
    Mutation(GPU_NORM, "    if (kSums || i >= count) continue;", "    continue;"),  # never set to 0
    # Long rows in two kernels.
    Mutation(GPU_NORM, "begin += kBatch * kThreads)", "begin += kThreads)"),
    Mutation(GPU_NORM, "if (row >= a.rows) continue;", ""),
    Mutation(GPU_NORM, "begin += kBatch * parts)", "begin += parts)"),
    Mutation(GPU_NORM, "store(a.partials + part * 2 * a.cols + a.cols + j, dbias);",
             "store(a.partials + part * 2 * a.cols + j, dbias);"),
    # Which kernel: packets that are not aligned, rows that don't fit.
    Mutation(GPU_NORM, "(c.cols, a.dy, a.x, a.dx, partials)", "(c.cols, a.dy, a.x, a.dx)"),
    Mutation(GPU_NORM, "lie_alike(a.x, a.y)", "true"),
    Mutation(GPU_NORM, "c.cols <= W * 4 * kThreads", "c.cols <= W * 5 * kThreads"),
    Mutation(GPU_NORM, "c.cols <= W * 8 * kThreads", "c.cols <= W * 9 * kThreads"),
    Mutation("cuda/rows.h", "if (behind) partials += cols;", "", "layer_norm"),
    Mutation("cuda/rows.h", "? second.dtype : first.dtype;", "? first.dtype : second.dtype;", "layer_norm"),

    # The online sum: its identity, its rescaling, the merge.
    Mutation(GPU_LOSS, "Online s = {kLowest, 0, 0};", "Online s = {-kInfinity<float>, 0, 0};"),  # -inf less -inf
    Mutation(GPU_LOSS, "s, Merge{}, Online{kLowest, 0, 0}, scratch", "s, Merge{}, Online{0, 0, 0}, scratch"),
    Mutation(GPU_LOSS, "s.exps * math::exp2((s.top - top) * kLog2e<float>) + exps", "s.exps + exps"),
    Mutation(GPU_LOSS, "exps + others * math::exp2(distance * kLog2e<float>)", "exps + others"),
    Mutation(GPU_LOSS, "bool higher = a.top > b.top;", "bool higher = true;"),
    Mutation(GPU_LOSS, "if (s.exps == 0) s.top = -kInfinity<float>;", ""),
    # Targets and classes.
    Mutation(GPU_LOSS, "if (row >= r.rows) return {true, false, -1};", ""),
    Mutation(GPU_LOSS, "if (team.rank > 0 || row >= r.rows) return;", "if (team.rank > 0) return;"),
    Mutation(GPU_LOSS, "target < r.vocab_size);", "target <= r.vocab_size);"),
    Mutation(GPU_LOSS, "column < r.classes ? column : -1", "column <= r.classes ? column : -1"),
    Mutation(GPU_LOSS, "span<W>(logits, target.ignored ? 0 : r.classes), team, add",
             "span<W>(logits, r.classes), team, add"),
    Mutation(GPU_LOSS, "span<W>(logits, target.ignored ? 0 : r.classes), team, add",
             "span<W>(logits, target.ignored ? 0 : r.cols), team, add"),
    Mutation(GPU_LOSS, "target.bad ? kNaN<float> : share * hit", "share * hit"),
    Mutation(GPU_LOSS, "target.bad ? kNaN<float> : load_one(dloss + row)", "load_one(dloss + row)"),
    # The loss and its gradient.
    Mutation(GPU_LOSS, "r.smoothing * (s.sum / classes - s.top)", "r.smoothing * (s.sum / classes)"),
    Mutation(GPU_LOSS, "r.z_loss * all * all", "r.z_loss * all"),
    Mutation(GPU_LOSS, "log_exps - share * (hit - s.top) + ", "all - share * hit + "),  # large logits cancel
    Mutation(GPU_LOSS, "(1 + 2 * r.z_loss * all)", "(1 + r.z_loss * all)"),
    Mutation(GPU_LOSS, "hit - int(j) == i ? share : 0.f", "hit - int(j) == i ? d : 0.f"),
    Mutation(GPU_LOSS, "target.column >= mine.begin && ", ""),  # of a chunk that is 2^32 columns away
    Mutation(GPU_LOSS, "&& target.column < mine.end ? int", "? int"),
    # Chunks and padding.
    Mutation(GPU_LOSS, "min(mine.end, target.ignored ? 0 : r.classes)", "min(mine.end, r.classes)"),
    Mutation(GPU_LOSS, "span<W>(dlogits, mine.end - classes)", "span<W>(dlogits, mine.end - classes - 1)"),
    Mutation(GPU_LOSS, "dlogits += classes - mine.begin;", ""),
    Mutation(GPU_LOSS, "(rows_are_aligned<T>(a.cols, logits) ? 0 : W - 1)", "0"),
    Mutation(GPU_LOSS, "lie_alike(logits, static_cast<const T*>(dlogits))", "true"),
    Mutation(GPU_LOSS, "(warps + chunks - 1) / chunks", "warps / chunks"),
    Mutation(GPU_LOSS, "(rows + kShort / 32 - 1) / (kShort / 32)", "rows / (kShort / 32)"),
    # What both ops share.
    Mutation("cuda/rows.h", "int64_t begin = number * size - past_boundary<W>(row);",
             "int64_t begin = number * size;", "cross_entropy"),
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
    """The first instruction set on which the test fails ("simt" for CUDA kernels), or nothing. Only one object is compiled anew."""
    for isa, target in mutation.builds(instruction_sets):
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
    if not chosen:
        print(f"no break has {' or '.join(words)} in its file or line")
        return 2
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
            arguments = {isa for m in chosen if m.program == program for isa, _ in m.builds(instruction_sets)}
            if failing := sorted(isa for isa in arguments if fails(tree, program, isa)):
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
