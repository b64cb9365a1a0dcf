"""What the laws of loading compare: every bit of a model's state, and what must stay the same object."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill all tensors of a model with values that no initialisation gives, ties kept."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in {id(value): value for value in [*model.parameters(), *model.buffers()]}.values():
            if is_lazy(tensor) or tensor.is_meta:
                continue
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.dtype is torch.bool:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) < 0.5)
            else:
                tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator))
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every tensor of a model and its extra state, copied; transient buffers among them."""
    values: dict[str, Any] = dict(model.state_dict())
    values.update(model.named_parameters(remove_duplicate=False))
    values.update(model.named_buffers(remove_duplicate=False))
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) and not is_lazy(value) else copy.copy(value)
        for name, value in values.items()
    }


def assert_equal_bits(have: dict[str, Any], want: dict[str, Any]) -> None:
    """Names in order, dtypes, shapes and bits."""
    assert list(have) == list(want)
    for name, value in want.items():
        assert same_bits(have[name], value), name


def same_bits(one: Any, other: Any) -> bool:
    """Whether two values are the same to the last bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if is_lazy(one) or is_lazy(other):
            return is_lazy(one) and is_lazy(other)
        if (one.dtype, one.shape, one.is_meta) != (other.dtype, other.shape, other.is_meta):
            return False
        if one.is_quantized:
            return torch.equal(one.int_repr(), other.int_repr()) and torch.equal(one.dequantize(), other.dequantize())
        return one.is_meta or one.numel() == 0 or torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return type(one) is type(other) and bool(one == other)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def identities(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    """Which objects a model's parameters are, where their memory is, and whether they are trained."""
    return {
        name: (id(value), value.data_ptr(), value.requires_grad)
        for name, value in model.named_parameters(remove_duplicate=False)
    }
