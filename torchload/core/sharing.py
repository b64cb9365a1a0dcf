"""Which tensors share memory, on disk or in a process: tensors that were one thing before stay one thing after.

Tensors of one dtype whose elements overlap (ties, and views of each other) belong to one `Run`, a flat stretch of
memory in which each of them is a strided view.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch

from torchload.core.checkpoint import Box, Shape, TensorEntry, box_end_bytes

__all__ = ["Layout", "Run", "View", "layout_of", "part_of", "shared_runs"]


class Layout(NamedTuple):
    """How a tensor lies in memory.

    Attributes:
        memory: Identity of the storage it lies in; ``None`` where it lies in several pieces, or in none.
        start_bytes: Position of its first element in that storage.
        dtype: Its element type.
        shape: Size along each dimension, in elements.
        strides: Distance between neighbours along each dimension, in elements.
    """

    memory: Hashable
    start_bytes: int
    dtype: torch.dtype
    shape: Shape
    strides: Shape

    @property
    def end_bytes(self) -> int:
        """Position just past its last element."""
        return box_end_bytes(self.start_bytes, self.shape, self.strides, self.dtype.itemsize)

    @property
    def is_dense(self) -> bool:
        """Whether its elements, in some order of its dimensions, lie one after the other."""
        step = 1
        for stride, size in sorted(zip(self.strides, self.shape)):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


class Run(NamedTuple):
    """A stretch of memory and the tensors in it.

    Attributes:
        members: Positions of the tensors in the list that was given.
        offsets: Where each begins in the stretch, in elements.
        start_bytes: Where the stretch begins in its storage.
        numel: Its length, in elements.
        is_flat: Whether it is best taken as it lies: it is no longer than its tensor, or several share it. Otherwise it
            is one tensor with gaps, which is best taken element by element.
    """

    members: tuple[int, ...]
    offsets: tuple[int, ...]
    start_bytes: int
    numel: int
    is_flat: bool


class View(NamedTuple):
    """A named tensor in whose memory another one lies.

    Attributes:
        name: The tensor that is filled for both.
        whole: How that lies in memory: without gaps.
        part: How the other one does.
    """

    name: str
    whole: Layout
    part: Layout

    def seen_in(self, entry: TensorEntry) -> TensorEntry | None:
        """What the part holds, once the whole holds what an entry of its shape does; see `part_of`."""
        return part_of(entry, self.whole, self.part)


def layout_of(tensor: torch.Tensor) -> Layout:
    """How a strided tensor lies in memory.

    One that is conjugated or negated lazily shows other values of its memory than one that isn't, so that they have
    nothing in common.

    Example:
        >>> plain = torch.zeros(2, dtype=torch.complex64)
        >>> layout_of(plain) == layout_of(plain[:]), layout_of(plain) == layout_of(plain.conj())
        (True, False)
    """
    memory = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.is_conj(), tensor.is_neg())
    start = int(tensor.storage_offset()) * tensor.dtype.itemsize
    return Layout(memory, start, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))


def shared_runs(layouts: Sequence[Layout]) -> list[Run]:
    """Group tensors by the memory that they share: runs that don't overlap, in the order of their first members.

    Example:
        >>> whole = Layout("storage", 0, torch.float32, (4, 2), (2, 1))
        >>> tied, part = whole, Layout("storage", 8, torch.float32, (2,), (1,))
        >>> other = Layout("storage", 32, torch.float32, (2,), (1,))
        >>> [run.members for run in shared_runs([whole, tied, part, other])]
        [(0, 1, 2), (3,)]
    """
    groups: dict[tuple[Hashable, ...], list[int]] = {}
    runs: list[Run] = []
    for index, layout in enumerate(layouts):
        if layout.memory is None or 0 in layout.shape:
            runs.append(_run(layouts, [index], is_alone=True))
        else:
            phase = layout.start_bytes % layout.dtype.itemsize
            groups.setdefault((layout.memory, layout.dtype, phase), []).append(index)
    for members in groups.values():
        runs += (_run(layouts, overlapping) for overlapping in _overlapping(layouts, members))
    return sorted(runs, key=lambda run: run.members[0])


def _overlapping(layouts: Sequence[Layout], members: list[int]) -> Iterator[list[int]]:
    """Split tensors of one storage where nothing bridges the gap between them."""
    if len(members) == 1:
        yield members
        return
    together: list[int] = []
    end = 0
    for index in sorted(members, key=lambda index: layouts[index].start_bytes):
        if together and layouts[index].start_bytes >= end:
            yield together
            together = []
        together.append(index)
        end = max(end, layouts[index].end_bytes)
    yield together


def _run(layouts: Sequence[Layout], members: list[int], *, is_alone: bool = False) -> Run:
    members = sorted(members)
    first, itemsize = layouts[members[0]], layouts[members[0]].dtype.itemsize
    if is_alone:
        return Run((members[0],), (0,), first.start_bytes, _numel(first.shape), is_flat=False)
    start = min(layouts[index].start_bytes for index in members)
    numel = (max(layouts[index].end_bytes for index in members) - start) // itemsize
    return Run(
        members=tuple(members),
        offsets=tuple((layouts[index].start_bytes - start) // itemsize for index in members),
        start_bytes=start,
        numel=numel,
        is_flat=len(members) > 1 or numel <= _numel(first.shape),
    )


def part_of(entry: TensorEntry, whole: Layout, part: Layout) -> TensorEntry | None:
    """What a part of a tensor's memory holds, once the whole holds what an entry of its shape does.

    Returns:
        An entry over the same bytes; ``None`` where no strides lead from one element to the next as they do in memory.

    Example:
        >>> from torchload.core.checkpoint import Extent
        >>> from torchload.core.source import MemorySource
        >>> box = Box(Extent(MemorySource(bytes(24)), 0, 24), 0, (2, 3), (3, 1), (0, 0))
        >>> memory = Layout("storage", 0, torch.float32, (2, 3), (3, 1))
        >>> row = Layout("storage", 12, torch.float32, (3,), (1,))
        >>> part_of(TensorEntry(torch.float32, (2, 3), (box,)), memory, row).boxes[0].start
        12
    """
    if len(entry.boxes) != 1 or type(entry.boxes[0]) is not Box or entry.shape != whole.shape:
        return None
    (box,) = entry.boxes
    axes = sorted(zip(whole.strides, whole.shape, box.strides), reverse=True)
    axes = [axis for axis in axes if axis[1] != 1]
    first = (part.start_bytes - whole.start_bytes) // whole.dtype.itemsize
    is_alike = all(stride == stored for stride, _, stored in axes)
    found = (first, part.strides) if is_alike else _retraced(first, part, axes)
    if found is None:
        return None
    start = box.start + found[0] * entry.dtype.itemsize
    return TensorEntry.over(box.extent, entry.dtype, part.shape, found[1], start)


def _retraced(first: int, part: Layout, axes: Sequence[tuple[int, int, int]]) -> tuple[int, Shape] | None:
    """Where a view begins in a file, and its strides there, in elements, if each of its dimensions keeps to one axis.

    Args:
        first: Where it begins in memory, in elements from the tensor's first.
        part: How it lies there.
        axes: The tensor's (stride in memory, size, stride in the file), the longest stride first.
    """
    start, reached = 0, []
    for stride, _, stored in axes:
        position, first = divmod(first, stride)
        start += position * stored
        reached.append(position)
    strides = []
    for size, step in zip(part.shape, part.strides):
        if size == 1 or step == 0:
            strides.append(0)
            continue
        index = next(index for index, (stride, _, _) in enumerate(axes) if step % stride == 0)
        stride, _, stored = axes[index]
        reached[index] += (size - 1) * (step // stride)
        strides.append(step // stride * stored)
    is_inside = all(position < size for position, (_, size, _) in zip(reached, axes))
    return (start, tuple(strides)) if is_inside else None


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()
