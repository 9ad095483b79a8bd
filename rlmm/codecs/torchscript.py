"""The tensors of a TorchScript archive, without running the program in it.

Such an archive is a zip file: its modules as a pickle, each tensor's numbers in a member of its own, and code, which is
left alone here. `torch.jit.load` would compile it.
"""

import collections
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Module:
    """A module of the archive: its attributes, and none of its methods."""


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """Tensors by their names in the state dict, plain tensor attributes among them.

    Raises ValueError where the file is no such archive, or would make anything but modules and tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise ValueError(f"{file} is a zip file without data.pkl; give a TorchScript archive")
            with archive.open(pickled) as stream:
                root = _Unpickler(stream, archive, pickled.removesuffix(".pkl")).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, OSError) as error:
        raise ValueError(f"{file} cannot be read as a TorchScript archive ({error})") from error
    return dict(_named(root, ""))


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Module):
        for key, inner in vars(value).items():
            yield from _named(inner, f"{name}.{key}" if name else key)


class _Unpickler(pickle.Unpickler):
    """Knows the archive's modules, tensors and lists, and refuses everything else."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(stream)
        self.archive, self.folder = archive, folder

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name.startswith("__torch__"):
            return _Module
        if module_name == "torch" and global_name in DTYPES:
            return DTYPES[global_name]
        if (module_name, global_name) in KNOWN:
            return KNOWN[module_name, global_name]
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is neither module nor tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of one storage."""
        _, dtype, key, _, count = pid
        raw = self.archive.read(f"{self.folder}/{key}")
        values = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        if len(values) < count or sys.byteorder != "little":
            raise pickle.UnpicklingError(f"storage {key} holds {len(values)} of {count} numbers, little end first")
        return values


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> Tensor:
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    **{
        ("torch.jit._pickle", name): _as_it_is
        for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
    },
}
