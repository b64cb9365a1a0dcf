"""Checksums: of data in files before it is used, and of data on its way to where it is used.

A file records CRC-32s. What was read and matched its own is known by the sum of its words as well, which takes a fifth
of the time where the data is read again and lands.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from torchload.core.checkpoint import Box, Extent
from torchload.core.copies import Copy
from torchload.core.crc32 import combine_crc32
from torchload.errors import GET_IT_AGAIN, CorruptCheckpointError
from torchload.transfer.pieces import Piece, is_plain

__all__ = [
    "Arrivals",
    "add_up",
    "crc_differs",
    "has_checksum",
    "has_word_sum",
    "is_summed_in_place",
    "report_damage",
    "word_sum",
]

_WORD_BYTES = 8
_LEAST_SUMMED_BYTES = 64 << 10
"""Of less a CRC-32 takes less time than an operator does."""


def has_checksum(box: Box, dtype: torch.dtype) -> bool:
    """Whether the file records a checksum for just the bytes of a box."""
    extent = box.extent
    if extent.crc32 is None or box.start != 0 or math.prod(box.shape) * dtype.itemsize != extent.nbytes:
        return False
    return box.is_contiguous


def is_summed_in_place(copy: Copy, device: torch.device) -> bool:
    """Whether `Arrivals` sums what lies in a target's own memory, given the copy to it or to a tensor of its form."""
    return device.type == "cpu" and is_plain(copy) and has_checksum(copy.box, copy.dtype)


def has_word_sum(extent: Extent) -> bool:
    """Whether an extent is worth a sum of its words."""
    return extent.nbytes >= _LEAST_SUMMED_BYTES


def word_sum(memory: memoryview, position: int) -> int:
    """The sum of 64-bit words, modulo 2**64, of bytes that begin at a position in what is cut into such words.

    A byte counts by its place in its word, so that the sums of parts add up to that of the whole, wherever it is cut.

    Example:
        >>> data = memoryview(bytearray(range(100)))
        >>> add_up([word_sum(data[:37], 0), word_sum(data[37:], 37)]) == word_sum(data, 0)
        True
    """
    lead = min(-position % _WORD_BYTES, len(memory))
    end = lead + (len(memory) - lead) // _WORD_BYTES * _WORD_BYTES
    first = (bytes(position % _WORD_BYTES) + memory[:lead]).ljust(_WORD_BYTES, b"\0") if lead else b""
    last = bytes(memory[end:]).ljust(_WORD_BYTES, b"\0")
    sums = [int.from_bytes(word, sys.byteorder) for word in (first, last)]
    if end > lead:
        sums.append(int(torch.frombuffer(memory[lead:end], dtype=torch.int64).sum()))
    return add_up(sums)


def add_up(sums: Iterable[int]) -> int:
    """The sum of words that are sums themselves, modulo 2**64."""
    return sum(sums) % (1 << 8 * _WORD_BYTES)


class Arrivals:
    """Sums what arrives, while it is still in a core's cache, for comparison with what the file records.

    What isn't changed on its way is summed where it ends up, so that the sum tells of the way too; all else as it was
    read. Only copies to the CPU are summed, of boxes that have a checksum to themselves. Where a copy's data was read
    and found sound before, its words are summed, and compared with those of then.
    """

    def __init__(self, copies: Iterable[Copy]) -> None:
        self._copies = [copy for copy in copies if copy.target.is_cpu and has_checksum(copy.box, copy.dtype)]
        self._parts: dict[int, dict[int, tuple[int, int]]] = {id(copy): {} for copy in self._copies}

    def add(self, piece: Piece, memory: memoryview, skip_bytes: int = 0) -> None:
        """Sum a piece's bytes, or those of them that `skip_bytes` lie before; may be called from several threads."""
        parts = self._parts.get(id(piece.copy))
        if parts is not None:
            extent = piece.copy.box.extent
            position = piece.offset + skip_bytes - extent.offset
            summed = zlib.crc32(memory) if extent.word_sum is None else word_sum(memory, position)
            parts[position] = (summed, len(memory))

    def check(self) -> None:
        """Compare; raises CorruptCheckpointError, which names all that differs."""
        damaged: list[tuple[Extent, str]] = []
        for copy in self._copies:
            extent, parts = copy.box.extent, self._parts[id(copy)]
            if extent.word_sum is None:
                damaged += crc_differs(extent, parts)
            elif (total := add_up(part for part, _ in parts.values())) != extent.word_sum:
                damaged.append((extent, f"its words add up to {total:016x}, and did to {extent.word_sum:016x} before"))
        report_damage(damaged, {copy.box.extent: copy.name for copy in self._copies})


def crc_differs(extent: Extent, parts: Mapping[int, tuple[int, int]]) -> list[tuple[Extent, str]]:
    """What to report of an extent, given the CRC-32 and length of each part by its position: nothing, if sound."""
    crc = 0
    for _, (part, nbytes) in sorted(parts.items()):
        crc = combine_crc32(crc, part, nbytes)
    return [] if crc == extent.crc32 else [(extent, f"CRC-32 {crc:08x}, recorded {extent.crc32:08x}")]


def report_damage(damaged: Sequence[tuple[Extent, str]], names: Mapping[Extent, str]) -> None:
    """Raise a `CorruptCheckpointError` that names all extents that failed, each with what was found, if any did."""
    if not damaged:
        return
    shown = "\n".join(
        f"  {names.get(extent, f'{extent.nbytes} bytes at offset {extent.offset}')}: {found}"
        for extent, found in damaged[:10]
    )
    more = f"\n  and {len(damaged) - 10} more" if len(damaged) > 10 else ""
    path = damaged[0][0].source.name
    raise CorruptCheckpointError(
        f"{path} is damaged: the data of {len(damaged)} of its records fails its checksum. "
        f"{GET_IT_AGAIN} If that doesn't help, a disk or this machine's memory is at fault.\n{shown}{more}",
        path=path,
    )
