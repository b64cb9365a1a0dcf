"""An optimizer's state in one flat mapping, as `torch.distributed.checkpoint` writes it on request and torchtitan does.

Every entry has a name of its own: ``state.<parameter>.exp_avg``, ``param_groups.<parameter>.lr``. Which parameters were
one group is not said; those of a group have the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchload.core.checkpoint import TensorEntry
from torchload.core.optimizers import FLAT_GROUPS, FLAT_STATE
from torchload.core.text import group_names
from torchload.match.names import align, tree_of

__all__ = ["grouped"]


def grouped(flat: Mapping[str, Any], model_groups: Sequence[Sequence[str]], problems: list[str]) -> dict[str, Any]:
    """The same state as `torch.optim` has it.

    Args:
        flat: The state.
        model_groups: The names of the optimizer's parameters, by group.
        problems: Receives what stands against it.

    Returns:
        ``state`` and ``param_groups``, by the file's names of the parameters, in the optimizer's groups.

    Example:
        >>> flat = {"state.fc.bias.step": 3, "param_groups.fc.bias.lr": 0.1}
        >>> grouped(flat, [["fc.bias"]], [])
        {'state': {'fc.bias': {'step': 3}}, 'param_groups': [{'lr': 0.1, 'params': ['fc.bias']}]}
    """
    state, settings = _split(flat, FLAT_STATE), _split(flat, FLAT_GROUPS)
    flat_names = [name for group in model_groups for name in group]
    pairs = align(tree_of(settings), tree_of(flat_names)).pairs
    if missing := [name for name in flat_names if name not in pairs]:
        problems.append(f"the file has no settings of {', '.join(group_names(missing)[:6])}")
    if extra := settings.keys() - set(pairs.values()):
        problems.append(
            f"the file has parameters that it doesn't optimize: {', '.join(group_names(sorted(extra))[:6])}"
        )
    groups = []
    for index, group in enumerate(model_groups):
        in_file = [pairs[name] for name in group if name in pairs]
        first = settings[in_file[0]] if in_file else {}
        if odd := [name for name in in_file if not _same(settings[name], first)]:
            problems.append(f"{odd[0]} has other settings in the file than the rest of group {index} here")
        groups.append({**first, "params": in_file})
    return {"state": state, "param_groups": groups}


def _split(flat: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Parameter → what is said of it; the last segment of a name is what."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        if name.startswith(kind):
            parameter, _, what = name[len(kind) :].rpartition(".")
            found.setdefault(parameter, {})[what] = value
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether settings agree, as far as they are plain: one that is a tensor has data of its own for each parameter."""
    plain = [name for name in one if not isinstance(one[name], TensorEntry)]
    return one.keys() == other.keys() and all(one[name] == other[name] for name in plain)
