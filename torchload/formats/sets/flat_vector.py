"""Tensors that were flattened and lie one after the other, in parts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from torchload.core.checkpoint import Box, Shape, TensorEntry, contiguous_strides
from torchload.formats.sets.tiling import regions_of_run

__all__ = ["FlatVector"]


class FlatVector:
    """Flat tensors that follow one another.

    Attributes:
        parts: Them; each contiguous, all of one dtype.
        dtype: Theirs.
        size: Number of elements of all.
    """

    def __init__(self, parts: Sequence[TensorEntry]) -> None:
        self.parts = parts
        self.dtype = parts[0].dtype
        self.ends = list(accumulate(part.numel for part in parts))
        self.size = self.ends[-1]

    def boxes(self, position: int, shape: Shape, first: int, count: int) -> Iterator[Box]:
        """Elements `position` … of the vector as elements `first` … of a flattened tensor, `count` of them."""
        itemsize = self.dtype.itemsize
        while count:
            index = bisect_right(self.ends, position)
            amount = min(count, self.ends[index] - position)
            (box,) = self.parts[index].boxes
            start = box.start + (position - self.ends[index] + self.parts[index].numel) * itemsize
            for region in regions_of_run(shape, first, amount):
                yield Box(box.extent, start, region.shape, contiguous_strides(region.shape), region.origin)
                start += math.prod(region.shape) * itemsize
            position, first, count = position + amount, first + amount, count - amount
