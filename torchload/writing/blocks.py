"""What is written: named tensors over blocks of data, which come chunk by chunk from any device, cast on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchload.core.checkpoint import Shape
from torchload.errors import CastOverflowError
from torchload.transfer.memory import memory_at
from torchload.transfer.overflow import largest_finite, overflow_error, overflows

__all__ = ["WEIGHTS", "Block", "Content", "StoredTensor", "joined", "overflows_in", "spoiled"]

WEIGHTS = "state_dict"
"""What the weights are called where something is stored beside them."""
_CHUNK_BYTES = 8 << 20
"""What is held at once beside the model: large enough for the disk, small enough not to matter."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Data that is stored once.

    Attributes:
        name: The first tensor in it, for messages.
        numel: Number of elements.
        dtype: Element type in the file.
        fetch: Gives the data: a dense tensor on any device. Called once.
        sharded: The tensor that `fetch` puts together from all ranks, which all have to take part in.
    """

    name: str
    numel: int
    dtype: torch.dtype
    fetch: Callable[[], torch.Tensor]
    sharded: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size in the file, in bytes."""
        return self.numel * self.dtype.itemsize

    def chunks(self) -> Iterator[memoryview]:
        """The data in row-major order, as bytes in this machine's order; each chunk is valid until the next is taken.

        Every chunk is a copy: another thread may train on, and what is written must be what its checksum was made of.

        Raises:
            CastOverflowError: A finite value is infinite in the file's dtype.
        """
        with torch.no_grad():
            tensor = self.fetch().detach()
            limit = max(_CHUNK_BYTES // max(tensor.dtype.itemsize, self.dtype.itemsize), 1)
            copies = torch.empty(min(limit, tensor.numel()), dtype=tensor.dtype)
            for part in _parts(tensor, limit):
                values = copies[: part.numel()]
                values.view(part.shape).copy_(part)
                data = values.to(self.dtype)
                if overflows(values, data):
                    largest = max(largest_finite(part.to("cpu")) for part in _parts(tensor, limit))
                    raise spoiled(tensor.dtype, self.dtype, {self.name: largest})
                yield memory_at(data.data_ptr(), data.nbytes)


def spoiled(source: torch.dtype, target: torch.dtype, largest: Mapping[str, float]) -> CastOverflowError:
    """The error for tensors, name → largest finite magnitude, which becomes infinite in the file's dtype."""
    return overflow_error(next(iter(largest)), source, target, largest, "Nothing was saved. Save")


def joined(found: Sequence[CastOverflowError]) -> CastOverflowError:
    """One error for several."""
    source, target = getattr(torch, found[0].source_dtype), getattr(torch, found[0].target_dtype)
    return spoiled(source, target, {error.tensor: error.largest for error in found})


def overflows_in(blocks: Iterable[Block]) -> Iterator[CastOverflowError]:
    """What would overflow if blocks were written."""
    for block in blocks:
        try:
            deque(block.chunks(), maxlen=0)
        except CastOverflowError as error:
            yield error


def _parts(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """A tensor in pieces of at most `limit` elements, in row-major order."""
    if tensor.numel() <= limit:
        if tensor.numel():
            yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(limit)
    else:
        dimension = next(index for index, size in enumerate(tensor.shape) if size > 1)
        rows = max(limit * tensor.shape[dimension] // tensor.numel(), 1)
        for piece in tensor.split(rows, dimension):
            yield from _parts(piece, limit)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        block: Position of its block.
        offset: Where it begins in the block, in elements.
        shape: Size along each dimension, in elements.
        strides: Distance between neighbours in the block, in elements.
    """

    block: int
    offset: int
    shape: Shape
    strides: Shape


@dataclass(slots=True, eq=False)
class Content:
    """All that goes into a file.

    Attributes:
        blocks: The data.
        tensors: Name → tensor of the model's state dict.
        others: Name → value of the state dict's entries that are no tensors (extra state).
        versions: The state dict's `_metadata`: module name → such things as its ``version``.
        beside: What is stored beside the weights: name → plain values and tensors.
        loose: Identity of each tensor in `others` and `beside` → where it is in the file.
    """

    blocks: list[Block] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    loose: dict[int, StoredTensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all data in the file, in bytes."""
        return sum(block.nbytes for block in self.blocks)
