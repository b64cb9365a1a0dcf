"""Modules with a custom loader, and extra state: they change themselves, just before the transfer.

What they changed can be taken back.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from torchload.core.text import as_glob, quoted
from torchload.core.undo import Undo
from torchload.errors import TorchLoadError, advised
from torchload.match import Selection
from torchload.model.target import HookedModule, Slot
from torchload.model.walk import modules_of
from torchload.plan.plain import ReadTensor, plain

__all__ = [
    "RefusedError",
    "attribute_restorer",
    "collecting",
    "filled_by_itself",
    "is_given",
    "load_itself",
    "metadata_below",
    "offered",
    "restorer",
    "run_own_loader",
    "set_extra_state",
    "would_load",
]

_NO_REFUSAL = (MemoryError, OSError, TorchLoadError)  # a failure to read, which says nothing of what a module accepts


class RefusedError(Exception):
    """A module, an optimizer or a scheduler did not take what the checkpoint has for it."""


@contextlib.contextmanager
def collecting(refusals: list[RefusedError]) -> Iterator[None]:
    """Take note of a refusal in place of raising it."""
    try:
        yield
    except RefusedError as refusal:
        refusals.append(refusal)


def is_given(hooked: HookedModule, selection: Selection) -> bool:
    """Whether the checkpoint has something for a module that loads itself, or nothing says that it needn't."""
    return bool(offered([hooked], selection)) or not _may_lack(hooked.prefix, selection)


def offered(hooked: list[HookedModule], selection: Selection) -> dict[str, str]:
    """Model name → checkpoint name of everything below hooked modules, leftovers under the name they would have."""
    prefixes = tuple(item.prefix for item in hooked)
    found = {name: source for name, source in selection.pairs.items() if name.startswith(prefixes)}
    unused = {*selection.unexpected, *selection.outside, *selection.claimed}
    for source, name in selection.alignment.leftover.items():
        if source in unused and name.startswith(prefixes):
            found.setdefault(name, source)
    return found


def run_own_loader(
    hooked: HookedModule, slots: Sequence[Slot], selection: Selection, read: ReadTensor, undo: Undo
) -> None:
    """Load one such module, and all below it, through torch's own machinery.

    Raises:
        RefusedError: The module refused what the checkpoint has for it; `undo` restores it.
    """
    undo.steps.append(restorer(hooked.module, slots))
    for slot in slots:
        if slot.tensor.is_meta and slot.shape is not None:
            undo.steps.append(partial(slot.install, slot.tensor.detach()))
            slot.install(torch.zeros(slot.shape, dtype=slot.tensor.dtype))
    try:
        load_itself(hooked.module, hooked.prefix, selection, read)
    except _NO_REFUSAL:
        raise
    except Exception as error:
        where = f" at {hooked.prefix.rstrip('.')!r}" if hooked.prefix else ""
        what = f"{type(hooked.module).__name__}{where} loads itself, and refused this checkpoint: {quoted(error)}"
        raise RefusedError(what) from error


def filled_by_itself(hooked: HookedModule, slots: Sequence[Slot], selection: Selection, read: ReadTensor) -> set[str]:
    """Which of the names that the file lacks a module that loads itself fills all the same, as upgrades of versions do.

    A copy of the module without memory is loaded to see it.
    """
    missing = [name for name in selection.missing if name.startswith(hooked.prefix)]
    if not missing or not is_given(hooked, selection):
        return set()
    lacking = _lacking(hooked, slots, selection, read)
    return set() if lacking is None else {name for name in missing if name[len(hooked.prefix) :] not in lacking}


def would_load(hooked: HookedModule, slots: Sequence[Slot], selection: Selection, read: ReadTensor) -> bool:
    """Whether a module that loads itself accepts all that it is offered, and lacks nothing."""
    return _lacking(hooked, slots, selection, read) == []


def _lacking(hooked: HookedModule, slots: Sequence[Slot], selection: Selection, read: ReadTensor) -> list[str] | None:
    """What a copy of a module without memory says that it lacks; ``None`` if it doesn't load."""
    memo: dict[int, Any] = {}
    for slot in slots:
        if slot.shape is not None:
            memo[id(slot.tensor)] = _without_memory(slot, memo)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that copying into a meta tensor does nothing
            return load_itself(copy.deepcopy(hooked.module, memo), hooked.prefix, selection, read)
    except Exception:  # noqa: BLE001 - whatever the module's own code raises
        return None


def _without_memory(slot: Slot, memo: dict[int, Any]) -> torch.Tensor:
    """A stand-in on meta for a slot's tensor, of its class and with its attributes, as a deep copy has them."""
    tensor = torch.empty_like(slot.tensor.detach(), device="meta")
    if slot.is_parameter:
        tensor = torch.Tensor._make_subclass(type(slot.tensor), tensor, slot.tensor.requires_grad)
    tensor.__dict__.update(copy.deepcopy(slot.tensor.__dict__, memo))
    return tensor


def load_itself(module: nn.Module, prefix: str, selection: Selection, read: ReadTensor) -> list[str]:
    """Call the `load_state_dict` of a module or its copy with what the checkpoint has; it may keep what is read.

    Returns:
        The names, below the prefix, that it reports as missing where the caller accepts that.
    """
    state_dict: Any = OrderedDict(
        (name[len(prefix) :], plain(selection.leaves[source], read))
        for name, source in offered([HookedModule(prefix, module)], selection).items()
    )
    state_dict._metadata = metadata_below(selection, prefix)
    missing: list[str] = module.load_state_dict(state_dict, strict=not _may_lack(prefix, selection)).missing_keys
    return missing


def _may_lack(prefix: str, selection: Selection) -> bool:
    """Whether the caller accepts that something below a prefix is not loaded."""
    return any(name.startswith(prefix) for name in (*selection.missing, *selection.skipped))


def set_extra_state(name: str, module: nn.Module, value: Any, read: ReadTensor, undo: Undo) -> None:
    """Give a module its extra state.

    Raises:
        RefusedError: The file's value holds objects that torchload does not build, or the module refused it; `undo`
            restores what was set before.
    """
    try:
        value = plain(value, read)
        undo.steps.append(partial(module.set_extra_state, module.get_extra_state()))
        module.set_extra_state(value)
    except _NO_REFUSAL:
        raise
    except Exception as error:
        advice = f"To load the rest: {advised(f'skip={[as_glob(name)]}')}"
        raise RefusedError(f"The extra state {name!r} can't be restored: {quoted(error)}. {advice}") from error


def restorer(module: nn.Module, slots: Sequence[Slot]) -> Callable[[], None]:
    """What puts back the values that slots of a module have now, and the attributes of all its parts."""
    saved = [(slot.tensor, slot.tensor.detach().clone()) for slot in slots if not slot.tensor.is_meta]
    put_back = attribute_restorer(modules_of(module))

    def restore() -> None:
        put_back()
        with torch.no_grad():
            for tensor, values in saved:
                if tensor.shape == values.shape:
                    tensor.detach().copy_(values)
                else:
                    tensor.data = values

    return restore


def attribute_restorer(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """What puts back the attributes that modules have now."""
    held = [(values, dict(values)) for module in modules for values in _attributes(module)]

    def restore() -> None:
        for now, before in held:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)

    return restore


def _attributes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    tables: tuple[Any, ...] = (module.__dict__, module._parameters, module._buffers, module._modules)
    return tables


def metadata_below(selection: Selection, prefix: str) -> dict[str, Any]:
    """The checkpoint's `_metadata` of a module of the model and of all below it, relative to it."""
    metadata = getattr(selection.container, "metadata", None) or {}
    root = _source_path(selection, prefix)
    if root is None:
        return {}
    below = f"{root}." if root else ""
    return {
        path[len(below) :] if path != root else "": dict(values)
        for path, values in metadata.items()
        if path == root or path.startswith(below)
    }


def _source_path(selection: Selection, prefix: str) -> str | None:
    """What the checkpoint calls the module that the model has at `prefix`, judged by a tensor below it."""
    for name, source in selection.pairs.items():
        if name.startswith(prefix) and source.endswith(rest := name[len(prefix) :]):
            return source[: len(source) - len(rest)].rstrip(".")
    return None
