"""Checkpoint trees without files: what the stages after opening are tested with."""

from __future__ import annotations

from typing import Any

import torch

from torchload.core.checkpoint import Box, Container, Extent, TensorEntry, contiguous_strides
from torchload.core.source import MemorySource
from torchload.match import Wanted


def entry(tensor: torch.Tensor) -> TensorEntry:
    """A tensor as a checkpoint holds it; its bytes lie in memory."""
    tensor = tensor.detach().contiguous()
    data = bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
    shape = tuple(tensor.shape)
    extent = Extent(MemorySource(data), 0, len(data))
    box = Box(extent, 0, shape, contiguous_strides(shape), (0,) * len(shape))
    return TensorEntry(tensor.dtype, shape, (box,))


def tree(value: Any) -> Any:
    """Ordinary Python with tensors in it, as a checkpoint's tree. Tensors that are one object stay one entry."""
    seen: dict[int, TensorEntry] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return seen.setdefault(id(value), entry(value))
        if isinstance(value, torch.nn.Module):
            return convert(dict(value.state_dict(keep_vars=True)))
        if isinstance(value, dict):
            return Container({name: convert(inner) for name, inner in value.items()}, getattr(value, "_metadata", None))
        if isinstance(value, (list, tuple)):
            return type(value)(convert(inner) for inner in value)
        return value

    return convert(value)


def wanted(model: torch.nn.Module, **changes: Any) -> Wanted:
    """A model as `select` sees it."""
    buffers = frozenset(name for name, _ in model.named_buffers(remove_duplicate=False))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Wanted(shapes, buffers=buffers, **changes)
