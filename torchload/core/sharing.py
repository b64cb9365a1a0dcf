"""Which tensors share memory, on disk or in a process: tensors that were one thing before stay one thing after.

Tensors of one dtype whose elements overlap (ties, and views of each other) belong to one `Run`, a flat stretch of
memory in which each of them is a strided view.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch

from torchload.core.checkpoint import Shape, box_end_bytes

__all__ = ["Layout", "Run", "shared_runs"]


@dataclass(frozen=True, slots=True)
class Layout:
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


@dataclass(frozen=True, slots=True)
class Run:
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


def shared_runs(layouts: Sequence[Layout]) -> list[Run]:
    """Group tensors by the memory that they share.

    Args:
        layouts: The tensors.

    Returns:
        Runs that don't overlap, each tensor in exactly one, in the order of their first members.

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


def _numel(shape: Shape) -> int:
    return torch.Size(shape).numel()
