"""Reading a cold file past the page cache: large requests, several in flight, at the speed of the device.

Buffered reads from several threads confuse the kernel's readahead, and a single thread spends its time on the page
cache. Data that is in the page cache, however, is read from there many times faster.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
from collections import deque

import torch

from torchload.core.launch import has_siblings
from torchload.core.source import Descriptor
from torchload.transfer.arena import allocate
from torchload.transfer.memory import address_of, is_absent, memory_at, move_much
from torchload.transfer.settings import direct_io

__all__ = ["DIRECT_IO_BYTES", "REQUESTS_IN_FLIGHT", "DirectFile", "is_cold"]

REQUESTS_IN_FLIGHT = 8
DIRECT_IO_BYTES = 1 << 20
"""Smaller reads are left to the page cache."""
_MINIMUM_FILE_BYTES = 32 << 20
"""Smaller files arrive by readahead before threads have started."""
_BLOCK_BYTES = 4096
"""What positions, lengths and addresses must be multiples of; a multiple of what any device asks for."""
_SCRATCH_BYTES = 4 << 20
"""What doesn't lie in memory as it does in the file is read so much at a time: on huge pages, since a device takes a
request in pieces that are contiguous in memory."""
_SAMPLES = 16


class DirectFile:
    """A file opened a second time, past the page cache; safe to read from several threads.

    Scratch memory is held for each thread that reads at the same time.
    """

    def __init__(self, descriptor: Descriptor, probe: mmap.mmap | None) -> None:
        self._descriptor = descriptor
        self._probe = probe
        self._scratch: deque[torch.Tensor] = deque()

    @classmethod
    def open(cls, descriptor: int) -> DirectFile | None:
        """The file behind a descriptor; None if most of it is in memory, or where it can't be read in this way."""
        wish = direct_io()
        if sys.platform != "linux" or wish is False:
            return None
        if wish is None and (not is_cold(descriptor) or has_siblings()):
            return None  # several processes read a file from the device once, by way of the page cache
        with contextlib.suppress(OSError, ValueError):
            direct = Descriptor()
            direct.take(os.open, f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            return cls(direct, mmap.mmap(direct.number, 0, flags=mmap.MAP_PRIVATE) if wish is None else None)
        return None

    def read(self, position: int, buffer: memoryview) -> bool:
        """Fill a buffer from the device, wholly; if False, it must be read in another way.

        Args:
            position: Of the first byte in the file.
            buffer: Where the bytes go. They spare a copy where ``(address - position) % 4096 == 0``.
        """
        nbytes = len(buffer)
        if self._probe is not None and not is_absent(address_of(self._probe) + position, nbytes, 3):
            return False
        straight = (address_of(buffer) - position) % _BLOCK_BYTES == 0 and nbytes > 2 * _BLOCK_BYTES
        scratch = self._take_scratch()
        try:
            return (self._read_straight if straight else self._read_by_way_of)(scratch, position, buffer)
        finally:
            self._scratch.append(scratch)

    def _read_straight(self, scratch: torch.Tensor, position: int, buffer: memoryview) -> bool:
        """Whole blocks go to their place; what of the first and the last block isn't wanted goes to scratch memory."""
        nbytes = len(buffer)
        head, tail = position % _BLOCK_BYTES, (position + nbytes) % _BLOCK_BYTES
        first = memory_at(scratch.data_ptr(), _BLOCK_BYTES)
        last = memory_at(scratch.data_ptr() + _BLOCK_BYTES, _BLOCK_BYTES)
        before = -position % _BLOCK_BYTES  # what of the buffer lies in a block that begins before it
        parts = [first] * (before > 0) + [buffer[before : nbytes - tail]] + [last] * (tail > 0)
        if not self._request(parts, position - head, head + nbytes):
            return False
        buffer[:before] = first[head:] if before else b""
        buffer[nbytes - tail :] = last[:tail]
        return True

    def _read_by_way_of(self, scratch: torch.Tensor, position: int, buffer: memoryview) -> bool:
        address, end = address_of(buffer), position + len(buffer)
        while position < end:
            head = position % _BLOCK_BYTES
            nbytes = min(end - position, _SCRATCH_BYTES - head)
            room = memory_at(scratch.data_ptr(), -(-(head + nbytes) // _BLOCK_BYTES) * _BLOCK_BYTES)
            if not self._request([room], position - head, head + nbytes):
                return False
            move_much(address, scratch.data_ptr() + head, nbytes)
            address, position = address + nbytes, position + nbytes
        return True

    def close(self) -> None:
        self._scratch.clear()
        self._descriptor.close()
        if self._probe is not None:
            self._probe.close()

    def _request(self, parts: list[memoryview], position: int, nbytes: int) -> bool:
        """Read whole blocks, of which the first `nbytes` bytes are needed."""
        try:
            return os.preadv(self._descriptor.number, parts, position) >= nbytes
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return False  # the file system only said so now

    def _take_scratch(self) -> torch.Tensor:
        with contextlib.suppress(IndexError):
            return self._scratch.popleft()
        return allocate([((_SCRATCH_BYTES,), torch.uint8)], torch.device("cpu"))[0]


def is_cold(descriptor: int) -> bool:
    """Whether most of a large file isn't in the page cache, as far as the kernel tells."""
    size_bytes = os.fstat(descriptor).st_size
    if sys.platform != "linux" or size_bytes < _MINIMUM_FILE_BYTES:
        return False
    with contextlib.suppress(OSError, ValueError), mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_PRIVATE) as probe:
        return is_absent(address_of(probe), size_bytes, _SAMPLES)
    return False
