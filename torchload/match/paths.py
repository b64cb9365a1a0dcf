"""Dotted paths as text."""

from __future__ import annotations

__all__ = ["joined", "last"]


def joined(*parts: str) -> str:
    """Parts of a path as one; empty ones don't count."""
    return ".".join(part for part in parts if part)


def last(name: str) -> str:
    """The last segment of a path."""
    return name.rpartition(".")[2]
