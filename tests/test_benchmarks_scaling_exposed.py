"""Exposed communication of traces that are made up: on which timeline what counts, and the arithmetic of intervals."""

from __future__ import annotations

import random

import pytest

from benchmarks import scaling_exposed


def test_intervals():
    """Against counting on a grid."""
    draw = random.Random(0)

    def some() -> list[tuple[float, float]]:
        return [(start, start + draw.randrange(6)) for start in (draw.randrange(40) for _ in range(draw.randrange(12)))]

    for _ in range(200):
        one, other = some(), some()
        cells = [{i for start, stop in intervals for i in range(start, stop)} for intervals in (one, other)]
        joined = [scaling_exposed.union(intervals) for intervals in (one, other)]
        assert [scaling_exposed.length(intervals) for intervals in joined] == [len(found) for found in cells]
        assert scaling_exposed.length(scaling_exposed.common(*joined)) == len(cells[0] & cells[1])
        assert all(a[1] < b[0] for a, b in zip(joined[0], joined[0][1:], strict=False))


def event(name: str, start: float, stop: float, cat: str, tid: int = 1) -> dict:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": stop - start, "tid": tid}


def test_exposed_communication_of_a_cpu_trace():
    """An all-reduce from 100 to 900 us, beside which a product runs from 200 to 500, inside an operator that waits from 500 on."""
    events = [event(scaling_exposed.STEP, 0, 1000, "user_annotation"), event("gloo:all_reduce", 100, 900, "user_annotation", tid=7),
              event("autograd::engine::evaluate_function: Backward", 150, 950, "cpu_op"), event("aten::mm", 200, 500, "cpu_op"),
              event("_c10d_functional::wait_tensor", 500, 900, "cpu_op"), event("aten::add", 910, 950, "cpu_op"),
              event("aten::mm", 520, 880, "cpu_op", tid=7), event("gloo:send", 1100, 1200, "user_annotation", tid=7),
              {"ph": "i", "name": "instant", "ts": 1}]
    assert scaling_exposed.of_cpu(events) == scaling_exposed.Exposed(1.0, 0.8, 0.5)


def test_operators_that_call_others_are_no_computation_of_their_own():
    events = [event(scaling_exposed.STEP, 0, 100, "user_annotation"), event("gloo:all_gather", 0, 100, "user_annotation", tid=7),
              event("aten::outer", 0, 100, "cpu_op"), event("aten::inner", 0, 30, "cpu_op"), event("aten::inner", 30, 40, "cpu_op")]
    assert scaling_exposed.of_cpu(events).exposed == pytest.approx(0.06)


def test_exposed_communication_of_a_gpu_trace():
    """NCCL from 0 to 400 and from 700 to 1000 us, products from 300 to 600 and a copy from 900 on; annotations are no work."""
    events = [event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 0, 400, "kernel", tid=20), event("gemm", 300, 600, "kernel"),
              event("ncclDevKernel_SendRecv", 700, 1000, "kernel", tid=20), event("Memcpy DtoD", 900, 1200, "gpu_memcpy"),
              event("nccl:all_reduce", 0, 2000, "gpu_user_annotation"), event("aten::mm", 0, 5000, "cpu_op")]
    assert scaling_exposed.of_gpu(events) == scaling_exposed.Exposed(1.2, 0.7, 0.5)
    assert scaling_exposed.of_gpu([]) == scaling_exposed.Exposed(0.0, 0.0, 0.0)
