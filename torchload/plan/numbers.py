"""Whole numbers that a file keeps as floats, as ``{name: tensor.half()}`` of a whole state dict does."""

from __future__ import annotations

from enum import Enum

import torch

from torchload.core.checkpoint import TensorEntry
from torchload.core.text import short_dtype
from torchload.match.tables import BENIGN_MISSING
from torchload.transfer import map_entry

__all__ = ["Verdict", "judge_numbers"]

_MOST_BYTES = 256 << 20


class Verdict(Enum):
    """What becomes of numbers in another kind of dtype."""

    LOAD = "they are whole, in range, and below what the file's dtype counts exactly"
    KEEP = "the model's own are kept: they round to the file's, or are a counter that nothing depends on"


def judge_numbers(name: str, entry: TensorEntry, tensor: torch.Tensor) -> Verdict | str:
    """Whether numbers of a file can become integers or bools without a change.

    Returns:
        A verdict, or why not, as the rest of a sentence that begins with the name.
    """
    harmless = name.rpartition(".")[2] in BENIGN_MISSING
    if entry.nbytes > _MOST_BYTES:
        return f" is {short_dtype(entry.dtype)} in the file, too much of it to be looked through for fractions"
    values = map_entry(entry)
    target = tensor.dtype
    if bool(_fits(values, target).all()):
        if not values.dtype.is_floating_point or bool((_wide(values).abs() <= _exact_below(values.dtype)).all()):
            return Verdict.LOAD
        if not tensor.is_meta and torch.equal(tensor.detach().cpu().to(values.dtype).reshape(values.shape), values):
            return Verdict.KEEP
        reason = (
            f" is {short_dtype(entry.dtype)} in the file, which can't tell whole numbers above "
            f"{_exact_below(entry.dtype):,} apart; the model has {short_dtype(target)}"
        )
    else:
        reason = (
            f" is {short_dtype(entry.dtype)} in the file, with numbers that {short_dtype(target)} in the model can't "
            "hold (fractions, or out of range)"
        )
    return Verdict.KEEP if harmless else reason


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float64)


def _fits(values: torch.Tensor, target: torch.dtype) -> torch.Tensor:
    """Where a value is one that a dtype of whole numbers has."""
    wide = _wide(values)
    if target is torch.bool:
        return (wide == 0) | (wide == 1)
    limits = torch.iinfo(target)
    return (wide == wide.trunc()) & (wide >= limits.min) & (wide <= limits.max)


def _exact_below(dtype: torch.dtype) -> int:
    """The whole number up to which a float dtype has all of them.

    Example:
        >>> [_exact_below(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
        [256, 2048, 16777216]
    """
    return int(2 / torch.finfo(dtype).eps)
