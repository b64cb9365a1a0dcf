"""Models whose parameters are not where their weights live: loading into them would change nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from torchload.core.text import plural
from torchload.errors import IncompatibleCheckpointError
from torchload.model.walk import paths_of

__all__ = ["elsewhere", "is_placeholder", "offloaded_values", "refusal"]

_FSDP1_CLASSES = frozenset(
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
        "fairscale.nn.data_parallel.fully_sharded_data_parallel.FullyShardedDataParallel",
        "torch_xla.distributed.fsdp.xla_fully_sharded_data_parallel.XlaFullyShardedDataParallel",
    )
)

_FSDP1 = (
    "wrapped in FullyShardedDataParallel, which keeps the weights in flat pieces of its own. Load before the model is "
    "wrapped, or use fully_shard (FSDP2), into which each process reads just its part"
)
_OFFLOADED = (
    "offloaded by accelerate: what the model shows are placeholders, and the weights live in accelerate's hooks. Load "
    "before cpu_offload, disk_offload or dispatch_model, or take the hooks off first: "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
_ZERO3 = (
    "partitioned by DeepSpeed (ZeRO 3): what the model shows are placeholders. Load before deepspeed.initialize, or "
    "inside deepspeed.zero.GatheredParameters(model.parameters(), modifier_rank=None)"
)


def elsewhere(module: nn.Module) -> str | None:
    """What a module is whose weights live elsewhere, and what to do; ``None`` for any other module.

    Example:
        >>> elsewhere(nn.Linear(2, 2)) is None
        True
    """
    if "_hf_hook" in module.__dict__ and any(map(_offloads, _hooks(module.__dict__["_hf_hook"]))):
        return _OFFLOADED
    cls: Any = type(module)
    if _is_fsdp1(cls):
        return _FSDP1
    if "deepspeed" in sys.modules and any(map(is_placeholder, module._parameters.values())):
        return _ZERO3
    return None


def is_placeholder(tensor: torch.Tensor | None) -> bool:
    """Whether a parameter's values are spread over processes by DeepSpeed (ZeRO 3), and none of them is here."""
    return hasattr(tensor, "ds_id") and tensor is not None and tensor.numel() == 0


def offloaded_values(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that accelerate keeps in its hooks, where the model shows placeholders: name, and tensor."""
    for prefix, module in paths_of(model):
        for hook in filter(_offloads, _hooks(module.__dict__.get("_hf_hook"))):
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_meta:
                        yield prefix + name, hook.weights_map[name]


@lru_cache(maxsize=512)
def _is_fsdp1(cls: Any) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" in _FSDP1_CLASSES for base in cls.__mro__)


def _hooks(hook: Any) -> Iterator[Any]:
    """A hook of accelerate's, or those that it runs one after the other."""
    yield hook
    for inner in getattr(hook, "hooks", ()):
        yield from _hooks(inner)


def _offloads(hook: Any) -> bool:
    return getattr(hook, "offload", False) is True and getattr(hook, "weights_map", None) is not None


def refusal(model: nn.Module, found: Mapping[str, list[str]]) -> IncompatibleCheckpointError:
    """The error for a model with such modules."""
    problems = []
    for what, paths in found.items():
        first = repr(paths[0]) if paths[0] else "the model"
        more = f" and {plural(len(paths) - 1, 'other module')}" if len(paths) > 1 else ""
        problems.append(f"{first}{more} {'are' if more else 'is'} {what}")
    return IncompatibleCheckpointError(
        f"This {type(model).__name__} can't be loaded into as it is: {'; '.join(problems)}.", problems=problems
    )
