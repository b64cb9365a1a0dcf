"""A model's own state dict, whatever it is wrapped in: told by the types of its modules, never by names alone.

A child that is called ``module`` is not a wrapper; a child that is a `torch.nn.DataParallel` is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import nn

from torchload.core.wrappers import WRAPPER_CLASSES, WRAPPER_STATE
from torchload.model.elsewhere import offloaded_values
from torchload.model.walk import modules_of, tensors_of

__all__ = ["State", "bare_names", "module_within", "unwrapped_state", "wrapped_child"]

_FSDP1_ATTRIBUTE = "_fsdp_wrapped_module"


@dataclass(slots=True, eq=False, repr=False)
class State:
    """A state dict without its wrappers.

    Attributes:
        entries: Name → tensor of the model (not a copy), or another value (extra state).
        versions: Module name → what the state dict's ``_metadata`` says of it.
        is_gathered: Whether it was put together from all ranks, and is whole only on the first.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    is_gathered: bool = False


def wrapped_child(module: nn.Module) -> str | None:
    """The attribute that holds what a wrapper wraps; ``None`` if the module is no wrapper.

    Example:
        >>> wrapped_child(nn.DataParallel(nn.Linear(2, 2))), wrapped_child(nn.Linear(2, 2))
        ('module', None)
    """
    cls: Any = type(module)
    attribute = _attribute_of(cls)
    return attribute if attribute is not None and module._modules.get(attribute) is not None else None


@lru_cache(maxsize=256)
def _attribute_of(cls: Any) -> str | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((WRAPPER_CLASSES[name] for name in names if name in WRAPPER_CLASSES), None)


def module_within(holder: Any) -> nn.Module | None:
    """The module that an object keeps averaged weights in, as ultralytics' and timm's averages do, if it has one."""
    for attribute in ("module", "ema", "ema_model"):
        if isinstance(module := getattr(holder, attribute, None), nn.Module):
            return module
    return None


def unwrapped_state(model: nn.Module) -> State:
    """A model's state dict under the names that its modules have without wrappers. Changes nothing.

    Args:
        model: Any module; wrapped, or with wrapped modules inside, in any order. If parts of it are wrapped in
            `FullyShardedDataParallel`, every rank has to call this, for the parameters are gathered.

    Raises:
        ValueError: Without wrappers two tensors would have the same name.
    """
    if any(wrapped_child(module) == _FSDP1_ATTRIBUTE for module in modules_of(model)):
        return _gathered(model)
    while (attribute := wrapped_child(model)) is not None:
        model = model._modules[attribute]  # type: ignore[assignment]
    raw = model.state_dict(keep_vars=True)
    versions = getattr(raw, "_metadata", {})
    raw.update((name, tensor) for name, tensor in offloaded_values(model) if name in raw)
    has_wrappers = any(wrapped_child(module) is not None for module in modules_of(model))
    if not has_wrappers:
        return State(dict(raw), dict(versions))
    state = State(
        versions={clean: value for name, value in versions.items() if (clean := _own(model, name)) is not None}
    )
    for name, value in raw.items():
        clean = _own(model, name)
        if clean is None:
            continue
        if clean in state.entries:
            raise ValueError(f"without its wrappers the model has two tensors called {clean!r}")
        state.entries[clean] = value
    return state


def bare_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Each name → the same without the segments of wrappers that are really there.

    Example:
        >>> bare_names(nn.DataParallel(nn.Linear(2, 2)), ["module.weight"])
        {'module.weight': 'weight'}
    """
    if all(wrapped_child(module) is None for module in modules_of(model)):
        return {name: name for name in names}
    return {name: _own(model, name) or name for name in names}


def _own(model: nn.Module, name: str) -> str | None:
    """A name without the segments of wrappers; ``None`` for what belongs to a wrapper itself."""
    module: nn.Module | None = model
    kept = []
    for segment in name.split("."):
        while module is not None and (attribute := wrapped_child(module)) is not None:
            if segment in WRAPPER_STATE and segment in module._buffers:
                return None
            inner = module._modules[attribute]
            if segment == attribute:
                module = inner
                break
            module = inner  # a wrapper whose own hook took its segment away
        else:
            kept.append(segment)
            module = module._modules.get(segment) if module is not None else None
    return ".".join(kept)


def _gathered(model: nn.Module) -> State:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # Offloading keeps whole tensors off the accelerator; where there is none, FSDP can't do it.
    offload = any(tensor.device.type != "cpu" for tensor in tensors_of(model))
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    return State(dict(get_model_state_dict(model, options=options)), is_gathered=True)
