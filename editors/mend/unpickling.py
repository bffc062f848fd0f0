"""Read a file of `torch.save` that strangers made, without running anything in it.

Flow: every pickle of the file is first read as a list of opcodes, and each name that it would import must be on the
list below; only then does torch's own restricted unpickler build the object, in which classes of configurations are
inert placeholders. Both forms of the file are read: zip (since torch 1.6) and the older sequence of pickles.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from editors.errors import ArchiveUnreadable, ArchiveUnsafe

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
ALLOWED = frozenset(
    {
        "_codecs.encode",  # bytes, in the protocol that torch.save writes
        "builtins.set",
        "collections.OrderedDict",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        *(f"torch.{storage}Storage" for storage in _STORAGES),
        *(f"torch.{dtype}" for dtype in _DTYPES),
    }
)
"""Names that may be imported: what tensors and plain values are made of."""
INERT_PACKAGES = ("transformers", "transformers_modules", "omegaconf")
INERT_NAMES = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")
"""Names that are never imported: objects of theirs come out as placeholders."""

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_PICKLES = 5
"""Magic number, protocol, system, the object, keys of the storages; then their bytes."""


class Placeholder:
    """What is left of an object whose class is not imported: its state. `kind` is the full name of the class."""

    kind = ""
    state: object = None

    def __new__(cls, *_arguments: object) -> Placeholder:
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def load_untrusted(path: Path) -> object:
    """The object in a file of `torch.save`, its tensors on the CPU and, in the zip form, still on the disk.

    Raises ArchiveUnsafe when the file would import anything that is not on the lists above, ArchiveUnreadable when it
    is missing, damaged or no such file.
    """
    if not path.is_file():
        raise ArchiveUnreadable(f"there is no file {path}", file=str(path))
    imported: set[str] = set()
    damage: Exception | None = None
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            file.seek(0)
            for name in _zip_imports(file) if zipped else _legacy_imports(file):
                imported.add(name)
    except Exception as error:  # zipfile and pickletools raise many unrelated types
        damage = error
    inert = {name for name in imported if _is_inert(name)}
    if unsafe := sorted(imported - inert - ALLOWED):
        raise ArchiveUnsafe(
            f"{path} would import {', '.join(unsafe)}, which no archive of MEND needs; nothing in it was run. "
            "Do not load it with anything else either",
            file=str(path),
            names=unsafe,
        )
    if damage:
        raise _unreadable(path, damage) from damage
    try:
        placeholders = [_placeholder(name) for name in inert]
        with warnings.catch_warnings(), torch.serialization.safe_globals(placeholders):
            warnings.simplefilter("ignore")  # the errors say the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load raises many unrelated types
        raise _unreadable(path, error) from error


def _is_inert(name: str) -> bool:
    return name.split(".", 1)[0] in INERT_PACKAGES or name in INERT_NAMES


def _placeholder(kind: str) -> type[Placeholder]:
    """A class that torch's unpickler takes for the one of that name."""
    module, _, name = kind.rpartition(".")
    return type(name, (Placeholder,), {"kind": kind, "__module__": module})


def _zip_imports(file: BinaryIO) -> Iterator[str]:
    with zipfile.ZipFile(file) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("it is compressed, which torch.save does not do")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"a zip file with {len(pickles)} objects of torch.save, not one")
        yield from _imports(io.BytesIO(archive.read(pickles[0])))


def _legacy_imports(file: BinaryIO) -> Iterator[str]:
    if file.read(1) != pickle.PROTO:
        raise ValueError("it begins as neither form of it does")
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        yield from _imports(file)


def _imports(file: BinaryIO) -> Iterator[str]:
    """Full names of everything that one pickle would import; nothing is built."""
    strings: deque[str] = deque(maxlen=2)
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield _full_name(*argument.split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":  # of a protocol that torch.save does not write; mostly its last strings
            yield f"STACK_GLOBAL {'.'.join(strings)}"
        elif isinstance(argument, str):
            strings.append(argument)


def _full_name(module: str, name: str) -> str:
    """By the names of Python 3, as unpicklers translate them."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _unreadable(path: Path, error: Exception) -> ArchiveUnreadable:
    # torch puts the reason after advice to load the file without any check.
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n", 1)[0]
    return ArchiveUnreadable(
        f"{path} cannot be read as a file of torch.save ({reason or type(error).__name__}); "
        "it is cut short, damaged or something else",
        file=str(path),
    )
