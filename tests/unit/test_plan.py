"""Boxes on disk meet regions in memory."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from torchload.core.checkpoint import Box, Extent, Region, TensorEntry, contiguous_strides
from torchload.core.source import MemorySource
from torchload.match.globs import Globs
from torchload.plan.pairing import copies_of
from torchload.transfer import run


def cuts(draw, size):
    points = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
    return list(itertools.pairwise([0, *points, size]))


@st.composite
def boxed_tensors(draw):
    """A tensor, and an entry that holds it in a random grid of boxes spread over one source."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    data = bytearray()
    pieces = []
    for cell in itertools.product(*(cuts(draw, size) for size in shape)):
        piece = tensor[tuple(slice(a, b) for a, b in cell)].contiguous()
        pieces.append((len(data), tuple(piece.shape), tuple(a for a, _ in cell)))
        data += bytes(piece.reshape(-1).view(torch.uint8).tolist())
    extent = Extent(MemorySource(bytes(data)), 0, len(data))
    boxes = tuple(Box(extent, start, size, contiguous_strides(size), origin) for start, size, origin in pieces)
    return tensor, TensorEntry(torch.float32, shape, boxes)


@given(boxed_tensors())
def test_any_grid_of_boxes_fills_a_whole_tensor(case):
    tensor, entry = case
    memory = torch.full_like(tensor, -1)
    run(list(copies_of("w", entry, memory)))
    assert torch.equal(memory, tensor)


@given(boxed_tensors(), st.data())
def test_any_region_of_it_gets_just_its_part(case, data):
    tensor, entry = case
    where = []
    for size in entry.shape:
        begin = data.draw(st.integers(0, size - 1))
        where.append((begin, data.draw(st.integers(begin + 1, size))))
    region = Region(tuple(a for a, _ in where), tuple(b - a for a, b in where))

    class Part(torch.Tensor):
        """Stands for a DTensor's local part."""

    memory = torch.full(region.shape, -1.0).as_subclass(Part)
    import torchload.plan.pairing as plan

    original = plan.local_region
    plan.local_region = lambda _: (memory.as_subclass(torch.Tensor), region)
    try:
        copies = list(copies_of("w", entry, memory))
    finally:
        plan.local_region = original
    run(copies)
    assert torch.equal(memory.as_subclass(torch.Tensor), tensor[tuple(slice(a, b) for a, b in where)])
    assert sum(torch.Size(copy.box.shape).numel() for copy in copies) == memory.numel()  # nothing is read twice


def test_a_plain_tensor_is_one_copy():
    memory = nn.Parameter(torch.zeros(2, 3))
    extent = Extent(MemorySource(bytes(24)), 0, 24)
    entry = TensorEntry(torch.float32, (2, 3), (Box(extent, 0, (2, 3), (3, 1), (0, 0)),))
    (copy,) = copies_of("w", entry, memory)
    assert copy.target is memory
    assert copy.box is entry.boxes[0]


def test_globs_match_whole_names():
    matcher = Globs(["fc.*", "*.bias", "exact"])
    assert [bool(matcher.match(name)) for name in ("fc.weight", "a.bias", "exact", "exact.not", "xfc.weight")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert not Globs([]).match("fc.weight")
