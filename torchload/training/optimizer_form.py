"""What an optimizer's state in a file must look like before anything is made of it: a file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchload.core.checkpoint import Copies, TensorEntry

__all__ = ["malformed"]

_DEEPEST = 16  # containers within one another; real ones have four
_MOST_VALUES = 4_000_000
_SMALL_BYTES = 256


class _MalformedError(Exception):
    """Ends the look at a state; the message completes a sentence about it."""


def malformed(state: Mapping[Any, Any]) -> str | None:
    """What keeps a mapping from being the state of an optimizer, if anything does.

    Example:
        >>> malformed({"state": {}, "param_groups": [{"params": [0, 1], "lr": 0.1}]})
        >>> malformed({"state": {}, "param_groups": [{"params": 2}]})
        'its groups have no lists of parameters'
    """
    groups, states = state.get("param_groups", []), state.get("state", {})
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        return "its groups are not a list of mappings"
    if not all(_is_list_of_keys(group.get("params", [])) for group in groups):
        return "its groups have no lists of parameters"
    if not isinstance(states, Mapping):
        return "its state is not a mapping"
    try:
        _count(state, 0, _MOST_VALUES, Copies())
    except _MalformedError as error:
        return str(error)
    return None


def _is_list_of_keys(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(key, (int, str)) for key in value)


def _count(value: Any, depth: int, left: int, copies: Copies) -> int:
    """How many more values there may be after these; what occurs twice counts twice, as it will be made twice."""
    if isinstance(value, TensorEntry):
        if value.is_expanded and value.nbytes > _SMALL_BYTES:
            raise _MalformedError("it has a tensor of more elements than the file has room for")
        copies.add(value)
    elif isinstance(value, (Mapping, list, tuple)):
        if depth == _DEEPEST:
            raise _MalformedError("it is nested too deeply")
        left -= len(value)
        if left < 0:
            raise _MalformedError(f"it has more than {_MOST_VALUES:,} values")
        for inner in value.values() if isinstance(value, Mapping) else value:
            if not isinstance(inner, (int, float, str)):
                left = _count(inner, depth + 1, left, copies)
    return left
