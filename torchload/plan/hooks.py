"""Modules that have a say in how they are loaded: torch's own hooks, honoured.

Pre-hooks rewrite the state dict before anything is copied; they run at planning, over tensors that are mapped from the
file. Modules with a `_load_from_state_dict` of their own, and modules with extra state, change themselves: they run
just before the transfer, and what they changed can be taken back.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from torchload.core.checkpoint import Copies, OpaqueTensor, Record, TensorEntry
from torchload.core.in_memory import entry_of
from torchload.core.quantized import quantized_tensor
from torchload.core.text import quoted
from torchload.core.undo import Undo
from torchload.errors import IncompatibleCheckpointError, TorchLoadError
from torchload.match import Selection
from torchload.model.target import HookedModule, Slot, Target
from torchload.model.walk import modules_of, paths_of

__all__ = [
    "COMPUTED",
    "ReadTensor",
    "RefusedError",
    "attribute_restorer",
    "call_pre_hooks",
    "filled_by_itself",
    "is_given",
    "load_itself",
    "offered",
    "plain",
    "restorer",
    "run_own_loader",
    "run_post_hooks",
    "run_pre_hooks",
    "set_extra_state",
    "would_load",
]

COMPUTED = "<computed by a hook>"
_NO_REFUSAL = (MemoryError, OSError, TorchLoadError)  # a failure to read, which says nothing of what a module accepts
ReadTensor = Callable[[TensorEntry], torch.Tensor]


class RefusedError(Exception):
    """A module did not take what the checkpoint has for it."""


def run_pre_hooks(target: Target, selection: Selection, read: ReadTensor) -> Selection:
    """Let load-state-dict pre-hooks rewrite the part of the state dict that is theirs.

    Args:
        target: The model.
        selection: What was chosen for it.
        read: Gives a tensor over the file's bytes, without reading them.

    Returns:
        The selection as the hooks left it. Tensors that they passed on stay where they are in the file; those that they
        computed are held in memory.
    """
    state: dict[str, Any] = {}
    entries: dict[int, str] = {}
    for name, source in offered(_early(target), selection).items():
        value = selection.leaves[source]
        if isinstance(value, TensorEntry):
            value = read(value)
            entries[id(value)] = source
        state[name] = value
    before = dict(state)
    if complaints := call_pre_hooks(target, state, partial(_local_metadata, selection)):
        raise IncompatibleCheckpointError(
            "\n  ".join(("A load-state-dict pre-hook of the model refused the checkpoint.", *complaints)),
            problems=complaints,
        )
    if state.keys() == before.keys() and all(state[name] is before[name] for name in state):
        return selection
    return _revised(target, selection, before, state, entries)


def _early(target: Target) -> list[HookedModule]:
    """Modules whose pre-hooks are called here: those below a module that loads itself are called by that."""
    own = tuple(hooked.prefix for hooked in target.overrides)
    return [hooked for hooked in target.pre_hooks if not (own and hooked.prefix.startswith(own))]


def call_pre_hooks(target: Target, state: dict[str, Any], metadata: Callable[[str], dict[str, Any]]) -> list[str]:
    """Call load-state-dict pre-hooks, parents first, each with what is below its module.

    Args:
        target: The model.
        state: Its state dict, under the model's names; rewritten.
        metadata: What the checkpoint's `_metadata` says of the module at a prefix.

    Returns:
        What they complain of.
    """
    complaints: list[str] = []
    for hooked in _early(target):
        part = {name: state.pop(name) for name in list(state) if name.startswith(hooked.prefix)}
        for hook in list(hooked.module._load_state_dict_pre_hooks.values()):
            hook(part, hooked.prefix, metadata(hooked.prefix), True, [], [], complaints)
        state.update(part)
    return complaints


def offered(hooked: list[HookedModule], selection: Selection) -> dict[str, str]:
    """Model name → checkpoint name of everything below hooked modules, leftovers under the name they would have."""
    prefixes = tuple(item.prefix for item in hooked)
    found = {name: source for name, source in selection.pairs.items() if name.startswith(prefixes)}
    unused = {*selection.unexpected, *selection.outside, *selection.claimed}
    for source, name in selection.alignment.leftover.items():
        if source in unused and name.startswith(prefixes):
            found.setdefault(name, source)
    return found


def _revised(
    target: Target,
    selection: Selection,
    before: Mapping[str, Any],
    state: Mapping[str, Any],
    entries: Mapping[int, str],
) -> Selection:
    leaves = dict(selection.leaves)
    pairs = {name: source for name, source in selection.pairs.items() if name not in before}
    used: set[str] = set()
    known = set(target.names)
    unexpected = []
    for name, value in state.items():
        source = entries.get(id(value))
        if source is None:
            source = name if name not in leaves else f"{name} (from a hook)"
            leaves[source] = entry_of(value, COMPUTED) if isinstance(value, torch.Tensor) else value
        if name in known:
            pairs[name] = source
            used.add(source)
        else:
            unexpected.append(source)
    consumed = {source for source in entries.values() if source not in used}
    mismatched = {}
    for name, source in pairs.items():
        slot, entry = target.by_name.get(name), leaves[source]
        if slot is not None and isinstance(entry, TensorEntry) and slot.shape is not None:
            ours = slot.shape
            if entry.shape != ours and not (ours == () and entry.shape == (1,)):
                mismatched[name] = (entry.shape, ours)
    return replace(
        selection,
        leaves=leaves,
        pairs=pairs,
        mismatched=mismatched,
        unexpected=[name for name in selection.unexpected if name not in consumed and name not in used]
        + [name for name in unexpected if name not in selection.unexpected and name not in selection.outside],
    )


def _local_metadata(selection: Selection, prefix: str) -> dict[str, Any]:
    """What the checkpoint's `_metadata` says of the module at `prefix` of the model."""
    return dict(_metadata_below(selection, prefix).get("", {}))


def _source_path(selection: Selection, prefix: str) -> str | None:
    """What the checkpoint calls the module that the model has at `prefix`, judged by a tensor below it."""
    for name, source in selection.pairs.items():
        if name.startswith(prefix) and source.endswith(rest := name[len(prefix) :]):
            return source[: len(source) - len(rest)].rstrip(".")
    return None


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


def is_given(hooked: HookedModule, selection: Selection) -> bool:
    """Whether the checkpoint has something for a module that loads itself, or nothing says that it needn't."""
    return bool(offered([hooked], selection)) or not _may_lack(hooked.prefix, selection)


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
    """Call a module's `load_state_dict` with what the checkpoint has for it.

    Args:
        module: The module at `prefix`, or a copy of it.
        prefix: Where it is in the model, with its dot.
        selection: Where its values are.
        read: Gives an entry's tensor, which the module may keep.

    Returns:
        The names, below the prefix, that it reports as missing where the caller accepts that.
    """
    state_dict: Any = OrderedDict(
        (name[len(prefix) :], plain(selection.leaves[source], read))
        for name, source in offered([HookedModule(prefix, module)], selection).items()
    )
    state_dict._metadata = _metadata_below(selection, prefix)
    missing: list[str] = module.load_state_dict(state_dict, strict=not _may_lack(prefix, selection)).missing_keys
    return missing


def _may_lack(prefix: str, selection: Selection) -> bool:
    """Whether the caller accepts that something below a prefix is not loaded."""
    return any(name.startswith(prefix) for name in (*selection.missing, *selection.skipped))


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
        advice = f'To load the rest: smart_load(..., skip=["{name}"])'
        raise RefusedError(f"The extra state {name!r} can't be restored: {quoted(error)}. {advice}") from error


def run_post_hooks(target: Target, missing: Sequence[str], unexpected: Sequence[str]) -> _IncompatibleKeys:
    """Call load-state-dict post-hooks, children first, with what torch would tell them.

    Each is told what the modules lack that `load_state_dict` would have come to before: those above it, all below it,
    and those before it. What a hook takes out or adds is seen by those after it.

    Args:
        target: The model.
        missing: Its names that nothing filled.
        unexpected: Names without a place in it, as they would be in it.

    Returns:
        What the hooks left of both, and what they added.
    """
    order = {path: index for index, (path, _) in enumerate(paths_of(target.model))} if target.post_hooks else {}
    keys = _IncompatibleKeys([], [])
    waiting = [
        (kind, [(_module_index(name, order), name) for name in names])
        for kind, names in ((keys.missing_keys, missing), (keys.unexpected_keys, unexpected))
    ]
    ends = {id(hooked): sum(path.startswith(hooked.prefix) for path in order) for hooked in target.post_hooks}
    spans = [(order[hooked.prefix], order[hooked.prefix] + ends[id(hooked)], hooked) for hooked in target.post_hooks]
    for _, end, hooked in sorted(spans, key=lambda span: (span[1], -span[0])):
        for kind, names in waiting:
            kind += [name for index, name in names if index < end]
            names[:] = [(index, name) for index, name in names if index >= end]
        for hook in list(hooked.module._load_state_dict_post_hooks.values()):
            hook(hooked.module, keys)
    for kind, names in waiting:
        kind += [name for _, name in names]
    return keys


def _module_index(name: str, order: Mapping[str, int]) -> int:
    """When the module that a name belongs to is come to."""
    path = name
    while path:
        path = path[:-1].rpartition(".")[0]
        path += "." if path else ""
        if path in order:
            return order[path]
    return 0


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


def _metadata_below(selection: Selection, prefix: str) -> dict[str, Any]:
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
