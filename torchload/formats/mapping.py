"""A mapping that is in memory already, such as a state dict or what `torch.load` returned, as a checkpoint.

Its tensors are read where they are, when they are needed, and always copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchload.core.checkpoint import Checkpoint, Container, OpaqueTensor, Quantized, TensorEntry
from torchload.core.in_memory import MemoryEntries
from torchload.core.text import short_dtype
from torchload.errors import CheckpointFormatError

__all__ = ["open_mapping"]

_NAME = "<mapping>"
_NAME_BYTES = 512  # about what a tensor takes of a file beside its data
_DEEPEST = 100


@dataclass(frozen=True, slots=True, eq=False)
class _Mapping(Checkpoint):
    names: int = 0

    @property
    def size_bytes(self) -> int:
        # What looking through its names may cost is measured by the size of files, in which names take room as well.
        return sum(source.size for source in self.sources) + _NAME_BYTES * self.names


def open_mapping(mapping: Mapping[Any, Any]) -> Checkpoint:
    """What a mapping holds. Containers are copied; tensors, and objects that are neither, stay where they are.

    Raises:
        CheckpointFormatError: It is nested very deeply.

    Example:
        >>> open_mapping({"state_dict": nn.Linear(3, 2).state_dict(), "epoch": 3}).root["state_dict"]["weight"].shape
        (2, 3)
    """
    tree = _Tree()
    root = tree.converted(mapping, _DEEPEST)
    return _Mapping(_NAME, "a mapping in memory", root, tuple(tree.entries.sources.values()), names=tree.names)


class _Tree:
    """Converts values; what occurs once in the mapping occurs once in the result.

    Attributes:
        entries: Its tensors.
        names: How many names its containers have, all together.
    """

    def __init__(self) -> None:
        self.entries = MemoryEntries(_NAME)
        self.names = 0
        self._known: dict[int, tuple[Any, Any]] = {}  # with the original, so that no other object gets its identity

    def converted(self, value: Any, levels: int) -> Any:
        if isinstance(value, (str, bytes, int, float, type(None))):
            return value
        if id(value) in self._known:
            return self._known[id(value)][1]
        if levels == 0:
            problem = f"The mapping is nested more than {_DEEPEST} levels deep. Give the part of it with the weights."
            raise CheckpointFormatError(problem, path=_NAME)
        if isinstance(value, (nn.Module, Mapping)):
            return self._container(value, levels - 1)
        if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            return self._list(value, levels - 1)
        tensor = _of_numpy(value) if type(value).__module__ == "numpy" else value
        if isinstance(tensor, torch.Tensor):
            return self._remember(value, self._leaf(tensor))
        return value

    def _remember(self, value: Any, made: Any) -> Any:
        self._known[id(value)] = value, made
        return made

    def _container(self, value: nn.Module | Mapping[Any, Any], levels: int) -> Container:
        container: Container = self._remember(value, Container())
        if isinstance(value, nn.Module):
            container.origin = f"{type(value).__module__}.{type(value).__qualname__}"
            value = type(value).state_dict(value)
        metadata = getattr(value, "_metadata", None)
        container.metadata = dict(metadata) if isinstance(metadata, Mapping) else None
        for key, inner in value.items():
            container[key] = self.converted(inner, levels)
        self.names += len(container)
        return container

    def _list(self, value: list[Any] | tuple[Any, ...], levels: int) -> list[Any] | tuple[Any, ...]:
        made: list[Any] = self._remember(value, [])
        made += (self.converted(inner, levels) for inner in value)
        return made if isinstance(value, list) else self._remember(value, tuple(made))

    def _leaf(self, tensor: torch.Tensor) -> TensorEntry | OpaqueTensor:
        if tensor.is_nested:
            return OpaqueTensor("a nested tensor")
        shape = tuple(tensor.shape) if not nn.parameter.is_lazy(tensor) else None
        if shape is None:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            return OpaqueTensor(f"an uninitialized {kind}")
        if tensor.is_quantized:
            return self._quantized(tensor)
        if hasattr(tensor, "placements"):
            return OpaqueTensor("a sharded tensor (DTensor), of which this process holds a part: full_tensor()", shape)
        if tensor.is_meta:
            return OpaqueTensor("a tensor on the meta device, without values", shape)
        if tensor.layout is not torch.strided:
            return OpaqueTensor(f"a tensor of layout {tensor.layout}", shape)
        if not _has_memory(tensor):
            return OpaqueTensor(f"a {type(tensor).__name__} without memory of its own", shape)
        return self.entries.add(tensor)

    def _quantized(self, tensor: torch.Tensor) -> OpaqueTensor:
        reason = f"a quantized tensor ({short_dtype(tensor.dtype)})"
        tensor = tensor.detach().cpu()
        integers = self.entries.add(tensor.int_repr())
        made_of = None
        if tensor.qscheme() == torch.per_tensor_affine:
            made_of = Quantized(tensor.dtype, integers, tensor.q_scale(), tensor.q_zero_point())
        elif tensor.qscheme() == torch.per_channel_affine:
            scales = self.entries.add(tensor.q_per_channel_scales())
            zero_points = self.entries.add(tensor.q_per_channel_zero_points())
            made_of = Quantized(tensor.dtype, integers, scales, zero_points, tensor.q_per_channel_axis())
        return OpaqueTensor(reason, tuple(tensor.shape), quantized=made_of)


def _of_numpy(value: Any) -> Any:
    """An array as a tensor over its memory; a single number, or an array of what torch has no dtype for, as it is."""
    if not any(base.__name__ == "ndarray" for base in type(value).__mro__):
        return value
    try:
        return torch.as_tensor(value if value.flags.writeable else value.copy())
    except (TypeError, ValueError):
        return value


def _has_memory(tensor: torch.Tensor) -> bool:
    try:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False
