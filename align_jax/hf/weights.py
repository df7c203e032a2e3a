"""Weight files as NumPy arrays: safetensors and PyTorch's zip pickles, whole or sharded.

No torch, and nothing in a file is ever executed. Names of tensors are `convert`'s business.
Source: the layout that `torch.save` has had since 1.6.
"""

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # safetensors asks NumPy for bfloat16, which this registers
import numpy as np
import safetensors
import safetensors.numpy

from align_jax.storage import writing

# In this order, as transformers looks for them.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_TORCH_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns {name: array} of all tensors of a checkpoint.

    float16 and bfloat16 come as float32, exactly, and other types as they are. Tensors of a pickle
    are read-only views of the mapped file, possibly strided.

    Args:
      path: a folder with one of `FILES`, or a `.safetensors`, `.bin` or `.index.json` file.

    Raises:
      ValueError: nothing to read there, a damaged file, one that is no weight file, or a pickle
        that asks for more than tensors (nothing of which is run).
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} holds no weights; expected one of {', '.join(FILES)}.")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path} does not exist.")
    return _read_shards(path) if path.suffix == ".json" else _read_file(path)


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, as a whole or not at all.

    Args:
      path: of the file; replaced if it exists.
      tensors: name -> array of a type that the format has; written in C order.

    Raises:
      ValueError: a type that the format lacks.
      OSError: it cannot be written.
    """
    # The library writes the memory as it lies; np.ascontiguousarray would make scalars vectors.
    arrays = {name: np.require(array, requirements="C") for name, array in tensors.items()}
    try:
        with writing.replacing(path) as temporary:
            safetensors.numpy.save_file(arrays, temporary, {"format": "pt"})
    except safetensors.SafetensorError as error:
        if "I/O error" in str(error):
            raise OSError(f"{path} cannot be written: {error}") from error
        raise ValueError(f"{path} cannot hold these tensors: {error}") from error


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    try:
        weight_map = dict(json.loads(path.read_text())["weight_map"])
        files = sorted(set(weight_map.values()))
        # A name with a folder in it could point anywhere.
        safe = all(name and name == os.path.basename(name) for name in files)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no index of weight files: {error!r}.") from error
    if not safe:
        raise ValueError(f"{path} names a weight file outside of its own folder.")
    tensors = {}
    for name in files:
        if not (path.parent / name).is_file():
            raise ValueError(f"{path.parent / name} is missing, but {path.name} names it.")
        tensors |= _read_file(path.parent / name)
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise ValueError(f"{path} lists tensors that are in no file: {', '.join(missing)}.")
    return {name: tensors[name] for name in weight_map}


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); download it again.")
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    start = data[:64].tobytes()
    if start.startswith(b"PK\x03\x04"):
        return _read_torch(path, data)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`.")
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is an HTML page, not weights; download the file itself.")
    if start.startswith(b"\x80"):
        raise ValueError(
            f"{path} is a bare pickle, as PyTorch wrote before 1.6 and others write; it is not "
            "read. Save it again with torch.save of PyTorch 1.6 or later, or as safetensors."
        )
    raise ValueError(f"{path} is neither a safetensors file nor a zip file of torch.save.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    try:
        with safetensors.safe_open(path, "np") as file:
            for name in file.keys():
                kind = file.get_slice(name).get_dtype()
                if kind.startswith(("F4", "F6_", "F8_")):  # NumPy has no such numbers
                    raise ValueError(f"{path}: tensor {name} has the type {kind}; not read.")
                array = file.get_tensor(name)
                tensors[name] = array.astype(np.float32) if kind in ("F16", "BF16") else array
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}.") from error
    return tensors


def _decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Returns uint8 [bytes] as numbers [elements]; half precisions as float32."""
    if dtype == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    array = raw.view(dtype)
    return array.astype(np.float32) if dtype == "<f2" else array


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int  # in elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # offset and strides in elements


class _Refused(pickle.UnpicklingError):
    pass


# What a pickle may call. Neither these nor the tuples they make have an attribute that it could
# set, and neither does anything: arrays are built from the descriptions when the pickle is done.
class _RebuildTensor:
    __slots__ = ()

    def __call__(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        *_unused: object,
    ) -> _Tensor:
        return _Tensor(storage, offset, shape, strides)


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, tensor: _Tensor, *_unused: object) -> _Tensor:
        return tensor


_ADMITTED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _RebuildTensor(),
    "torch._utils._rebuild_parameter": _RebuildParameter(),
    **{f"torch.{name}": dtype for name, dtype in _TORCH_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        admitted = _ADMITTED.get(f"{module}.{name}")
        if admitted is None:
            raise _Refused(f"{module}.{name}")
        return admitted

    def persistent_load(self, pid: tuple[Any, ...]) -> _Storage:
        kind, dtype, key, _device, size = pid
        if kind != "storage" or dtype not in _TORCH_DTYPES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return _Storage(dtype, key, size)


def _read_torch(path: Path, data: np.ndarray) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}.") from error
    root = next((name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")), None)
    if root is None:
        raise ValueError(f"{path} is a zip file without data.pkl: not one of torch.save.")
    try:
        if (
            root + "byteorder" in entries
            and _entry(data, entries, root + "byteorder").tobytes() == b"big"
        ):
            raise pickle.UnpicklingError("written on a big-endian machine")
        content = _Unpickler(io.BytesIO(_entry(data, entries, root + "data.pkl"))).load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__}")
        storages: dict[_Storage, np.ndarray] = {}
        tensors = {}
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, _Tensor):
                raise pickle.UnpicklingError(f"its entry {name!r} is no tensor")
            storage = tensor.storage
            if storage not in storages:
                raw = _entry(data, entries, f"{root}data/{storage.key}")
                storages[storage] = _decode(raw, storage.dtype)
            tensors[name] = _strided_view(storages[storage], tensor)
    except _Refused as error:
        raise ValueError(
            f"{path} was refused: its pickle asks for {error}, which weights do not need. Nothing "
            "in it was run; do not open it with other programs."
        ) from error
    except Exception as error:  # whatever a damaged pickle raises, it is the file's fault
        raise ValueError(f"{path} is no state dict (name -> tensor): {error}.") from error
    return tensors


def _entry(data: np.ndarray, entries: Mapping[str, zipfile.ZipInfo], name: str) -> np.ndarray:
    """Returns the bytes of a file in the archive `data`, both uint8 [bytes], as a view."""
    if name not in entries:
        raise pickle.UnpicklingError(f"the archive has no {name}")
    info = entries[name]
    if info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed, which torch.save never does")
    # The lengths of name and extra field in the directory may differ from those before the bytes.
    header = data[info.header_offset : info.header_offset + 30].tobytes()
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + info.file_size > len(data):
        raise pickle.UnpicklingError(f"the archive ends within {name}")
    return data[start : start + info.file_size]


def _strided_view(storage: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """Returns a view [*tensor.shape] of the elements [N] of a storage."""
    size = storage.itemsize
    # NumPy checks that every element lies in the buffer.
    view = np.ndarray(
        tensor.shape,
        storage.dtype,
        storage.data,
        tensor.offset * size,
        tuple(stride * size for stride in tensor.strides),
    )
    view.flags.writeable = False
    return view
