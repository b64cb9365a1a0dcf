"""How bytes are fetched from a source: the one place that chooses between the ways of reading a file."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

from torchload.source import Descriptor, Source
from torchload.transfer.direct import DIRECT_IO_BYTES, DirectFile
from torchload.transfer.memory import address_of, advise, is_resident, scatter

if sys.platform == "linux":
    import fcntl

__all__ = ["Reader"]

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_F_SETSIG = 10  # not in Python's fcntl before 3.11


class Reader:
    """Fetches bytes for one transfer; safe to use from several threads. Close it when all of them are done."""

    def __init__(self) -> None:
        self._leases: dict[Source, _Lease | None] = {}
        self._direct: dict[int, DirectFile | None] = {}
        self._lock = threading.Lock()

    @property
    def is_cold(self) -> bool:
        """Whether any file that was looked at is cold."""
        return any(file is not None for file in self._direct.values())

    def look_at(self, source: Source) -> bool:
        """Whether a source's file is cold, so that it is best read in large requests to its device.

        From then on that is how it is read. To be asked before several threads read.
        """
        if source.fd is None:
            return False
        if source.fd not in self._direct:
            self._direct[source.fd] = DirectFile.open(source.fd)
        return self._direct[source.fd] is not None

    def readinto(self, source: Source, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of `source`, wholly; raises like `Source.readinto`."""
        if self._direct and len(buffer) >= DIRECT_IO_BYTES and source.fd is not None:
            file = self._direct.get(source.fd)
            if file is not None and file.read(source.base + offset, buffer):
                return
        source.readinto(offset, buffer)

    def scatter(self, source: Source, offset: int, nbytes: int, places: Sequence[int]) -> bool:
        """Fill several places (see `memory.scatter`) with `nbytes` bytes; if False, read them in another way."""
        descriptor = source.fd
        if descriptor is not None and self._direct.get(descriptor) is not None:
            return False
        return descriptor is not None and scatter(descriptor, source.base + offset, places) == nbytes

    def lend(self, source: Source, offset: int, nbytes: int) -> int | None:
        """The address of bytes that are in memory already, if they are safe there until the next call; never write.

        This spares the copy that a read into scratch memory makes.
        """
        if source.fd is None or self._direct.get(source.fd) is not None:
            return None
        with self._lock:
            if source not in self._leases:
                self._leases[source] = _Lease.take(source)
            lease = self._leases[source]
        return None if lease is None else lease.address(source.base + offset, nbytes)

    def close(self) -> None:
        """Give up what was held to read and lend from."""
        for file in self._direct.values():
            if file is not None:
                file.close()
        self._direct.clear()
        for lease in self._leases.values():
            if lease is not None:
                lease.close()
        self._leases.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Lease:
    """A mapped file that nobody can truncate meanwhile.

    Touching a mapped page that a truncation took away kills the process. Under a read lease (``F_SETLEASE``) the
    kernel makes whoever wants to write to the file or truncate it wait, and tells us. Linux grants one to a file's
    owner, where the file system knows leases and nobody writes to the file.
    """

    def __init__(self, descriptor: Descriptor, mapping: mmap.mmap) -> None:
        self._descriptor = descriptor
        self._mapping: mmap.mmap | None = mapping
        self._address = address_of(mapping)
        self._size = len(mapping)

    @classmethod
    def take(cls, source: Source) -> _Lease | None:
        """Lease the file behind a source and map it, or None where that can't be had."""
        if sys.platform != "linux":
            return None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # Leases belong to an open file description; ours must not interfere with another transfer's.
            descriptor = Descriptor()
            descriptor.take(os.open, f"/proc/self/fd/{source.fd}", os.O_RDONLY | os.O_CLOEXEC)
            number = descriptor.number
            fcntl.fcntl(number, _F_SETSIG, signal.SIGURG)  # ignored by default, where SIGIO would kill
            fcntl.fcntl(number, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            return cls(descriptor, mmap.mmap(number, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE))
        return None

    def address(self, position: int, nbytes: int) -> int | None:
        """Where the bytes are, if they are in the page cache and the lease still holds."""
        if sys.platform != "linux":
            return None
        address = self._address + position
        with contextlib.suppress(OSError):
            # A lease that is being broken holds for many seconds more (/proc/sys/fs/lease-break-time).
            held = fcntl.fcntl(self._descriptor.number, fcntl.F_GETLEASE) == fcntl.F_RDLCK
            within = position + nbytes <= self._size
            if held and within and is_resident(address, nbytes) and advise(address, nbytes, _POPULATE_READ):
                return address
        return None

    def close(self) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.close()
        self._descriptor.close()  # which ends the lease
