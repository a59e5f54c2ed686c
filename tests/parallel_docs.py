"""Cases for four ranks: the program that docs/parallel.md shows does what the page says."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_kernels as mk

PAGE = Path(__file__).resolve().parent.parent / "docs" / "parallel.md"


def example():
    code = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    before = os.getcwd()
    os.chdir(folder[0])
    try:
        names: dict = {}
        exec(compile(code, str(PAGE), "exec"), names)
        serial = mk.models.GPT2(names["config"])
        restored = mk.checkpoint.load_training("run", serial)
    finally:
        os.chdir(before)
    shares = {name: (parameter, share) for name, parameter, share in mk.parallel.layout.shares(names["model"])}
    same = all(torch.equal(parameter, share.of(serial.get_parameter(name))) for name, (parameter, share) in shares.items())
    return {"finite": bool(names["loss"].isfinite()), "resumed serially": restored.step == 3 and same}


def cases():
    return {"example": example}
