"""CRC-32 checksums: of data in files before it is used, and of data on its way to where it is used."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

import torch

from torchload.core.checkpoint import Box, Extent
from torchload.core.copies import Copy
from torchload.core.crc32 import combine_crc32
from torchload.errors import GET_IT_AGAIN, CorruptCheckpointError
from torchload.transfer.pieces import Piece, is_plain

__all__ = ["Arrivals", "combine_parts", "has_checksum", "is_summed_in_place", "report_damage"]


def has_checksum(box: Box, dtype: torch.dtype) -> bool:
    """Whether the file records a checksum for just the bytes of a box."""
    extent = box.extent
    if extent.crc32 is None or box.start != 0 or math.prod(box.shape) * dtype.itemsize != extent.nbytes:
        return False
    return box.is_contiguous


def is_summed_in_place(copy: Copy, device: torch.device) -> bool:
    """Whether `Arrivals` sums what lies in a target's own memory, given the copy to it or to a tensor of its form."""
    return device.type == "cpu" and is_plain(copy) and has_checksum(copy.box, copy.dtype)


class Arrivals:
    """Sums what arrives, while it is still in a core's cache, for comparison with what the file records.

    What isn't changed on its way is summed where it ends up, so that the sum tells of the way too; all else as it was
    read. Only copies to the CPU are summed, of boxes that have a checksum to themselves.
    """

    def __init__(self, copies: Iterable[Copy]) -> None:
        self._copies = [copy for copy in copies if copy.target.is_cpu and has_checksum(copy.box, copy.dtype)]
        self._parts: dict[int, dict[int, tuple[int, int]]] = {id(copy): {} for copy in self._copies}

    def add(self, piece: Piece, memory: memoryview, skip_bytes: int = 0) -> None:
        """Sum a piece's bytes, or those of them that `skip_bytes` lie before; may be called from several threads."""
        parts = self._parts.get(id(piece.copy))
        if parts is not None:
            parts[piece.offset + skip_bytes] = (zlib.crc32(memory), len(memory))

    def check(self) -> None:
        """Compare; raises CorruptCheckpointError, which names all that differs."""
        found = [(copy, combine_parts(self._parts[id(copy)])) for copy in self._copies]
        report_damage(
            [(copy.box.extent, crc) for copy, crc in found if crc != copy.box.extent.crc32],
            {copy.box.extent: copy.name for copy in self._copies},
        )


def report_damage(damaged: list[tuple[Extent, int]], names: Mapping[Extent, str]) -> None:
    """Raise a `CorruptCheckpointError` that names all extents of which other checksums were found than recorded."""
    if not damaged:
        return
    shown = "\n".join(
        f"  {names.get(extent, f'{extent.nbytes} bytes at offset {extent.offset}')}: "
        f"CRC-32 {crc:08x}, recorded {extent.crc32:08x}"
        for extent, crc in damaged[:10]
    )
    more = f"\n  and {len(damaged) - 10} more" if len(damaged) > 10 else ""
    path = damaged[0][0].source.name
    raise CorruptCheckpointError(
        f"{path} is damaged: the data of {len(damaged)} of its records fails its checksum. "
        f"{GET_IT_AGAIN} If that doesn't help, a disk or this machine's memory is at fault.\n{shown}{more}",
        path=path,
    )


def combine_parts(parts: Mapping[int, tuple[int, int]]) -> int:
    """The CRC-32 of consecutive runs of bytes: position → (CRC-32, length in bytes)."""
    total = 0
    for _, (crc, nbytes) in sorted(parts.items()):
        total = combine_crc32(total, crc, nbytes)
    return total
