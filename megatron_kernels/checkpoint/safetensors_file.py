"""Writing a safetensors file one tensor at a time.

The library's own writer takes all tensors of a file at once, which would hold a second copy of the model in memory. The format
is small: eight bytes with the length of a JSON header, the header (dtype, shape and byte range of each tensor), then the bytes.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_safetensors(path: Path, entries: dict[str, tuple[tuple[int, ...], torch.dtype]], make: Callable[[str], Tensor],
                      track: Callable[[list[str]], Iterable[str]] = iter) -> None:
    """Write the tensors named in `entries` (shape and dtype each), calling make(name) for one at a time.

    `track` wraps the list of names, for progress. Raises OSError when the file can't be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in entries.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors start at a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in track(list(entries)):
            write_tensor(file, make(name), entries[name], name)


def write_tensor(file: BinaryIO, tensor: Tensor, expected: tuple[tuple[int, ...], torch.dtype], name: str) -> None:
    """Append a tensor's bytes to a binary file; raises ValueError when shape or dtype differ from what was announced."""
    if (tuple(tensor.shape), tensor.dtype) != expected:
        raise ValueError(f"{name}: announced as {expected}, made as {(tuple(tensor.shape), tensor.dtype)}")
    file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
