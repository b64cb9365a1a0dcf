"""Arguments that several of the public functions take."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

__all__ = ["check_arguments"]


def check_arguments(model: nn.Module, dtype: Any, skip: Any, keep_fp32: Any, atomic: Any) -> None:
    """Raise a `TypeError` for what no checkpoint could make right."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument is the model, an nn.Module, not {type(model).__name__}")
    if dtype not in (None, "auto") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be None, 'auto' or a floating-point torch.dtype, not {dtype!r}")
    for name, globs in (("skip", skip), ("keep_fp32", keep_fp32)):
        if isinstance(globs, str):
            raise TypeError(f"{name} is a list of globs: {name}=[{globs!r}]")
    if not isinstance(atomic, (bool, AbstractContextManager)):
        raise TypeError(f"atomic is a bool or a lock, not {type(atomic).__name__}")
