"""Notice when a finite value doesn't fit a narrower dtype: it becomes infinite (or NaN, or a bound, in some float8).

The check runs on each chunk while it is in the cache. The squares of the source, or else the sum of the result, or else
the range of the source tell almost every chunk harmless; only where all fail to is each element looked at. So the
verdict is that of the cast itself. Of large casts the squares of all blocks are added up on the way and asked once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch

from torchload.core.copies import Copy
from torchload.core.text import as_glob, listing, short_dtype
from torchload.errors import CastOverflowError

__all__ = [
    "SQUARABLE",
    "OverflowFoundError",
    "does_not_fit",
    "largest_finite",
    "limit_of",
    "out_of_range",
    "overflow_error",
    "overflows",
    "surely_fit",
]

SQUARABLE = (torch.float32, torch.float64)
"""Dtypes whose sum of squares is the cheapest to come by: for 512 KiB of float32 in the cache 7 us (BLAS), where the
sum of the result takes 11 and the range of the source 35 (Xeon, 2 MiB of L2)."""
_SUMMABLE = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose sum is cheaper than the range of what they were cast from."""


class OverflowFoundError(Exception):
    """A copy overflowed; raised by a worker, and explained once all of them have stopped.

    Attributes:
        copy: Which.
    """

    def __init__(self, copy: Copy) -> None:
        super().__init__(copy.name)
        self.copy = copy


def overflows(source: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether a finite element of `source` lies beyond the range of `result`, which was cast from it.

    Infinities and NaNs in the source are legal.

    Example:
        >>> source = torch.tensor([65519.0, float("inf")])
        >>> overflows(source, source.half())
        False
        >>> overflows(source + 1, (source + 1).half())
        True
    """
    limit = limit_of(source.dtype, result.dtype)
    if limit is None or not source.numel():
        return False
    source, result = _real_parts(source, result)
    if source.dtype in SQUARABLE and source.is_contiguous():
        values = source.view(-1)
        if surely_fit([torch.dot(values, values)], limit):
            return False
    # A sum is infinite or NaN if any element is.
    if result.dtype in _SUMMABLE and math.isfinite(result.sum().item()):
        return False
    if source.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        low, high = torch.aminmax(_computable(source))
        if -limit <= low.item() and high.item() <= limit:  # never true with a NaN
            return False
    return bool(out_of_range(source, result))


def surely_fit(squares: Iterable[torch.Tensor], limit: float) -> bool:
    """Whether sums of squares (0-dim) say that no value exceeds a limit; False where one is NaN."""
    # No square is larger than the sum of all. Half of what is allowed: torch may have been told to multiply in bfloat16
    # (`set_float32_matmul_precision`), which rounds.
    return all(total.item() <= limit * limit / 2 for total in squares)


@lru_cache(maxsize=256)
def limit_of(source: torch.dtype, result: torch.dtype) -> float | None:
    """The largest finite value of `result`, or None if no finite value of `source` exceeds it."""
    if not (result.is_floating_point or result.is_complex) or source == torch.bool:
        return None
    limit = float(torch.finfo(result).max)
    exact = source.is_floating_point or source.is_complex
    largest = float(torch.finfo(source).max if exact else torch.iinfo(source).max)
    return limit if largest > limit else None


def out_of_range(source: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The answer of `overflows` as a tensor (bool, 0-dim) on the tensors' device, by looking at each element."""
    source, result = _real_parts(source, result)
    source, lost = _computable(source), ~torch.isfinite(_computable(result))
    if result.dtype.itemsize == 1:
        lost |= source.abs() > _largest_rounded_down(result.dtype)  # some float8 casts saturate
    return (torch.isfinite(source) & lost).any()


def largest_finite(source: torch.Tensor) -> float:
    """The largest finite magnitude among the elements (of real or imaginary parts), or 0."""
    values = _real(source).to(torch.float64).abs()
    values = values[torch.isfinite(values)]
    return float(values.max()) if values.numel() else 0.0


def overflow_error(
    name: str, source: torch.dtype, target: torch.dtype, overflowing: Mapping[str, float], advice: str = "Load"
) -> CastOverflowError:
    """The error for a copy, and for all others that the load would spoil: name → largest finite magnitude."""
    others = listing((other for other in overflowing if other != name), _SHOWN)
    also = f"; nor {'does' if len(overflowing) == 2 else 'do'} {others}" if others else ""
    wider = _wider(source, max(overflowing.values()))
    advice = f"{advice} in a wider dtype ({wider}){_or_keep(source, target, overflowing)}."
    return does_not_fit(name, overflowing[name], source, target, advice, also)


def does_not_fit(
    name: str, largest: float, source: torch.dtype, target: torch.dtype, advice: str, also: str = ""
) -> CastOverflowError:
    """The error for a tensor whose largest finite magnitude becomes infinite when it is cast."""
    return CastOverflowError(
        f"{name} does not fit {short_dtype(target)}: its largest value, {largest:.6g} in {short_dtype(source)}, would "
        f"become infinite (the limit is {torch.finfo(target).max:.6g}){also}. {advice}",
        tensor=name,
        largest=largest,
        source_dtype=short_dtype(source),
        target_dtype=short_dtype(target),
    )


_SHOWN = 6
_WIDER = (torch.bfloat16, torch.float32, torch.float64)


def _wider(source: torch.dtype, largest: float) -> str:
    """Dtypes that hold a value, as a phrase."""
    if source.is_complex:
        return short_dtype(source)
    holding = [short_dtype(dtype) for dtype in _WIDER if largest <= torch.finfo(dtype).max]
    return " or ".join(holding[:2] if "float32" in holding else holding)


def _or_keep(source: torch.dtype, target: torch.dtype, overflowing: Mapping[str, float]) -> str:
    """The argument that leaves layers in float32: whole ones, for a layer computes in one dtype (or refuses to)."""
    layers = dict.fromkeys(
        f"{as_glob(module)}.*" if module else as_glob(name)
        for name in overflowing
        for module in [name.rpartition(".")[0]]
    )
    holds = max(overflowing.values()) <= torch.finfo(torch.float32).max and target is not torch.float32
    if not holds or source.is_complex or len(layers) > _SHOWN:
        return ""
    return f", or keep {'its layer' if len(layers) == 1 else 'their layers'} in float32: keep_fp32={list(layers)}"


@lru_cache(maxsize=16)
def _largest_rounded_down(dtype: torch.dtype) -> float:
    """The largest value that is as near to a dtype's last finite value as to what would come next."""
    information = torch.finfo(dtype)
    return float(information.max + information.eps / 2 * 2.0 ** math.floor(math.log2(information.max)))


def _real_parts(source: torch.Tensor, result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as real numbers, without the imaginary parts that a real source leaves 0."""
    if result.is_complex() and not source.is_complex():
        return source, result.real
    return _real(source), _real(result)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype that has operators: float8 and small unsigned integers have next to none."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return tensor.float()
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return tensor.double()
    return tensor
