"""Addresses: tensor memory as a writable buffer, and the kernel's view of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from functools import lru_cache
from typing import Any

__all__ = ["address_of", "advise", "is_resident", "memory_at", "move"]

move = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
"""``move(target_address, source_address, nbytes)``: `ctypes.memmove` for little data, holding the GIL: to pass it to
another thread and get it back takes longer than the copy."""

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
    madvise = _system_call("madvise", ctypes.c_int)
    head = address % mmap.PAGESIZE
    return madvise is not None and madvise(address - head, nbytes + head, advice) == 0


def is_resident(address: int, nbytes: int) -> bool:
    """Whether all pages of a mapped file's range are in the page cache, as far as the kernel tells."""
    mincore = _system_call("mincore", ctypes.c_char_p)
    head = address % mmap.PAGESIZE
    pages = bytearray(-(-(nbytes + head) // mmap.PAGESIZE))
    result = ctypes.c_char_p(ctypes.addressof(ctypes.c_char.from_buffer(pages)))
    if mincore is None or mincore(address - head, nbytes + head, result) != 0:
        return False
    return 0 not in pages


@lru_cache(maxsize=4)
def _system_call(name: str, last_argument: Any) -> Any:
    """A function of the C library that takes (address, length, something) and returns 0 for success, if it exists."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        function = getattr(ctypes.CDLL(None), name)
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, last_argument)
        function.restype = ctypes.c_int
        return function
    return None
