"""Changing live objects, with a way back: optimizers, schedulers, scalers, and the memory of modules."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from torchload.core.text import quoted
from torchload.model.shards import is_sharded, local_region
from torchload.model.target import Target
from torchload.plan import custom_loaders
from torchload.plan.custom_loaders import RefusedError
from torchload.plan.plan import LoadPlan

__all__ = ["like", "receive", "replace_attributes", "restorer", "taking_back"]


def receive(receiver: Any, state: Any) -> None:
    """Give an object its state.

    Raises:
        RefusedError: It did not accept it, or what it became of it can't be used.
    """
    try:
        before = [group.keys() & receiver.defaults.keys() for group in getattr(receiver, "param_groups", ())]
        receiver.load_state_dict(state)
        for group, names in zip(getattr(receiver, "param_groups", ()), before):
            if lacking := names - group.keys():
                raise ValueError(f"its groups would lack {', '.join(sorted(lacking))}")
    except (MemoryError, OSError):
        raise  # which says nothing about what is in the file
    except Exception as error:
        raise RefusedError(f"{type(receiver).__name__} did not accept its state: {quoted(error)}") from error


def like(value: Any, live: Any) -> Any:
    """A plain value in the collections that its receiver has there.

    `torch.distributed.checkpoint` makes text of numbers that are keys, and other readers plain mappings of all.

    Example:
        >>> like({"milestones": {"30": 1}, "gamma": 0.1}, {"milestones": Counter([10]), "gamma": 0.1})
        {'milestones': Counter({30: 1}), 'gamma': 0.1}
    """
    if isinstance(value, Mapping) and isinstance(live, Mapping):
        if type(live) is Counter or (live and all(type(key) is int for key in live)):  # a Counter's keys are milestones
            value = {_number(key): inner for key, inner in value.items()}
        inner = {key: like(inner, live.get(key)) for key, inner in value.items()}
        return Counter(inner) if type(live) is Counter else OrderedDict(inner) if type(live) is OrderedDict else inner
    if isinstance(value, (list, tuple)) and isinstance(live, (list, tuple)) and len(value) == len(live):
        return type(value)([like(inner, of) for inner, of in zip(value, live)])
    return value


def _number(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key


def replace_attributes(holder: Any, attributes: Mapping[str, Any]) -> None:
    """Give an object back the attributes that it had."""
    holder.__dict__.clear()
    holder.__dict__.update(attributes)


def taking_back(what: str, receiver: Any) -> Callable[[], object]:
    """What undoes a change to an object, prepared before it is made."""
    if what == "updates":
        return partial(setattr, receiver, "updates", receiver.updates)
    attributes = _copied(getattr(receiver, "__dict__", {}))
    before = copy.deepcopy(receiver.state_dict())

    def take_back() -> None:
        try:
            with suppress(Exception):  # one that refuses whatever it is given has its attributes back all the same
                receiver.load_state_dict(copy.deepcopy(before))
        finally:
            if attributes:
                replace_attributes(receiver, _copied(attributes))  # it may be interrupted, and come again

    return take_back


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, (dict, list)) else value for name, value in attributes.items()}


def restorer(target: Target, plan: LoadPlan) -> Callable[[], None]:
    """How to show the memory again that the module has now, and to take back what changes in place.

    That is what modules do that load themselves, and all of a model with sharded tensors: FSDP owns the memory of its
    parts, and such a model is not loaded into fresh memory.
    """
    held = [slot for slot in target.slots if slot.shape is not None and not slot.tensor.is_meta]
    shown = [(slot, slot.tensor.detach()) for slot in held if not is_sharded(slot.tensor)]
    parts: list[torch.Tensor] = []
    if any(is_sharded(slot.tensor) for slot in target.slots):
        parts = [local_region(slot.tensor)[0] for slot in held]
    copies = [(part, part.detach().clone()) for part in parts]
    own = [custom_loaders.restorer(hooked.module, slots) for hooked, slots in plan.own_loaders]
    extra = [(module, copy.deepcopy(module.get_extra_state())) for module in target.extra_state.values()]

    def restore() -> None:
        with torch.no_grad():
            for slot, data in shown:
                if slot.tensor.data_ptr() != data.data_ptr():
                    slot.install(data)
            for part, values in copies:
                part.detach().copy_(values)
        for put_back in own:
            put_back()
        for module, state in extra:
            module.set_extra_state(state)

    return restore
