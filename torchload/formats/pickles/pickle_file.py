"""Bytes of a file that begins with pickles of unknown length."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torchload.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from torchload.core.source import Source

__all__ = ["from_growing_window"]

Result = TypeVar("Result")

# A first read that holds the pickles of nearly every file, a second one for giants, then everything.
_WINDOWS_BYTES = (4 << 20, 64 << 20)


def from_growing_window(source: Source, read: Callable[[bytes | mmap.mmap], Result]) -> Result:
    """What `read` gives for the beginning of a file, or for more of it where that was too little.

    Only a file whose pickles are longer than 64 MiB is mapped: then long payloads stay on disk, for the price that a
    file which another process truncates at this very moment would kill this one. Reads have no such risk.
    """
    for window_bytes in _WINDOWS_BYTES:
        size = min(window_bytes, source.size)
        try:
            return read(source.read(0, size))
        except CorruptCheckpointError as error:
            # The scan of a pickle runs off its end with an IndexError; damage of other kinds stays where it is.
            if size == source.size or not isinstance(error.__context__, IndexError):
                raise
    return read(_whole(source))


def _whole(source: Source) -> bytes | mmap.mmap:
    """All bytes of a source, mapped where that can be."""
    if source.fd is not None and source.base == 0:
        try:
            return mmap.mmap(source.fd, source.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError):  # some network file systems can't
            pass
    return source.read(0, source.size)
