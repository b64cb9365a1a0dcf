"""torch's own hooks, honoured.

Load-state-dict pre-hooks rewrite the state dict before anything is copied; they run at planning, over tensors that are
mapped from the file. Post-hooks run when the model shows what was loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.modules.module import _IncompatibleKeys

from torchload.core.checkpoint import TensorEntry
from torchload.core.in_memory import entry_of
from torchload.errors import IncompatibleCheckpointError
from torchload.match import Selection
from torchload.match.selection import mismatched
from torchload.model.target import HookedModule, Target
from torchload.model.walk import paths_of
from torchload.plan.custom_loaders import metadata_below, offered
from torchload.plan.plain import ReadTensor

__all__ = ["COMPUTED", "call_pre_hooks", "run_post_hooks", "run_pre_hooks"]

COMPUTED = "<computed by a hook>"


def run_pre_hooks(target: Target, selection: Selection, read: ReadTensor) -> Selection:
    """Let load-state-dict pre-hooks rewrite the part of the state dict that is theirs.

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
    """Call load-state-dict pre-hooks, parents first, each with what is below its module; gives their complaints."""
    complaints: list[str] = []
    for hooked in _early(target):
        part = {name: state.pop(name) for name in list(state) if name.startswith(hooked.prefix)}
        for hook in list(hooked.module._load_state_dict_pre_hooks.values()):
            hook(part, hooked.prefix, metadata(hooked.prefix), True, [], [], complaints)
        state.update(part)
    return complaints


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
    shapes = {name: slot.shape for name, slot in target.by_name.items()}
    return replace(
        selection,
        leaves=leaves,
        pairs=pairs,
        mismatched=mismatched(shapes, pairs, leaves),
        unexpected=[name for name in selection.unexpected if name not in consumed and name not in used]
        + [name for name in unexpected if name not in selection.unexpected and name not in selection.outside],
    )


def _local_metadata(selection: Selection, prefix: str) -> dict[str, Any]:
    """What the checkpoint's `_metadata` says of the module at `prefix` of the model."""
    return dict(metadata_below(selection, prefix).get("", {}))


def run_post_hooks(target: Target, missing: Sequence[str], unexpected: Sequence[str]) -> _IncompatibleKeys:
    """Call load-state-dict post-hooks, children first, with what torch would tell them.

    Each is told what the modules lack that `load_state_dict` would have come to before: those above it, all below it,
    and those before it. What a hook takes out or adds is seen by those after it.
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
