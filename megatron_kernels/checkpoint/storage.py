"""torch.distributed.checkpoint reading and writing pieces, and its files' checksums.

The library plans which rank writes and reads what, and moves the bytes; told here are only the boxes. Its `.metadata` is a pickle,
which it would run: here it may build the library's own records and nothing else. Tensors are read with weights_only.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .errors import CheckpointError
from .pieces import Piece
from .reading import first_line
from .together import Ranks

CHECKSUMS = "checksums.json"
_RECORDS = {"torch.distributed.checkpoint.metadata": {"Metadata", "TensorStorageMetadata", "TensorProperties", "StorageMeta",
                                                      "ChunkStorageMetadata", "MetadataIndex", "_MEM_FORMAT_ENCODING"},
            "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "torch": {"Size"}, "torch.serialization": {"_get_layout"},
            "pathlib": {"PosixPath", "WindowsPath"}, "pathlib._local": {"PosixPath", "WindowsPath"}}


def write_pieces(folder: Path, pieces: dict[str, Piece], ranks: Ranks) -> None:
    """Write the pieces of all ranks, what several ranks hold once. Raises CheckpointError on all ranks when one fails."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(pieces, storage_writer=dcp.FileSystemWriter(folder), planner=_SavePieces(), no_dist=ranks.size == 1,
                     process_group=ranks.process_group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder.parent}: cannot write: {_first_failure(error, ranks)}") from error


def read_pieces(folder: Path, pieces: dict[str, Piece], ranks: Ranks) -> None:
    """Fill the pieces, reading only the files that hold some of them. Raises CheckpointError on all ranks when one fails."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(pieces, storage_reader=_Reader(folder), planner=_LoadPieces(), no_dist=ranks.size == 1,
                     process_group=ranks.process_group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: damaged or unreadable: {_first_failure(error, ranks)}") from error


def _first_failure(error: CheckpointException, ranks: Ranks) -> str:
    rank, (cause, _) = min(error.failures.items())
    return f"rank {ranks.global_rank(rank)}: {first_line(cause)}"


class _SavePieces(dcp.DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(key, piece) for key, piece in self.state_dict.items() if piece.tensor.numel()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


def _write_item(key: str, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.shape)
    properties = TensorProperties.create_from_tensor(piece.tensor)
    return WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD,
                     tensor_data=TensorWriteData(chunk, properties, torch.Size(piece.shape)))


class _LoadPieces(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, piece in self.state_dict.items():
            if piece.tensor.numel():
                chunk = ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.shape)
                items += create_read_items_for_chunk_list(key, self.metadata.state_dict_metadata[key],  # type: ignore
                                                          [chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(f"refused, the pickle refers to {module}.{name}, which is no record of torch.distributed.checkpoint; "
                              "nothing in the file was run")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


def read_metadata(folder: Path) -> Metadata:
    """What the checkpoint holds. Raises CheckpointError for a file that is damaged or holds anything else."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            metadata = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle can fail anywhere, with any exception
        raise CheckpointError(f"{path}: damaged ({first_line(error)})") from None
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}: expected the metadata of torch.distributed.checkpoint, got {type(metadata).__name__}")
    return metadata


def _checksum(path: Path) -> tuple[int, int]:
    """Length and CRC-32."""
    size = total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, total = size + len(block), zlib.crc32(block, total)
    return size, total


def write_checksums(folder: Path, ranks: Ranks) -> None:
    """Put checksums.json beside the files; each rank reads its share of them."""
    names = ranks.first(lambda: sorted(path.name for path in folder.iterdir()))
    sums = ranks.everywhere(lambda: {name: _checksum(folder / name) for name in names[ranks.rank::ranks.size]})
    ranks.first(lambda: (folder / CHECKSUMS).write_text(
        json.dumps({name: found for share in sums for name, found in share.items()}, indent=2, sort_keys=True)))


def verify_checksums(folder: Path, ranks: Ranks) -> None:
    """Raise CheckpointError on all ranks when a file is missing or is not what was written; each rank reads its share of them.

    torch's own zip reader does not look at the checksums in its files.
    """
    def read() -> dict[str, list[int]]:
        try:
            expected = json.loads((folder / CHECKSUMS).read_text())
            if all(len(found) == 2 for found in expected.values()):
                return expected
        except (ValueError, AttributeError, TypeError):
            pass
        raise CheckpointError(f"{folder / CHECKSUMS}: damaged, expected a JSON object of lengths and checksums")

    expected = ranks.first(read)

    def verify() -> None:
        for name in sorted(expected)[ranks.rank::ranks.size]:
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing")
            if list(found := _checksum(path)) != list(expected[name]):
                raise CheckpointError(f"{path}: damaged: length and CRC-32 are {found[0]} and {found[1]:08x}, expected "
                                      f"{expected[name][0]} and {expected[name][1]:08x}")
    ranks.everywhere(verify)
