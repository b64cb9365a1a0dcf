"""Arguments that several of the public functions take."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

__all__ = ["check_arguments", "check_choice", "with_hints"]

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

# Arguments that other functions of this kind take → what to do here.
_HINTS = {
    "map_location": "give device=: where the checkpoint was saved never matters",
    "weights_only": "leave it out: nothing that a file names is ever imported or called",
    "pickle_module": "leave it out: nothing that a file names is ever imported or called",
    "assign": "leave it out: parameters stay the same objects, and models on the meta device are filled",
    "state_dict": "give it in place of the path",
    "ema": "give key=, with the name that the average has in the file",
}


def with_hints(function: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
    """Let a function say what to do instead of an argument that only others have."""
    hints = {name: hint for name, hint in _HINTS.items() if name not in signature(function).parameters}

    @wraps(function)
    def hinted(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        for name in kwargs.keys() & hints.keys():
            raise TypeError(f"{function.__name__}() has no argument {name!r}: {hints[name]}")
        return function(*args, **kwargs)

    return hinted


def check_arguments(model: nn.Module, dtype: Any, skip: Any, keep_fp32: Any, atomic: Any) -> None:
    """Raise a `TypeError` for what no checkpoint could make right."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument is the model, an nn.Module, not {type(model).__name__}")
    if dtype not in (None, "auto") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be None, 'auto' or a floating-point torch.dtype, not {dtype!r}")
    for name, globs in (("skip", skip), ("keep_fp32", keep_fp32)):
        if isinstance(globs, str):
            raise TypeError(f"{name} is a list of globs: {name}=[{globs!r}]")
        if not isinstance(globs, Iterable):
            raise TypeError(f"{name} is a list of globs, not {globs!r}")
        if isinstance(globs, Collection) and (odd := [glob for glob in globs if not isinstance(glob, str)]):
            raise TypeError(f"{name} is a list of globs, which are strings, not {odd[0]!r}")
    if not isinstance(atomic, (bool, AbstractContextManager)):
        raise TypeError(f"atomic is a bool or a lock, not {type(atomic).__name__}")


def check_choice(key: Any, prefix: Any, rename: Any, strict: Any = True) -> None:
    """Raise for a choice among a file's weights that no file could make right.

    Raises:
        TypeError: An argument is of another type.
        ValueError: A pattern of `rename` is no regular expression.
    """
    for name, value in (("key", key), ("prefix", prefix)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} is a name, or several joined by dots, as text, not {value!r}")
    if not isinstance(strict, bool):
        raise TypeError(f"strict is True or False, not {strict!r}")
    if rename is None or (callable(rename) and not isinstance(rename, Mapping)):
        return
    if not isinstance(rename, Mapping):
        raise TypeError(
            "rename is a mapping of regular expressions to replacements, or a function from name to name, not "
            f"{type(rename).__name__}"
        )
    for pattern, replacement in rename.items():
        if not (isinstance(pattern, str) and isinstance(replacement, str)):
            raise TypeError(f"rename maps text to text, not {pattern!r} to {replacement!r}")
        try:
            re.compile(f"{pattern}|").sub(replacement, "")  # matches nothing, so that the replacement is looked at too
        except re.error as error:
            raise ValueError(f"rename has {pattern!r}: {replacement!r}, which re can't use: {error}") from error
