"""Which dtype a tensor gets, and which casts keep what its numbers mean: one rule for loading, reading and saving."""

from __future__ import annotations

from typing import Literal

import torch

from torchload.core.text import short_dtype

__all__ = ["DtypeSpec", "final_dtype", "impossible_cast"]

DtypeSpec = torch.dtype | Literal["auto"] | None


def final_dtype(
    now: torch.dtype, wish: DtypeSpec, *, stored: torch.dtype | None = None, keeps_fp32: bool = False
) -> torch.dtype:
    """The dtype that a tensor gets. Only floating dtypes ever change.

    Args:
        now: The dtype that it has.
        wish: Floating dtype to cast to; ``"auto"`` takes the stored one, ``None`` leaves it.
        stored: What the file holds for it, if it holds anything.
        keeps_fp32: Whether the caller wants it in float32, whatever the rest becomes.

    Example:
        >>> final_dtype(torch.float32, torch.float16), final_dtype(torch.int64, torch.float16)
        (torch.float16, torch.int64)
        >>> final_dtype(torch.float32, "auto", stored=torch.bfloat16)
        torch.bfloat16
    """
    if not now.is_floating_point:
        return now
    if keeps_fp32:
        return torch.float32
    if wish == "auto":
        return stored if stored is not None and stored.is_floating_point else now
    return wish or now


def impossible_cast(source: torch.dtype, target: torch.dtype) -> str | None:
    """Why a cast would lose what the numbers mean; ``None`` where it is sound.

    Example:
        >>> impossible_cast(torch.float32, torch.int64)
        'float32 in the file would lose its fractions in int64'
    """
    if source is target or target.is_complex or (target.is_floating_point and not source.is_complex):
        return None
    if source.is_complex:
        return f"{short_dtype(source)} in the file would lose its imaginary part in {short_dtype(target)}"
    if source.is_floating_point:
        return f"{short_dtype(source)} in the file would lose its fractions in {short_dtype(target)}"
    if torch.bool in (source, target):
        # Masks were uint8 before torch 1.2 had bool.
        same_size = source.itemsize == target.itemsize
        return None if same_size else f"{short_dtype(source)} can't become {short_dtype(target)}"
    if torch.iinfo(source).min < torch.iinfo(target).min or torch.iinfo(source).max > torch.iinfo(target).max:
        return f"{short_dtype(source)} in the file does not fit into {short_dtype(target)}"
    return None
