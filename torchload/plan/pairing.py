"""From a tensor in a file and memory for it to copies: boxes on disk meet the region that this process holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchload.core.checkpoint import Box, Region, Shape, TensorEntry
from torchload.core.copies import Copy
from torchload.model.shards import is_ordinary, local_region

__all__ = ["copies_of"]


def copies_of(name: str, entry: TensorEntry, memory: torch.Tensor) -> Sequence[Copy]:
    """The copies that fill a whole tensor: one as a rule, several where the file or the tensor is sharded."""
    if len(entry.boxes) == 1 and entry.boxes[0].shape == memory.shape and is_ordinary(memory):
        return (Copy(name, entry.boxes[0], entry.dtype, memory),)
    local, region = local_region(memory)
    if region.shape == () and entry.shape == (1,):  # a scalar that was saved as one element
        local, region = local.view(1), Region((0,), (1,))
    copies = []
    for box in entry.boxes:
        if (part := _intersection(box, region, entry.dtype.itemsize)) is not None:
            piece, where = part
            view = local
            for dimension, (start, size) in enumerate(zip(where, piece.shape)):
                view = view.narrow(dimension, start, size)
            copies.append(Copy(name, piece, entry.dtype, view))
    return copies


def _intersection(box: Box, region: Region, itemsize: int) -> tuple[Box, Shape] | None:
    """The part of a box that lies in a region, and where in the region it begins."""
    begin = tuple(map(max, box.origin, region.origin))
    end = tuple(min(b + bs, r + rs) for b, bs, r, rs in zip(box.origin, box.shape, region.origin, region.shape))
    shape = tuple(e - b for b, e in zip(begin, end))
    if any(size <= 0 for size in shape):
        return None
    skipped = sum((b - o) * stride for b, o, stride in zip(begin, box.origin, box.strides))
    piece = Box(box.extent, box.start + skipped * itemsize, shape, box.strides, begin)
    return piece, tuple(b - r for b, r in zip(begin, region.origin))
