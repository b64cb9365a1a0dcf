"""Values of a checkpoint's tree as ordinary Python, as modules, optimizers and schedulers take them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchload.core.checkpoint import Copies, OpaqueTensor, Record, TensorEntry
from torchload.core.quantized import quantized_tensor

__all__ = ["ReadTensor", "plain"]

ReadTensor = Callable[[TensorEntry], torch.Tensor]


def plain(value: Any, read: ReadTensor) -> Any:
    """A value of the tree as ordinary Python: dicts, lists, tensors. What the file has once, the result has once.

    Raises:
        ValueError: It holds an object that would have to be built by running code, or itself, or is nested very deeply.
    """
    copies = Copies()

    def read_new(entry: TensorEntry) -> torch.Tensor:
        copies.add(entry)
        return read(entry)

    return _plain(value, read_new, {}, _DEEPEST)


_DEEPEST = 100
_SMALL_BYTES = 256
_PENDING = object()


def _plain(value: Any, read: ReadTensor, known: dict[int, Any], levels: int) -> Any:
    if isinstance(value, (Mapping, list, tuple)):
        found = known.get(id(value))
        if found is None:
            if levels == 0:
                raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
            known[id(value)] = _PENDING
            if isinstance(value, Mapping):
                found = {key: _plain(inner, read, known, levels - 1) for key, inner in value.items()}
            else:
                found = type(value)([_plain(inner, read, known, levels - 1) for inner in value])
            known[id(value)] = found
        if found is _PENDING:
            raise ValueError("it holds itself")
        return found
    if isinstance(value, TensorEntry):
        if value.is_expanded and value.nbytes > _SMALL_BYTES:
            raise ValueError("it holds a tensor of more elements than the file has room for")
        if id(value) not in known:
            known[id(value)] = read(value)
        return known[id(value)]
    if isinstance(value, OpaqueTensor) and value.quantized is not None and value.shape is not None:
        return quantized_tensor(value.shape, value.quantized, read)
    if isinstance(value, (Record, OpaqueTensor)):
        what = value.name if isinstance(value, Record) else value.reason
        raise ValueError(f"it holds {what}, which torchload does not build because that would run code")
    return value if isinstance(value, (str, bytes, int, float, type(None))) else copy.deepcopy(value)
