"""Instructions per element, read from machine code: what `cuobjdump -sass` prints, as a graph of blocks and a path through it.

What is counted. A kernel has many ways through it: packets or single elements, a bias in float or in the tensor's type, a division
of 32 or of 64 bits. Counted is one way, that of long aligned rows: of all paths it has the most 128-bit accesses; among those the
fewest accesses of single elements, then the fewest calls of subroutines (where ptxas puts divisions of 64 bits and by denormal
numbers), then the most instructions. An instruction whose predicate is false takes an issue slot too, and counts. So the count is
an upper bound for that way: of two branches that full packets could take, the longer one is taken.

Where. The innermost loops with 128-bit loads are what takes the time of a kernel that has any, and each such loop on the path
counts with one iteration, to be divided by the elements it handles. Of loops that access alike, in the same proportion of loads to
stores, those with the most accesses count: the others are what ptxas leaves for a remainder when it unrolls. A kernel without such
a loop keeps its row in registers, unrolled: it counts as a whole, reductions and addresses included. Other loops on the path count
with one iteration, and their 128-bit stores, which only fill, do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
ADDRESS = re.compile(r"\b0x([0-9a-f]+)\s*$")
# Accesses to global memory that move data; LD and ST, which find out by the address where they go, would be a surprise.
GLOBAL = re.compile(r"(LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG)\b")
JUMP = re.compile(r"(BRX|JMP|JMX)\b")
END = -1  # the block after an EXIT under a predicate


@dataclass
class Instruction:
    address: int
    guard: str  # the predicate, or ""
    name: str
    operands: str

    @property
    def target(self) -> int:
        found = ADDRESS.search(self.operands)
        assert found, f"{self.name} {self.operands}: no address"
        return int(found[1], 16)

    @property
    def is_global(self) -> bool:
        return bool(GLOBAL.match(self.name))

    @property
    def is_wide(self) -> bool:
        return self.is_global and ".128" in self.name

    @property
    def is_single(self) -> bool:
        """Of one element, as far as that shows: a float is loaded as the mask of four floats is."""
        return self.is_global and not self.is_wide and (self.name.startswith("ST") or bool(re.search(r"\.[US](8|16)\b", self.name)))


@dataclass(order=True)
class Weight:
    """Of a path; the larger one is taken."""

    wide: int = 0
    singles: int = 0  # negative
    calls: int = 0  # negative
    instructions: int = 0
    loads: int = field(default=0, compare=False)
    stores: int = field(default=0, compare=False)

    def is_remainder_of(self, other: Weight) -> bool:
        return self.wide < other.wide and self.stores * other.loads == other.stores * self.loads

    def __add__(self, other: Weight) -> Weight:
        return Weight(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def parse(text: str) -> dict[str, list[Instruction]]:
    """By mangled name."""
    kernels = {}
    for part in text.split("Function : ")[1:]:
        name, code = part.split("\n", 1)
        kernels[name.strip()] = [Instruction(int(at, 16), guard, op, operands.strip())
                                 for at, guard, op, operands in INSTRUCTION.findall(code)]
    return kernels


class Graph:
    """Blocks of a kernel by their first address, without subroutines and the paths of warps whose threads have parted."""

    def __init__(self, code: list[Instruction]):
        starts = {code[0].address}
        for this, following in pairwise(code):
            assert not JUMP.match(this.name), f"{this.name} at {this.address:#x}: a jump that is not understood"
            if this.name.startswith(("BRA", "CALL", "BSSY")):
                starts.add(this.target)
            if this.name.startswith(("BRA", "CALL", "EXIT", "RET")):
                starts.add(following.address)
        self.blocks: dict[int, list[Instruction]] = {}
        for instruction in code:
            if instruction.address in starts:
                block = self.blocks[instruction.address] = []
            block.append(instruction)
        order = sorted(self.blocks)
        after = dict(pairwise(order))
        self.successors = {at: self._successors(block, after.get(at)) for at, block in self.blocks.items()}
        self.blocks[END], self.successors[END] = [], []
        self._search(order[0])
        self.weights = {at: self._weight(self.blocks[at]) for at in self.order}
        self.loading = {header: body for header, body in self.loops.items() if any(self.weights[at].loads for at in body)}
        for header in self.loops.keys() - self.loading.keys():
            for at in self.loops[header]:
                self.weights[at].wide = self.weights[at].stores = 0

    @staticmethod
    def _successors(block: list[Instruction], following: int | None) -> list[int]:
        last = block[-1]
        base = last.name.split(".")[0]
        onward = [following] if following is not None else []
        # ptxas leaves some loops of sm_80 by a call under a predicate, which never returns.
        if (base == "BRA" and ".DIV" not in last.name) or (base == "CALL" and last.guard):
            condition = last.guard or re.match(r"!?U?P[0-9]", last.operands)
            return [last.target, *(onward if condition else [])]
        if base in ("EXIT", "RET"):
            return [END, *onward] if last.guard else []
        return onward

    def _search(self, entry: int) -> None:
        """Depth first: reachable blocks in topological order but for edges that close a loop, and the loops."""
        closing, done, open_, seen = [], [], {entry}, {entry}
        stack = [(entry, iter(self.successors[entry]))]
        while stack:
            at, rest = stack[-1]
            for to in rest:
                if to in open_:
                    closing.append((at, to))
                elif to not in seen:
                    seen.add(to)
                    open_.add(to)
                    stack.append((to, iter(self.successors[to])))
                    break
            else:
                stack.pop()
                open_.discard(at)
                done.append(at)
        self.entry, self.order, self.closing = entry, done[::-1], set(closing)
        before: dict[int, list[int]] = {at: [] for at in self.order}
        for at in self.order:
            for to in self.successors[at]:
                before[to].append(at)
        self.loops: dict[int, set[int]] = {}
        for latch, header in closing:
            body, work = self.loops.setdefault(header, {header}), [latch]
            while work:
                at = work.pop()
                if at not in body:
                    body.add(at)
                    work += before[at]

    def _weight(self, block: list[Instruction]) -> Weight:
        out = Weight(instructions=len(block))
        for instruction in block:
            out.wide += instruction.is_wide
            out.singles -= instruction.is_single
            out.loads += instruction.is_wide and instruction.name.startswith("LD")
            out.stores += instruction.is_wide and instruction.name.startswith("ST")
            if instruction.name.startswith("CALL") and not instruction.guard:
                out.calls -= 1
                out.instructions += self._subroutine(instruction.target)
        return out

    def _subroutine(self, start: int) -> int:
        count = 0
        for at in sorted(self.blocks):
            if at >= start:
                count += len(self.blocks[at])
                if self.blocks[at][-1].name.startswith("RET"):
                    break
        return count

    def path(self, start: int, within: set[int]) -> tuple[Weight, list[int]]:
        """The heaviest path inside `within` from `start` to an end or once around the loop that begins there; a loop on the way is
        gone around once. With it the blocks on the path."""
        best: dict[int, tuple[Weight, list[int]]] = {}
        for at in reversed(self.order):
            if at not in within:
                continue
            weight, steps, leaving = self.weights[at], [at], [(at, to) for to in self.successors[at]]
            if at != start and at in self.loops:
                body = self.loops[at]
                weight, steps = self.path(at, body)
                leaving = [(one, to) for one in body for to in self.successors[one] if to not in body]
            following = [best[to] for one, to in leaving if to in best and (one, to) not in self.closing]
            onward, rest = max(following, key=lambda found: found[0], default=(Weight(), []))
            best[at] = (weight + onward, [*steps, *rest])
        return best[start]

    def regions(self) -> list[Weight]:
        """One iteration of each innermost loop with 128-bit loads that lies on the path, or the whole path if there is none."""
        whole, steps = self.path(self.entry, set(self.order))
        inner = [header for header, body in self.loading.items()
                 if header in steps and not any(other != header and other in body for other in self.loading)]
        found = [self.path(header, self.loading[header])[0] for header in inner]
        return [one for one in found if not any(one.is_remainder_of(other) for other in found)] or [whole]
