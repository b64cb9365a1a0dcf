"""Which part of a tensor this process holds. An ordinary tensor is held whole; a `DTensor` in part."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from torchload.index import Shape

__all__ = ["Region", "is_ordinary", "is_sharded", "local_region"]


@dataclass(frozen=True, slots=True)
class Region:
    """An axis-aligned part of a tensor: where it begins and how large it is, in elements."""

    origin: Shape
    shape: Shape


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor is certainly held whole: no subclass that could be a part of something."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over ranks (or could be): a `DTensor`."""
    dtensor = _dtensor_class()
    return dtensor is not None and isinstance(tensor, dtensor)


def local_region(tensor: torch.Tensor) -> tuple[torch.Tensor, Region]:
    """The memory of a tensor in this process, and which part of the whole it is.

    Args:
        tensor: Any dense tensor; a parameter or buffer of a model.

    Returns:
        A view without autograd history, and its region. For ``Shard``-ed or ``Replicate``-d `DTensor`s the local tensor
        and what `torch.distributed.tensor` says that it holds.

    Example:
        >>> local_region(torch.zeros(2, 3))[1]
        Region(origin=(0, 0), shape=(2, 3))
    """
    if not is_sharded(tensor):
        return tensor.detach(), Region((0,) * tensor.dim(), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    shape, origin = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    local: torch.Tensor = sharded._local_tensor.detach()
    return local, Region(tuple(origin), tuple(shape))


def _dtensor_class() -> type[torch.Tensor] | None:
    """`DTensor`, if anybody has imported it: without that no tensor can be one."""
    module = sys.modules.get("torch.distributed.tensor") or sys.modules.get("torch.distributed._tensor")
    return getattr(module, "DTensor", None)
