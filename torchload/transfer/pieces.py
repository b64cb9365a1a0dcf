"""From copies to jobs: what is cut up because it is large, and what is read together because it is small.

A `Piece` is a part of a copy that is moved in one go; a `Job` is one read and the pieces that it feeds. Large plain
tensors are cut into jobs whose read goes straight to where the data ends up; small ones that are neighbours in the file
share a read, which the kernel can scatter to their places. All else goes through scratch memory of bounded size: a
strided box is cut along its widest strides until the bytes that a piece spans fit.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from torchload.core.checkpoint import Extent, Shape, box_end_bytes
from torchload.core.copies import Copy
from torchload.core.source import Source

__all__ = [
    "CAST",
    "RAW",
    "STAGED_BYTES",
    "STRIDED_BYTES",
    "VIEW",
    "Job",
    "Piece",
    "cut",
    "is_plain",
    "needs_swap",
    "schedule",
]

_BIG_ENDIAN = sys.byteorder == "big"

RAW = 0
"""The bytes in the file are those in memory."""
CAST = 1
"""Elements lie in the same order on both sides, but differ in dtype."""
VIEW = 2
"""Anything else: other strides, other byte order, or another dtype on another device."""

DIRECT_BYTES = 8 << 20
"""Read straight into place at most this much at once."""
STAGED_BYTES = 4 << 20
"""What is cast by way of scratch memory is at most this much at once: much less, and the price of a job shows."""
CAST_BYTES = 16 << 20
"""The same for what is in the page cache, and is cast from there, or in blocks."""
STRIDED_BYTES = 1 << 20
"""The same for what is rearranged, which should stay in the cache nearest to a core."""
DEVICE_BYTES = (4 << 20) - (8 << 10)
"""The same on the way to another device, where each copy has a price of its own; see `_fill_lanes`."""
SMALL_BYTES = 64 << 10
"""Below this size a plain tensor shares a read with its neighbours."""
GAP_BYTES = 64 << 10
"""Reading over a gap of this size costs as much as another read: from the page cache, from a cold disk by way of it,
and past it alike."""
MAX_SHARING = 500
"""Pieces that share a read at most: the kernel scatters to 1024 places, of which half are for gaps."""
CUT_BYTES = 4096
"""Cuts are made where a block of the file begins, so that what follows lies well in memory and can be read directly."""
COLD_BYTES = 8 << 20
"""From a device that waits for requests, read this much at once, whatever it is made up of."""
COLD_SMALL_BYTES = 2 << 20

_CPU = torch.device("cpu")


class Piece(NamedTuple):
    """Part of a copy.

    Attributes:
        copy: The whole.
        kind: `RAW`, `CAST` or `VIEW`.
        offset: Position of the piece's first byte in the source.
        nbytes: Bytes from its first element to the end of its last.
        target: Where it goes: a view of just the piece, or for `RAW` something larger.
        skip_bytes: For `RAW`, where in the target's memory the piece begins.
        shape, strides: How the elements of a `CAST` or `VIEW` lie in those bytes, in elements.
    """

    copy: Copy
    kind: int
    offset: int
    nbytes: int
    target: torch.Tensor
    skip_bytes: int
    shape: Shape
    strides: Shape


class Job(NamedTuple):
    """One read, and the pieces that lie in it.

    Attributes:
        device: Where the pieces end up.
        source: Where the bytes come from.
        offset: Position of the first of them.
        nbytes: How many there are, gaps between pieces included.
        pieces: What they are, in the order of the source.
        can_scatter: Whether each piece is plain and goes to the CPU, and none overlaps the one before it.
    """

    device: torch.device
    source: Source
    offset: int
    nbytes: int
    pieces: list[Piece]
    can_scatter: bool = False

    @property
    def is_direct(self) -> bool:
        """Whether the read can go to memory on the CPU without scratch."""
        return len(self.pieces) == 1 and self.pieces[0].kind == RAW and self.device.type == "cpu"


def needs_swap(extent: Extent, dtype: torch.dtype) -> bool:
    """Whether elements lie in the other byte order than this machine's."""
    return extent.big_endian != _BIG_ENDIAN and dtype.itemsize > 1


def schedule(copies: Iterable[Copy], is_cold: Callable[[Source], bool] = lambda _: False) -> list[Job]:
    """The jobs that carry out the copies, in the order of the files; cold sources are read in large requests."""
    groups: dict[tuple[torch.device, Source], list[Piece]] = {}
    source: Source | None = None
    device: torch.device | None = None
    cast_bytes = STAGED_BYTES
    pieces: list[Piece] = []
    for copy in copies:
        target, extent = copy.target, copy.box.extent
        its_device = _CPU if target.is_cpu else target.device
        if extent.source is not source or its_device != device:
            if extent.source is not source:
                cast_bytes = STAGED_BYTES if is_cold(extent.source) else CAST_BYTES
            source, device = extent.source, its_device
            pieces = groups.setdefault((device, source), [])
        if its_device is _CPU and is_plain(copy) and 0 < (nbytes := target.nbytes) <= DIRECT_BYTES:  # most tensors
            box = copy.box
            piece = (copy, RAW, extent.offset + box.start, nbytes, target, 0, box.shape, box.strides)
            pieces.append(_new_tuple(Piece, piece))
        else:
            cut(copy, pieces, cast_bytes)
    jobs: list[Job] = []
    for (device, source), pieces in groups.items():
        pieces.sort(key=_offset)
        jobs.extend(_batch(device, source, pieces, is_cold(source)))
    return jobs


def is_plain(copy: Copy) -> bool:
    """Whether both sides are row-major and of one dtype. May say no where `_classify` says `RAW`, but is quicker."""
    target, box = copy.target, copy.box
    return (
        target.dtype is copy.dtype
        and box.strides == target.stride()
        and target.is_contiguous()
        and box.extent.big_endian == _BIG_ENDIAN
        and not target.is_neg()
        and not target.is_conj()
    )


def cut(copy: Copy, pieces: list[Piece], cast_bytes: int = STAGED_BYTES) -> None:
    """Append the pieces of one copy to a list; of what is only cast, pieces of so many bytes."""
    box, dtype, target = copy.box, copy.dtype, copy.target
    shape: Shape = box.shape
    itemsize = dtype.itemsize
    nbytes = math.prod(shape) * itemsize
    if not nbytes:
        return
    extent = box.extent
    offset = extent.offset + box.start
    strides = box.strides
    kind, flat = _classify(copy)
    limit = (DIRECT_BYTES, cast_bytes, STRIDED_BYTES)[kind] if target.is_cpu else DEVICE_BYTES
    if not target.is_cpu and (flat or kind == RAW):
        if kind != RAW and nbytes > limit:
            target, shape, strides = target.reshape(-1), (nbytes // itemsize,), (1,)
        limit = nbytes  # `_fill_lanes` knows where to cut
    if nbytes <= limit and (flat or kind == RAW):  # most tensors
        pieces.append(_new_tuple(Piece, (copy, kind, offset, nbytes, target, 0, shape, strides)))
        return
    if kind == RAW:
        pieces.extend(
            Piece(copy, RAW, offset + skip, min(limit, nbytes - skip), target, skip, shape, strides)
            for skip in range(0, nbytes, limit)
        )
        return
    if flat:
        target, shape, strides = target.reshape(-1), (nbytes // itemsize,), (1,)
    is_same_kind = kind == VIEW and target.is_cpu and target.dtype == dtype and not needs_swap(extent, dtype)
    may_hold_rows = is_same_kind and not target.is_neg() and not target.is_conj()
    for part, start, part_shape in _split(target, shape, strides, limit // itemsize, GAP_BYTES // itemsize):
        span = box_end_bytes(0, part_shape, strides, itemsize)
        part_kind = RAW if may_hold_rows and _is_run(part, part_shape, strides) else kind
        pieces.append(Piece(copy, part_kind, offset + start * itemsize, span, part, 0, part_shape, strides))


def _classify(copy: Copy) -> tuple[int, bool]:
    """The kind of a copy's pieces, and whether both sides can be seen as one dimension."""
    box, target = copy.box, copy.target
    strides = target.stride()
    if target.is_contiguous():
        same_order = flat = box.strides == strides or box.is_contiguous
    else:
        # Such as channels-last on both sides.
        same_order, flat = box.strides == strides and _covers_memory(box.shape, strides), False
    if not same_order or box.extent.big_endian != _BIG_ENDIAN or target.is_neg() or target.is_conj():
        return VIEW, False
    if target.dtype == copy.dtype:
        return RAW, flat
    return (CAST, True) if flat and target.is_cpu else (VIEW, flat)


def _covers_memory(shape: Shape, strides: Shape) -> bool:
    """Whether a strided tensor is a permutation of a contiguous one."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != step:
                return False
            step *= size
    return True


def _is_run(part: torch.Tensor, shape: Shape, strides: Shape) -> bool:
    """Whether a part lies in one piece on both sides, in the same order: a row of what is cut by columns."""
    return part.is_contiguous() and all(
        size == 1 or stride == here for size, stride, here in zip(shape, strides, part.stride(), strict=True)
    )


def _split(
    target: torch.Tensor, shape: Shape, strides: Shape, limit: int, gap: int
) -> Iterator[tuple[torch.Tensor, int, Shape]]:
    """Cut a strided region into parts that span at most `limit` elements of its source, with rows beyond a `gap` apart.

    Yields:
        The part of the target, its first element's distance from the region's, and its shape.
    """
    dimension = max(range(len(shape)), key=lambda index: strides[index] if shape[index] > 1 else -1, default=-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if dimension < 0 or shape[dimension] == 1:
        # Dimensions of stride 0 need no more bytes however large they are.
        yield target, 0, shape
        return
    size, stride = shape[dimension], strides[dimension]
    inner = span - (size - 1) * stride
    is_wide = stride - inner >= gap
    if span <= limit and not is_wide:
        yield target, 0, shape
        return
    step = 1 if is_wide or inner > limit else 1 + (limit - inner) // stride
    for first in range(0, size, step):
        count = min(step, size - first)
        part_shape = (*shape[:dimension], count, *shape[dimension + 1 :])
        part = target.narrow(dimension, first, count)
        for piece, start, piece_shape in _split(part, part_shape, strides, limit, gap):
            yield piece, first * stride + start, piece_shape


def _batch(device: torch.device, source: Source, pieces: Sequence[Piece], cold: bool) -> Iterator[Job]:
    """Let neighbours share a read."""
    if device.type != "cpu":
        yield from _fill_lanes(device, source, pieces)
        return
    small, limit = (COLD_SMALL_BYTES, COLD_BYTES) if cold else (SMALL_BYTES, STRIDED_BYTES)
    members: list[Piece] = []
    start = end = 0
    can_scatter = True
    for piece in pieces:
        _, kind, offset, nbytes, _, _, _, _ = piece
        piece_end = offset + nbytes
        if kind == RAW and nbytes >= small:
            yield Job(device, source, offset, nbytes, [piece])
            continue
        is_far = offset - end >= GAP_BYTES or max(end, piece_end) - start > limit
        if members and (is_far or len(members) == MAX_SHARING):
            yield Job(device, source, start, end - start, members, can_scatter)
            members, can_scatter = [], True
        if not members:
            start = end = offset
        if kind != RAW or offset < end:
            can_scatter = False
        members.append(piece)
        end = max(end, piece_end)
    if members:
        yield Job(device, source, start, end - start, members, can_scatter)


def _fill_lanes(device: torch.device, source: Source, pieces: Iterable[Piece]) -> Iterator[Job]:
    """Reads of one size, whatever lies in them, since each costs the same; a tensor is cut where one ends."""
    members: list[Piece] = []
    start = end = 0
    for piece in pieces:
        done = 0
        while done < piece.nbytes:
            offset = piece.offset + done
            before = offset < start  # what overlaps with a tensor that was cut may begin earlier
            if members and (before or offset - end >= GAP_BYTES or len(members) == MAX_SHARING):
                yield Job(device, source, start, end - start, members)
                members = []
            if not members:
                start = end = offset
            nbytes = _fitting(piece, done, start + DEVICE_BYTES - offset, bool(members))
            if nbytes:
                members.append(_part(piece, done, nbytes))
                done += nbytes
                end = max(end, offset + nbytes)
            if done < piece.nbytes:
                yield Job(device, source, start, end - start, members)
                members = []
    if members:
        yield Job(device, source, start, end - start, members)


def _fitting(piece: Piece, done: int, room: int, may_wait: bool) -> int:
    """How many bytes of a piece, from byte `done` on, go where there is room for so many; some, unless it may wait."""
    left = piece.nbytes - done
    if left <= room:
        return left
    if piece.kind != RAW and piece.strides != (1,):
        return 0 if may_wait else left
    nbytes = room - (piece.copy.box.extent.source.base + piece.offset + done + room) % CUT_BYTES
    nbytes -= nbytes % piece.copy.dtype.itemsize
    return 0 if nbytes < SMALL_BYTES and may_wait else nbytes


def _part(piece: Piece, start: int, nbytes: int) -> Piece:
    """`nbytes` bytes of a piece, from byte `start` on."""
    copy, kind, offset, whole, target, skip_bytes, shape, strides = piece
    if nbytes == whole:
        return piece
    if kind == RAW:
        skip_bytes += start
    else:
        count = nbytes // copy.dtype.itemsize
        target, shape = target.narrow(0, start // copy.dtype.itemsize, count), (count,)
    return _new_tuple(Piece, (copy, kind, offset + start, nbytes, target, skip_bytes, shape, strides))


_offset = operator.attrgetter("offset")
_new_tuple = tuple.__new__
"""What a `NamedTuple` calls after it has sorted out its arguments: 0.14 µs for a `Piece` instead of 0.29."""
