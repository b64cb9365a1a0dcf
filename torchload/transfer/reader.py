"""How bytes are fetched from a source: the one place that chooses between the ways of reading a file."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torchload.core.source import Source
from torchload.transfer.direct import DIRECT_IO_BYTES, DirectFile
from torchload.transfer.lease import LeasedFile
from torchload.transfer.memory import scatter

__all__ = ["Reader"]


class Reader:
    """Fetches bytes for one transfer; safe to use from several threads. Close it when all of them are done."""

    def __init__(self) -> None:
        self._direct: dict[int, DirectFile | None] = {}
        self._leased: list[LeasedFile] = []

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

    def is_direct(self, source: Source) -> bool:
        """Whether a source's file was looked at and is cold."""
        return self._direct.get(source.fd if source.fd is not None else -1) is not None

    def pages(self, source: Source) -> LeasedFile | None:
        """Where a source's bytes may be read without copying them, for the calling thread; None if nowhere."""
        if source.fd is None or self.is_direct(source):
            return None
        file = LeasedFile.open(source.fd)
        if file is not None:
            self._leased.append(file)
        return file

    def close(self) -> None:
        """Give up what was held to read."""
        while self._leased:
            self._leased.pop().close()
        for file in self._direct.values():
            if file is not None:
                file.close()
        self._direct.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
