"""benchmarks.plan: what is counted on fake tensors against the papers, against closed forms, and against a step that is real."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks import flops, plan, plan_fake, plan_forms, plan_report, plan_trace, scaling_run, trainer
from benchmarks.plan_forms import Place
from benchmarks.plan_trace import trace
from benchmarks.trainer import PRESETS, Settings
from megatron_kernels.models import GPT2

SMALL = Settings(layers=2, hidden=64, heads=8, vocab=1000, sequence=160, batch=2, tensor_parallel=8, dtype="bf16")
TINY = Settings(layers=4, hidden=48, heads=4, vocab=500, sequence=40, batch=4, microbatches=2, tensor_parallel=4)


def calls(found: plan_trace.Trace, group: str) -> dict[tuple[str, str, int], int]:
    """(phase, kind, bytes) -> how often, in one kind of group."""
    return {(one.phase, one.kind, one.bytes): count for one, count in found.collectives.items() if one.group == group}


@pytest.mark.parametrize("world", [512, 4096])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_step_among_many_ranks(world, sequence_parallel):
    """FLOPs exactly the closed form's eighth, and the collectives that docs/parallel.md says."""
    settings = replace(SMALL, sequence_parallel=sequence_parallel)
    found = trace(settings, world, rank=world - 1)
    config, tokens, layers = settings.config, 2 * 160, settings.layers
    assert found.place == {"pp": 0, "dp": world // 8 - 1, "tp": 7}
    assert found.flops["forward"] + found.flops["backward"] == flops.model_flops(config, 2, 160) // 8
    assert sum(product.flops * count for product, count in found.products.items()) == found.total_flops
    whole = tokens * 64 * 2
    statistics = {("forward", "all_gather", tokens * 3 * 4 * 8): 1}
    norm = {("update", "all_reduce", 8): 1}
    if sequence_parallel:
        replicated = 64 * (6 * layers + 2 + 160) * 2  # norms and biases after a sum, the last norm, the positions
        expected = {(phase, kind, whole): 1 + 2 * layers
                    for phase in ("forward", "backward") for kind in ("all_gather", "reduce_scatter")}
        expected |= {("update", "all_reduce", replicated): 1}
    else:
        expected = {(phase, "all_reduce", whole): 1 + 2 * layers for phase in ("forward", "backward")}
    assert calls(found, "tp") == {**expected, **statistics, **norm}
    gradients = {key: count for key, count in calls(found, "dp").items() if key[0] == "backward"}
    assert sum(size * count for (_, _, size), count in gradients.items()) == found.parameters * 2
    assert not dist.is_initialized()


def test_recomputation_is_apart():
    plain, again = trace(SMALL, 8), trace(replace(SMALL, recompute=True), 8)
    assert (again.flops["forward"], again.flops["backward"]) == (plain.flops["forward"], plain.flops["backward"])
    last = 2 * 2 * 2 * 160 * 4 * 64 * 64 // 8  # of two layers, the product that the backward does not need
    assert again.flops["recomputed"] == 2 * flops.layer_flops(SMALL.config, 2, 160) // 8 - last
    assert calls(again, "tp")["recomputed", "all_reduce", 2 * 160 * 64 * 2] == 2
    assert again.kept < plain.kept / 2


@pytest.mark.parametrize("change", [{}, {"attention": "sdpa"}, {"dtype": "fp32"}, {"recompute": True, "dtype": "fp32"},
                                    {"microbatches": 2}], ids=str)
def test_traced_as_on_a_cpu_counts_what_runs_there(change):
    """The same step on real tensors, one rank."""
    settings = replace(SMALL, tensor_parallel=1, **change)
    found = trace(settings, 1, target="cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        training = trainer.Training(settings, settings.mesh("cpu"), torch.device("cpu"))
        with flops.counter() as count:
            training.step()
    finally:
        dist.destroy_process_group()
    assert found.total_flops == count.get_total_flops() == sum(one.flops * calls for one, calls in found.products.items())
    expected = plan_forms.rank_flops(Place(settings, 1, 0, 0), "cpu")
    assert (found.flops["forward"], found.flops["backward"]) == (expected["forward"], expected["backward"])
    assert (found.flops["recomputed"] > 0) == settings.recompute
    on_gpu = plan_forms.rank_flops(Place(settings, 1, 0, 0), "gpu")
    assert (on_gpu["forward"] > expected["forward"]) == (settings.attention == "softmax")


CASES = [
    {}, {"sequence_parallel": True, "recompute": True}, {"data_parallel": "fsdp", "recompute": True},
    {"data_parallel": "fsdp", "sequence_parallel": True, "master_weights": True, "dtype": "bf16"},
    {"pipeline_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2, "schedule": "GPipe", "data_parallel": "fsdp"},
    {"pipeline_parallel": 2, "schedule": "Interleaved1F1B", "dtype": "fp64"},
    {"pipeline_parallel": 2, "schedule": "ZBVZeroBubble", "data_parallel": "fsdp", "sequence_parallel": True},
    {"fuse_linear_loss": True, "dropout": 0.1}]
MANY = [{"sequence_parallel": sequence, "data_parallel": kind, "recompute": again, "pipeline_parallel": stages,
         "schedule": schedule, "microbatches": 4, "batch": 8, "layers": 8}
        for sequence, kind, again, (stages, schedule) in itertools.product(
            (False, True), ("ddp", "fsdp"), (False, True),
            [(1, "1F1B"), (4, "GPipe"), *((2, name) for name in (
                "1F1B", "LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"))])
        if not (kind == "ddp" and schedule in plan_forms.SPLIT)]


@pytest.mark.parametrize("change", [*CASES, *(pytest.param(one, marks=pytest.mark.slow) for one in MANY)], ids=str)
def test_trace_and_closed_forms_agree(change):
    settings = replace(TINY, **change)
    world = 12 * settings.pipeline_parallel  # three replicas, which do not divide every parameter
    for pp, replica in zip(range(settings.pipeline_parallel), itertools.cycle([1, 2, 0])):
        found = trace(settings, world, rank=(pp * 3 + replica) * 4 + 1)
        compared = plan_report.compare(found, settings, world, "gpu")
        assert (compared.place.pipeline_rank, compared.place.replica) == (pp, replica)
        assert compared.place.stages == [number for number, _ in found.stages]
        assert compared.differing == []
        assert sum(plan_forms.held(compared.place)) == found.parameters
        verdicts = Counter(line.verdict for line in (*compared.sent, *compared.sent_bytes))
        assert set(verdicts) <= {"equal", "no form"}
        assert verdicts["equal"] > 4 or plan_forms.collectives(compared.place) is None


def test_a_difference_is_seen():
    found = trace(TINY, 4)
    found.collectives[plan_trace.Collective("forward", "all_reduce", "tp", 4, 8)] += 1
    found.flops["forward"] += 2
    found.memory["parameters"] += 4
    assert plan_report.compare(found, TINY, 4, "gpu").differing == [
        "forward", "forward all_reduce tp", "forward all_reduce tp", "parameters"]


@pytest.mark.parametrize("change", [{"data_parallel": "fsdp"}, {"microbatches": 1}], ids=str)
def test_the_first_step_is_like_the_second(change):
    settings = replace(TINY, **change)
    first, second = (trace(settings, 8, steps=steps) for steps in (1, 2))
    assert first == second


def test_memory_of_the_parameters_is_that_of_the_model():
    settings = replace(TINY, tensor_parallel=1, dtype="bf16")
    model = GPT2(settings.config, device="meta")
    elements = sum(parameter.numel() for parameter in model.parameters())
    found = trace(settings, 2)
    assert found.parameters == elements
    tensors = len(list(model.parameters()))
    assert found.memory["parameters"] == found.memory["gradients"] == 2 * elements
    assert found.memory["optimizer"] == 4 * elements + 4 * tensors


def test_one_more_layer_keeps_what_a_layer_keeps():
    """Sixteen activations, the probabilities, and four floats of the layer norms for each token; shares where they are shared."""
    kept = [trace(replace(TINY, layers=layers, microbatches=1), 4).kept for layers in (2, 3)]
    tokens, h, t, e = 4 * 40, 48, 4, 4
    assert kept[1] - kept[0] == tokens * h * e * (4 + 12 // t) + 4 * tokens * e + 4 * 40 * tokens * e // t


@pytest.mark.parametrize("cap", [None, 2])
def test_later_buckets_are_those_of_ddp(cap):
    """Of a real second step. By default the first is smaller than the others."""
    settings = replace(PRESETS["small-1"], layers=10)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = GPT2(settings.config, seed=1)
        replica = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=cap)
        arrived, reduced = [], []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(arrived.append)

        def hook(state, bucket):
            reduced.append(bucket.buffer().nbytes)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        replica.register_comm_hook(None, hook)
        ids = torch.zeros(1, 8, dtype=torch.int64)
        for _ in range(2):
            arrived.clear()
            reduced.clear()
            replica(ids, labels=ids).backward()
        assert len(reduced) > 2 and plan_fake.later_buckets(replica, arrived) == reduced
    finally:
        dist.destroy_process_group()


class Steps(plan_fake.Mode):
    """What the recorder does to memory, without a model."""

    def __init__(self):
        super().__init__()
        self.memory = plan_trace._Memory()

    def run(self, func, args, kwargs):
        out = func(*args, **kwargs)
        self.memory.see(out, "forward")
        return out


def test_peak_of_memory():
    with Steps() as steps, plan_fake.resizes(steps.memory.resized):
        kept = torch.empty(1000, dtype=torch.uint8)
        steps.memory.restart()
        steps.memory.label([kept], "parameters")
        first = torch.empty(500, dtype=torch.uint8)
        view = first.view(5, 100)[1:]
        del first
        second = torch.empty(300, dtype=torch.uint8)
        del view
        third = second + 1
        third.untyped_storage().resize_(0)
        del third
        fourth = torch.empty(100, dtype=torch.uint8)
    assert steps.memory.peak() == ({"parameters": 1000, "gradients": 0, "optimizer": 0, "rest": 800}, "forward")
    held = sum(count for _, count, _ in steps.memory.events)
    assert held == 1000 + 300 + 100 and fourth.numel() == 100


def test_korthikanti_is_the_papers_formula():
    """Equations 2 and 4 and section 5 at 16 bits, with dropout."""
    settings = replace(PRESETS["8.3B"], dropout=0.1, recompute=False)
    s, b, h, a, t, layers = 1024, 8, 3072, 32, 8, 72
    found = plan_forms.korthikanti(Place(settings, 64, 0, 0))
    assert found == layers * (s * b * h * (10 + 24 / t) + 5 * a * s * s * b / t)
    found = plan_forms.korthikanti(Place(replace(settings, sequence_parallel=True), 64, 0, 0))
    assert found == layers * (34 * s * b * h + 5 * a * s * s * b) / t
    assert plan_forms.korthikanti(Place(PRESETS["8.3B"], 64, 0, 0)) == layers * 2 * s * b * h
    pipeline = replace(PRESETS["8.3B"], pipeline_parallel=4, microbatches=8)
    assert [plan_forms.korthikanti(Place(pipeline, 1, rank, 0)) for rank in range(4)] == [
        layers // 4 * 2 * s * 1 * h * (4 - rank) for rank in range(4)]


def run_plan(capsys, *argv: str) -> tuple[int, str, str]:
    code = plan.main(list(argv))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_command(capsys, tmp_path):
    code, out, err = run_plan(capsys, "--preset", "8.3B", "--layers", "2", "--tensor-parallel", "8", "--data-parallel", "64",
                              "--json", str(tmp_path / "plan.json"))
    assert (code, err) == (0, "")
    assert "512 ranks: tensor 8 x data 64 (ddp)" in out and "DIFFERS" not in out and "does not predict" in out
    assert "77%" in out and "74%" in out and "modelled" not in out.lower()
    data = json.loads((tmp_path / "plan.json").read_text())
    lines = {line["name"][0]: line["traced"] for line in data["ranks"][0]["flops"]}
    settings = Settings.from_json(data["settings"])
    assert lines["forward"] + lines["backward"] == flops.model_flops(settings.config, 8, 1024) // 8
    assert data["world"] == 512 and data["modelled"] is None
    assert sum(one["calls"] * one["bytes"] for one in data["ranks"][0]["collectives"] if one["group"] == "dp") == (
        2 * data["ranks"][0]["parameters"] + 8)


def test_command_of_a_pipeline_shows_three_ranks(capsys, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run_plan(capsys, "--preset", "tiny", "--pipeline-parallel", "4", "--microbatches", "4", "--data-parallel", "2",
                            "fsdp", "--json", str(path))
    data = json.loads(path.read_text())
    assert code == 0 and [rank["place"]["pp"] for rank in data["ranks"]] == [0, 2, 3]
    assert data["settings"]["data_parallel"] == "fsdp" and data["world"] == 8
    assert "pipeline rank 3 of 4" in out and "77%" not in out


@pytest.mark.parametrize(("argv", "says"), [
    (["--tensor-parallel", "3"], "does not divide num_attention_heads 4"),
    (["--pipeline-parallel", "3"], "do not divide num_layers 4"),
    (["--world", "7", "--tensor-parallel", "2"], "multiple of 2, got 7"),
    (["--microbatches", "3"], "microbatches must divide the batch"),
    (["--schedule", "best", "--pipeline-parallel", "2"], "got 'best'"),
    (["--pipeline-parallel", "2", "--schedule", "ZBVZeroBubble", "--data-parallel", "2", "--microbatches", "4"], "use FSDP2"),
    (["--rank", "1"], "--rank must be in [0, 1), got 1"),
    (["--rates", "nothing.json"], "nothing.json: cannot read")])
def test_bad_combinations_end_in_one_line(capsys, argv, says):
    code, out, err = run_plan(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and says in err
    assert err.startswith("benchmarks.plan: ") and not dist.is_initialized()


@pytest.mark.parametrize(("argv", "says"), [
    (["--data-parallel", "2", "--world", "4"], "only one of them"), (["--data-parallel", "0"], "got '0'"),
    (["--data-parallel", "2", "3"], "one number"), (["--check", "run.json"], "--check needs --rates")])
def test_bad_options(capsys, argv, says):
    with pytest.raises(SystemExit) as ended:
        plan.parse(argv)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_a_process_with_a_group_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="is initialised in this process"):
            trace(TINY, 4)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_largest_preset(capsys):
    """8.3B parameters on 512 ranks, with the paper's recomputation."""
    code, out, _ = run_plan(capsys, "--preset", "8.3B", "--tensor-parallel", "8", "--data-parallel", "64")
    assert code == 0 and out.count(" equal") >= 10
    assert scaling_run.name_of(PRESETS["8.3B"], 512) == "8.3B-tp8-dp64"
