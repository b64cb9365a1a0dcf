"""Quantized tensors, built as torch has them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchload.core.checkpoint import Quantized, Shape, TensorEntry

__all__ = ["quantized_tensor"]


def quantized_tensor(shape: Shape, quantized: Quantized, read: Callable[[TensorEntry], torch.Tensor]) -> torch.Tensor:
    """Build a quantized tensor on the CPU. The memory of what `read` gives for the integers becomes its own."""
    integers = read(quantized.data)
    dtype, scale, zero_point = quantized.dtype, quantized.scale, quantized.zero_point
    if isinstance(scale, TensorEntry) and isinstance(zero_point, TensorEntry):
        scales, zero_points = read(scale), read(zero_point)
        empty = torch._empty_per_channel_affine_quantized(
            shape, scales=scales, zero_points=zero_points, axis=quantized.axis or 0, dtype=dtype
        )
    else:
        empty = torch._empty_affine_quantized(shape, scale=scale, zero_point=zero_point, dtype=dtype)  # type: ignore[arg-type]
    if tuple(integers.shape) == shape:
        return empty.set_(integers.untyped_storage(), integers.storage_offset(), shape, integers.stride())
    packed = torch.empty(0, dtype=integers.dtype).set_(empty.untyped_storage())  # several elements share a byte
    packed.copy_(integers)
    return empty
