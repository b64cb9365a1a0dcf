"""Checksums: of data in files before it is used, and of data on its way to where it is used.

A file records CRC-32s. What was read and matched its own is known by sums of its words as well, which take a fraction
of the time where the data is read again and lands.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch

from torchload.core.checkpoint import Box, Extent
from torchload.core.copies import Copy
from torchload.core.crc32 import combine_crc32
from torchload.core.word_sums import WordSums
from torchload.errors import GET_IT_AGAIN, CorruptCheckpointError
from torchload.transfer.pieces import Piece, is_plain

__all__ = ["Arrivals", "crc_differs", "has_checksum", "is_summed_in_place", "new_word_sums", "report_damage"]

_LEAST_SUMMED_BYTES = 64 << 10
"""Of less a CRC-32 takes less time than operators do."""


def has_checksum(box: Box, dtype: torch.dtype) -> bool:
    """Whether the file records a checksum for just the bytes of a box."""
    extent = box.extent
    if extent.crc32 is None or box.start != 0 or math.prod(box.shape) * dtype.itemsize != extent.nbytes:
        return False
    return box.is_contiguous


def is_summed_in_place(copy: Copy, device: torch.device) -> bool:
    """Whether `Arrivals` sums what lies in a target's own memory, given the copy to it or to a tensor of its form."""
    return device.type == "cpu" and is_plain(copy) and has_checksum(copy.box, copy.dtype)


def new_word_sums(extent: Extent) -> WordSums | None:
    """Room for sums of an extent's words, if it is worth that."""
    return WordSums(extent.nbytes) if extent.nbytes >= _LEAST_SUMMED_BYTES else None


class Arrivals:
    """Sums what arrives, while it is still in a core's cache, for comparison with what the file records.

    What isn't changed on its way is summed where it ends up, so that the sum tells of the way too; all else as it was
    read. Only copies to the CPU are summed, of boxes that have a checksum to themselves. Where a copy's data was read
    and found sound before, its words are summed, and compared with those of then.
    """

    def __init__(self, copies: Iterable[Copy]) -> None:
        self._copies = [copy for copy in copies if copy.target.is_cpu and has_checksum(copy.box, copy.dtype)]
        self._crcs: dict[int, dict[int, tuple[int, int]]] = {}
        self._sums: dict[int, WordSums] = {}
        for copy in self._copies:
            if copy.box.extent.word_sums is None:
                self._crcs[id(copy)] = {}
            else:
                self._sums[id(copy)] = WordSums(copy.box.extent.nbytes)

    def add(self, piece: Piece, memory: memoryview, skip_bytes: int = 0) -> None:
        """Sum a piece's bytes, or those of them that `skip_bytes` lie before; may be called from several threads."""
        position = piece.offset + skip_bytes - piece.copy.box.extent.offset
        if (crcs := self._crcs.get(id(piece.copy))) is not None:
            crcs[position] = (zlib.crc32(memory), len(memory))
        elif (sums := self._sums.get(id(piece.copy))) is not None:
            sums.add(memory, position)

    def check(self) -> None:
        """Compare; raises CorruptCheckpointError, which names all that differs."""
        damaged: list[tuple[Extent, str]] = []
        for copy in self._copies:
            extent, sums = copy.box.extent, self._sums.get(id(copy))
            if sums is None:
                damaged += crc_differs(extent, self._crcs[id(copy)])
            elif extent.word_sums is None or not sums.same_as(extent.word_sums):
                damaged.append((extent, "it isn't what it was when its CRC-32 was right, a moment before"))
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
