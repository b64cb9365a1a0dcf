"""Fresh memory behaves as any tensor's memory does."""

from __future__ import annotations

import copy
import gc
import io
import re
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from torchload.transfer import allocate
from torchload.transfer.arena import ALIGNMENT_BYTES, HUGE_PAGE_BYTES, LARGE_BYTES, _pooled_bytes

CPU = torch.device("cpu")
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip
FILLER = ((HUGE_PAGE_BYTES,), torch.uint8)
"""Enough beside a small tensor that memory is mapped for them."""


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7), (2, 3, 4)], ids=str)
def test_any_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _, tensor = allocate([FILLER, (shape, dtype)], CPU)
    assert tensor.dtype == dtype
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    assert tensor.storage_offset() == 0
    assert tensor.untyped_storage().nbytes() == tensor.numel() * dtype.itemsize
    assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
    assert not tensor.requires_grad
    assert tensor._base is None
    ones = torch.ones(shape).to(dtype)
    tensor.copy_(ones)
    if tensor.numel():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), ones.reshape(-1).view(torch.uint8))


def test_neighbours_do_not_overlap() -> None:
    tensors = allocate([((1000 + index,), torch.float32) for index in range(3000)], CPU)
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert all(bool((tensor == index).all()) for index, tensor in enumerate(tensors))


def test_large_tensors_begin_on_a_huge_page() -> None:
    tensors = allocate([((LARGE_BYTES + 12,), torch.uint8), ((LARGE_BYTES,), torch.float32)], CPU)
    assert [tensor.data_ptr() % HUGE_PAGE_BYTES for tensor in tensors] == [0, 0]


def test_nothing_requested() -> None:
    assert allocate([], CPU) == []


def test_other_devices() -> None:
    [tensor] = allocate([((2, 3), torch.float16)], torch.device("meta"))
    assert tensor.is_meta
    assert tensor.shape == (2, 3)


@pytest.mark.parametrize("size", [10, LARGE_BYTES])
def test_ordinary_in_every_way(size: int) -> None:
    _, tensor = allocate([FILLER, ((size,), torch.float32)], CPU)
    tensor.copy_(torch.arange(size))
    expected = torch.arange(size, dtype=torch.float32)

    assert torch.equal(copy.deepcopy(tensor), expected)
    file = io.BytesIO()
    torch.save(tensor, file)
    assert len(file.getvalue()) < size * 4 + 5000  # and not its neighbours
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), expected)

    parameter = torch.nn.Parameter(tensor)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.sum().backward()
    optimizer.step()
    assert torch.equal(parameter.detach(), expected - 1)
    assert parameter.data_ptr() == tensor.data_ptr()

    address = tensor.data_ptr()
    tensor.share_memory_()
    assert tensor.is_shared()
    assert tensor.data_ptr() != address
    assert torch.equal(tensor, expected - 1)
    tensor.resize_(size // 2)
    assert tensor.shape == (size // 2,)


def test_ordinary_tensors_even_in_inference_mode() -> None:
    with torch.inference_mode():
        tensors = allocate([FILLER, ((3,), torch.float32), ((LARGE_BYTES,), torch.uint8)], CPU)
    assert not any(tensor.is_inference() for tensor in tensors)


def test_default_device_and_dtype_change_nothing() -> None:
    with torch.device("meta"):
        tensors = allocate([FILLER, ((3,), torch.float32), ((0,), torch.int8)], CPU)
    assert [tensor.device.type for tensor in tensors] == ["cpu"] * 3
    assert tensors[1].dtype == torch.float32


def _anonymous_bytes() -> int:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_freed_and_no_more_than_asked_for() -> None:
    gc.collect()
    before = _anonymous_bytes()
    # A little more than a whole number of huge pages each: the rest must not take a huge page of its own.
    size = LARGE_BYTES + 4096
    tensors = [tensor.fill_(1) for tensor in allocate([((size,), torch.uint8)] * 12, CPU)]
    assert 12 * size * 0.9 < _anonymous_bytes() - before < 12 * size + (6 << 20)
    del tensors[6:]  # each on its own
    assert _anonymous_bytes() - before < 6 * size + (6 << 20)
    tensors.clear()
    small = [tensor.fill_(1) for tensor in allocate([((1 << 20,), torch.uint8)] * 40, CPU)]
    assert 38 << 20 < _anonymous_bytes() - before < 46 << 20
    del small
    assert _anonymous_bytes() - before < 6 << 20


def test_what_a_gpu_reserves_for_a_tensor() -> None:
    """Small tensors come from a pool of their own; others in steps of 512 bytes."""
    assert _pooled_bytes(((1 << 20,), torch.uint8)) == 0
    assert _pooled_bytes((((1 << 20) + 1,), torch.uint8)) == (1 << 20) + 512
    assert _pooled_bytes(((1 << 10, 1 << 10), torch.float32)) == 1 << 22
    assert _pooled_bytes(((0, 1 << 30), torch.float32)) == 0


class FakeGpu:
    """torch's CUDA allocator: the smallest free block that is large enough, cut; else a new one from the driver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.segments: list[list[Block]] = []
        self._empty = torch.empty
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: sum(self.asked))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        monkeypatch.setattr("torchload.transfer.arena.torch.empty", self.empty)
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            monkeypatch.delenv(name, raising=False)

    @property
    def allocated(self) -> int:
        return sum(block.size for segment in self.segments for block in segment if not block.is_free)

    def empty(self, shape: tuple[int, ...] | int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        shape = (shape,) if isinstance(shape, int) else shape
        tensor = self._empty(shape, dtype=dtype, device="meta")
        if nbytes := _pooled_bytes((shape, dtype)):
            weakref.finalize(tensor, self._give_back, *self._take(nbytes))
        return tensor

    def _take(self, nbytes: int) -> tuple[list[Block], Block]:
        fitting = [(b.size, n, s) for s in self.segments for n, b in enumerate(s) if b.is_free and b.size >= nbytes]
        if not fitting:
            self.asked.append(nbytes)
            self.segments.append([Block(nbytes)])
            fitting = [(nbytes, 0, self.segments[-1])]
        size, number, segment = min(fitting, key=lambda one: one[0])
        segment[number : number + 1] = [Block(nbytes, is_free=False), Block(size - nbytes)]
        return segment, segment[number]

    @staticmethod
    def _give_back(segment: list[Block], block: Block) -> None:
        block.is_free = True
        merged = [Block(0)]
        for one in segment:
            if one.is_free and merged[-1].is_free:
                merged[-1].size += one.size
            else:
                merged.append(one)
        segment[:] = merged


@dataclass(eq=False)
class Block:
    size: int
    is_free: bool = True


@pytest.mark.parametrize(
    ("sizes", "most"),
    [
        ([4] * 281, 3),
        ([600, 2, 600, 3], 4),
        ([300] * 10, 10),
        ([300, 200, 250, 200] * 3, 6),
        ([1002, *[112, 112, 112, 32, 32, 8, 8] * 8, 1002], 10),
        ([0, 1] * 50, 0),
    ],
)
def test_a_gpu_holds_no_more_than_the_tensors_need(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], most: int
) -> None:
    gpu = FakeGpu(monkeypatch)
    tensors = allocate([((size << 20,), torch.uint8) for size in sizes], torch.device("cuda"))
    assert [tensor.numel() >> 20 for tensor in tensors] == sizes
    assert sum(gpu.asked) == gpu.allocated == sum(size << 20 for size in sizes if size > 1)
    assert len(gpu.asked) <= most
    del tensors
    allocate([((size << 20,), torch.uint8) for size in sizes if size < 300], torch.device("cuda"))
    assert len(gpu.asked) <= most, "there is enough in stock"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_that_grow_need_no_help(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setenv(name, "backend:native,expandable_segments:True")
    tensors = allocate([((40 << 20,), torch.uint8)] * 3, torch.device("cuda"))
    assert gpu.asked == [tensor.numel() for tensor in tensors]


@pytest.mark.gpu
def test_a_gpu_is_asked_once() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats(device).get("num_device_alloc", 0)
    requests = [((2 << 20,), torch.float16)] * 40
    tensors = allocate(requests, device)
    assert torch.cuda.memory_stats(device).get("num_device_alloc", 0) == before + 1
    assert len({tensor.data_ptr() for tensor in tensors}) == 40
    assert torch.cuda.memory_allocated(device) >= 40 * (4 << 20)
