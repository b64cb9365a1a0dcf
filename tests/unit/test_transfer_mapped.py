"""Mapped tensors: views of the file that are private, safe to keep, and copied where they can't be mapped."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from torchload.core.checkpoint import Box, Extent, TensorEntry, contiguous_strides
from torchload.core.source import FileSource, MemorySource, Source
from torchload.errors import CorruptCheckpointError
from torchload.transfer import map_entries, map_entry, read_entries

VALUES = torch.arange(20_000, dtype=torch.float32)


def source_of(path: Path, data: bytes) -> FileSource:
    path.write_bytes(data)
    return FileSource(path)


def entry_of(
    source: Source,
    shape: tuple[int, ...],
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
    swapped: bool = False,
) -> TensorEntry:
    extent = Extent(source, 0, source.size, None, swapped)
    box = Box(extent, offset, shape, strides or contiguous_strides(shape), (0,) * len(shape))
    return TensorEntry(torch.float32, shape, (box,))


def is_mapped(tensor: torch.Tensor, path: str) -> bool:
    """Whether a tensor's memory belongs to a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(path)
    return False


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_proc
def test_mapped_without_a_copy(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes())
    tensor = map_entry(entry_of(source, (100, 200)))
    assert is_mapped(tensor, source.name)
    assert torch.equal(tensor, VALUES.reshape(100, 200))
    assert tensor._base is None
    assert tensor.untyped_storage().nbytes() == VALUES.nbytes


@needs_proc
def test_one_mapping_for_all_that_outlives_the_source(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes())
    before = len(os.listdir("/proc/self/fd"))
    tensors = map_entries([entry_of(source, (10,), offset=40 * index) for index in range(500)])
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    source.close()
    os.unlink(source.name)
    del source
    gc.collect()
    assert torch.equal(torch.cat(tensors), VALUES[:5000])
    last = tensors.pop()
    tensors.clear()
    gc.collect()
    assert torch.equal(last, VALUES[4990:5000])
    del last
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_writes_stay_private(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes())
    one, other = map_entry(entry_of(source, (20_000,))), map_entry(entry_of(source, (20_000,)))
    one.zero_()
    assert torch.equal(other, VALUES)
    assert Path(source.name).read_bytes() == VALUES.numpy().tobytes()


def test_entries_that_overlap_do_not_share_memory(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes())
    entries = [
        entry_of(source, (100,)),
        entry_of(source, (100,), offset=200),
        entry_of(source, (100,)),
        entry_of(source, (5,)),
    ]
    tensors = map_entries(entries)
    for tensor in tensors:
        tensor += 1
    for tensor, entry in zip(tensors, entries):
        first = entry.boxes[0].start // 4
        assert torch.equal(tensor, VALUES[first : first + entry.numel] + 1)


@needs_proc
def test_strided_and_unaligned(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes() + b"x" + VALUES.numpy().tobytes())
    transposed = entry_of(source, (200, 100), strides=(1, 200))
    unaligned = entry_of(source, (20_000,), offset=VALUES.nbytes + 1)
    expanded = entry_of(source, (3, 4), strides=(0, 1), offset=VALUES.nbytes - 16)
    one, other, third = map_entries([transposed, unaligned, expanded])
    assert torch.equal(one, VALUES.reshape(100, 200).t())
    assert is_mapped(one, source.name)
    assert torch.equal(other, VALUES)
    assert not is_mapped(other, source.name)
    assert torch.equal(third, VALUES[-4:].expand(3, 4))


@needs_proc
def test_a_file_larger_than_memory_is_mapped_without_being_read(tmp_path: Path) -> None:
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open(tmp_path / "f", "wb") as file:  # a hole: it takes no room on the disk
        file.truncate(size)
    source = FileSource(tmp_path / "f")

    def resident_kib() -> int:
        [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1])

    before = resident_kib()
    whole = map_entry(entry_of(source, (size // 4,)))
    assert is_mapped(whole, source.name)
    assert whole[-1] == 0
    assert resident_kib() - before < 1 << 18


def test_other_byte_order_and_memory() -> None:
    swapped = VALUES.view(torch.uint8).view(-1, 4).flip(1).numpy().tobytes()
    one = map_entry(entry_of(MemorySource(swapped), (20_000,), swapped=True))
    other = map_entry(entry_of(MemorySource(VALUES.numpy().tobytes()), (20_000,)))
    assert torch.equal(one, VALUES)
    assert torch.equal(other, VALUES)


def test_several_boxes_are_put_together(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes())
    extent = Extent(source, 0, source.size)
    boxes = (
        Box(extent, 0, (2, 3), (3, 1), (0, 0)),
        Box(extent, 100, (2, 2), (2, 1), (0, 3)),
        Box(extent, 200, (1, 5), (5, 1), (2, 0)),
    )
    entry = TensorEntry(torch.float32, (3, 5), boxes)
    [tensor] = read_entries([entry])
    assert tensor.tolist() == [[0, 1, 2, 25, 26], [3, 4, 5, 27, 28], [50, 51, 52, 53, 54]]
    assert torch.equal(map_entry(entry), tensor)


def test_nothing_in_it(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", b"")
    assert map_entry(entry_of(source, (3, 0))).shape == (3, 0)
    assert map_entry(TensorEntry(torch.int8, (0,), ())).dtype == torch.int8


def test_slices_of_a_file(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", bytes(8) + VALUES.numpy().tobytes()).slice(8, VALUES.nbytes)
    assert torch.equal(map_entry(entry_of(source, (200,), offset=400)), VALUES[100:300])


def test_a_file_that_was_changed(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes())
    os.truncate(source.name, 100)
    with pytest.raises(CorruptCheckpointError, match="changed since it was opened"):
        map_entry(entry_of(source, (20_000,)))


def test_ordinary_tensors_in_any_mode(tmp_path: Path) -> None:
    source = source_of(tmp_path / "f", VALUES.numpy().tobytes())
    with torch.inference_mode(), torch.device("meta"):
        tensors = [map_entry(entry_of(source, (200,))), *read_entries([entry_of(source, (200,))])]
    for tensor in tensors:
        assert not tensor.is_inference()
        assert torch.equal(tensor, VALUES[:200])
