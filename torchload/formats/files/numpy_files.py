"""Weights as numpy arrays: ``.npz`` archives, and plain pickles of them such as detectron2's model zoo.

Neither numpy nor a pickled class is needed: the header of an array is one line of text, and in a pickle the inert
unpickler knows what an array is.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import NamedTuple

from torchload.core.checkpoint import Checkpoint, Container, Extent, Record, TensorEntry, contiguous_strides
from torchload.core.crc32 import combine_crc32
from torchload.core.source import Source
from torchload.errors import CheckpointFormatError, damaged
from torchload.formats.files.zip_directory import STORED, ZipDirectory
from torchload.formats.pickles.arrays import dtype_of_code
from torchload.formats.pickles.pickle_file import from_growing_window
from torchload.formats.pickles.unpickle import unpickle

__all__ = ["open_npz", "open_pickle"]

MAX_HEADER_BYTES = 1 << 16
MAX_DIMENSIONS = 64
MAX_VALUES = 100_000  # looked at to find the first tensor of a pickle
_HEAD_BYTES = 256

_DESCRIPTION = re.compile(
    rb"\s*\{(?=.*'descr': *(?P<descr>'[^'\n]*'|\[))(?=.*'fortran_order': *(?P<order>True|False))"
    rb"(?=.*'shape': *\((?P<shape>[\dL, ]*)\))[^\n]*\}\s*"
)
_NUMBER = re.compile(rb"\d{1,19}")  # may exceed 63 bits, but is never slow to convert


class _Header(NamedTuple):
    """What stands before the elements of an array.

    Attributes:
        code: Numpy's type code, such as ``<f4``; empty for one that is made of several.
        is_fortran: Whether the first index varies fastest.
        shape: Size along each dimension, in elements.
        size_bytes: Length of the header.
        crc32: Its checksum.
    """

    code: str
    is_fortran: bool
    shape: tuple[int, ...]
    size_bytes: int
    crc32: int


def open_npz(directory: ZipDirectory, path: str) -> Checkpoint:
    """Index a numpy archive: names → arrays, or inert records of strings and objects; what is compressed is read."""
    root = Container()
    for record in directory.records.values():
        name = record.name.removesuffix(".npy")
        # What was unpacked has been checked already.
        checksum = record.crc32 if record.method == STORED else 0
        root[name] = _array(directory.source_of(record.name), checksum, name, path)
    return Checkpoint(path, "numpy archive", root, (directory.source,), checksums=True)


def _array(source: Source, checksum: int, name: str, path: str) -> TensorEntry | Record:
    """An array, given the checksum of its file (0 for none)."""
    header = _read_header(source, name, path)
    element = dtype_of_code(header.code)
    if element is None:
        return Record("numpy.ndarray", (header.code or "several fields", header.shape))
    dtype, is_big_endian = element
    nbytes = math.prod(header.shape) * dtype.itemsize
    if nbytes != source.size - header.size_bytes:
        raise damaged(
            path, f"the array {name[:200]!r} should have {nbytes} bytes, and has {source.size - header.size_bytes}"
        )
    crc32 = None
    if checksum:  # of header and data; what the header contributes is taken out
        crc32 = checksum ^ combine_crc32(header.crc32, 0, nbytes)
    strides = contiguous_strides(header.shape[::-1])[::-1] if header.is_fortran else None
    return TensorEntry.over(
        Extent(source, header.size_bytes, nbytes, crc32, is_big_endian), dtype, header.shape, strides
    )


def _read_header(source: Source, name: str, path: str) -> _Header:
    """The header: a magic number, a version, a length of 2 or (from version 2.0 on) 4 bytes, and a line of text."""
    head = source.read(0, min(_HEAD_BYTES, source.size))
    width = 2 if head[6:7] == b"\x01" else 4
    start = 8 + width
    size = start + int.from_bytes(head[8:start], "little")
    if not head.startswith(b"\x93NUMPY") or len(head) < start or size > min(MAX_HEADER_BYTES, source.size):
        raise damaged(path, f"the array {name[:200]!r} has no header as numpy writes one")
    if size > len(head):
        head = source.read(0, size)
    description = _DESCRIPTION.fullmatch(head, start, size)
    numbers = [part.strip(b" L") for part in description["shape"].split(b",")] if description else [b"-"]
    if numbers[-1] == b"":
        numbers.pop()  # one comma more, as in (3,), or nothing at all
    if description is None or len(numbers) > MAX_DIMENSIONS or not all(map(_NUMBER.fullmatch, numbers)):
        raise damaged(path, f"the array {name[:200]!r} has no header as numpy writes one")
    shape = tuple(int(number) for number in numbers)
    code = description["descr"].decode("latin-1").strip("'[")
    return _Header(code, description["order"] == b"True", shape, size, zlib.crc32(head[:size]))


def open_pickle(source: Source, path: str) -> Checkpoint:
    """Index a plain pickle that has arrays in it; their data stays in the file."""
    if b"joblib.numpy_pickle" in source.read(0, min(MAX_HEADER_BYTES, source.size)):
        raise CheckpointFormatError(
            f"{path} was written by joblib, which puts arrays between the pickle's opcodes in a way of its own. "
            "Load it with joblib.load and save the weights with torch.save.",
            path=path,
            found="joblib file",
        )
    root = from_growing_window(source, lambda data: unpickle(data, name=path, source=source).finish())
    if not _has_tensor(root):
        raise CheckpointFormatError(
            f"{path} is a pickle without weights, not a checkpoint. Expected are files of torch.save, safetensors, or "
            "a pickle of numpy arrays.",
            path=path,
            found="pickle",
        )
    return Checkpoint(path, "pickle of numpy arrays", root, (source,))


def _has_tensor(root: object) -> bool:
    """Whether there is a tensor in the first values of a tree, cycles or not."""
    pending = [root]
    seen: set[int] = set()
    for value in pending:  # grows while it runs
        if type(value) is TensorEntry:
            return True
        if id(value) in seen or len(pending) > MAX_VALUES:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, Record):
            pending.extend((value.state, value.args, value.items, value.entries))
    return False
