"""The zip format of `torch.save`, written record by record, so that casting needs no second copy of the model.

Records are stored, aligned to 64 bytes and carry their CRC-32. Everything is marked as saved from the CPU, so any
machine can load it.
"""

from __future__ import annotations

import io
import pickle
import secrets
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from torchload.writing.blocks import WEIGHTS, Block, Content, StoredTensor

if TYPE_CHECKING:
    import zipfile

__all__ = ["order", "write"]

_TOP = "archive"  # what torch.save calls the top folder where it does not know the file's name
_PICKLE_PROTOCOL = 2
_ALIGNMENT_BYTES = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_FIELD_BYTES = 20
_ZIP64_FROM_BYTES = 1 << 30


def order(content: Content) -> list[int]:
    """The blocks in the order in which they are written."""
    return list(range(len(content.blocks)))


def write(file: BinaryIO, content: Content) -> None:
    """Write a content as `torch.load` reads it: a state dict, or, beside other things, ``{"state_dict": …, …}``."""
    import zipfile  # only needed for saving

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _add(archive, file, "data.pkl", [_pickled(content)])
        _add(archive, file, "byteorder", [sys.byteorder.encode()])
        for key in order(content):
            block = content.blocks[key]
            _add(archive, file, f"data/{key}", block.chunks(), block.nbytes)
        _add(archive, file, "version", [b"3\n"])
        _add(archive, file, ".data/serialization_id", [secrets.token_hex(20).encode()])


def _add(
    archive: zipfile.ZipFile,
    file: BinaryIO,
    name: str,
    chunks: Iterable[bytes | memoryview],
    nbytes: int = 0,
) -> None:
    """Store a record whose data begins at a multiple of the alignment."""
    from zipfile import ZipInfo

    record = ZipInfo(f"{_TOP}/{name}")
    is_large = nbytes >= _ZIP64_FROM_BYTES
    before = file.tell() + _LOCAL_HEADER_BYTES + len(record.filename) + _ZIP64_FIELD_BYTES * is_large + 4
    padding = -before % _ALIGNMENT_BYTES
    record.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(record, "w", force_zip64=is_large) as out:
        for chunk in chunks:
            out.write(chunk)
    record.extra = b""  # of no use in the directory


# --- the pickle ---


class _Storage:
    """Stands for a block in the pickle."""

    def __init__(self, key: int, block: Block) -> None:
        names = torch.storage._dtype_to_storage_type_map()
        self.dtype = block.dtype
        self.is_typed = block.dtype in names
        kind = getattr(torch, names[block.dtype]) if self.is_typed else torch.UntypedStorage
        self.persistent_id = ("storage", kind, str(key), "cpu", block.numel if self.is_typed else block.nbytes)


class _Pickler(pickle.Pickler):
    """Reduces tensors, and what stands for them, to what a tensor in the file reduces to."""

    def __init__(self, file: BinaryIO, content: Content) -> None:
        super().__init__(file, _PICKLE_PROTOCOL)
        self._storages = [_Storage(key, block) for key, block in enumerate(content.blocks)]
        self._loose = content.loose

    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if type(obj) is _Storage else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            obj = self._loose[id(obj)]
        if type(obj) is not StoredTensor:
            return NotImplemented
        storage = self._storages[obj.block]
        backward_hooks: OrderedDict[Any, Any] = OrderedDict()
        arguments = (storage, obj.offset, obj.shape, obj.strides, False, backward_hooks)
        if storage.is_typed:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, storage.dtype)


def _pickled(content: Content) -> bytes:
    state: Any = OrderedDict(content.tensors)
    state.update(content.others)
    state._metadata = OrderedDict(content.versions)
    buffer = io.BytesIO()
    _Pickler(buffer, content).dump({WEIGHTS: state, **content.beside} if content.beside else state)
    return buffer.getvalue()
