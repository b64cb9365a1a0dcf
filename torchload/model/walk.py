"""The modules of a model, as `load_state_dict` finds them: by their tables, never by methods that attributes may hide.

Classes in the field have lists that are called ``modules`` or ``children``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["modules_of", "parameter_names", "paths_of", "tensors_of"]


def paths_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every path that leads to it, parents first, as `state_dict` walks them.

    Example:
        >>> [path for path, _ in paths_of(nn.Sequential(nn.Sequential(nn.ReLU())))]
        ['', '0.', '0.0.']
    """
    stack: list[tuple[str, nn.Module, frozenset[int]]] = [("", model, frozenset())]
    while stack:
        prefix, module, above = stack.pop()
        yield prefix, module
        if module._modules:
            inside = above | {id(module)}
            stack.extend(
                (f"{prefix}{name}.", child, inside)
                for name, child in reversed(module._modules.items())
                if child is not None and id(child) not in inside
            )


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, parents first."""
    seen = {id(model)}
    todo = [model]
    for module in todo:
        yield module
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                todo.append(child)


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The identity of every parameter → the first of its names, as `named_parameters` has them."""
    names: dict[int, str] = {}
    for prefix, module in paths_of(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), prefix + name)
    return names


def tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer, as often as it is registered."""
    for module in modules_of(model):
        for table in (module._parameters, module._buffers):
            yield from (tensor for tensor in table.values() if tensor is not None)
