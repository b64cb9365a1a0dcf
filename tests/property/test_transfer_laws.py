"""Laws of the transfer: whatever the layout, what arrives is what torch itself would have put there."""

from __future__ import annotations

import math
import random
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchload.core.checkpoint import Box, Extent, TensorEntry, box_end_bytes
from torchload.core.copies import Copy
from torchload.core.crc32 import combine_crc32
from torchload.core.source import FileSource, MemorySource, Source
from torchload.transfer import map_entries, pieces, read_entries, run

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHER = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128,
    torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32,
]  # fmt: skip

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], *, expanded: bool = True) -> tuple[int, ...]:
    """Strides for a shape: row-major, permuted, with gaps, or expanded."""
    order = draw(st.permutations(range(len(shape))))
    strides = [0] * len(shape)
    step = 1
    for dimension in order if draw(st.booleans()) else reversed(range(len(shape))):
        strides[dimension] = step
        step = step * max(shape[dimension], 1) + draw(st.sampled_from([0, 0, 0, 1, 7]))
        if expanded and draw(st.integers(0, 9)) == 0:
            strides[dimension] = 0
    return tuple(strides)


def _random_bytes(nbytes: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Bytes that hold moderate numbers of a dtype at every offset that is a multiple of its size."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-nbytes // dtype.itemsize)
    values = torch.randn(count, generator=generator) * 30
    if dtype == torch.bool:
        values = values > 0
    elif not dtype.is_floating_point and not dtype.is_complex:
        values = values.abs()
    return values.to(dtype).view(torch.uint8)[:nbytes]


@st.composite
def copies(draw: st.DrawFn, index: int) -> tuple[Copy, torch.Tensor]:
    """A copy over bytes of its own, and what must arrive."""
    dtype = draw(st.sampled_from(REAL + OTHER))
    shape = draw(shapes)
    strides = draw(layouts(shape))
    swapped = draw(st.booleans())
    start, offset = draw(st.integers(0, 9)) * dtype.itemsize, draw(st.integers(0, 70))
    end = box_end_bytes(start, shape, strides, dtype.itemsize)
    data = _random_bytes(end, dtype, draw(st.integers(0, 999)))
    values = (
        data[start:].view(dtype).as_strided(shape, strides) if math.prod(shape) else torch.empty(shape, dtype=dtype)
    )
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    stored = data.view(-1, width).flip(1).reshape(-1) if swapped and data.numel() else data
    content = bytes(offset) + bytes(stored.tolist())
    source: Source = MemorySource(content)
    if draw(st.booleans()):
        path = Path(tempfile.mkdtemp()) / "data"
        path.write_bytes(content)
        source = FileSource(path)
        path.unlink()
    target_dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])) if dtype in REAL else dtype
    target_strides = draw(layouts(shape, expanded=False))
    memory = torch.zeros(box_end_bytes(0, shape, target_strides, 1) + 1, dtype=torch.float32).to(target_dtype)
    target = memory.as_strided(shape, target_strides)
    box = Box(Extent(source, offset, end, None, swapped), start, shape, strides, (0,) * len(shape))
    return Copy(f"tensor {index}", box, dtype, target), values.to(target_dtype)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor) for tensor in (one, other))
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


@given(st.data())
def test_what_arrives_is_what_torch_would_have_copied(data: st.DataObject) -> None:
    cases = [data.draw(copies(index)) for index in range(data.draw(st.integers(1, 3)))]
    run([copy for copy, _ in cases], threads=data.draw(st.integers(1, 3)))
    for copy, expected in cases:
        assert _same_bits(copy.target, expected)


members = st.tuples(st.sampled_from([1, 10, 200, 1000]), st.sampled_from([torch.float32, torch.float16, torch.float64]))


@given(st.lists(members, min_size=1, max_size=20), st.integers(0, 100), st.integers(0, 400), st.randoms())
def test_neighbours_in_one_file(
    members: list[tuple[int, torch.dtype]], gap: int, shift: int, random: random.Random
) -> None:
    """Many tensors share reads, whatever lies between them, and some want another dtype."""
    content = _random_bytes(100_000, torch.float32, 1)
    source = MemorySource(bytes(shift) + bytes(content.tolist()))
    found, offset = [], 0
    for count, dtype in members:
        box = Box(Extent(source, shift + offset, count * 4), 0, (count,), (1,), (0,))
        expected = content[offset : offset + count * 4].view(torch.float32)
        found.append((Copy("t", box, torch.float32, torch.zeros(count, dtype=dtype)), expected.to(dtype)))
        offset += (count + gap) * 4
    random.shuffle(found)
    run([copy for copy, _ in found])
    assert all(torch.equal(copy.target, expected) for copy, expected in found)


@given(st.data())
def test_pieces_cover_a_copy_once_and_stay_small(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    strides = data.draw(layouts(shape))
    limit, gap = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    values = torch.arange(box_end_bytes(0, shape, strides, 1) + 1)
    target = torch.full(shape, -1)
    for part, start, part_shape in pieces._split(target, shape, strides, limit, gap):
        assert box_end_bytes(0, part_shape, strides, 1) <= limit
        assert bool((part == -1).all())
        part.copy_(values.as_strided(part_shape, strides, start))
    assert torch.equal(target, values.as_strided(shape, strides))


@given(st.data())
def test_mapped_and_read_entries_are_equal(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(REAL + OTHER))
    content = _random_bytes(20_000, dtype, 2)
    with tempfile.NamedTemporaryFile() as file:
        shift = data.draw(st.integers(0, 17))
        file.write(bytes(shift) + bytes(content.tolist()))
        file.flush()
        source = FileSource(file.name)
        entries = []
        for _ in range(data.draw(st.integers(1, 4))):
            shape = data.draw(shapes)
            strides = data.draw(layouts(shape))
            start = data.draw(st.integers(0, 100)) * dtype.itemsize
            box = Box(Extent(source, shift, 20_000), start, shape, strides, (0,) * len(shape))
            entries.append(TensorEntry(dtype, shape, (box,)))
        mapped, read = map_entries(entries), read_entries(entries)
    for entry, one, other in zip(entries, mapped, read):
        assert one.shape == entry.shape
        assert one.dtype == dtype
        assert _same_bits(one, other)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_combine(first: bytes, second: bytes) -> None:
    assert combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
