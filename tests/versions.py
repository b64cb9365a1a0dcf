"""What the oldest supported versions of torch lack, for tests that write files or models with it."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn


def can_pickle(dtype: torch.dtype) -> bool:
    """Whether `torch.save` takes tensors of this type: before torch 2.5, not uint16 and wider."""
    try:
        torch.save(torch.zeros(1).to(dtype), io.BytesIO())
    except KeyError:
        return False
    return True


def save_folder(state: dict[str, Any], **options: Any) -> None:
    """`torch.distributed.checkpoint.save` from one process, which before torch 2.5 or so finds out by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it found out
        if "no_dist" in inspect.signature(dcp.save).parameters:
            options["no_dist"] = True
        dcp.save(state, **options)


def register_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """`register_load_state_dict_pre_hook`, which is public since torch 2.5; `hook` takes the module first."""
    if hasattr(module, "register_load_state_dict_pre_hook"):
        module.register_load_state_dict_pre_hook(hook)
    else:
        module._register_load_state_dict_pre_hook(hook, with_module=True)
