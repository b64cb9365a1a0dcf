"""Addresses: tensor memory as a writable buffer, and the kernel's view of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from functools import lru_cache
from typing import Any

__all__ = ["address_of", "advise", "memory_at", "move"]

move = ctypes.memmove
"""``move(target_address, source_address, nbytes)``."""

_WRITABLE = 0x200  # PyBUF_WRITE
_from_memory = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


def memory_at(address: int, nbytes: int) -> memoryview:
    """`nbytes` bytes of this process's memory, writable. The caller keeps what owns them alive."""
    view: memoryview = _from_memory(address, nbytes, _WRITABLE)
    return view


def address_of(mapping: mmap.mmap) -> int:
    """Where a writable mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def advise(address: int, nbytes: int, advice: int) -> bool:
    """``madvise(2)`` without holding the GIL, as `mmap.madvise` does; False where the kernel has no such advice.

    Args:
        address: Start of the range; rounded down to a page.
        nbytes: Length in bytes.
        advice: One of the kernel's ``MADV_*`` numbers.
    """
    madvise = _madvise()
    if madvise is None or nbytes <= 0:
        return False
    head = address % mmap.PAGESIZE
    return bool(madvise(address - head, nbytes + head, advice) == 0)


@lru_cache(maxsize=1)
def _madvise() -> Any:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        function = ctypes.CDLL(None).madvise
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        function.restype = ctypes.c_int
        return function
    return None
