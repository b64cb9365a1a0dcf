"""The unit of work that planning hands to transfer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchload.core.checkpoint import Box

__all__ = ["Copy"]


@dataclass(slots=True, eq=False, repr=False)
class Copy:
    """Move one box to one place.

    Attributes:
        name: The model's name for the tensor, for messages.
        box: Where the data lies.
        dtype: Element type on disk.
        target: Where it goes: a tensor (or a view of one) of the box's shape, on any device, of any strides and dtype.
            Elements are cast where the dtypes differ.
    """

    name: str
    box: Box
    dtype: torch.dtype
    target: torch.Tensor
