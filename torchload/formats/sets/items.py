"""The items of a `torch.distributed.checkpoint` file: each a `torch.save` stream, or a place in a safetensors file."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from torchload.core.checkpoint import Box, Extent, Record, Shape, TensorEntry, contiguous_strides
from torchload.core.source import MemorySource, Source
from torchload.errors import CheckpointFormatError, CorruptCheckpointError, damaged

__all__ = ["Item", "ItemBox", "ItemReader"]

SMALL_BYTES = 1 << 16  # an item up to this size is read whole: cheaper than the parts of it that are needed
MAX_REMEMBERED = 4096  # different small values


class Item(NamedTuple):
    """A run of bytes that holds one value.

    Attributes:
        file: The file it lies in.
        offset: Its first byte there.
        size: Its length in bytes.
        name: What it holds, for messages.
    """

    file: Source
    offset: int
    size: int
    name: str


class ItemReader:
    """Opens items; remembers what is likely to come again."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int, int], Any] = {}
        self._values: dict[bytes, Any] = {}
        self._archives: dict[tuple[int, int], dict[str, Any]] = {}

    def value(self, item: Item) -> Any:
        """A pickled value. Equal items, such as the learning rate of each group, are the same object."""
        place = (id(item.file), item.offset, item.size)
        if place not in self._places:
            self._places[place] = self._value(item)
        return self._places[place]

    def _value(self, item: Item) -> Any:
        if item.size > SMALL_BYTES:
            return self._open(item, self._source(item))
        data = item.file.read(item.offset, item.size)
        if data not in self._values:
            value = self._open(item, MemorySource(data, item.file.name, item.file.budget))
            if len(self._values) >= MAX_REMEMBERED or isinstance(value, (dict, list)):
                return value
            self._values[data] = value
        return self._values[data]

    def tensor(self, item: Item, dtype: torch.dtype, shape: Shape) -> Box:
        """Where a chunk's elements are: a box inside the item's file, with an origin of zeros.

        Raises:
            CorruptCheckpointError: The item is no tensor, or one of another dtype or shape.
        """
        source = self._source(item)
        if item.size <= SMALL_BYTES:
            source = MemorySource(source.read(0, item.size), source.name, source.budget)
        if source.size >= 4 and source.read(0, 4) != b"PK\x03\x04":
            entry, base = self._in_safetensors(item), None
        else:
            entry, base = self._open(item, source), source
        if not isinstance(entry, TensorEntry) or entry.dtype is not dtype or entry.shape != shape:
            found = f"{entry.dtype} {list(entry.shape)}" if isinstance(entry, TensorEntry) else "no tensor"
            raise self._refuse(item, f"is {found} in the file, but {dtype} {list(shape)} in .metadata")
        (box,) = entry.boxes
        extent = box.extent
        if base is None:
            return box
        if extent.source is not base:
            raise self._refuse(item, "has its data inside the pickle")
        in_file = Extent(item.file, item.offset + extent.offset, extent.nbytes, extent.crc32, extent.big_endian)
        return Box(in_file, box.start, box.shape, box.strides, box.origin)

    def _open(self, item: Item, source: Source) -> Any:
        from torchload.formats.files import torch_zip, zip_directory

        try:
            return torch_zip.open_directory(zip_directory.read_directory(source), source.name).root
        except CorruptCheckpointError as error:
            raise self._refuse(item, f"can't be read: {error}") from error
        except CheckpointFormatError:
            return Record("torch.distributed.checkpoint item of a custom planner")

    def _in_safetensors(self, item: Item) -> Any:
        """`SerializationFormat.SAFETENSORS`: all tensors of a file are in one archive from an item's offset on."""
        from torchload.formats.files import is_safetensors, safetensors

        key = (id(item.file), item.offset)
        if key not in self._archives:
            rest = item.file.slice(item.offset, item.file.size - item.offset)
            if not is_safetensors(rest.read(0, min(16, rest.size))):
                raise self._refuse(item, "is neither a torch.save stream nor in a safetensors file")
            self._archives[key] = safetensors.open(rest, item.file.name).root
        return self._archives[key].get(item.name)

    def _source(self, item: Item) -> Source:
        return item.file.slice(item.offset, item.size)

    def _refuse(self, item: Item, problem: str) -> CorruptCheckpointError:
        return damaged(item.file.name, f"the item of {item.name[:200]!r} at byte {item.offset} {problem}")


class ItemBox(Box):
    """A chunk that is looked up in its item when its place is asked for; shape and origin are known without.

    Looking up twice in two threads gives the same result.
    """

    __slots__ = ("_dtype", "_item", "_reader")

    def __init__(self, reader: ItemReader, item: Item, dtype: torch.dtype, shape: Shape, origin: Shape) -> None:
        self.shape = shape
        self.origin = origin
        self._reader = reader
        self._item = item
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        # Only called for what has no value yet.
        if name not in {"extent", "start", "strides"}:
            raise AttributeError(name)
        found = self._reader.tensor(self._item, self._dtype, self.shape)
        self.extent, self.start, self.strides = found.extent, found.start, found.strides
        return getattr(found, name)

    @property
    def location(self) -> tuple[int, int, Shape, Shape]:
        """Told apart by the item, without looking into it."""
        return id(self._item.file), self._item.offset, self.shape, contiguous_strides(self.shape)
