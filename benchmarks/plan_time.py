"""How long a step should take, from what it does and from rates that `benchmarks.scaling --measure-rates` measured.

No constant here was fitted to a run. A product takes what was measured for its shape, other ops what copying their bytes takes, a
collective what was measured for its kind, ranks and bytes. What lies between measured points is interpolated, what lies beyond is
named, and a kind, dtype or group size that nobody measured is refused.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files
from .plan_forms import SPLIT, TWO_STAGES
from .plan_trace import Collective, Product, Trace
from .rates import KIND
from .trainer import Settings

# How a rate was found.
MEASURED, INTERPOLATED, BEYOND = "from measured rates", "from interpolated ones", "from extrapolated ones"
AS = {"broadcast": "all_reduce"}  # measured as; of the few bytes that are broadcast the latency counts


@dataclass
class Rates:
    """A rates file. Products by (dtype, dimensions), collectives by (kind, ranks): sorted (bytes, seconds)."""

    path: str
    environment: dict[str, Any]
    products: dict[tuple[str, int], dict[tuple[int, ...], float]]
    collectives: dict[tuple[str, int], list[tuple[int, float]]]
    copy: float
    launch: float

    @classmethod
    def load(cls, path: str | Path) -> Rates:
        """Raises ValueError where the file is none of rates, naming the file and the key."""
        data = files.read_json(path, "rates that benchmarks.scaling --measure-rates wrote", KIND)
        products: dict[tuple[str, int], dict[tuple[int, ...], float]] = defaultdict(dict)
        collectives: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
        try:
            for row in data["matmul"]:
                products[row["dtype"], 3][row["m"], row["n"], row["k"]] = _positive(row["seconds"])
            for row in data["batched_matmul"]:
                products[row["dtype"], 4][row["batch"], row["m"], row["n"], row["k"]] = _positive(row["seconds"])
            for row in data["collectives"]:
                collectives[row["kind"], row["ranks"]].append((row["bytes"], _positive(row["seconds"])))
            found = cls(str(path), data["environment"], dict(products), {key: sorted(rows) for key, rows in collectives.items()},
                        _positive(data["copy_bytes_per_second"]), _positive(data["launch"]["seconds"]))
            if not isinstance(found.environment["kind"], str):
                raise TypeError("environment.kind is no text")
        except KeyError as error:
            raise ValueError(f"{path}: the rates lack {error}") from error
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: rates of an unexpected form: {error}") from error
        return found

    def product(self, product: Product) -> tuple[float, str]:
        """Seconds, and how they were found: as measured, also of the transposed product, or from the rates of products nearby,
        each weighing by the inverse square of its distance in the logarithms of the sizes."""
        batched = product.batch > 1
        key = (product.dtype, 4 if batched else 3)
        known = self.products.get(key)
        if not known:
            raise ValueError(f"{self.path}: no {'batched ' * batched}product in {product.dtype} was measured")
        sizes = (product.m, product.n, product.k)
        own: tuple[int, ...] = (product.batch, *sizes) if batched else sizes
        turned = (*own[:-3], product.n, product.m, product.k)
        for one in (own, turned):
            if one in known:
                return known[one], MEASURED
        top, total = 0.0, 0.0
        for other, seconds in known.items():
            weight = 1 / sum(math.log(a / b) ** 2 for a, b in zip(own, other, strict=True))
            top += weight * math.log(2 * math.prod(other) / seconds)
            total += weight
        inside = all(min(column) <= size <= max(column) for size, column in zip(own, zip(*known, strict=True), strict=True))
        return product.flops / math.exp(top / total), INTERPOLATED if inside else BEYOND

    def collective(self, one: Collective) -> tuple[float, str]:
        """Seconds and how they were found: linear between measured sizes; below the smallest as long as that."""
        kind, ranks = AS.get(one.kind, one.kind), 2 if one.kind == "send" else one.ranks
        rows = self.collectives.get((kind, ranks))
        if not rows:
            raise ValueError(f"{self.path}: no {kind} among {ranks} ranks was measured")
        sizes = [size for size, _ in rows]
        i = bisect_left(sizes, one.bytes)
        if i < len(rows) and sizes[i] == one.bytes:
            return rows[i][1], MEASURED
        if i == 0:
            return rows[0][1], MEASURED if one.bytes < sizes[0] else BEYOND
        if i == len(rows):
            return rows[-1][1] * one.bytes / sizes[-1], BEYOND
        (x0, y0), (x1, y1) = rows[i - 1:i + 1]
        return y0 + (y1 - y0) * (one.bytes - x0) / (x1 - x0), INTERPOLATED


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"seconds and rates must be positive, got {value!r}")
    return float(value)


@dataclass
class Estimate:
    """Modelled seconds of a step, one thing after the other. `total` hides nothing; `hidden` is the part of it that could pass
    while the backward computes, if the replicas' communication does not slow it down."""

    products: float = 0.0
    others: float = 0.0
    launches: float = 0.0
    communication: dict[str, float] = field(default_factory=dict)  # by group
    bubble: float = 0.0  # waiting for the other stages of a pipeline
    total: float = 0.0
    hidden: float = 0.0
    found: dict[str, float] = field(default_factory=dict)  # share of the time by how its rates were found
    beyond: list[str] = field(default_factory=list)


def estimate(traces: Sequence[Trace], settings: Settings, rates: Rates) -> Estimate:
    """Of the slowest of the traced ranks, and the waiting of a pipeline. Raises ValueError for what was not measured."""
    return max((_of(trace, settings, rates) for trace in traces), key=lambda one: one.total)


def idle_share(settings: Settings) -> float:
    """How much longer a pipeline's forward and backward take than one rank's work: (p - 1) / m, over 2 with two stages a rank
    (Narayanan et al. 2021, arXiv 2104.04473, section 2.2); 0 for the schedules that are to have none."""
    p, m = settings.pipeline_parallel, settings.microbatches
    return 0.0 if p == 1 or settings.schedule in SPLIT else (p - 1) / m / (2 if settings.schedule in TWO_STAGES else 1)


def _of(trace: Trace, settings: Settings, rates: Rates) -> Estimate:
    found, how, beyond = Estimate(), defaultdict[str, float](float), defaultdict[str, float](float)
    for product, count in trace.products.items():
        seconds, way = rates.product(product)
        found.products += seconds * count
        how[way] += seconds * count
        if way == BEYOND:
            batch = f"{product.batch} x " if product.batch > 1 else ""
            beyond[f"product {batch}[{product.m}, {product.k}] @ [{product.k}, {product.n}] in {product.dtype}"] += seconds * count
    update = 0.0
    for one, count in trace.collectives.items():
        seconds, way = rates.collective(one)
        found.communication[one.group] = found.communication.get(one.group, 0.0) + seconds * count
        how[way] += seconds * count
        update += seconds * count * (one.phase == "update")
        if way == BEYOND:
            beyond[f"{one.kind} of {one.bytes} bytes among {one.ranks} ranks"] += seconds * count
    found.others = sum(trace.moved.values()) / rates.copy
    calls = sum(trace.ops.values()) * rates.launch
    found.launches = calls if rates.environment["kind"] == "cpu" else max(
        0.0, calls + sum(trace.products.values()) * rates.launch - found.products - found.others)  # a GPU works meanwhile
    how[MEASURED] += found.others + found.launches
    busy = found.products + found.others + found.launches + sum(found.communication.values())
    update += trace.moved["update"] / rates.copy
    found.bubble = (busy - update) * idle_share(settings)
    found.total = busy + found.bubble
    replicas = sum(rates.collective(one)[0] * count for one, count in trace.collectives.items()
                   if one.group == "dp" and one.phase == "backward")
    backward = sum(trace.flops[name] for name in ("backward", "recomputed")) / max(trace.total_flops, 1) * found.products
    found.hidden = min(replicas, backward + (trace.moved["backward"] + trace.moved["recomputed"]) / rates.copy)
    found.found = {way: seconds / busy for way, seconds in how.items() if seconds}
    found.beyond = sorted(beyond, key=lambda name: -beyond[name])
    return found


def comparable(environment: dict[str, Any], rates: Rates) -> str:
    """Why a run on another machine says nothing about these rates, or nothing."""
    for name in ("kind", "device", *(("threads",) if rates.environment["kind"] == "cpu" else ())):
        if environment.get(name) != rates.environment.get(name):
            return f"{name} is {environment.get(name)}, of the rates {rates.environment.get(name)}"
    return ""
