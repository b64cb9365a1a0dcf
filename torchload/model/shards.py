"""Which part of a tensor this process holds. An ordinary tensor is held whole; a `DTensor` in part."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchload.core.checkpoint import Region, Shape
from torchload.model.walk import modules_of

__all__ = [
    "empty_part",
    "held_numel",
    "home_of",
    "is_hollow",
    "is_ordinary",
    "is_sharded",
    "local_region",
    "refresh_shards",
    "show_shards",
]


_KEPT_REGIONS = 1000


_regions: dict[Any, Region] = {}
_ORDINARY, _STRIDED = (torch.Tensor, torch.nn.Parameter), torch.strided  # looked up once, not for each tensor


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether a tensor is certainly held whole: no subclass that could be a part of something."""
    return type(tensor) in _ORDINARY


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over ranks (or could be): a `DTensor`."""
    if is_ordinary(tensor):  # nearly always, and quickly seen
        return False
    dtensor = _dtensor_class()
    return dtensor is not None and isinstance(tensor, dtensor)


def is_hollow(tensor: torch.Tensor) -> bool:
    """Whether a tensor claims elements where there is no memory: to read or write where it says they are is a crash.

    So do subclasses that wrap other tensors (quantized ones of torchao), fake tensors, layouts that are not strided,
    and storage that was given back (FSDP's first version). Tensors on meta, lazy and sharded ones are another matter.

    Example:
        >>> is_hollow(torch.zeros(2)), is_hollow(torch.eye(2).to_sparse())
        (False, True)
    """
    if type(tensor) in _ORDINARY and tensor.layout is _STRIDED and tensor.data_ptr():  # nearly always
        return False
    if tensor.device.type not in ("cpu", "cuda") or is_lazy(tensor) or is_sharded(tensor):
        return False
    try:
        if is_ordinary(tensor):
            return tensor.data_ptr() == 0 and tensor.numel() > 0
        storage = tensor.untyped_storage()  # a fake tensor warns of a look at its address
        return storage.device.type == "meta" or (storage.data_ptr() == 0 and tensor.numel() > 0)
    except RuntimeError:
        return True


def local_region(tensor: torch.Tensor) -> tuple[torch.Tensor, Region]:
    """The memory of a tensor in this process, and which part of the whole it is.

    Returns:
        A view without autograd history, and its region. For ``Shard``-ed or ``Replicate``-d `DTensor`s the local tensor
        and what `torch.distributed.tensor` says that it holds.

    Example:
        >>> local_region(torch.zeros(2, 3))[1]
        Region(origin=(0, 0), shape=(2, 3))
    """
    if not is_sharded(tensor):
        return tensor.detach(), Region((0,) * tensor.dim(), tuple(tensor.shape))
    sharded: Any = tensor
    local: torch.Tensor = sharded._local_tensor.detach()
    return local, _region(sharded)


def _region(sharded: Any) -> Region:
    """What `torch.distributed.tensor` says, which takes milliseconds, asked once for all tensors that are alike."""
    mesh = sharded.device_mesh
    placements = tuple((type(placement), placement) for placement in sharded.placements)  # some equal their bases
    key = (sharded.shape, tuple(mesh.shape), tuple(mesh.get_coordinate() or ()), placements)
    region = _regions.get(key)
    if region is None:
        layout = importlib.import_module(f"{_dtensor_module().__name__}._utils")
        shape, origin = layout.compute_local_shape_and_global_offset(sharded.shape, mesh, sharded.placements)
        if len(_regions) >= _KEPT_REGIONS:
            _regions.clear()
        region = _regions[key] = Region(tuple(origin), tuple(shape))
    return region


def held_numel(tensor: torch.Tensor, shape: Shape) -> int:
    """How many elements of a tensor this process holds; of a lazy one, which has no shape, as many as `shape` says."""
    return math.prod(shape if is_ordinary(tensor) or is_lazy(tensor) else local_region(tensor)[1].shape)


def empty_part(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A `DTensor` like another one, with fresh memory for this process's part of it."""
    sharded: Any = tensor
    with torch.inference_mode(False):
        local = torch.empty(sharded._local_tensor.shape, dtype=dtype, device=device)
        whole: torch.Tensor = _dtensor_module().DTensor.from_local(
            local,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        )
    return whole


def home_of(tensor: torch.Tensor) -> torch.device:
    """Where a tensor is; for a `DTensor` on the meta device, where its mesh wants it to be."""
    if not (tensor.is_meta and is_sharded(tensor)):
        return tensor.device
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    module: Any = getattr(torch, mesh.device_type, None)
    index = module.current_device() if mesh.device_type != "cpu" and hasattr(module, "current_device") else None
    return torch.device(mesh.device_type) if index is None else torch.device(mesh.device_type, index)


def show_shards(model: nn.Module) -> None:
    """Let FSDP2 put its sharded parameters back where a forward pass left whole ones, which it throws away."""
    for module in _fsdp_modules(model):
        module.reshard()


def refresh_shards(model: nn.Module) -> None:
    """Let FSDP2 take note that parameters have other memory, as it does itself in `torch.nn.Module.to_empty`."""
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        with torch.no_grad():
            for group in filter(None, groups):
                for parameter in group.fsdp_params:
                    parameter.reset_sharded_param()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    if _dtensor_class() is None:
        return []
    return [
        module for module in modules_of(model) if any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    ]


def _dtensor_class() -> type[torch.Tensor] | None:
    return getattr(_dtensor_module(), "DTensor", None)


def _dtensor_module() -> Any:
    """Where `DTensor` is, if anybody has imported it: without that no tensor can be one.

    Before torch 2.5 it is in a private package, and the public one exists without it.
    """
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        module = sys.modules.get(name)
        if hasattr(module, "DTensor"):
            return module
    return None
