"""Fresh memory for tensors, fast to touch for the first time.

The first write to ordinary fresh memory takes a page fault per 4 KiB, which costs more than the copy itself.
Huge pages take one per 2 MiB. Large tensors get a mapping each, so that each is freed on its own; small ones share.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence

import torch

from torchload.core.checkpoint import Shape
from torchload.transfer.memory import address_of

__all__ = ["allocate", "map_memory"]

HUGE_PAGE_BYTES = 2 << 20
LARGE_BYTES = 2 * HUGE_PAGE_BYTES
"""From this size on a tensor has a mapping of its own."""
ARENA_BYTES = 32 << 20
"""Small tensors are packed into mappings of this size at most."""
ALIGNMENT_BYTES = 64

# How torch's CUDA allocator divides memory (kMinBlockSize, kSmallSize and kLargeBuffer in c10/cuda).
_CUDA_ROUNDING_BYTES = 512
_CUDA_SMALL_BYTES = 1 << 20
_WORTH_RESERVING_BYTES = 20 << 20
_BLOCK_BYTES = 512 << 20  # more might not be had in one piece, or be held back in one piece later

Request = tuple[Shape, torch.dtype]


def allocate(requests: Sequence[Request], device: torch.device) -> list[torch.Tensor]:
    """Uninitialised contiguous tensors, one for each (shape, dtype); they don't require grad.

    On the CPU each tensor has a storage of exactly its own size, like any other tensor's, except that it can't be
    resized (as with `torch.from_numpy`). A large tensor's memory is freed with it, a small one's together with its
    neighbours in the list.

    Raises:
        RuntimeError: Out of memory, as from `torch.empty`.

    Example:
        >>> [weight, bias] = allocate([((2, 3), torch.float32), ((2,), torch.float32)], torch.device("cpu"))
        >>> weight.shape, bias.untyped_storage().nbytes()
        (torch.Size([2, 3]), 8)
    """
    # Ordinary tensors even under `inference_mode`: they become a model's parameters and outlive it.
    with torch.inference_mode(False):
        if device.type == "cuda":
            return _allocate_in_blocks(requests, device)
        if device.type != "cpu":
            return [_empty(request, device) for request in requests]
        tensors: list[torch.Tensor | None] = [None] * len(requests)
        for members, size_bytes in _layout(requests):
            buffer = map_memory(size_bytes) if size_bytes >= HUGE_PAGE_BYTES else None
            for index, offset_bytes in members:
                request = requests[index]
                tensors[index] = _empty(request, device) if buffer is None else _carve(buffer, offset_bytes, request)
        return [
            _empty(request, device) if tensor is None else tensor
            for tensor, request in zip(tensors, requests, strict=True)
        ]


def _allocate_in_blocks(requests: Sequence[Request], device: torch.device) -> list[torch.Tensor]:
    """Tensors on a GPU, for which torch's allocator asks the driver for large blocks and hands them out in pieces.

    Each request to the driver takes a tenth of a millisecond and more. Segments that can grow need no such help. Each
    block is used up before the next is asked for, so that nothing is held that no tensor needs.
    """
    in_stock = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    tensors: list[torch.Tensor] = []
    for members in _blocks(requests):
        nbytes = sum(map(_pooled_bytes, members))
        if nbytes <= in_stock:
            in_stock -= nbytes
        elif nbytes >= _WORTH_RESERVING_BYTES and len(members) > 1 and not _has_growing_segments():
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                torch.empty(nbytes, dtype=torch.uint8, device=device)
        tensors += [_empty(request, device) for request in members]
    return tensors


def _blocks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Neighbours that fit into one block together; a tensor that is larger has one of its own."""
    members: list[Request] = []
    used_bytes = 0
    for request in requests:
        nbytes = _pooled_bytes(request)
        if members and used_bytes + nbytes > _BLOCK_BYTES:
            yield members
            members, used_bytes = [], 0
        members.append(request)
        used_bytes += nbytes
    yield members


def _has_growing_segments() -> bool:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:True" in os.environ.get(name, "") for name in names)


def _pooled_bytes(request: Request) -> int:
    """What a tensor takes of the pool from which torch's CUDA allocator serves all but small tensors."""
    shape, dtype = request
    nbytes = math.prod(shape) * dtype.itemsize
    return -(-nbytes // _CUDA_ROUNDING_BYTES) * _CUDA_ROUNDING_BYTES if nbytes > _CUDA_SMALL_BYTES else 0


def _layout(requests: Sequence[Request]) -> list[tuple[list[tuple[int, int]], int]]:
    """Mappings to make: the (request index, offset in bytes) pairs inside each, and its size in bytes."""
    mappings: list[tuple[list[tuple[int, int]], int]] = []
    members: list[tuple[int, int]] = []
    used_bytes = 0
    for index, (shape, dtype) in enumerate(requests):
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes >= LARGE_BYTES:
            mappings.append(([(index, 0)], nbytes))
            continue
        if used_bytes + nbytes > ARENA_BYTES:
            mappings.append((members, used_bytes))
            members, used_bytes = [], 0
        if nbytes:
            members.append((index, used_bytes))
            used_bytes += -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    mappings.append((members, used_bytes))
    return mappings


def map_memory(nbytes: int) -> memoryview | None:
    """Private anonymous memory that begins on a huge page, or None where the system refuses."""
    try:
        mapping = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, AttributeError):  # the last where there is no such memory: Windows
        return None
    start = -address_of(mapping) % HUGE_PAGE_BYTES
    # Only whole huge pages: one that reached beyond the tensor would be memory that nobody asked for.
    with contextlib.suppress(OSError, AttributeError):
        mapping.madvise(mmap.MADV_HUGEPAGE, start, nbytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
    return memoryview(mapping)[start : start + nbytes]


def _carve(buffer: memoryview, offset_bytes: int, request: Request) -> torch.Tensor:
    shape, dtype = request
    # `resize_` gives the shape in place: a `view` would leave a tensor that has a base.
    return torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=offset_bytes).resize_(shape)


def _empty(request: Request, device: torch.device) -> torch.Tensor:
    shape, dtype = request
    return torch.empty(shape, dtype=dtype, device=device)
