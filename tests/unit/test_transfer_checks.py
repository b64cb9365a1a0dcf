"""Checksums of data, and comparing tensors without loading them."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch

from torchload.core.checkpoint import Box, Extent, TensorEntry, contiguous_strides
from torchload.core.copies import Copy
from torchload.core.source import FileSource, MemorySource
from torchload.errors import CorruptCheckpointError
from torchload.transfer import checks, memory, run
from torchload.transfer.checks import not_seen_equal, same_data, verify_extents


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_intact_data_passes(tmp_path: Path, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_CHUNK_BYTES", 3000)
    data = torch.randint(0, 256, (50_000,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "f").write_bytes(data)
    source = FileSource(tmp_path / "f")
    extents = [
        Extent(source, start, size, zlib.crc32(data[start : start + size]))
        for start, size in ((0, 1), (5, 20_000), (30_000, 2999), (40_000, 0), (41_000, 6000))
    ]
    seen: list[tuple[int, int]] = []
    total = verify_extents([*extents, *extents], threads=threads, progress=lambda *state: seen.append(state))
    assert total == 29_000
    assert seen[-1] == (29_000, 29_000)


def test_damage_is_named_all_of_it() -> None:
    source = MemorySource(bytes(1000), "model.pth")
    good = Extent(source, 0, 100, zlib.crc32(bytes(100)))
    unknown = Extent(source, 0, 100)
    bad = [Extent(source, index, 50, 7) for index in range(12)]
    with pytest.raises(CorruptCheckpointError) as caught:
        verify_extents([good, unknown, *bad], names={bad[0]: "fc.weight", good: "good"})
    message = str(caught.value)
    assert "12 of its records" in message
    assert "fc.weight: CRC-32" in message
    assert "50 bytes at offset 3" in message
    assert "and 2 more" in message
    assert "good" not in message
    assert caught.value.path == "model.pth"


def test_nothing_recorded() -> None:
    assert verify_extents([Extent(MemorySource(bytes(9)), 0, 9)]) == 0


def entry(values: torch.Tensor, *, shift: int = 0, swapped: bool = False) -> TensorEntry:
    data = values.reshape(-1).view(torch.uint8)
    if swapped:
        data = data.view(-1, values.element_size()).flip(1).reshape(-1)
    extent = Extent(MemorySource(bytes(shift) + data.numpy().tobytes()), shift, data.numel(), None, swapped)
    shape = tuple(values.shape)
    return TensorEntry(values.dtype, shape, (Box(extent, 0, shape, contiguous_strides(shape), (0,) * len(shape)),))


def test_same_data() -> None:
    values = torch.randn(1000, 500)
    values[3, 4] = float("nan")
    one = entry(values)
    assert same_data(one, one)
    assert same_data(one, entry(values, shift=3))
    assert same_data(one, entry(values, swapped=True))
    other = values.clone()
    other[-1, -1] += 1
    assert not same_data(one, entry(other))
    assert not same_data(one, entry(other, swapped=True))
    assert not same_data(one, entry(values.reshape(500, 1000)))
    assert not same_data(one, entry(values.double()))
    assert same_data(entry(torch.zeros(0, 3)), entry(torch.zeros(0, 3)))


def test_same_data_in_other_strides() -> None:
    values = torch.randn(30, 20)
    transposed = entry(values.t().contiguous())
    box = transposed.boxes[0]
    turned = TensorEntry(values.dtype, (30, 20), (Box(box.extent, 0, (30, 20), (1, 30), (0, 0)),))
    assert same_data(entry(values), turned)
    assert not same_data(entry(values + 1), turned)


def test_threads_take_turns_at_a_cold_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from front to back by one of them at a time, whatever the order of the extents, and asked for early."""
    monkeypatch.setattr(checks, "_CHUNK_BYTES", 1000)
    monkeypatch.setattr(checks, "is_cold", lambda _: True)
    data = torch.randint(0, 256, (50_000,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "f").write_bytes(data)
    source = FileSource(tmp_path / "f")
    reading, positions, asked, most = [0], [], [], [0]
    real, advise = FileSource.readinto, os.posix_fadvise

    def watch(self: FileSource, offset: int, buffer: memoryview) -> None:
        reading[0] += 1
        most[0] = max(most[0], reading[0])
        positions.append(offset)
        assert asked[-1] >= min(offset + 20_000, 39_000)  # twenty chunks ahead, or all there are
        real(self, offset, buffer)
        reading[0] -= 1

    def ask(descriptor: int, offset: int, nbytes: int, advice: int) -> None:
        assert (descriptor, nbytes, advice) == (source.fd, checks._ASKED_BYTES, os.POSIX_FADV_WILLNEED)
        asked.append(offset)
        advise(descriptor, offset, nbytes, advice)

    monkeypatch.setattr(FileSource, "readinto", watch)
    monkeypatch.setattr(os, "posix_fadvise", ask, raising=False)
    monkeypatch.setattr(checks, "_ASKED_AHEAD", 20)
    extents = [Extent(source, start, 10_000, zlib.crc32(data[start:][:10_000])) for start in (30_000, 0, 20_000)]
    for threads in (1, 2, 4, None):
        positions.clear()
        asked.clear()
        assert verify_extents(extents, threads=threads) == 30_000
        assert positions == sorted(positions)
        assert asked == positions  # each of them once
    assert most == [1]


def copy_of(source: FileSource, offset: int, target: torch.Tensor, dtype: torch.dtype = torch.float32) -> Copy:
    shape = tuple(target.shape)
    extent = Extent(source, offset, target.numel() * dtype.itemsize)
    return Copy("t", Box(extent, 0, shape, contiguous_strides(shape), (0,) * len(shape)), dtype, target)


def test_what_is_not_seen_equal(tmp_path: Path) -> None:
    """One changed bit anywhere is seen, in large tensors and small; what isn't plain is never called equal."""
    sizes = [3_000_001, 5, 0, 1, 70_000, 3]
    values = [torch.randn(size) for size in sizes]
    (tmp_path / "f").write_bytes(b"".join(value.numpy().tobytes() for value in values))
    source = FileSource(tmp_path / "f")
    copies, offset = [], 0
    for value in values:
        copies.append(copy_of(source, offset, torch.zeros_like(value)))
        offset += value.nbytes
    assert [copy.target.numel() for copy in not_seen_equal(copies)] == [size for size in sizes if size]
    run(copies)
    assert not_seen_equal(copies) == []
    for copy in copies:
        for index in {0, copy.target.numel() - 1} if copy.target.numel() else ():
            bits = copy.target.view(torch.int32)
            bits[index] ^= 1
            assert not_seen_equal(copies) == [copy]
            bits[index] ^= 1
    cast, strided = copy_of(source, 0, values[0].double()), copy_of(source, 0, values[0][:100].view(10, 10).t())
    assert set(not_seen_equal([cast, *copies, strided])) == {cast, strided}


@pytest.mark.parametrize("has_library", [True, False])
def test_memory_is_compared_with_and_without_the_c_library(monkeypatch: pytest.MonkeyPatch, has_library: bool) -> None:
    if not has_library:
        monkeypatch.setattr(memory, "_library", lambda *_: None)
    one = bytearray(b"a" * (2 * memory._COMPARED_BYTES + 5))
    other = bytearray(one)
    addresses = [memory.address_of(memoryview(buffer)) for buffer in (one, other)]
    assert memory.is_same(*addresses, len(one))
    assert memory.is_same(*addresses, 0)
    other[-1] = 0
    assert not memory.is_same(*addresses, len(one))
    assert memory.is_same(*addresses, len(one) - 1)
