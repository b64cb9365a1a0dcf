"""Slices of one tensor in several safetensors files.

`torch.distributed.checkpoint.HuggingFaceStorageWriter` lets each rank write a file of its own: the same names in every
file, each with the part of the tensor that the rank holds. Where a part begins stands in the file's metadata. Each
slice becomes a `Box` of one `TensorEntry`.
"""

from __future__ import annotations

import math
from typing import Any

from torchload.core.checkpoint import Box, Checkpoint, Shape, TensorEntry
from torchload.errors import CorruptCheckpointError
from torchload.formats.json_text import parse_object

__all__ = ["assemble", "slice_origins"]

_SLICES_KEY = "DCP_SHARDING_INFO"  # in a safetensors header: tensor name → {"saved_offsets": origin of the slice}


def slice_origins(shard: Checkpoint) -> dict[str, Shape]:
    """Tensor name → origin of the slice that this file holds, where its header says so.

    Raises:
        CorruptCheckpointError: The header's record of slices can't be read.
    """
    text = shard.metadata.get(_SLICES_KEY)
    if text is None:
        return {}
    info = parse_object(text.encode(), f"metadata {_SLICES_KEY}", shard.path)
    origins: dict[str, Shape] = {}
    for name, fields in info.items():
        offsets = fields.get("saved_offsets") if isinstance(fields, dict) else None
        if not isinstance(offsets, list) or not all(type(offset) is int and offset >= 0 for offset in offsets):
            raise CorruptCheckpointError(
                f"The metadata {_SLICES_KEY} of {shard.path} is invalid at tensor {name!r}.", path=shard.path
            )
        origins[name] = tuple(offsets)
    return origins


def assemble(key: Any, parts: list[Any], origins: list[Shape], path: str) -> TensorEntry:
    """Make one entry of the slices of a tensor.

    Args:
        key: The tensor's name, for messages.
        parts: Its entries, one for each file that has a slice.
        origins: Position of each slice's first element in the whole tensor.
        path: The set of files, for messages.

    Returns:
        An entry of several boxes, which together cover the tensor exactly once.

    Raises:
        CorruptCheckpointError: The slices overlap, leave a hole, or differ in dtype or number of dimensions.
    """

    def refuse(problem: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"The slices of tensor {key!r} in the shards of {path} do not fit together: {problem}.", path=path
        )

    first = parts[0]
    for part, origin in zip(parts, origins):
        if not isinstance(part, TensorEntry) or part.dtype != first.dtype:
            raise refuse("they differ in dtype")
        if len(part.shape) != len(origin) or len(part.shape) != len(first.shape):
            raise refuse("they differ in the number of dimensions")
    ends = [tuple(start + size for start, size in zip(origin, part.shape)) for origin, part in zip(origins, parts)]
    shape = tuple(max(sizes) for sizes in zip(*ends))
    if math.prod(size or 1 for size in shape) >= 2**63:
        raise refuse("together they are larger than any tensor can be")
    whole = TensorEntry(first.dtype, shape, ())
    # Equal regions are copies of one slice (replicas), where the first one serves.
    regions: dict[tuple[Shape, Shape], Any] = {}
    for part, origin, end in zip(parts, origins, ends):
        regions.setdefault((origin, end), part)
    covered = sum(part.numel for part in regions.values())
    if covered != whole.numel:
        problem = "overlap" if covered > whole.numel else "leave a hole; a shard may be missing"
        raise refuse(f"they cover {covered:,} elements of {list(shape)} ({whole.numel:,}), so they {problem}")
    if _any_overlap([region for region, part in regions.items() if part.numel]):
        raise refuse("some of them overlap")
    boxes = tuple(
        Box(box.extent, box.start, box.shape, box.strides, origin)
        for (origin, _), part in regions.items()
        for box in part.boxes
    )
    return TensorEntry(first.dtype, shape, boxes)


def _any_overlap(regions: list[tuple[Shape, Shape]]) -> bool:
    """Whether two of the half-open regions (start, end) share an element: a sweep along the first dimension."""
    active: list[tuple[Shape, Shape]] = []
    for start, end in sorted(regions):
        active = [other for other in active if other[1][0] > start[0]]
        for other_start, other_end in active:
            if all(a < d and c < b for a, b, c, d in zip(start, end, other_start, other_end)):
                return True
        active.append((start, end))
    return False
