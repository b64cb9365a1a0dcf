"""What modules that load themselves would hold after a load: copies of them are loaded, and the two are compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchload.core.checkpoint import TensorEntry
from torchload.core.in_memory import entry_of
from torchload.core.text import quoted
from torchload.match import Selection
from torchload.model.target import HookedModule, Slot, Target, own_loaders
from torchload.plan import custom_loaders
from torchload.plan.compare import Difference, compare_values
from torchload.plan.plain import plain
from torchload.transfer import map_entry

__all__ = ["Twins", "compare_extra_states", "load_twins"]


@dataclass(slots=True)
class Twins:
    """What was found by loading copies.

    Attributes:
        entries: Model name → the tensor that would be there, for those that the model has in the same shape.
        sources: Names in the checkpoint of what the copies were given.
        differing: What differs of everything else that they hold, or can't be told.
    """

    entries: dict[str, TensorEntry] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    differing: list[Difference] = field(default_factory=list)


def load_twins(target: Target, selection: Selection) -> Twins:
    """Load a copy of each module that loads itself, one at a time.

    Modules whose values are not there yet (on meta) are left out.
    """
    found = Twins()
    for hooked, slots in own_loaders(target):
        if not custom_loaders.is_given(hooked, selection) or any(slot.tensor.is_meta for slot in slots):
            continue
        given = custom_loaders.offered([hooked], selection)
        found.sources += given.values()
        try:
            twin = copy.deepcopy(hooked.module)
            custom_loaders.load_itself(twin, hooked.prefix, selection, map_entry)
        except (MemoryError, OSError):
            raise  # a failure to read says nothing about what is in the file
        except Exception as error:  # noqa: BLE001 - whatever the module's own code raises
            reason = f"{type(hooked.module).__name__} loads itself, and a copy of it did not: {quoted(error)}"
            found.differing += [Difference(name, source, 0, 0, reason=reason) for name, source in given.items()]
            continue
        for name, loaded, own in _values(hooked, twin):
            if name in selection.skipped:
                continue
            source = selection.pairs.get(name, name)
            slot = target.by_name.get(name)
            if slot is not None and _is_alike(loaded, slot):
                found.entries[name] = entry_of(loaded, "<a copy of the module>")
            elif (difference := compare_values(name, source, loaded, own)) is not None:
                found.differing.append(difference)
    return found


def _values(hooked: HookedModule, twin: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Each name that a module or its copy has: what the copy holds there, and the module; ``None`` for nothing."""
    loaded, own = twin.state_dict(), hooked.module.state_dict()
    for name in dict.fromkeys([*own, *loaded]):
        yield hooked.prefix + name, loaded.get(name), own.get(name)


def _is_alike(value: Any, slot: Slot) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_quantized and tuple(value.shape) == slot.shape


def compare_extra_states(target: Target, selection: Selection) -> list[Difference]:
    """Compare the extra state of modules with the file's; what a module makes of it counts."""
    own = tuple(hooked.prefix for hooked, _ in own_loaders(target))
    found = [
        _compare_extra_state(name, module, selection.pairs[name], selection)
        for name, module in target.extra_state.items()
        if name in selection.pairs and not (own and name.startswith(own))
    ]
    return [difference for difference in found if difference is not None]


def _compare_extra_state(name: str, module: nn.Module, source: str, selection: Selection) -> Difference | None:
    failed = ""
    try:
        file, model = plain(selection.leaves[source], map_entry), module.get_extra_state()
        if compare_values(name, source, file, model) is None:
            return None
        failed = "a copy of the module did not take it: "
        twin = copy.deepcopy(module)
        twin.set_extra_state(file)
        file = twin.get_extra_state()
    except (MemoryError, OSError):
        raise  # a failure to read says nothing about what is in the file
    except Exception as error:  # noqa: BLE001 - the module's own code, or a value that only code could build
        return Difference(name, source, 0, 0, reason=f"{failed}{quoted(error)}")
    return compare_values(name, source, file, model)
