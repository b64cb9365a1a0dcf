"""Arguments that several of the public functions take."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

__all__ = ["check_arguments", "check_choice", "with_hints"]

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")

# Arguments that other functions of this kind take → one of the function's own that must be there, and what to do.
_NOTHING_RUNS = ("key", "leave it out: nothing that a file names is ever imported or called")
_HALF = ("dtype", "give dtype=torch.float16")
_ONLY_RESUMED = ("strict", "smart_resume() restores it")
_GLOBS = ("skip", "give skip=, a list of globs such as 'fc.*'")
_KEY = ("key", "give key=, with the name that those weights have in the file")
_EXTRA = ("extra", "give it in extra={'epoch': 3, ...}")
_HINTS = {
    "map_location": ("device", "give device=: where the checkpoint was saved never matters"),
    "device_map": ("device", "give device=: one device, 'auto', or a mapping from parts of the model to devices"),
    "weights_only": _NOTHING_RUNS,
    "pickle_module": _NOTHING_RUNS,
    "assign": ("skip", "leave it out: parameters stay the same objects, and models on the meta device are filled"),
    "state_dict": ("path", "give it in place of the path"),
    "torch_dtype": ("dtype", "give dtype="),
    "half": _HALF,
    "fp16": _HALF,
    "ema": _KEY,
    "use_ema": _KEY,
    "filter_fn": ("rename", "give rename=, a function from a name to the new one, or to None to drop it"),
    "revise_keys": ("rename", "give rename={r'^old[.]': 'new.'}"),
    "ignore": _GLOBS,
    "exclude": _GLOBS,
    "optimizer": _ONLY_RESUMED,
    "scheduler": _ONLY_RESUMED,
    "epoch": _EXTRA,
    "step": _EXTRA,
    "args": _EXTRA,
}


def with_hints(function: Callable[ParamsT, ResultT]) -> Callable[ParamsT, ResultT]:
    """Let a function say what to do instead of an argument that only others have, or that is misspelled."""
    own = signature(function).parameters

    @wraps(function)
    def hinted(*args: ParamsT.args, **kwargs: ParamsT.kwargs) -> ResultT:
        for name in kwargs.keys() - own.keys():
            needed, hint = _HINTS.get(name, ("", ""))
            if needed not in own:
                near = get_close_matches(name, own, n=1)
                hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(own)}"
            raise TypeError(f"{function.__name__}() has no argument {name!r}: {hint}")
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
