"""Pages of a file, read where they lie in the page cache: nobody can take them away meanwhile.

To read into scratch memory first costs a whole pass more: casting 1 GiB of float32 to float16 with two threads takes
225 ms by way of scratch memory that stays in the cache, and 113 ms straight from the pages, where the kernel keeps them
in large folios; 240 and 190 ms where it doesn't (Xeon, 2 MiB of L2; on an EPYC the two were alike).

But to touch a mapped page that a truncation took away kills the process (SIGBUS). Under a read lease the kernel makes
whoever wants to write to the file or truncate it wait. It is held for one job at a time, a few milliseconds at most as
a rule, and isn't granted again while somebody waits, or has the file open for writing.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import time

import torch

from torchload.core.source import Descriptor
from torchload.transfer.memory import NO_RESERVE, POPULATE_READ, address_of, advise, file_system_of, is_absent

if sys.platform == "linux":
    import fcntl

    def _lease(descriptor: int) -> None:
        """Keep others from changing the file; OSError where that isn't to be had."""
        # With the lease goes what was set: SIGIO would end the process, while this signal is ignored.
        fcntl.fcntl(descriptor, _F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)

    def _end_lease(descriptor: int) -> None:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


__all__ = ["LeasedFile"]

_PATIENCE_SECONDS = 0.1
_DONTNEED = 4  # MADV_DONTNEED, on Linux
_F_SETSIG = 10  # not in Python's fcntl before 3.11
_LOCAL = {0xEF53: "ext4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0xF2F52010: "f2fs", 0x01021994: "tmpfs"}
"""File systems of which nobody elsewhere takes pages away: leases are this machine's."""


class LeasedFile:
    """A file that was opened a second time and mapped; for one thread.

    One thing is left: from a process that is stopped in the middle of a job, the kernel takes the lease after 45 s
    (``/proc/sys/fs/lease-break-time``).
    """

    def __init__(self, descriptor: Descriptor, mapping: mmap.mmap) -> None:
        self._descriptor = descriptor
        self._address = address_of(mapping)
        self._size = len(mapping)
        self._bytes: torch.Tensor | None = torch.frombuffer(memoryview(mapping), dtype=torch.uint8)

    @classmethod
    def open(cls, descriptor: int) -> LeasedFile | None:
        """The file behind a descriptor; None where its pages can't be kept."""
        if sys.platform != "linux" or signal.getsignal(signal.SIGURG) not in (signal.SIG_DFL, signal.SIG_IGN):
            return None
        if file_system_of(descriptor) not in _LOCAL:
            return None
        own = Descriptor()  # what is set of it is set for nobody else
        try:
            own.take(os.open, f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            _lease(own.number)  # refused unless the file is the user's own
            _end_lease(own.number)
            flags = mmap.MAP_PRIVATE | NO_RESERVE
            return cls(own, mmap.mmap(own.number, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE))
        except BaseException as error:
            own.close()
            if not isinstance(error, (OSError, ValueError, AttributeError)):
                raise
        return None

    def borrow(self, position: int, nbytes: int) -> torch.Tensor | None:
        """Bytes of the file, uint8, never to be written to; None if they aren't in memory, or somebody wants to write.

        After a tensor was borrowed, and only then, `give_back` must be called, and before long.
        """
        if self._bytes is None or position + nbytes > self._size:
            return None
        try:
            _lease(self._descriptor.number)
        except OSError:
            return None
        begun, address = time.monotonic(), self._address + position
        # Mapped at once, which says of a page that can't be had what touching it would be killed for. Single pages that
        # have to come from the device are waited for, unless that takes so long that others should write first.
        is_there = not is_absent(address, nbytes, 3) and advise(address, nbytes, POPULATE_READ)
        if is_there and time.monotonic() - begun < _PATIENCE_SECONDS:
            return self._bytes[position : position + nbytes]
        self.give_back()
        return None

    def unmap(self) -> None:
        """Let go of all pages, none of which may be in use: 8 ms for 1 GiB, which threads should do side by side."""
        if self._bytes is not None:
            advise(self._address, self._size, _DONTNEED)

    def give_back(self) -> None:
        """Let others write; harmless where the kernel has taken the lease, or there is none."""
        with contextlib.suppress(OSError, ValueError):
            _end_lease(self._descriptor.number)

    def close(self) -> None:
        """Give up the file; unmapped when nobody holds what was borrowed."""
        self.give_back()  # an interrupt may have come before anybody could; the mapping would keep the lease
        self._bytes = None
        self._descriptor.close()
