"""Tensors of this process as entries, so that what a caller or a hook holds loads as what a file holds."""

from __future__ import annotations

import sys

import torch

from torchload.core.budget import Budget
from torchload.core.checkpoint import Box, Extent, TensorEntry
from torchload.core.source import Source

__all__ = ["MemoryEntries", "TensorSource", "entry_of"]

_BIG_ENDIAN = sys.byteorder == "big"


class TensorSource(Source):
    """The bytes of a storage of torch, on any device; it keeps the storage alive.

    Attributes:
        address: Where the storage begins.
    """

    __slots__ = ("_bytes", "address")

    def __init__(self, storage: torch.UntypedStorage, name: str) -> None:
        with torch.inference_mode(False):
            self._bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.address = storage.data_ptr()
        super().__init__(name, storage.nbytes(), Budget())

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        if len(buffer):
            start = self.base + offset
            torch.frombuffer(buffer, dtype=torch.uint8).copy_(self._bytes[start : start + len(buffer)])


class MemoryEntries:
    """Makes entries of tensors; those that share memory lie in one source, as tied tensors do in a file.

    Attributes:
        sources: The storages seen so far.
    """

    def __init__(self, name: str) -> None:
        self.sources: dict[int, TensorSource] = {}
        self._name = name

    def add(self, tensor: torch.Tensor) -> TensorEntry:
        """The entry of a strided tensor with memory. Nothing is copied, unless it is conjugated or negated lazily."""
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        tensor = tensor.detach().resolve_conj().resolve_neg()
        shape = tuple(tensor.shape)
        if not tensor.numel():
            return TensorEntry(tensor.dtype, shape, (), is_parameter)
        storage = tensor.untyped_storage()
        source = self.sources.get(storage.data_ptr())
        if source is None or source.size < storage.nbytes():
            source = self.sources[storage.data_ptr()] = TensorSource(storage, self._name)
        extent = Extent(source, 0, source.size, big_endian=_BIG_ENDIAN)
        start = int(tensor.storage_offset()) * tensor.dtype.itemsize
        box = Box(extent, start, shape, tuple(tensor.stride()), (0,) * len(shape))
        return TensorEntry(tensor.dtype, shape, (box,), is_parameter)


def entry_of(tensor: torch.Tensor, name: str) -> TensorEntry:
    """The entry of one strided tensor with memory, on any device, which messages call `name`.

    Example:
        >>> entry = entry_of(torch.zeros(2, 3).t(), "<computed>")
        >>> entry.shape, entry.boxes[0].strides
        ((3, 2), (1, 3))
    """
    return MemoryEntries(name).add(tensor)
