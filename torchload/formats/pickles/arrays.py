"""Numpy values in a pickle, read without numpy.

An array of plain numbers becomes a `TensorEntry` over its bytes, a scalar becomes a Python number. Arrays of objects,
strings, dates and records stay `Record`s.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchload.core.checkpoint import TensorEntry, contiguous_strides
from torchload.formats.pickles.standins import AS_RECORD, Call, StandInType

if TYPE_CHECKING:
    from torchload.formats.pickles.walk import Walk

__all__ = ["KNOWN_CALLS", "dtype_of_code"]

MAX_DIMENSIONS = 64

# Numpy's type codes → torch's dtype and the format of one element for `struct`.
_CODES: dict[str, tuple[torch.dtype, str]] = {
    "b1": (torch.bool, "?"),
    "i1": (torch.int8, "b"),
    "i2": (torch.int16, "h"),
    "i4": (torch.int32, "i"),
    "i8": (torch.int64, "q"),
    "u1": (torch.uint8, "B"),
    "u2": (torch.uint16, "H"),
    "u4": (torch.uint32, "I"),
    "u8": (torch.uint64, "Q"),
    "f2": (torch.float16, "e"),
    "f4": (torch.float32, "f"),
    "f8": (torch.float64, "d"),
    "c8": (torch.complex64, "ff"),
    "c16": (torch.complex128, "dd"),
}
_ENCODINGS = frozenset(("latin1", "latin-1", "latin_1", "iso-8859-1", "utf-8", "utf8", "ascii"))
_ARRAY_CLASSES = frozenset(
    ("numpy.ndarray", "numpy.memmap", "numpy.core.memmap", "numpy.matrix", "numpy.matrixlib.defmatrix.matrix")
)


def dtype_of_code(code: str) -> tuple[torch.dtype, bool] | None:
    """Of numpy's code for a type, such as ``<f4``: torch's dtype and whether it is big-endian.

    Returns:
        ``None`` for anything but plain numbers.
    """
    known = _CODES.get(code.lstrip("<>|="))
    return None if known is None else (known[0], code[0] == ">")


def _element_type(dtype: Any) -> tuple[torch.dtype, str, bool] | None:
    """Of a recorded ``numpy.dtype(code, …)``: torch's dtype, struct's format, whether it is big-endian."""
    if not isinstance(dtype, Call) or dtype.qualified != "numpy.dtype" or not dtype.args:
        return None
    code = dtype.args[0]
    known = _CODES.get(code.lstrip("<>|=")) if type(code) is str else None
    if known is None:
        return None
    order = dtype.state[1] if type(dtype.state) is tuple and len(dtype.state) > 1 else code[0]
    return (*known, order == ">")


def _array(call: Call, walk: Walk) -> Any:
    """``_reconstruct(ndarray, (0,), b"b")`` with the state (version, shape, dtype, is_fortran, data)."""
    kind = call.args[0] if call.args else None
    if not isinstance(kind, StandInType) or kind.qualified not in _ARRAY_CLASSES or type(call.state) is not tuple:
        return AS_RECORD
    shape, dtype, is_fortran, data = call.state[-4:]
    return _array_over(walk, data, dtype, shape, bool(is_fortran))


def _array_from_buffer(call: Call, walk: Walk) -> Any:
    """``_frombuffer(buffer, dtype, shape, order)``: protocol 5."""
    buffer, dtype, shape, order = call.args
    return _array_over(walk, buffer, dtype, shape, order == "F")


def _array_over(walk: Walk, data: Any, dtype: Any, shape: Any, is_fortran: bool) -> Any:
    element = _element_type(dtype)
    shape = walk.value(shape)
    if element is None or type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
        return AS_RECORD
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        walk.fail("is an array of an impossible shape")
    extent = walk.extent_of_bytes(data, big_endian=element[2])
    if extent is None:
        return AS_RECORD
    nbytes = math.prod(shape) * element[0].itemsize
    if nbytes != extent.nbytes:
        walk.fail(f"is an array of {nbytes} bytes by its shape, but {extent.nbytes} bytes are there")
    strides = contiguous_strides(shape[::-1])[::-1] if is_fortran else None
    return TensorEntry.over(extent, element[0], shape, strides)


def _scalar(call: Call, walk: Walk) -> Any:
    """``scalar(dtype, data)``."""
    if len(call.args) != 2:
        return AS_RECORD
    element = _element_type(call.args[0])
    data = walk.bytes_of(call.args[1])
    if element is None or data is None:
        return AS_RECORD
    if len(data) != element[0].itemsize:
        walk.fail(f"is a scalar of {len(data)} bytes where {element[0].itemsize} belong")
    values = struct.unpack((">" if element[2] else "<") + element[1], data)
    return complex(*values) if len(values) == 2 else values[0]


def _encoded(call: Call, walk: Walk) -> Any:
    """``_codecs.encode(text, encoding)``: how old protocols say bytes."""
    text = call.args[0] if call.args else None
    encoding = call.args[1] if len(call.args) > 1 else "utf-8"
    if type(text) is not str or type(encoding) is not str or encoding not in _ENCODINGS:
        return AS_RECORD
    return walk.encoded(text, encoding)


def _bytes(call: Call, walk: Walk) -> Any:
    """``bytes()`` and ``bytearray(data)``."""
    if not call.args:
        return b""
    if len(call.args) == 2 and type(call.args[0]) is str and call.args[1] == "latin-1":
        return walk.encoded(call.args[0], "latin-1")
    data = walk.bytes_of(call.args[0])
    return AS_RECORD if data is None else data


def _as_record(call: Call, walk: Walk) -> Any:
    return AS_RECORD


# Numpy 2 moved its core.
KNOWN_CALLS: dict[str, Callable[[Call, Walk], Any]] = {
    "numpy.dtype": _as_record,
    "_codecs.encode": _encoded,
    "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "__builtin__.bytearray": _bytes,
} | {
    f"numpy.{core}.{name}": convert
    for core in ("core", "_core")
    for name, convert in {
        "multiarray._reconstruct": _array,
        "multiarray.scalar": _scalar,
        "numeric._frombuffer": _array_from_buffer,
    }.items()
}
