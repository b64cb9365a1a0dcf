"""What is public, and what callers hand over."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias, TypeVar, get_type_hints

__all__ = ["CheckpointLike", "public"]

CheckpointLike: TypeAlias = str | os.PathLike[str] | BinaryIO | Sequence[str | os.PathLike[str]] | Mapping[Any, Any]
"""A checkpoint as callers give it: a path (of a file, a folder, the index of a sharded one), a list of shards, a binary
file object, or a mapping that is in memory already."""

PublicT = TypeVar("PublicT")


def public(thing: PublicT) -> PublicT:
    """Let a class or function say that it is from ``torchload``, wherever it is defined.

    The annotations of a class are resolved first: they are looked up where it says that it is from.
    """
    if isinstance(thing, type):
        cls: Any = thing
        hints = get_type_hints(cls, include_extras=True)
        cls.__annotations__ = {name: hints[name] for name in inspect.get_annotations(cls)}
        with contextlib.suppress(AttributeError):
            del cls.__firstlineno__  # Python 3.13 would show that line of another file as its source
    thing.__module__ = "torchload"
    return thing
