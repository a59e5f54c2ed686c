"""What benchmarks.plan shows: the trace of each rank beside the closed forms, the paper's table, and modelled times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, NamedTuple

from . import flops, plan_forms, scaling_efficiency
from .plan_forms import Place
from .plan_time import MEASURED, Estimate
from .plan_trace import PHASES, Trace
from .trainer import PRESETS, Settings

PAPER = ("1.2B", "2.5B", "4.2B", "8.3B")
REPLICAS = 64  # of the paper's larger runs: table 1
Lines = list[list[str]]


class Line(NamedTuple):
    """A figure of the trace and its closed form; `limit`: the form is what it may be at most. None: there is no form."""

    name: tuple[str, ...]
    traced: int
    form: int | None
    limit: bool = False

    @property
    def verdict(self) -> str:
        if self.form is None:
            return "no form"
        if self.limit:
            return f"{self.traced / self.form:.1%} of it" if self.form else ""
        return "equal" if self.traced == self.form else "DIFFERS"


@dataclass(frozen=True)
class Compared:
    """A traced rank beside its closed forms. sent: calls, sent_bytes: bytes, by phase, kind and group."""

    trace: Trace
    place: Place
    target: str
    flops: list[Line]
    sent: list[Line]
    sent_bytes: list[Line]
    memory: list[Line]
    korthikanti: int | None

    @property
    def differing(self) -> list[str]:
        return [" ".join(line.name) for line in (*self.flops, *self.sent, *self.sent_bytes, *self.memory)
                if line.verdict == "DIFFERS"]

    def as_json(self) -> dict[str, Any]:
        trace = self.trace
        return {"rank": trace.rank, "place": trace.place, "stages": trace.stages, "parameters": trace.parameters,
                **{name: [{**line._asdict(), "verdict": line.verdict} for line in getattr(self, name)]
                   for name in ("flops", "sent", "sent_bytes", "memory")},
                "collectives": [{**one._asdict(), "calls": count} for one, count in sorted(trace.collectives.items())],
                "products": [{**one._asdict(), "calls": count} for one, count in trace.products.items()],
                "bytes_moved_by_other_ops": dict(trace.moved), "other_ops": dict(trace.ops), "peak_bytes": trace.peak,
                "peak_phase": trace.peak_phase, "kept_bytes": trace.kept, "korthikanti_bytes": self.korthikanti}


def compare(trace: Trace, settings: Settings, world: int, target: str) -> Compared:
    place = Place(settings, settings.replicas(world), trace.place["pp"], trace.place["dp"])
    expected = plan_forms.rank_flops(place, target)
    of_flops = [Line((phase,), trace.flops[phase], expected[phase], limit=phase == "recomputed")
                for phase in ("forward", "backward", *(["recomputed"] if settings.recompute else []))]
    form = plan_forms.collectives(place)
    keys = {(one.phase, one.kind, one.group) for one in trace.collectives} | {key[:3] for key in form or ()}
    sent, sent_bytes = [], []
    for key in sorted(keys, key=lambda key: (("tp", "pp", "dp").index(key[2]), PHASES.index(key[0]), key[1])):
        traced = [(one.bytes, count) for one, count in trace.collectives.items() if (one.phase, one.kind, one.group) == key]
        formed = None if form is None else [(call[3], count) for call, count in form.items() if call[:3] == key]
        cut = key == ("backward", "all_reduce", "dp") or (settings.fuse_linear_loss and key == ("forward", "all_gather", "tp"))
        calls = None if formed is None or cut else sum(count for _, count in formed)
        sent.append(Line(key, sum(count for _, count in traced), calls))
        sent_bytes.append(Line(key, sum(map(prod, traced)), None if formed is None else sum(map(prod, formed))))
    of_memory = plan_forms.memory(place)
    gradients = not place.fsdp and settings.data_parallel == "ddp" and place.replicas > 1  # DDP's buckets are always there
    lines = [Line((name,), trace.memory[name], of_memory[name], limit=name == "gradients" and not gradients)
             for name in ("parameters", "gradients", "optimizer")]
    return Compared(trace, place, target, of_flops, sent, sent_bytes, lines, plan_forms.korthikanti(place))


def quantity(value: float, unit: str) -> str:
    """With a decimal prefix and four digits."""
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}"


def size(value: float) -> str:
    """Bytes with a binary prefix."""
    for prefix, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 2 ** shift:
            return f"{value / 2 ** shift:,.2f} {prefix}"
    return f"{value:.0f} B"


def title(settings: Settings, world: int) -> str:
    s, config = settings, settings.config
    parts = [f"tensor {s.tensor_parallel}" + " with sequence parallelism" * (s.sequence_parallel and s.tensor_parallel > 1)]
    parts += [f"pipeline {s.pipeline_parallel} ({s.schedule})"] if s.pipeline_parallel > 1 else []
    parts += [f"data {s.replicas(world)} ({s.data_parallel})"]
    return (f"{s.preset}: {s.layers} layers, hidden {s.hidden}, {s.heads} heads, vocabulary {config.padded_vocab_size}; "
            f"{s.batch} x {s.sequence} tokens a replica in {s.microbatches} microbatch{'es' * (s.microbatches > 1)}, {s.dtype}"
            f"{', recomputed' * s.recompute}\n{world} rank{'s' * (world > 1)}: {' x '.join(parts)}")


def rank_title(found: Compared) -> str:
    trace, s = found.trace, found.place.settings
    where = f", pipeline rank {trace.place['pp']} of {s.pipeline_parallel}" if s.pipeline_parallel > 1 else ""
    stages = f", stages {', '.join(str(number) for number, _ in trace.stages)} of {trace.stages[0][1]}" if where else ""
    return f"Rank {trace.rank}{where}{stages}: {trace.parameters:,} parameters, one step"


def flops_lines(found: Compared) -> Lines:
    rows = [[line.name[0], quantity(line.traced, "FLOP"), "" if line.form is None else quantity(line.form, "FLOP"), line.verdict]
            for line in found.flops]
    return [*rows, ["together", quantity(found.trace.total_flops, "FLOP"), "", ""]]


def sent_lines(found: Compared) -> Lines:
    rows, sizes = [], {"tp": found.place.settings.tensor_parallel, "dp": found.place.replicas,
                       "pp": found.place.settings.pipeline_parallel}
    for calls, count in zip(found.sent, found.sent_bytes, strict=True):
        phase, kind, group = calls.name
        verdicts = {line.verdict for line in (calls, count)}
        verdict = ("DIFFERS" if "DIFFERS" in verdicts else "equal" if verdicts == {"equal"} else
                   "bytes equal" if count.verdict == "equal" else "no form")
        rows.append([f"{group} {sizes[group]}", phase, kind.replace("_", "-"), f"{calls.traced:,}",
                     quantity(count.traced, "B"), quantity(on_the_wire(kind, sizes[group], count.traced), "B"), verdict])
    return rows


def on_the_wire(kind: str, ranks: int, count: int) -> float:
    """Bytes that a rank sends when the collective goes round a ring."""
    return count * {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks,
                    "reduce_scatter": (ranks - 1) / ranks}.get(kind, 1.0)


def memory_lines(found: Compared) -> Lines:
    rows = [[line.name[0], size(line.traced), size(line.form or 0), line.verdict] for line in found.memory]
    return [*rows, ["activations and temporaries", size(found.trace.memory["rest"]), "", ""],
            [f"together, at the peak (in {found.trace.peak_phase})", size(found.trace.peak), "", ""],
            ["kept for the backward, when it first begins", size(found.trace.kept),
             "" if found.korthikanti is None else size(found.korthikanti), ""]]


def paper_lines() -> Lines:
    """Each of the paper's models by closed form, on as many GPUs as there, with what was reported."""
    reported = {(one.preset, one.devices): one for one in scaling_efficiency.PAPER}
    rows = []
    for name in PAPER:
        settings = PRESETS[name]
        t = settings.tensor_parallel
        for replicas in (1, REPLICAS):
            place = Place(settings, replicas, 0, 0)
            sent = plan_forms.collectives(place) or Counter()
            in_bytes = {group: sum(on_the_wire(call[1], t if group == "tp" else replicas, call[3] * count)
                                   for call, count in sent.items() if call[2] == group) for group in ("tp", "dp")}
            theirs = reported.get((name, t * replicas))
            rows.append([name if replicas == 1 else "", str(t * replicas), f"{t} x {replicas}",
                         quantity(flops.model_flops(settings.config, settings.batch, settings.sequence) / t, "FLOP"),
                         *(quantity(in_bytes[group], "B") for group in ("tp", "dp")),
                         size(sum(plan_forms.memory(place).values())),
                         "" if theirs is None or theirs.efficiency is None else f"{theirs.efficiency:.0%}"])
    return rows


def time_lines(found: Estimate) -> Lines:
    rows: list[tuple[str, float]] = [("matrix products", found.products), ("other ops, at the rate of a copy", found.others),
                                     ("calls of ops", found.launches)]
    rows += [(f"communication, {group}", seconds) for group, seconds in sorted(found.communication.items())]
    rows += [("waiting for other stages", found.bubble)] if found.bubble else []
    rows += [("one after the other", found.total)]
    rows += [("with replicas' communication hidden", found.total - found.hidden)] if found.hidden else []
    return [[name, f"{seconds * 1e3:,.2f}"] for name, seconds in rows]


def time_notes(found: Estimate) -> Iterator[str]:
    yield "Of the time, " + ", ".join(f"{share:.0%} {way}" for way, share in sorted(found.found.items(),
                                                                                  key=lambda item: -item[1])) + "."
    if found.beyond:
        more = f", and {len(found.beyond) - 4} more" if len(found.beyond) > 4 else ""
        yield f"Extrapolated: {'; '.join(found.beyond[:4])}{more}."


class Checked(NamedTuple):
    """A measured run and its model; `why`: there is none. others: the share of the processors that other processes took."""

    name: str
    what: str
    measured: float  # seconds
    modelled: Estimate | None
    why: str = ""
    others: float | None = None

    @property
    def error(self) -> float | None:
        return None if self.modelled is None else self.modelled.total / self.measured - 1

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "what": self.what, "measured_seconds": self.measured, "why": self.why, "others": self.others,
                "error": self.error, "modelled": None if self.modelled is None else asdict(self.modelled)}


def check_lines(rows: Sequence[Checked]) -> Lines:
    lines = []
    for row in rows:
        if row.modelled is None:
            lines.append([row.name, row.what, f"{row.measured * 1e3:,.1f}", "-", "-", "-", row.why])
            continue
        low, high = row.modelled.total - row.modelled.hidden, row.modelled.total
        lines.append([row.name, row.what, f"{row.measured * 1e3:,.1f}", f"{high * 1e3:,.1f}", f"{low * 1e3:,.1f}",
                      f"{row.error:+.0%}", f"{row.modelled.found.get(MEASURED, 0.0):.0%}"])
    return lines
