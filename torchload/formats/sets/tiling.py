"""How parts make a tensor: boxes that tile it, parts that say where they begin, and runs of its flattened elements."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from operator import add, itemgetter
from typing import Any

import torch

from torchload.core.checkpoint import Box, Region, Shape, TensorEntry, contiguous_strides

__all__ = ["FlatVector", "MisfitError", "assemble", "of_boxes", "regions_of_run", "tiles"]

MAX_CORNERS = 1 << 19
MAX_ELEMENTS = (1 << 63) - 1


class MisfitError(ValueError):
    """Parts that make no tensor; the message says why, as a sentence about them: "they overlap"."""


def assemble(parts: Iterable[tuple[Shape, Any]], shape: Shape | None = None) -> TensorEntry:
    """Make one tensor of parts, each behind the position where it begins; as large as they reach, without `shape`.

    Parts of the same region are replicas: one of them is taken.

    Raises:
        MisfitError: They overlap, leave a hole, or differ in dtype or number of dimensions.
    """
    regions: dict[str, tuple[Shape, TensorEntry]] = {}  # by text: hashes of tuples of numbers can be made to collide
    for origin, part in parts:
        if not isinstance(part, TensorEntry):
            raise MisfitError("not all of them are dense tensors")
        regions.setdefault(f"{origin}{part.shape}", (origin, part))
    if not regions:
        raise MisfitError("there are none")
    placed = list(regions.values())
    if len({part.dtype for _, part in placed}) > 1:
        raise MisfitError("they differ in dtype")
    dimensions = len(placed[0][0] if shape is None else shape)
    if any(not len(origin) == len(part.shape) == dimensions for origin, part in placed):
        raise MisfitError("they differ in the number of dimensions")
    if shape is None:
        shape = tuple(map(max, zip(*(map(add, origin, part.shape) for origin, part in placed))))
    boxes = [
        Box(box.extent, box.start, box.shape, box.strides, tuple(map(add, origin, box.origin)))
        for origin, part in placed
        for box in part.boxes
        if part.numel
    ]
    return of_boxes(placed[0][1].dtype, shape, boxes)


def of_boxes(dtype: torch.dtype, shape: Shape, boxes: Sequence[Box]) -> TensorEntry:
    """A tensor of boxes, which must cover it exactly once. Nothing of them is looked at but shape and origin.

    Raises:
        MisfitError: They overlap or leave a hole.
    """
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise MisfitError("together they are larger than any tensor can be")
    if 0 in shape:
        return TensorEntry(dtype, shape, ())
    if not tiles(shape, [Region(box.origin, box.shape) for box in boxes]):
        covered, whole = sum(math.prod(box.shape) for box in boxes), math.prod(shape)
        problem = "overlap" if covered > whole else "leave a hole" if covered < whole else "leave holes and overlap"
        raise MisfitError(f"they cover {covered:,} elements of {list(shape)} ({whole:,}), so they {problem}")
    return TensorEntry(dtype, shape, tuple(boxes))


def tiles(shape: Shape, regions: Iterable[Region]) -> bool:
    """Whether regions cover a tensor exactly once: no hole, no overlap, nothing outside.

    How often each element is covered is a step function, and a step function is known by its signed corners: those of
    the regions must cancel to those of the whole tensor. That takes n · 2ᵈ steps for n regions that cut d dimensions,
    and a sort, however they lie.

    Raises:
        MisfitError: There are more than half a million corners: cut up along so many dimensions, or into so many parts,
            nobody can have meant it.

    Example:
        >>> halves = [Region((0, 0), (2, 3)), Region((2, 0), (2, 3))]
        >>> tiles((4, 3), halves), tiles((4, 3), halves[:1]), tiles((4, 3), halves + halves[:1])
        (True, False, False)
    """
    regions = list(regions)
    cut = [
        dimension
        for dimension, size in enumerate(shape)
        if any(origin[dimension] or part[dimension] != size for origin, part in regions)
    ]
    if len(cut) > MAX_CORNERS.bit_length() or len(regions) << len(cut) > MAX_CORNERS:
        raise MisfitError(f"they are {len(regions):,} parts that cut {len(cut)} dimensions, more than any tensor has")
    corners = [corner for region in regions for corner in _corners(region, cut, 1)]
    corners += _corners(Region((0,) * len(shape), shape), cut, -1)
    corners.sort()
    return all(sum(sign for _, sign in group) == 0 for _, group in groupby(corners, itemgetter(0)))


def _corners(region: Region, dimensions: list[int], sign: int) -> list[tuple[Shape, int]]:
    corners: list[tuple[Shape, int]] = [((), sign)]
    for dimension in dimensions:
        begin = region.origin[dimension]
        end = begin + region.shape[dimension]
        corners = [
            corner for point, weight in corners for corner in (((*point, begin), weight), ((*point, end), -weight))
        ]
    return corners


def regions_of_run(shape: Shape, first: int, count: int) -> Iterator[Region]:
    """The boxes that `count` elements of a tensor without a dimension of 0 are, from the `first` in row-major order on.

    At most 2·d − 1 of them for d dimensions: the end of a row, the rest of a plane, …, whole planes, and down again.
    Each is contiguous in the tensor's own memory as well as in the run.

    Example:
        >>> for region in regions_of_run((4, 3), 2, 8):
        ...     print(*region)
        (0, 2) (1, 1)
        (1, 0) (2, 3)
        (3, 0) (1, 1)
    """
    blocks = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    position, end = first, first + count
    if not shape and count:
        yield Region((), ())
        return
    while position < end:
        dimension = next(d for d, block in enumerate(blocks) if position % block == 0 and position + block <= end)
        origin = tuple(position // block % size for block, size in zip(blocks, shape))
        whole = min((end - position) // blocks[dimension], shape[dimension] - origin[dimension])
        yield Region(origin, (*(1,) * dimension, whole, *shape[dimension + 1 :]))
        position += whole * blocks[dimension]


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
