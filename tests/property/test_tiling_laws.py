"""Laws of tiling: boxes that make up a tensor, and runs of its elements that are boxes."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchload.core.checkpoint import Region
from torchload.formats.sets.tiling import MisfitError, regions_of_run, tiles

shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A shape, cut into halves again and again at places of their own."""
    shape = draw(shapes)
    regions = [Region((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        wide = [dimension for dimension, size in enumerate(region.shape) if size > 1]
        if not wide:
            regions.append(region)
            continue
        dimension = draw(st.sampled_from(wide))
        first = draw(st.integers(1, region.shape[dimension] - 1))
        for begin, size in ((0, first), (first, region.shape[dimension] - first)):
            origin, part = list(region.origin), list(region.shape)
            origin[dimension] += begin
            part[dimension] = size
            regions.append(Region(tuple(origin), tuple(part)))
    return shape, draw(st.permutations(regions))


def elements(region: Region) -> list[tuple[int, ...]]:
    return list(product(*(range(begin, begin + size) for begin, size in zip(*region))))


def covers_once(shape: tuple[int, ...], regions: list[Region]) -> bool:
    """What `tiles` means, counted element by element."""
    covered = sorted(element for region in regions for element in elements(region))
    return covered == elements(Region((0,) * len(shape), shape))


@given(tilings())
def test_what_was_cut_tiles(case: tuple[tuple[int, ...], list[Region]]) -> None:
    assert tiles(*case)


@given(tilings(), st.data())
def test_tiles_agrees_with_counting(case: tuple[tuple[int, ...], list[Region]], data: st.DataObject) -> None:
    shape, regions = case
    regions = list(regions)
    number = data.draw(st.integers(0, len(regions) - 1))
    change = data.draw(st.sampled_from(["drop", "repeat", "move", "grow"]))
    origin, size = regions[number]
    if change == "drop":
        del regions[number]
    elif change == "repeat":
        regions.append(regions[number])
    elif change == "move" and shape:
        regions[number] = Region((origin[0] + 1, *origin[1:]), size)
    elif change == "grow" and shape:
        regions[number] = Region(origin, (size[0] + 1, *size[1:]))
    assert tiles(shape, regions) == covers_once(shape, regions)


def test_a_hole_and_an_overlap_of_equal_size_do_not_cancel() -> None:
    assert not tiles((4,), [Region((0,), (2,)), Region((1,), (2,))])
    assert not tiles((2, 2), [Region((0, 0), (1, 2)), Region((0, 0), (1, 2))])


def test_a_tiling_that_no_cut_divides() -> None:
    pinwheel = [
        Region((0, 0), (1, 2)),
        Region((0, 2), (2, 1)),
        Region((2, 1), (1, 2)),
        Region((1, 0), (2, 1)),
        Region((1, 1), (1, 1)),
    ]
    assert tiles((3, 3), pinwheel)
    assert not tiles((3, 3), pinwheel[:-1])


def test_too_many_parts_are_refused_at_once() -> None:
    many = [Region((0,) * 40, (1,) * 40)]
    with pytest.raises(MisfitError, match="cut 40 dimensions"):
        tiles((2,) * 40, many)


@given(shapes, st.data())
def test_a_run_is_few_boxes_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    first = data.draw(st.integers(0, numel))
    count = data.draw(st.integers(0, numel - first))
    regions = list(regions_of_run(shape, first, count))
    everything = elements(Region((0,) * len(shape), shape))
    assert [element for region in regions for element in elements(region)] == everything[first : first + count]
    assert len(regions) <= max(1, 2 * len(shape) - 1)
