"""`kill -9` at random points of a training run, again and again: it always goes on, and ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from training_cases import base, rows, same, text, words

from megatron_kernels import checkpoint, cli

__all__ = ["base", "text", "words"]  # fixtures
KILLS, ITERATIONS = 20, 200


def arguments(base, run, log) -> list[str]:
    options = {**base, "iterations": ITERATIONS, "save_interval": 5, "keep": 2, "save": run, "log_csv": log, "global_batch_size": 8,
               "valid_fraction": 0.1, "eval_interval": 7, "eval_batches": 1}
    data = [str(path) for path in options.pop("data")]
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", *data, *given, "--resume"]


def command(words: list[str]) -> None:
    """In a process of its own, forked so that nothing need be imported again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.manual_seed(time.time_ns())
    os._exit(cli.run(words))


def at(run) -> int:
    """The iteration of the last checkpoint."""
    latest = checkpoint.latest(run)
    return int(latest.name.removeprefix("step_")) if latest else 0


def iteration_of(log) -> int:
    """The iteration of the last whole row."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


@pytest.mark.slow
def test_killed_twenty_times(base, tmp_path):
    draws = random.Random(2026)
    run, log = tmp_path / "run", tmp_path / "log.csv"
    torch.set_num_threads(1)
    fork, start = multiprocessing.get_context("fork"), time.perf_counter()
    kills: list[tuple[int, int]] = []
    while len(kills) < KILLS:
        begun = at(run)
        process = fork.Process(target=command, args=(arguments(base, run, log),))
        process.start()
        target = begun + draws.randrange(14)  # iterations, and on from there into the next one, scoring, or saving
        while process.is_alive() and (iteration_of(log) < target or target == begun < iteration_of(log)):
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.5 if target == begun else 0.15))
        assert process.is_alive(), f"ended with {process.exitcode} before it could be killed for the {len(kills) + 1}th time"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills.append((iteration_of(log), at(run)))
        assert at(run) >= begun
    process = fork.Process(target=command, args=(arguments(base, run, log),))
    process.start()
    process.join()
    assert process.exitcode == 0
    print(f"\n{KILLS} kills in {time.perf_counter() - start:.0f} s, (iteration, last checkpoint): {kills}")
    assert len({iteration for iteration, _ in kills}) > KILLS // 2 < at(run)  # it was killed at many places, and went on in between

    whole = fork.Process(target=command, args=(arguments(base, tmp_path / "whole", tmp_path / "whole.csv"),))
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    found, expected = rows(log), rows(tmp_path / "whole.csv")
    assert [int(row["iteration"]) for row in found] == list(range(1, ITERATIONS + 1))
    assert found == expected and same(run, tmp_path / "whole")
    print(f"final loss {found[-1]['loss']}, uninterrupted {expected[-1]['loss']}")
    assert not list(run.glob(".*.tmp-*"))
