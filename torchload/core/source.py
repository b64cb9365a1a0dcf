"""Where bytes come from: a file, memory, or a stream that can seek.

A `Source` is a run of bytes with random access. Reads are whole or raise; slices share the underlying file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torchload.core.budget import Budget
from torchload.core.collector import collector_running
from torchload.core.text import printable
from torchload.errors import CheckpointFormatError, CorruptCheckpointError, TorchLoadError, incomplete

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Descriptor", "FileSource", "MemorySource", "Source", "StreamSource", "UnpackedSource"]


class Source(ABC):
    """Random access to a run of `size` bytes.

    Attributes:
        name: What to call it in messages (a path, as a rule).
        size: Length in bytes, fixed when the source was opened.
        fd: File descriptor that holds the bytes, or ``None`` for memory.
        base: Position of byte 0 in that descriptor, or in what else holds the bytes.
        budget: What reading its content may cost; that of the whole load.
    """

    __slots__ = ("base", "budget", "name", "size")
    _fields: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls) -> None:
        cls._fields = tuple(field for kind in cls.__mro__ for field in getattr(kind, "__slots__", ()))

    def __init__(self, name: str, size: int, budget: Budget) -> None:
        self.name = name
        self.size = size
        self.base = 0
        self.budget = budget

    @property
    def fd(self) -> int | None:
        return None

    @abstractmethod
    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, one byte per item) from byte `offset`, wholly.

        Raises:
            CorruptCheckpointError: The source ends before the buffer is full.
            OSError: The device failed.
        """

    def slice(self, offset: int, size: int, name: str | None = None) -> Source:
        """The `size` bytes from `offset`, as a source of its own over the same file."""
        self._check(offset, size)
        part: Source = object.__new__(type(self))  # `copy.copy` takes ten times as long; an archive has many parts
        for field in self._fields:
            setattr(part, field, getattr(self, field))
        part.name, part.base, part.size = name or self.name, self.base + offset, size
        return part

    def read(self, offset: int, size: int) -> bytes:
        """The `size` bytes from `offset`; raises like `readinto`."""
        self._check(offset, size)
        buffer = bytearray(size)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        """Release the file. Closing twice is harmless."""

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            needed = f"{size} bytes are needed at offset {offset}, but the file has {self.size}"
            raise incomplete(self.name, needed)


class FileSource(Source):
    """A regular file, opened once; safe to read from several threads.

    Attributes:
        identity: Device, inode, size in bytes and modification time in ns, to notice a file that was replaced.
    """

    __slots__ = ("_descriptor", "identity")

    def __init__(self, path: str | os.PathLike[str], budget: Budget | None = None) -> None:
        name = os.fspath(path)
        # Without O_NONBLOCK, opening a FIFO waits for its writer; on regular files the flag does nothing.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        self._descriptor = Descriptor()
        try:
            self._descriptor.take(os.open, name, flags)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            if not _raise_open_file_limit():
                raise TorchLoadError(_TOO_MANY_FILES.format(printable(name, None)), path=name) from None
            self._descriptor.take(os.open, name, flags)
        self._describe(name, budget)

    @classmethod
    def from_descriptor(cls, descriptor: int, name: str, budget: Budget | None = None) -> FileSource:
        """The file behind a descriptor, which is duplicated: neither it nor its position is touched."""
        source = cls.__new__(cls)
        source._descriptor = Descriptor()
        source._descriptor.take(os.dup, descriptor)
        source._describe(name, budget)
        return source

    def _describe(self, name: str, budget: Budget | None) -> None:
        status = os.fstat(self._descriptor.number)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointFormatError(f"{name} is not a regular file.", path=name, found="special file")
        super().__init__(name, status.st_size, _grown(budget, status.st_size))
        self.identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def fd(self) -> int | None:
        return self._descriptor.number if self._descriptor.number >= 0 else None

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        position = self.base + offset
        while len(buffer):
            count = read_at(self._descriptor.number, buffer, position)
            if count == 0:
                raise CorruptCheckpointError(
                    f"{self.name} became shorter while it was read: nothing at byte {position}. Nobody may write to a "
                    "checkpoint that is being loaded.",
                    path=self.name,
                )
            buffer = buffer[count:]
            position += count

    def close(self) -> None:
        self._descriptor.close()


def _preadv(descriptor: int, buffer: memoryview, position: int) -> int:
    return os.preadv(descriptor, [buffer], position)


def _pread(descriptor: int, buffer: memoryview, position: int) -> int:
    data = os.pread(descriptor, min(len(buffer), _STREAM_CHUNK_BYTES), position)
    buffer[: len(data)] = data
    return len(data)


_seeking = threading.Lock()


def _seek_and_read(descriptor: int, buffer: memoryview, position: int) -> int:
    """For systems without reads at a position (Windows): no two of ours may move a descriptor at once."""
    with _seeking:
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            os.lseek(descriptor, position, os.SEEK_SET)
            data = os.read(descriptor, min(len(buffer), _STREAM_CHUNK_BYTES))
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)  # it may be the caller's, too
    buffer[: len(data)] = data
    return len(data)


read_at = _preadv if hasattr(os, "preadv") else _pread if hasattr(os, "pread") else _seek_and_read
"""``read_at(descriptor, buffer, position)`` reads what it can, and returns how many bytes that was; 0 at the end."""


class Descriptor:
    """An open file descriptor; closed once, at the latest with the last of those who hold it.

    An interrupt that comes during a call is raised after it, when the number that it returned would be lost, and the
    file open for good. So numbers go from call to list and back without a step of the interpreter in between.
    """

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def take(self, function: Callable[..., int], *arguments: object) -> None:
        """Call a function that opens a descriptor."""
        self._numbers.extend(map(function, *((argument,) for argument in arguments)))

    @property
    def number(self) -> int:
        return self._numbers[0] if self._numbers else -1

    def close(self) -> None:
        with contextlib.suppress(IndexError, AttributeError):  # closed before, or never begun
            any(map(os.close, map(self._numbers.pop, (-1,))))

    def __del__(self) -> None:
        try:
            self.close()
        finally:  # an interrupt is lost in a finalizer, as everywhere in Python; the file must not stay open with it
            self.close()


class MemorySource(Source):
    """Bytes that are in memory already: a `BytesIO`, or data embedded in a pickle."""

    __slots__ = ("view",)

    def __init__(self, data: Buffer, name: str = "<memory>", budget: Budget | None = None) -> None:
        """Bytes as a source; a file of their own unless the `budget` of what they were read from is given."""
        self.view = memoryview(data).cast("B").toreadonly()
        super().__init__(name, self.view.nbytes, budget or _grown(None, self.view.nbytes))

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        start = self.base + offset
        buffer[:] = self.view[start : start + len(buffer)]


class UnpackedSource(Source):
    """Bytes that are packed somewhere: unpacked when they are first read, and kept as long as this is."""

    __slots__ = ("_lock", "_unpack", "_unpacked")

    def __init__(self, unpack: Callable[[], bytes | bytearray], size: int, name: str, budget: Budget) -> None:
        self._unpack = unpack
        self._unpacked: list[bytes | bytearray] = []
        self._lock = threading.Lock()
        super().__init__(name, size, budget)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        with self._lock:
            if not self._unpacked:
                self._unpacked.append(self._unpack())
        start = self.base + offset
        buffer[:] = memoryview(self._unpacked[0])[start : start + len(buffer)]


class StreamSource(Source):
    """Any object with ``seek`` and ``read``, such as a remote file; one read at a time, its position restored."""

    __slots__ = ("_lock", "_stream")

    def __init__(self, stream: Any, name: str, budget: Budget | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        position = stream.tell()
        try:
            end = stream.seek(0, os.SEEK_END)
            size = stream.tell() if end is None else end
        finally:
            stream.seek(position)
        super().__init__(name, size, _grown(budget, size))

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._check(offset, len(buffer))
        with collector_running(), self._lock:
            position = self._stream.tell()
            try:
                self._stream.seek(self.base + offset)
                self._fill(buffer)
            finally:
                self._stream.seek(position)

    def _fill(self, buffer: memoryview) -> None:
        while len(buffer):
            chunk = self._stream.read(min(len(buffer), _STREAM_CHUNK_BYTES))
            if not chunk or len(chunk) > len(buffer):
                raise CorruptCheckpointError(
                    f"{self.name} gave {len(chunk or b'')} bytes where {len(buffer)} were left to read.", path=self.name
                )
            buffer[: len(chunk)] = chunk
            buffer = buffer[len(chunk) :]


_TOO_MANY_FILES = (
    "{} can't be opened: this process has as many files open as it may, the checkpoint's other files among them. Raise "
    "that limit (ulimit -n as root, LimitNOFILE= of a service, --ulimit nofile= of a container), or let go of weights "
    "that were mapped before."
)


def _raise_open_file_limit() -> bool:
    """Have this process allowed as many open files as it may allow itself; whether that is more than before."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            return True
    return False


def _grown(budget: Budget | None, size_bytes: int) -> Budget:
    """The load's budget, grown by one more file; a new one for a load of this file alone."""
    budget = budget or Budget()
    budget.add_file(size_bytes)
    return budget


_STREAM_CHUNK_BYTES = 8 * 1024 * 1024
