"""How bytes are fetched from a source: the one place that chooses between the ways of reading a file."""

from __future__ import annotations

from typing import Protocol

from torchload.source import Source

__all__ = ["BufferedReader", "Reader"]


class Reader(Protocol):
    """Fetches bytes; safe to use from several threads."""

    def readinto(self, source: Source, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of `source`, wholly; raises like `Source.readinto`."""


class BufferedReader:
    """Reads through the page cache."""

    def readinto(self, source: Source, offset: int, buffer: memoryview) -> None:
        source.readinto(offset, buffer)
