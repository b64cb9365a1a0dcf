"""What a training checkpoint holds beside the model's weights: under the names that `smart_resume` looks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from torchload.core.wrappers import WRAPPER_STATE
from torchload.model.unwrapping import State, module_within, unwrapped_state, wrapped_child
from torchload.writing.blocks import WEIGHTS

__all__ = ["optimizer_by_name", "run_state"]


def run_state(
    model: nn.Module,
    state: State,
    *,
    optimizer: Any = None,
    scheduler: Any = None,
    scaler: Any = None,
    ema: Any = None,
    extra: Mapping[Any, Any],
) -> dict[str, Any]:
    """The states of everything that takes part in a training run.

    Args:
        model: The model.
        state: Its state dict, without wrappers.
        optimizer: An optimizer, or several in a list or under names. Its groups get ``param_names``, so that whoever
            reads them can match parameters by name.
        scheduler: A scheduler, or several likewise.
        scaler: A gradient scaler; one that is disabled has no state.
        ema: What holds averaged weights: a module, an object with one inside, or anything with ``state_dict``.
        extra: Whatever else is to be stored, by name.

    Returns:
        Name in the file → state. Tensors in it are those of the objects, not copies.

    Raises:
        TypeError: Something has no ``state_dict``, or `extra` has keys that aren't text.
        ValueError: `extra` has a name that is taken.
    """
    names: dict[int, str] = {}
    for name, value in state.entries.items():
        names.setdefault(id(value), name)
    parts: dict[str, Any] = {
        "optimizer_state_dict": _each("optimizer", optimizer, lambda one: _optimizer_state(model, state, one, names)),
        "scheduler_state_dict": _each("scheduler", scheduler, _state_of),
        "scaler_state_dict": _each("scaler", scaler, _state_of),
        "ema_state_dict": None if ema is None else _average_state(ema),
        "updates": getattr(ema, "updates", None),  # ultralytics counts them
    }
    parts = {name: part for name, part in parts.items() if part is not None and part != {}}
    for name, value in extra.items():
        if not isinstance(name, str):
            raise TypeError(f'the keys of extra and metadata are text, such as {{"epoch": 3}}, not {name!r}')
        if name in parts or name == WEIGHTS:
            raise ValueError(f"{name!r} can't be stored beside the weights: that is where {_owner(name)} go")
        parts[name] = value
    return parts


def optimizer_by_name(value: Any) -> Any:
    """States of optimizers with the names of parameters for their numbers, as `torch.distributed.checkpoint` has them.

    Example:
        >>> group = {"lr": 0.1, "params": [0], "param_names": ["fc.bias"]}
        >>> optimizer_by_name({"state": {0: {"step": 3}}, "param_groups": [group]})
        {'state': {'fc.bias': {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': ['fc.bias']}]}
    """
    if isinstance(value, list):
        return [optimizer_by_name(one) for one in value]
    if "param_groups" not in value:
        return {name: optimizer_by_name(one) for name, one in value.items()}
    groups = value["param_groups"]
    if not all("param_names" in group for group in groups):
        return value
    name_of = {key: name for group in groups for key, name in zip(group["params"], group["param_names"])}
    return {
        **value,
        "state": {name_of.get(key, key): values for key, values in value["state"].items()},
        "param_groups": [
            {**{key: entry for key, entry in group.items() if key != "param_names"}, "params": group["param_names"]}
            for group in groups
        ],
    }


def _owner(name: str) -> str:
    return "the weights" if name == WEIGHTS else f"the values of {name.partition('_')[0]}="


def _each(what: str, value: Any, state_of: Callable[[Any], Any]) -> Any:
    """The state of one thing, or of several in a list or under names."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): _each(what, one, state_of) for name, one in value.items()} or None
    if isinstance(value, (list, tuple)):
        return [_each(what, one, state_of) for one in value] or None
    if not callable(getattr(value, "state_dict", None)):
        found = f"not {type(value).__name__}: give the {what} itself, not its state"
        raise TypeError(f"{what}= takes what has a state_dict method, {found}")
    return state_of(value)


def _state_of(one: Any) -> Any:
    return one.state_dict()


def _optimizer_state(model: nn.Module, state: State, optimizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    if state.is_gathered and optimizer.state_dict().get("state"):  # FSDP's first version keeps it flat and cut up
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        offload = any(parameter.device.type != "cpu" for parameter in model.parameters())
        options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
        return dict(get_optimizer_state_dict(model, optimizer, options=options))
    saved: dict[str, Any] = dict(optimizer.state_dict())
    groups = list(saved.get("param_groups", ()))
    for index, group in enumerate(getattr(optimizer, "param_groups", ())):
        known = [names.get(id(parameter)) for parameter in group["params"]]
        if index < len(groups) and None not in known:
            groups[index] = {**groups[index], "param_names": known}
    return {**saved, "param_groups": groups} if groups else saved


def _average_state(ema: Any) -> Any:
    """An average under the names of the bare model; what `torch.optim.swa_utils.AveragedModel` counts stays with it."""
    module = ema if isinstance(ema, nn.Module) else module_within(ema)
    if module is None:
        return _each("ema", ema, _state_of)
    entries = unwrapped_state(module).entries
    counters = {name: module._buffers[name] for name in WRAPPER_STATE if module._buffers.get(name) is not None}
    child = wrapped_child(module)
    if not counters or child is None:
        return entries
    return {**counters, **{f"{child}.{name}": value for name, value in entries.items()}}
