"""Fresh memory behaves as any tensor's memory does."""

from __future__ import annotations

import copy
import gc
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from torchload.transfer import allocate
from torchload.transfer.arena import ALIGNMENT_BYTES, HUGE_PAGE_BYTES, LARGE_BYTES, _pooled_bytes, _reserve

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


@pytest.mark.parametrize(
    ("conf", "expected"),
    [
        ({}, [512 << 20, 512 << 20, 100 << 20]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native,expandable_segments:True"}, []),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, []),
    ],
)
def test_how_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch, conf: dict[str, str], expected: list[int]) -> None:
    asked: list[int] = []

    def empty(nbytes: int, **_: object) -> torch.Tensor:
        asked.append(nbytes)
        return torch.zeros(0)

    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in conf.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10 << 20)
    monkeypatch.setattr("torchload.transfer.arena.torch.empty", empty)
    _reserve(1124 << 20, torch.device("cuda"))
    assert asked == expected
    asked.clear()
    _reserve(50 << 20, torch.device("cuda"))
    assert asked == [], "there is enough in stock"


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
