"""What an optimizer's state looks like: the one answer for who chooses weights and for who resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FLAT_GROUPS", "FLAT_STATE", "is_flat_optimizer_state", "is_optimizer_state"]

FLAT_STATE, FLAT_GROUPS = "state.", "param_groups."


def is_optimizer_state(value: Any) -> bool:
    """Whether it is what `torch.optim.Optimizer.state_dict` returns, or the same in one flat mapping.

    Example:
        >>> is_optimizer_state({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]})
        True
        >>> is_optimizer_state({"state.fc.bias.step": 3, "param_groups.fc.bias.lr": 0.1})
        True
        >>> is_optimizer_state({"state": {}, "epoch": 3})
        False
    """
    if not isinstance(value, Mapping):
        return False
    groups = value.get("param_groups")
    if groups is None:
        return is_flat_optimizer_state(value)
    # Folders of torch.distributed.checkpoint lack what is empty: the state of plain SGD.
    return "state" in value or (isinstance(groups, list) and len(value) == 1)


def is_flat_optimizer_state(value: Any) -> bool:
    """Whether each entry has a name of its own, as `torch.distributed.checkpoint` writes it on request."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and name.startswith((FLAT_STATE, FLAT_GROUPS)) for name in value)
        and any(name.startswith(FLAT_GROUPS) for name in value)
    )
