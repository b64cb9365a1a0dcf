"""Dotted paths as text."""

from __future__ import annotations

from torchload.core.wrappers import WRAPPERS

__all__ = ["joined", "last", "unwrapped"]


def joined(*parts: str) -> str:
    """Parts of a path as one; empty ones don't count."""
    return ".".join(part for part in parts if part)


def last(name: str) -> str:
    """The last segment of a path."""
    return name.rpartition(".")[2]


def unwrapped(name: str) -> str:
    """A path without the segments that wrappers put into names, whoever owns them.

    Example:
        >>> unwrapped("module.fc._orig_mod.weight")
        'fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
