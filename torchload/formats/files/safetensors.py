"""safetensors: an 8-byte little-endian header length, a JSON header, one buffer of data.

All the rules of the format are checked before anything is believed: the header is strict JSON of at most 100 MB, every
tensor's length is what its shape and dtype say, and together the tensors cover the buffer with no hole and no overlap.
The format records no checksums.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch

from torchload.core.checkpoint import (
    Box,
    Checkpoint,
    Container,
    Extent,
    OpaqueTensor,
    Shape,
    TensorEntry,
    contiguous_strides,
)
from torchload.core.source import Source
from torchload.errors import CorruptCheckpointError, damaged, incomplete
from torchload.formats.json_text import parse_object

__all__ = ["first_file", "open"]

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own bound

# Code → (bits per element, name in torch). A name that this torch lacks, or None, makes the tensor opaque.
# Source: `Dtype` in the safetensors crate, `_TYPES` in safetensors.torch.
DTYPES: dict[str, tuple[int, str | None]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "F32": (32, "float32"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F4": (4, "float4_e2m1fn_x2"),  # torch packs two elements into one of this dtype
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}

_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
_INT = frozenset({int})
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 2**63 - 1  # sizes and strides are signed 64-bit integers in torch


def open(source: Source, path: str) -> Checkpoint:
    """Index a safetensors file.

    Returns:
        A checkpoint whose root maps each name to a `TensorEntry` (an `OpaqueTensor` for dtypes that this torch lacks),
        in the header's order. Names that `save_model` dropped because they were tied are there again, as the same
        entries. ``metadata`` is the header's ``__metadata__``.
    """
    header, data_offset = _read_header(source, path)
    metadata = _take_metadata(header, path)
    root, placed = _Header(Extent(source, data_offset, source.size - data_offset), path).entries(header)
    _check_coverage(placed, source, data_offset, path)
    _restore_tied_names(root, metadata)
    notes = _metadata_notes(metadata)
    return Checkpoint(path, "safetensors", root, (source,), notes=notes, metadata=metadata)


def first_file(source: Source) -> Source:
    """The file that a run of bytes begins with, where others follow it; the whole run if that can't be told."""
    with contextlib.suppress(CorruptCheckpointError):
        header, data_offset = _read_header(source, source.name)
        _take_metadata(header, source.name)
        _, placed = _Header(Extent(source, data_offset, source.size - data_offset), source.name).entries(header)
        return source.slice(0, min(data_offset + max((end for _, end, _ in placed), default=0), source.size))
    return source


def _read_header(source: Source, path: str) -> tuple[dict[str, Any], int]:
    if source.size < 8:
        problem = f"a safetensors file begins with 8 bytes of header length, this one has {source.size} bytes"
        raise incomplete(path, problem)
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        problem = f"it claims a header of {length:,} bytes, but at most {MAX_HEADER_BYTES:,} are allowed"
        raise damaged(path, problem)
    if 8 + length > source.size:
        problem = f"its header alone needs {8 + length:,} bytes, the file has {source.size:,}"
        raise incomplete(path, problem)
    data = bytearray(length)
    source.readinto(8, memoryview(data))
    if not data.startswith(b"{"):
        raise damaged(path, "its header does not begin with '{' as a safetensors header must")
    return parse_object(data, "safetensors header", path), 8 + length


def _take_metadata(header: dict[str, Any], path: str) -> dict[str, str]:
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpointError(
            f"The safetensors header of {path} is invalid: __metadata__ must map text to text.", path=path
        )
    return metadata


class _Layout(NamedTuple):
    """What all tensors of one dtype code and shape have in common.

    Attributes:
        dtype: In torch, or ``None`` where it has none that fits.
        shape: In elements of that dtype.
        strides, origin: As a contiguous `Box` of the whole tensor has them.
        nbytes: Size of the data.
    """

    dtype: torch.dtype | None
    shape: Shape
    strides: Shape
    origin: Shape
    nbytes: int


class _Header:
    """The tensors that a header describes, all in one buffer."""

    __slots__ = ("buffer", "layouts", "path")

    def __init__(self, buffer: Extent, path: str) -> None:
        self.buffer = buffer
        self.path = path
        self.layouts: dict[tuple[str, Shape], _Layout] = {}

    def entries(self, header: dict[str, Any]) -> tuple[Container, list[tuple[int, int, str]]]:
        """Every tensor by its name, and (begin, end, name) of its data in the buffer."""
        root = Container()
        placed: list[tuple[int, int, str]] = []
        buffer, layouts = self.buffer, self.layouts
        for name, fields in header.items():
            try:
                code, sizes, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
                layout = layouts.get((code, tuple(sizes)))
            except (KeyError, TypeError, ValueError):
                raise self._bad_entry(name, fields) from None
            # A cached layout says nothing about types: True and 1.0 are equal to 1, "" and {} have no sizes, like [].
            if layout is None or type(sizes) is not list or not _INT.issuperset(map(type, sizes)):
                layout = self._layout(name, fields)
            if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
                positions = _short(fields["data_offsets"])
                raise self._refuse(name, f"its data_offsets {positions} are not two ordered positions")
            dtype, shape, strides, origin, nbytes = layout
            if end - begin != nbytes:
                problem = f"{code} of shape {_short(sizes)} takes {nbytes:,} bytes, not {end - begin:,}"
                raise self._refuse(name, problem)
            placed.append((begin, end, name))
            if dtype is None:
                reason = f"a tensor of dtype {code}, which torch {torch.__version__} can't represent"
                root[name] = OpaqueTensor(reason, shape)
            elif begin == end:
                root[name] = TensorEntry(dtype, shape, ())
            else:
                root[name] = TensorEntry(dtype, shape, (Box(buffer, begin, shape, strides, origin),))
        return root, placed

    def _layout(self, name: str, fields: dict[str, Any]) -> _Layout:
        """Checks a dtype code and a shape, once for all tensors that share them."""
        code, sizes = fields["dtype"], fields["shape"]
        if code not in DTYPES:
            raise self._bad_entry(name, fields)
        if type(sizes) is not list or len(sizes) > _MAX_DIMENSIONS:
            raise self._refuse(name, f"its shape {_short(sizes)} is not a list of at most {_MAX_DIMENSIONS} sizes")
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise self._refuse(name, f"its shape {_short(sizes)} holds something other than sizes")
        if math.prod(size or 1 for size in sizes) > _MAX_ELEMENTS:  # the strides overflow even if a 0 makes it empty
            raise self._refuse(name, f"its shape {_short(sizes)} is larger than any tensor can be")
        bits, torch_name = DTYPES[code]
        shape: Shape = tuple(sizes)
        nbytes, rest = divmod(math.prod(shape) * bits, 8)
        if rest:
            raise self._refuse(name, f"{code} of shape {_short(sizes)} does not fill whole bytes")
        dtype = getattr(torch, torch_name, None) if torch_name else None
        if bits < 8:
            if dtype is not None and shape and shape[-1] % 2 == 0:
                shape = (*shape[:-1], shape[-1] // 2)
            else:
                dtype = None
        layout = _Layout(dtype, shape, contiguous_strides(shape), (0,) * len(shape), nbytes)
        self.layouts[code, tuple(sizes)] = layout
        return layout

    def _bad_entry(self, name: str, fields: Any) -> CorruptCheckpointError:
        if not isinstance(fields, dict):
            return self._refuse(name, f"it is described by {_short(fields)} instead of an object")
        if missing := sorted(_ENTRY_FIELDS - fields.keys()):
            return self._refuse(name, f"{' and '.join(missing)} missing")
        if type(fields["dtype"]) is not str or fields["dtype"] not in DTYPES:
            return self._refuse(name, f"unknown dtype {_short(fields['dtype'])}; known are {', '.join(DTYPES)}")
        sizes = fields["shape"]
        if type(sizes) is not list or not all(type(size) is int for size in sizes):
            return self._refuse(name, f"its shape {_short(sizes)} holds something other than sizes")
        return self._refuse(name, f"its data_offsets {_short(fields['data_offsets'])} are not two positions")

    def _refuse(self, name: str, problem: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"The safetensors header of {self.path} is invalid at tensor {_short(name)}: {problem}.", path=self.path
        )


def _check_coverage(placed: list[tuple[int, int, str]], source: Source, data_offset: int, path: str) -> None:
    """The tensors must fill the buffer exactly, one after the other, and the file must end with it."""
    placed.sort()
    position, previous = 0, "the header"
    for begin, end, name in placed:
        if begin != position:
            kind = "overlap" if begin < position else "leave a hole"
            raise CorruptCheckpointError(
                f"The safetensors header of {path} is invalid: {_short(previous)} and {_short(name)} {kind} "
                f"(data ends at byte {position:,}, the next begins at {begin:,}).",
                path=path,
            )
        position, previous = end, name
    expected = data_offset + position
    if source.size < expected:
        raise incomplete(path, f"{source.size:,} of {expected:,} bytes")
    if source.size > expected:
        raise CorruptCheckpointError(
            f"{path} has {source.size - expected:,} bytes after the end of its data (expected {expected:,} bytes in "
            f"all, found {source.size:,}): a damaged header, or two files in one.",
            path=path,
        )


def _restore_tied_names(root: Container, metadata: dict[str, str]) -> None:
    """Give back the names that `safetensors.torch.save_model` dropped: it lists them as dropped → kept.

    The kept one may be listed as dropped itself, before or after.
    """
    followed: set[str] = {"format"}
    for dropped in metadata:
        name, chain = dropped, list[str]()
        while name not in root and name in metadata and name not in followed:
            followed.add(name)
            chain.append(name)
            name = metadata[name]
        if isinstance(entry := root.get(name), TensorEntry):
            root.update(dict.fromkeys(chain, entry))


def _metadata_notes(metadata: dict[str, str]) -> tuple[str, ...]:
    framework = metadata.get("format", "pt")
    if framework in {"flax", "tf"}:
        return (f"written by {framework} (metadata 'format'): kernels may be transposed against torch's layout",)
    return ()


def _short(value: Any) -> str:
    """A `repr` for messages that a hostile value can't blow up."""
    if isinstance(value, str):
        return repr(value if len(value) <= 120 else value[:117] + "...")
    if isinstance(value, list) and len(value) > 16:
        return f"of {len(value)} items"
    if isinstance(value, (dict, list)) and any(isinstance(item, (dict, list)) for item in value):
        return f"a nested {'object' if isinstance(value, dict) else 'list'}"
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
