"""Addresses: tensor memory as a writable buffer, and the kernel's view of it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

__all__ = [
    "NO_RESERVE",
    "POPULATE_READ",
    "address_of",
    "advise",
    "cached_bytes",
    "file_system_of",
    "is_absent",
    "is_same",
    "memory_at",
    "move",
    "move_much",
    "replace_pages",
    "scatter",
]

POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named since Python 3.13
_MAP_FIXED = 0x10  # on Linux and on macOS

move = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
"""``move(target_address, source_address, nbytes)``: `ctypes.memmove` for little data, holding the GIL: for 400 bytes
0.42 µs instead of 0.49, even if no other thread takes it meanwhile."""

move_much = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
"""The same for much data: other threads run meanwhile."""

_LEAST_CACHED_BYTES = 256 << 10
"""With less, what Python does for each block shows: two threads that call operators wait for each other."""
_MOST_CACHED_BYTES = 1 << 20
_COMPARED_BYTES = 1 << 20  # at a time, where it takes copies

_ADDRESS = ctypes.c_void_p
_WRITABLE = 0x200  # PyBUF_WRITE
_from_memory = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


def memory_at(address: int, nbytes: int) -> memoryview:
    """`nbytes` bytes of this process's memory, writable. The caller keeps what owns them alive."""
    view: memoryview = _from_memory(address, nbytes, _WRITABLE)
    return view


def address_of(buffer: mmap.mmap | memoryview) -> int:
    """Where a writable buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def is_same(address: int, other_address: int, nbytes: int) -> bool:
    """Whether two stretches of memory hold the same bytes."""
    compare = _library("memcmp", ctypes.c_int, _ADDRESS, _ADDRESS, ctypes.c_size_t)
    if compare is not None:
        return bool(compare(address, other_address, nbytes) == 0)
    return all(
        ctypes.string_at(address + start, min(_COMPARED_BYTES, nbytes - start))
        == ctypes.string_at(other_address + start, min(_COMPARED_BYTES, nbytes - start))
        for start in range(0, nbytes, _COMPARED_BYTES)
    )


def scatter(descriptor: int, position: int, places: Sequence[int]) -> int:
    """Read from a file into several places with one system call.

    `os.preadv` wants an object for each of them: for 512 places of 1 KiB it takes 370 µs, this 32.

    Args:
        descriptor: The file.
        position: Where in the file to begin, in bytes.
        places: Address and length in bytes of each place, one after the other; at most 1024 places.

    Returns:
        Number of bytes read, fewer where the file ends; -1 for an error, or where the system has no such call.
    """
    # Where a long is as wide as an address, so are a file's positions and the fields of an `iovec`.
    is_wide = ctypes.sizeof(ctypes.c_long) == ctypes.sizeof(_ADDRESS) == 8
    read = _library("preadv", ctypes.c_ssize_t, ctypes.c_int, _ADDRESS, ctypes.c_int, ctypes.c_long)
    if read is None or not is_wide:
        return -1
    vectors = array("L", places)
    return int(read(descriptor, vectors.buffer_info()[0], len(vectors) // 2, position))


def advise(address: int, nbytes: int, advice: int) -> bool:
    """``madvise(2)`` without holding the GIL, as `mmap.madvise` does; False where the kernel has no such advice."""
    madvise = _library("madvise", ctypes.c_int, _ADDRESS, ctypes.c_size_t, ctypes.c_int)
    head = address % mmap.PAGESIZE
    return madvise is not None and madvise(address - head, nbytes + head, advice) == 0


def file_system_of(descriptor: int) -> int:
    """The number by which Linux knows the kind of file system that a file is on (``f_type``), or 0."""
    status = (ctypes.c_long * 64)()  # of 15 such fields at most
    look = _library("fstatfs", ctypes.c_int, ctypes.c_int, _ADDRESS)
    return status[0] & 0xFFFFFFFF if look is not None and look(descriptor, status) == 0 else 0


def is_absent(address: int, nbytes: int, samples: int) -> bool:
    """Whether most of a mapped file's range isn't in the page cache, judging by a few of its pages.

    The kernel tells this only to whoever may write to the file; to others everything seems to be there. To ask about
    every page takes 24 ms for 1 GiB.
    """
    mincore = _library("mincore", ctypes.c_int, _ADDRESS, ctypes.c_size_t, ctypes.c_char_p)
    step = max(nbytes - 1, 0) / max(samples - 1, 1)
    found = 0
    for index in range(samples):
        place, page = address + int(index * step), ctypes.create_string_buffer(1)
        if mincore is not None and mincore(place - place % mmap.PAGESIZE, 1, page) == 0:
            found += page.raw != b"\0"
    return 2 * found < samples


def replace_pages(address: int, nbytes: int) -> bool:
    """Put pages of this process alone in the place of a mapped file's, with what these hold; False where it fails."""
    number = ctypes.c_int
    function = _library("mmap", _ADDRESS, _ADDRESS, ctypes.c_size_t, number, number, number, ctypes.c_long)
    head = address % mmap.PAGESIZE
    start, size = address - head, -(-(nbytes + head) // mmap.PAGESIZE) * mmap.PAGESIZE
    if function is None:
        return False
    held = ctypes.string_at(start, size)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
    if function(start, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != start:
        return False
    memory_at(start, size)[:] = held
    return True


@lru_cache(maxsize=1)
def cached_bytes() -> int:
    """How much of a source stays in a core's own cache (L2) while it is cast and looked at: half of the cache.

    With 2 MiB (Xeon) to look at what was just cast to float16 adds 25 us to 115 for each MiB, in blocks of 384 KiB as
    of 1 MiB; 35 in blocks of 1.5 MiB, 43 of 2. The fewer blocks, the less two threads wait for the interpreter: 1 GiB
    takes 129 ms in blocks of 1 MiB, 136 in half of that.
    """
    with contextlib.suppress(OSError, ValueError), open("/sys/devices/system/cpu/cpu0/cache/index2/size") as file:
        return min(max(int(file.read().strip().removesuffix("K")) << 9, _LEAST_CACHED_BYTES), _MOST_CACHED_BYTES)
    return _LEAST_CACHED_BYTES


@lru_cache(maxsize=8)
def _library(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the C library with the types of what it gives and takes; None where there is no such."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        function = ctypes.CDLL(None)[name]  # an object of its own for each call of this
        function.restype, function.argtypes = result, arguments
        return function
    return None
