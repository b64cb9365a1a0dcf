"""Tensors that torch conjugates or negates when it must: what lies in the file is not yet what they show."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from torchload.core.checkpoint import Extent, OpaqueTensor, TensorEntry, box_end_bytes
from torchload.core.source import UnpackedSource

if TYPE_CHECKING:
    from torchload.formats.pickles.walk import Walk

__all__ = ["resolved"]


def resolved(walk: Walk, entry: Any, metadata: Any) -> Any:
    """A tensor as what `torch.save` noted beside it says that it is (``conj``, ``neg``); worked out when first read."""
    flags = [flag for flag in ("conj", "neg") if isinstance(metadata, dict) and metadata.get(flag) is True]
    if not flags or type(entry) is not TensorEntry or not entry.boxes:
        return entry
    try:
        _as_flagged(torch.zeros(1, dtype=entry.dtype), flags)
    except RuntimeError:
        return OpaqueTensor(f"a lazily negated tensor of {entry.dtype}, which torch can't negate", entry.shape)
    (box,) = entry.boxes
    size = box_end_bytes(0, entry.shape, box.strides, entry.dtype.itemsize)

    def work_out() -> bytearray:
        walk.budget.spend(size + entry.nbytes, walk.name)
        data, result = bytearray(size), bytearray(entry.nbytes)
        box.extent.source.readinto(box.extent.offset + box.start, memoryview(data))
        if box.extent.big_endian != (sys.byteorder == "big"):
            part = entry.dtype.itemsize // (2 if entry.dtype.is_complex else 1)
            data[:] = b"".join(data[start : start + part][::-1] for start in range(0, size, part))
        tensor = torch.frombuffer(data, dtype=entry.dtype).as_strided(entry.shape, box.strides)
        torch.frombuffer(result, dtype=entry.dtype).view(entry.shape).copy_(_as_flagged(tensor, flags))
        return result

    source = UnpackedSource(work_out, entry.nbytes, walk.name, walk.budget)
    extent = Extent(source, 0, entry.nbytes, big_endian=sys.byteorder == "big")
    return TensorEntry.over(extent, entry.dtype, entry.shape)


def _as_flagged(tensor: torch.Tensor, flags: list[str]) -> torch.Tensor:
    tensor = tensor.conj() if "conj" in flags else tensor
    return tensor.neg() if "neg" in flags else tensor
