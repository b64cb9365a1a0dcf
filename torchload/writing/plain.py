"""Values that `torch.load(weights_only=True)` reads, and what isn't one."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from typing import Any

import torch

__all__ = ["PlainCopy"]

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size})
_MAPPINGS = frozenset({dict, OrderedDict, Counter})
_MOST_LEVELS = 50
_HINTS = {
    "numpy.ndarray": " (torch.from_numpy() makes it a tensor)",
    "argparse.Namespace": " (vars() makes it a dictionary)",
}


class PlainCopy:
    """Makes plain copies of values, and notes the tensors in them.

    Attributes:
        tensors: Every tensor that was found, once: a name for messages, and the tensor. The copies hold them as they
            are.
        problems: What can't be stored, one sentence each.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self.problems: list[str] = []

    def of(self, value: Any, name: str, levels: int = _MOST_LEVELS) -> Any:
        """The copy of a value, which messages call `name`: numbers, text, tensors, and collections of such.

        Example:
            >>> PlainCopy().of({"milestones": Counter([30, 60]), "best": float("inf")}, "scheduler")
            {'milestones': Counter({30: 1, 60: 1}), 'best': inf}
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            self.tensors.setdefault(id(value), (name, value))
            return value
        if levels == 0:
            self.problems.append(f"{name} is nested too deeply")
        elif kind in _MAPPINGS:
            inner = {self.of(key, name, levels - 1): self.of(value[key], f"{name}.{key}", levels - 1) for key in value}
            return inner if kind is dict else _counter(inner) if kind is Counter else OrderedDict(inner)
        elif kind in (list, tuple):
            return kind([self.of(item, f"{name}.{index}", levels - 1) for index, item in enumerate(value)])
        elif kind is set:
            return {self.of(item, name, levels - 1) for item in value}
        elif (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.generic):
            return self.of(value.item(), name, 1)
        else:
            what = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
            refuses = "which torch.load(weights_only=True) refuses"
            self.problems.append(f"{name} is of type {what}, {refuses}{_HINTS.get(what, '')}")
        return None


def _counter(counts: dict[Any, Any]) -> dict[Any, Any]:
    """The counter, where `torch.load(weights_only=True)` knows the class."""
    from torch import _weights_only_unpickler

    known = _weights_only_unpickler._get_allowed_globals()
    return Counter(counts) if "collections.Counter" in known else counts
