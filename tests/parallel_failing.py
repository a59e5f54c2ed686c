"""One rank of the training runs that test_parallel_failures.py starts, kills and resumes. TP 2 x DP 2, with dropout.

    RANK=... WORLD_SIZE=4 ... python parallel_failing.py STEPS RUN WHERE [RUN WHERE ...]

Each RUN is a directory. It is resumed from the checkpoint in it, if any, saves at every second step, and leaves losses and weights
in RUN.RANK.pt. WHERE says how a rank ends: "never", "step 5" (rank 3, within the forward pass of that step), "save 8" (rank 2,
while that checkpoint is being written).
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from megatron_kernels import checkpoint, parallel
from megatron_kernels.checkpoint import training
from megatron_kernels.models import GPT2, GPT2Config

CONFIG = GPT2Config(num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=24, vocab_size=97)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def train(run: Path, steps: int, where: str, mesh) -> None:
    rank = dist.get_rank()
    model = GPT2(CONFIG, mesh, seed=1)
    parallel.seed(1, mesh, model)
    wrapped = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = checkpoint.load_training(run, wrapped, optimizer).step if checkpoint.latest(run) else 0
    losses = []
    for step in range(start + 1, steps + 1):
        if where == f"step {step}" and rank == 3:
            model.decoder.layers[1].register_forward_pre_hook(die)
        ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(2 * step + mesh.get_local_rank("dp")))
        loss = wrapped(ids, labels=ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 2 == 0:
            if where == f"save {step}" and rank == 2:
                training.write_checksums = die  # the files are written, the directory not yet renamed
            torch.save((start, losses, dict(model.named_parameters())), f"{run}.{rank}.pt")
            checkpoint.save_training(run, wrapped, optimizer, step=step)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    mesh = parallel.make_mesh(tensor_parallel=2, data_parallel=2, device_type="cpu")
    with parallel.failures(mesh):
        for run, where in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
            train(Path(run), int(sys.argv[1]), where, mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
