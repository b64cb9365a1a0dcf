"""The tensors of a checkpoint's tree, read the plain way: every box by itself, straight from its source."""

from __future__ import annotations

from typing import Any

import torch

from torchload.core.checkpoint import Box, TensorEntry
from torchload.formats import open_checkpoint

__all__ = ["read_tensor", "read_tree", "same_bits"]


def read_tree(path: Any) -> Any:
    """Everything in a checkpoint, with tensors for entries."""
    with open_checkpoint(path) as checkpoint:
        return _read(checkpoint.root)


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor that an entry stands for, dense."""
    tensor = torch.zeros(entry.shape, dtype=entry.dtype)
    for box in entry.boxes:
        region = tensor[tuple(slice(first, first + size) for first, size in zip(box.origin, box.shape))]
        region.copy_(_read_box(box, entry.dtype))
    return tensor


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.numel():
        return True
    first, second = (
        tensor.detach().contiguous().resolve_conj().reshape(-1).view(torch.uint8) for tensor in (one, other)
    )
    return torch.equal(first, second)


def _read_box(box: Box, dtype: torch.dtype) -> torch.Tensor:
    data = bytearray(box.extent.source.read(box.extent.offset, box.extent.nbytes))
    if box.extent.big_endian:
        width = dtype.itemsize // (2 if dtype.is_complex else 1)
        for start in range(box.start, len(data) - width + 1, width):
            data[start : start + width] = data[start : start + width][::-1]
    usable = len(data) - box.start - (len(data) - box.start) % dtype.itemsize
    flat = torch.frombuffer(data, dtype=dtype, offset=box.start, count=usable // dtype.itemsize)
    return flat.as_strided(box.shape, box.strides)


def _read(value: Any) -> Any:
    if isinstance(value, TensorEntry):
        return read_tensor(value)
    if isinstance(value, dict):
        return {key: _read(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_read(inner) for inner in value)
    return value
