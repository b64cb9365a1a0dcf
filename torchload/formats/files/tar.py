"""Tar archives: what `torch.save` wrote in its first releases (0.1.x), and checkpoints packed by others, as NeMo does.

torch's has four members, all made of pickles with binary data between them:

============  =================================================================================================
``sys_info``  facts about the machine that wrote it, which nothing needs
``storages``  a count; for each storage (key, location, class), its element count in 8 bytes, its elements;
              then the list of storages that are parts of others: (key, key of the other, offset, element count)
``tensors``   a count; for each tensor (key, key of its storage, class), then in binary its number of dimensions,
              four bytes of nothing, its shape, strides and offset
``pickle``    the object; a persistent id is the key of a tensor or a storage
============  =================================================================================================
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch

from torchload.core.checkpoint import Checkpoint, Extent, Record, Shape, TensorEntry
from torchload.core.source import Source
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, damaged, incomplete
from torchload.formats.files import head_of, may_be_inside, reader
from torchload.formats.files.archives import open_members
from torchload.formats.pickles.pickle_file import from_growing_window
from torchload.formats.pickles.tensors import STORAGE_DTYPES, strided_entry
from torchload.formats.pickles.unpickle import unpickle

__all__ = ["open", "read_members"]

BLOCK_BYTES = 512
MAX_MEMBERS = 10_000
MAX_PARTS = 100_000  # storages or tensors: each is a pickle of its own
MAX_DIMENSIONS = 64
MAX_PAX_BYTES = 1 << 16
MAX_BYTES = 1 << 63
_PICKLE_BYTES = 4096  # of one (key, …, class), generously


class _Part(NamedTuple):
    """A storage, or a part of one."""

    extent: Extent
    dtype: torch.dtype
    start: int
    numel: int


def open(source: Source, path: str) -> Checkpoint:
    """Index a tar archive without reading tensor data."""
    members = read_members(source, path)
    if {"storages", "tensors", "pickle"} <= members.keys():
        root = _read_torch(members, path)
        return Checkpoint(path, "tar checkpoint (torch 0.1)", root, (source,))
    candidates = ((name, member) for name, member in members.items() if may_be_inside(head_of(member)))
    checkpoint = open_members(candidates, source, path, "tar archive")
    if checkpoint is None:
        raise reader("foreign").describe(source, head_of(source), path)
    return checkpoint


def read_members(source: Source, path: str) -> dict[str, Source]:
    """The files in a tar archive, by name."""
    members: dict[str, Source] = {}
    position = 0
    extended: dict[str, Any] = {}  # what a pax header says about the file that follows it
    while position + BLOCK_BYTES <= source.size:
        block = source.read(position, BLOCK_BYTES)
        if not any(block):
            return members
        name, size, kind = _header(block, position, path)
        position += BLOCK_BYTES
        name, size = extended.get("path", name), int(extended.get("size", size))
        if size > source.size - position:
            end = position + size
            raise incomplete(path, f"its member {name[:200]!r} ends at byte {end}, but the file has {source.size}")
        extended = {}
        if kind == b"x":
            if size > MAX_PAX_BYTES:
                raise damaged(path, f"it has a header of {size} bytes")
            extended = _pax(source.read(position, size), path)
        elif kind in {b"0", b"\0", b"7"}:
            if name in members:
                raise damaged(path, f"its member {name[:200]!r} is there twice")
            if len(members) >= MAX_MEMBERS:
                raise CheckpointFormatError(
                    f"{path} is a tar archive of more than {MAX_MEMBERS} files. Unpack it and give the path of the "
                    "checkpoint inside.",
                    path=path,
                    found="tar archive",
                )
            members[name] = source.slice(position, size, f"{path}/{printable(name)}")
        position += -(-size // BLOCK_BYTES) * BLOCK_BYTES
    raise incomplete(path, f"it has {source.size} bytes, and the empty block that ends a tar archive is not among them")


def _header(block: bytes, position: int, path: str) -> tuple[str, int, bytes]:
    """Name, size in bytes and kind of a member."""
    try:
        checksum = int(block[148:156].strip(b"\0 ") or b"0", 8)
        # Sizes beyond eight octal digits are written as a binary number after a byte 0x80.
        wide = block[124] == 0x80
        size = int.from_bytes(block[125:136], "big") if wide else int(block[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" ") or not 0 <= size < MAX_BYTES:
        raise damaged(path, f"the header at byte {position} does not match its checksum")
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    full = prefix + b"/" + name if prefix else name
    return full.decode("utf-8", "replace").removeprefix("./"), size, block[156:157]


def _pax(data: bytes, path: str) -> dict[str, Any]:
    """The lines of a pax header, ``<length> <key>=<value>``; only names and sizes matter."""
    found: dict[str, Any] = {}
    position = 0
    while position < len(data):
        digits, _, _ = data[position : position + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        line = data[position + len(digits) + 1 : position + length - 1]
        key, equals, value = line.partition(b"=")
        if length <= len(digits) or position + length > len(data) or not equals:
            raise damaged(path, "one of its pax headers is malformed")
        if key == b"path":
            found["path"] = value.decode("utf-8", "replace").removeprefix("./")
        elif key == b"size" and value.isdigit() and len(value) < 19:
            found["size"] = int(value)
        position += length
    return found


def _read_torch(members: dict[str, Source], path: str) -> Any:
    """The object that torch 0.1 saved."""
    parts = _read_storages(members["storages"], path)
    tensors = _read_tensors(members["tensors"], parts, path)

    def outside(pid: str) -> TensorEntry:
        entry = tensors.get(pid)
        if entry is None and pid in parts:
            entry = tensors[pid] = _entry(parts[pid], 0, (parts[pid].numel,), (1,), path)
        if entry is None:
            raise LookupError(f"it refers to a tensor {pid[:80]!r} that is not there")
        return entry

    source = members["pickle"]

    def read(data: Any) -> Any:
        return unpickle(data, name=path, source=source, outside=outside).finish()

    return from_growing_window(source, read)


def _read_storages(source: Source, path: str) -> dict[str, _Part]:
    parts: dict[str, _Part] = {}
    count, position = _number(source, 0, path)
    for _ in range(count):
        (key, _, kind), position = _tuple(source, position, 3, path)
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Record) else None
        if dtype is None or key in parts:
            raise damaged(path, f"its storage {key!r} is there twice, or of no known kind")
        (numel,) = struct.unpack("<q", source.read(position, 8))
        nbytes = numel * dtype.itemsize
        position += 8
        if numel < 0 or nbytes > source.size - position:
            raise damaged(path, f"its storage {key!r} of {numel} elements runs past the end")
        parts[key] = _Part(Extent(source, position, nbytes), dtype, 0, numel)
        position += nbytes
    views = unpickle(source.read(position, source.size - position), name=path, budget=source.budget).finish()
    for view in views if isinstance(views, list) else ():
        if type(view) is not tuple or len(view) != 4 or not all(type(number) is int for number in view):
            raise damaged(path, "its list of parts of storages is not one")
        key, of, offset, numel = str(view[0]), str(view[1]), *view[2:]
        whole = parts.get(of)
        if whole is None or min(offset, numel) < 0 or offset + numel > whole.numel:
            raise damaged(path, f"its storage {key!r} lies outside the storage {of!r}")
        parts[key] = _Part(whole.extent, whole.dtype, whole.start + offset * whole.dtype.itemsize, numel)
    return parts


def _read_tensors(source: Source, parts: dict[str, _Part], path: str) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    count, position = _number(source, 0, path)
    for _ in range(count):
        (key, of, _), position = _tuple(source, position, 3, path)
        (dimensions,) = struct.unpack("<i", source.read(position, 4))
        if not 0 <= dimensions <= MAX_DIMENSIONS:
            raise damaged(path, f"its tensor {key!r} has {dimensions} dimensions")
        numbers = struct.unpack(f"<{2 * dimensions + 1}q", source.read(position + 8, 16 * dimensions + 8))
        position += 16 + 16 * dimensions
        shape, strides, offset = numbers[:dimensions], numbers[dimensions:-1], numbers[-1]
        if of == "None" and not any(shape):  # a tensor without a storage has no elements
            tensors[key] = TensorEntry(torch.float32, shape or (0,), ())
        elif of in parts and key not in tensors:
            tensors[key] = _entry(parts[of], offset, shape, strides, path)
        else:
            raise damaged(path, f"its tensor {key!r} is there twice, or has no storage")
    return tensors


def _entry(part: _Part, offset: int, shape: Shape, strides: Shape, path: str) -> TensorEntry:
    """A tensor over a storage, checked against it in integers that can't overflow."""
    if min((offset, *shape, *strides)) < 0:
        raise damaged(path, "a tensor has a negative shape, stride or offset")
    if not shape and part.numel == 0:  # torch 0.1 had no scalars; an empty tensor had no dimensions
        shape = strides = (0,)
    start, end = (part.start + number * part.dtype.itemsize for number in (offset, part.numel))
    try:
        return strided_entry(part.extent, start, end, part.dtype, shape, strides)
    except ValueError as error:
        raise damaged(path, f"a tensor {error}") from None


def _number(source: Source, position: int, path: str) -> tuple[int, int]:
    """A pickled count, and where it ends."""
    number, end = _pickled(source, position, path)
    if type(number) is not int or not 0 <= number <= MAX_PARTS:
        raise damaged(path, f"it doesn't say how many tensors it has, or says that they are more than {MAX_PARTS:,}")
    return number, end


def _tuple(source: Source, position: int, length: int, path: str) -> tuple[tuple[str, Any, Any], int]:
    """A pickled tuple that begins with a key and something that may be one."""
    value, end = _pickled(source, position, path)
    if type(value) is not tuple or len(value) != length or not _is_key(value[0]):
        raise damaged(path, f"it has no key and class at byte {position} of {source.name[-80:]!r}")
    second = str(value[1]) if _is_key(value[1]) or value[1] is None else ""
    return (str(value[0]), second, value[2]), end


def _is_key(value: Any) -> bool:
    return (type(value) is int and abs(value) < 1 << 64) or (type(value) is str and len(value) < 64)


def _pickled(source: Source, position: int, path: str) -> tuple[Any, int]:
    data = source.read(position, min(_PICKLE_BYTES, source.size - position))
    recorded = unpickle(data, name=path, budget=source.budget)
    return recorded.finish(), position + recorded.end
