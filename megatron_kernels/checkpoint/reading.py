"""Reading PyTorch files without running what is in them.

torch.load(weights_only=True) builds nothing but tensors and plain containers. Megatron's pickles also name harmless classes
(the command line in an argparse.Namespace, enums, loss scalers, NumPy states of random generators): those names, and no others,
are mapped to inert stand-ins, so the modules that they come from are neither needed nor imported.
"""

from __future__ import annotations

import contextlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch

from .errors import CheckpointError

_HARMLESS = {
    "argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "_io.BytesIO", "datetime.timedelta", "datetime.datetime",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    *(f"numpy.{name}" for name in ("ndarray", "dtype", "random._pickle.__randomstate_ctor")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}
# Python 3.11.0 to 3.11.3 pickles a member of an enum by getattr, and a signal by its own name.
_GETATTR = ("builtins.getattr", "__builtin__.getattr")
_SIGNAL = re.compile(r"signal\.SIG[A-Z0-9]+")
_HARMLESS_PACKAGES = ("megatron.", "fp16.", "apex.", "transformer_engine.")


class Stub:
    """Stands in for an object of a class that is not loaded; keeps what the pickle would have given its constructor."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        stub = super().__new__(cls)
        stub.arguments = args
        return stub

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments: tuple[Any, ...] = args
        self.state: Any = getattr(self, "state", None)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        shown = self.arguments or self.state
        return f"<{type(self).__module__}.{type(self).__name__} {shown!r}>"


def attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of a stubbed namespace (Megatron's `args`), or the items of a plain dict; None for anything else."""
    if isinstance(value, Stub):
        value = getattr(value, "state", None)
    return dict(value) if isinstance(value, dict) else None


def _numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    """A NumPy scalar as a Python number, from the stubbed dtype and the bytes of the pickle."""
    import numpy

    code = dtype.arguments[0] if isinstance(dtype, Stub) and dtype.arguments else None
    if not isinstance(raw, bytes) or not isinstance(code, str) or code[:1] not in "biuf":
        return None
    swapped = isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">"
    return numpy.frombuffer(raw, numpy.dtype(code).newbyteorder(">" if swapped else "<"))[0].item()


def _member(owner: Any, name: Any) -> Stub:
    """In place of getattr: the member of a stubbed enum, and of nothing else."""
    if not (isinstance(owner, type) and issubclass(owner, Stub) and isinstance(name, str)):
        raise UnpicklingError(f"getattr of {owner!r}, which is no enum")
    return owner(name)


def _stand_in(name: str) -> Any:
    if name.endswith(".multiarray.scalar"):
        return _numpy_scalar
    if name in _GETATTR:
        return _member
    module, _, attribute = name.rpartition(".")
    return type(attribute, (Stub,), {"__module__": module})


def _is_harmless(name: str) -> bool:
    return name in _HARMLESS or name in _GETATTR or name.startswith(_HARMLESS_PACKAGES) or bool(_SIGNAL.fullmatch(name))


def _globals(pickle: IO[bytes]) -> Iterator[str]:
    """Every `module.name` that one pickle refers to, found without running it."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)


def _allowed_by_torch(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return (name.startswith(("torch.", "collections.")) or name == "_codecs.encode"
            or (module in ("builtins", "__builtin__") and attribute in ("set", "bytearray", "complex")))


def _foreign_globals(path: Path, label: str) -> set[str]:
    """The names in a file that torch does not load by itself; raises CheckpointError for one that is not harmless."""
    names: set[str] = set()
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for member in archive.namelist():
                    if member.rpartition("/")[2] == "data.pkl":
                        with archive.open(member) as pickle:
                            names.update(_globals(pickle))
        else:
            file.seek(0)
            for _ in range(4):  # magic number, protocol version, system, object
                names.update(_globals(file))
    foreign = {name for name in names if not _allowed_by_torch(name)}
    for name in sorted(foreign):
        if not _is_harmless(name):
            raise _refused(name, label)
    return foreign


def _refused(name: str, label: str) -> CheckpointError:
    return CheckpointError(f"{label}: refused, the pickle refers to {name}, which is neither a tensor nor on the list of "
                           "harmless classes; nothing in the file was run")


def is_torch_zip(path: Path) -> bool:
    """Whether a zip file is what torch.save writes (since 1.6), rather than an archive that holds such files."""
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())


@contextlib.contextmanager
def _standing_in(stand_ins: list[tuple[Any, str]]) -> Iterator[None]:
    """torch.serialization.safe_globals, but nobody else's class has one of these names inside.

    Other libraries allow classes for the whole process, Megatron-core argparse.Namespace as soon as it is imported, and of two with
    one name torch takes either.
    """
    before = torch.serialization.get_safe_globals()
    names = {name for _, name in stand_ins}

    def name_of(allowed: Any) -> str:
        return allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"

    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*(allowed for allowed in before if name_of(allowed) not in names),
                                          *stand_ins])  # type: ignore[list-item]
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_torch_file(path: Path, label: str | None = None) -> Any:
    """What torch.save wrote to `path`, with tensors on the CPU and memory-mapped where the format allows it (zip, since 1.6).

    `label` names the file in errors, where `path` is a temporary copy. Raises CheckpointError when the file is damaged,
    is no PyTorch file, or refers to a class outside the list of harmless names. No code from the file is run.
    """
    label = label or str(path)
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if not head:
            raise CheckpointError(f"{label}: empty file, expected a PyTorch checkpoint")
        mapped = zipfile.is_zipfile(path)
        if head == b"PK\x03\x04" and not mapped:
            raise CheckpointError(f"{label}: truncated or damaged (a zip file without its directory at the end)")
        stand_ins = [(_stand_in(name), name.replace("__builtin__.", "builtins."))  # torch takes Python 2's name off
                     for name in sorted(_foreign_globals(path, label))]
        with _standing_in(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (CheckpointError, MemoryError, KeyboardInterrupt):
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{label}: no such file") from None
    except PermissionError:
        raise CheckpointError(f"{label}: permission denied") from None
    except (struct.error, EOFError) as error:
        raise CheckpointError(f"{label}: truncated or damaged ({first_line(error)})") from None
    except Exception as error:  # a damaged pickle can fail anywhere in the unpickler, with any exception
        if match := re.search(r"Unsupported global: GLOBAL (\S+) ", str(error)):
            raise _refused(match[1], label) from None
        raise CheckpointError(f"{label}: not a readable PyTorch checkpoint ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """The type and the first line of an error's text, at most 200 characters, for use inside a one-line message."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]  # torch puts advice before its reason
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
