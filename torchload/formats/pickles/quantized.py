"""Quantized tensors: what stands beside their integers in a file, checked as torch would use it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchload.core.checkpoint import Extent, OpaqueTensor, Quantized, Shape, TensorEntry
from torchload.core.source import MemorySource

if TYPE_CHECKING:
    from torchload.formats.pickles.walk import Walk

__all__ = ["INTEGERS", "quantized"]

# Quantized dtype → the plain dtype of its integers, and how many of them share one element of that.
INTEGERS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    getattr(torch, name): (integers, count)
    for name, integers, count in (
        ("qint8", torch.int8, 1),
        ("quint8", torch.uint8, 1),
        ("qint32", torch.int32, 1),
        ("quint4x2", torch.uint8, 2),
        ("quint2x4", torch.uint8, 4),
    )
    if hasattr(torch, name)
}

# Scheme with a scale for each position → dtypes of scales and zero points in old files, which have lists of numbers.
# In tensors, zero points may be floating whatever the scheme is called; torch goes by their dtype.
_PER_CHANNEL = {
    "torch.per_channel_affine": (torch.float64, torch.int64),
    "torch.per_channel_affine_float_qparams": (torch.float32, torch.float32),
}
_REAL = frozenset((torch.float32, torch.float64))
_WHOLE = frozenset((torch.int32, torch.int64))
_LETTERS = {torch.float64: "d", torch.float32: "f", torch.int64: "q"}  # of the array module


def quantized(walk: Walk, dtype: torch.dtype, shape: Shape, data: Any, quantizer: Any) -> OpaqueTensor:
    """A quantized tensor over integers that were checked, with the scales that `quantizer` has as torch records it."""
    if data.is_expanded:  # torch would need memory for all of it
        return OpaqueTensor("a quantized tensor", shape)
    scheme = getattr(quantizer[0], "qualified", "")
    if scheme == "torch.per_tensor_affine":
        _, scale, zero_point = quantizer
        if type(scale) is not float or type(zero_point) is not int or not -(1 << 31) <= zero_point < 1 << 31:
            walk.fail("has a malformed quantization scale or zero point")
        return OpaqueTensor("a quantized tensor", shape, quantized=Quantized(dtype, data, scale, zero_point))
    if scheme not in _PER_CHANNEL:
        return OpaqueTensor("a quantized tensor", shape)
    _, scales, zero_points, axis = quantizer
    if type(axis) is not int or not 0 <= axis < len(shape):
        walk.fail("is quantized along a dimension that it does not have")
    real, whole = _PER_CHANNEL[scheme]
    scale, zero_point = _numbers(walk, scales, real), _numbers(walk, zero_points, whole)
    if not scale.shape == zero_point.shape == (shape[axis],):
        walk.fail("is quantized by scales or zero points that don't belong to its shape")
    if scale.dtype not in _REAL or zero_point.dtype not in _REAL | _WHOLE:
        walk.fail("has quantization scales or zero points of an impossible dtype")
    return OpaqueTensor("a quantized tensor", shape, quantized=Quantized(dtype, data, scale, zero_point, axis))


def _numbers(walk: Walk, value: Any, dtype: torch.dtype) -> TensorEntry:
    """One number for each position: a tensor, or a list as older versions of torch wrote it."""
    value = walk.value(value)
    if type(value) is TensorEntry:
        if value.is_expanded:
            walk.fail("is quantized by expanded scales or zero points")
        return value
    numbers: Sequence[Any] = walk.allow(value)
    data = array(_LETTERS[dtype], numbers).tobytes()
    return TensorEntry.over(Extent(MemorySource(data, walk.name, walk.budget), 0, len(data)), dtype, (len(numbers),))
