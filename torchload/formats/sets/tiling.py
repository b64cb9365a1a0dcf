"""How parts make a tensor: whether boxes tile it, and which boxes a run of its flattened elements is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from torchload.core.checkpoint import Shape

__all__ = ["Region", "TooManyCornersError", "regions_of_run", "tiles"]

MAX_CORNERS = 1 << 19


class Region(NamedTuple):
    """An axis-aligned part of a tensor, in elements."""

    origin: Shape
    shape: Shape


class TooManyCornersError(ValueError):
    """A tensor is cut up along so many dimensions, or into so many parts, that nobody can have meant it."""


def tiles(shape: Shape, regions: Iterable[Region]) -> bool:
    """Whether regions cover a tensor exactly once: no hole, no overlap, nothing outside.

    How often each element is covered is a step function, and a step function is known by its signed corners: those of
    the regions must cancel to those of the whole tensor. That takes n · 2ᵈ steps for n regions that cut d dimensions,
    and a sort, however they lie.

    Args:
        shape: Of the tensor.
        regions: In any order, all with as many dimensions as `shape`.

    Raises:
        TooManyCornersError: There are more than half a million corners.

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
        raise TooManyCornersError(f"{len(regions)} parts that cut {len(cut)} dimensions")
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
    """The boxes that a run of a tensor's elements in row-major order is made of.

    At most 2·d − 1 of them for d dimensions: the end of a row, the rest of a plane, …, whole planes, and down again.
    Each is contiguous in the tensor's own memory as well as in the run.

    Args:
        shape: Of the tensor; no dimension is 0.
        first: Position of the first element in the flattened tensor.
        count: Number of elements.

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
