"""Questions about data in files that are answered without keeping it: is it sound, is it the same?"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from torchload.core.checkpoint import Extent, TensorEntry
from torchload.core.copies import Copy
from torchload.core.word_sums import WordSums
from torchload.transfer.arena import allocate
from torchload.transfer.checksums import crc_differs, new_word_sums, report_damage
from torchload.transfer.crew import Crew
from torchload.transfer.direct import is_cold
from torchload.transfer.engine import Progress, check_unchanged, default_threads
from torchload.transfer.mapped import read_entries
from torchload.transfer.memory import is_same, memory_at
from torchload.transfer.pieces import STRIDED_BYTES, Job, Piece, is_plain, schedule
from torchload.transfer.reader import Reader

__all__ = ["not_seen_equal", "same_data", "verify_extents"]

_CHUNK_BYTES = 1 << 20
"""What is read at once: small enough for the cache, large enough for the call not to show."""
_READERS_OF_COLD_FILES = 3
"""One reads, the others sum what they have read."""
_ASKED_AHEAD = 64
"""So many chunks are under way to the page cache before their turn. Readahead by itself asks for 128 KiB at a time: so
reading 1 GiB took 2.7 s from a virtual disk (Xeon), 0.6 to 1 s with these requests in flight; past the cache, 0.6 s."""
_ASKED_BYTES = 128 << 10
"""What a kernel surely reads ahead at once; it may pass over what goes beyond."""


def verify_extents(
    extents: Iterable[Extent],
    *,
    names: Mapping[Extent, str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Compare data with the checksums that its file records, and note sums of its words.

    Args:
        extents: What to check; those without a recorded checksum are passed over.
        names: What to call an extent in messages, such as the name of a tensor in it.
        threads: How many threads may work, by default as many as are worth it.
        progress: Receives (bytes done, bytes in all) now and then, in the calling thread.

    Returns:
        Number of bytes checked.

    Raises:
        CorruptCheckpointError: Data differs from its checksum, or a file ended early or changed. All damaged extents
            are named.
        OSError: A device failed.
    """
    checked = [extent for extent in dict.fromkeys(extents) if extent.crc32 is not None]
    crcs: dict[Extent, dict[int, tuple[int, int]]] = {extent: {} for extent in checked}
    sums = {extent: new_word_sums(extent) for extent in checked}
    jobs = [
        _Part(extent, skip, min(_CHUNK_BYTES, extent.nbytes - skip), crcs[extent], sums[extent])
        for extent in sorted(checked, key=_position)
        for skip in range(0, extent.nbytes, _CHUNK_BYTES)
    ]
    total_bytes = sum(job.nbytes for job in jobs)
    check_unchanged(dict.fromkeys(extent.source for extent in checked))
    on_progress = None if progress is None else lambda done_bytes: progress(done_bytes, total_bytes)
    turns = _turns(jobs)
    threads = threads or default_threads(total_bytes, computes=False, least=_READERS_OF_COLD_FILES if turns else 1)
    Crew(jobs, lambda: contextlib.nullcontext(_Summer(turns)), threads, on_progress).run()
    report_damage([found for extent, parts in crcs.items() for found in crc_differs(extent, parts)], names or {})
    for extent in checked:
        extent.word_sums = sums[extent]
    return total_bytes


class _Part(NamedTuple):
    """A stretch of an extent, and where to leave its CRC-32 and length (by its position in the extent) and sums."""

    extent: Extent
    skip: int
    nbytes: int
    crcs: dict[int, tuple[int, int]]
    sums: WordSums | None


class _Turns(NamedTuple):
    """A cold file: one thread at a time reads the next of its parts, the others sum what they have read.

    It is read from front to back, and stays in the page cache, where the load finds it afterwards; several threads at
    once, or out of order, would confuse the readahead. What comes later is asked for early, so that the device is busy.
    """

    lock: threading.Lock
    parts: deque[_Part]
    later: Iterator[_Part]

    def next(self) -> _Part:
        """The part whose turn it is; one further ahead is asked for."""
        self.ask_for(1)
        return self.parts.popleft()  # as many are in there as there are jobs

    def ask_for(self, count: int) -> None:
        """Let the kernel bring what comes later into the page cache, without waiting for it."""
        for extent, skip, nbytes, _, _ in islice(self.later, count):
            start = extent.source.base + extent.offset + skip
            for position in range(start, start + nbytes, _ASKED_BYTES):
                with contextlib.suppress(OSError):  # only slower
                    os.posix_fadvise(extent.source.fd or 0, position, _ASKED_BYTES, os.POSIX_FADV_WILLNEED)


def _turns(parts: Iterable[_Part]) -> dict[int | None, _Turns]:
    """File descriptor → whose turn it is, for each cold file among those of the parts."""
    by_file: dict[int | None, deque[_Part]] = {}
    for part in parts:
        by_file.setdefault(part.extent.source.fd, deque()).append(part)
    turns: dict[int | None, _Turns] = {
        number: _Turns(threading.Lock(), members, iter(list(members)))
        for number, members in by_file.items()
        if number is not None and is_cold(number)
    }
    for members in turns.values():
        members.ask_for(_ASKED_AHEAD)
    return turns


class _Summer:
    """Computes checksums of parts; one for each thread."""

    def __init__(self, turns: Mapping[int | None, _Turns]) -> None:
        """Ready to sum; cold files, by their descriptors, are read in turns."""
        self._turns = turns
        [scratch] = allocate([((_CHUNK_BYTES,), torch.uint8)], torch.device("cpu"))
        self._scratch = scratch  # owns the memory
        self._memory = memory_at(scratch.data_ptr(), _CHUNK_BYTES)

    def __call__(self, part: _Part) -> int:
        turns = self._turns.get(part.extent.source.fd)
        if turns is None:
            chunk = self._read(part)
        else:
            with turns.lock:
                part = turns.next()
                chunk = self._read(part)
        part.crcs[part.skip] = (zlib.crc32(chunk), part.nbytes)
        if part.sums is not None:
            part.sums.add(chunk, part.skip)
        return part.nbytes

    def _read(self, part: _Part) -> memoryview:
        chunk = self._memory[: part.nbytes]
        part.extent.source.readinto(part.extent.offset + part.skip, chunk)
        return chunk


def _position(extent: Extent) -> int:
    return extent.source.base + extent.offset


def not_seen_equal(copies: Sequence[Copy]) -> list[Copy]:
    """The copies whose targets don't hold, bit for bit, what their sources do, in order; by a quick look.

    Only what is plain on both sides and on the CPU is looked at. All else counts as not seen equal.

    Raises:
        CorruptCheckpointError: A source ended too early, or changed.
        OSError: A device failed.
    """
    plain_copies = [copy for copy in copies if copy.target.is_cpu and is_plain(copy)]
    with torch.inference_mode():
        jobs = schedule(plain_copies)
    plain: list[Job] = []
    overlapping: list[Job] = []
    for job in jobs:
        (plain if job.is_direct or job.can_scatter else overlapping).append(job)
    equal = {id(copy): not copy.target.numel() for copy in copies} | {id(copy): True for copy in plain_copies}
    equal.update((id(piece.copy), False) for job in overlapping for piece in job.pieces)
    sources = dict.fromkeys(job.source for job in plain)
    total_bytes = sum(job.nbytes for job in plain)
    check_unchanged(sources)
    with Reader() as reader:
        cold = [source for source in sources if reader.look_at(source)]
        threads = default_threads(total_bytes, computes=False, cold=bool(cold))
        Crew(plain, lambda: contextlib.nullcontext(_Comparer(reader, equal)), threads).run()
    check_unchanged(sources)
    return [copy for copy in copies if not equal[id(copy)]]


class _Comparer:
    """Compares jobs' data with what is in place; one for each thread."""

    def __init__(self, reader: Reader, equal: dict[int, bool]) -> None:
        """Ready to compare; `equal` has for each copy's identity whether no difference was found so far."""
        self._reader = reader
        self._equal = equal
        room_bytes = max(_CHUNK_BYTES, STRIDED_BYTES)
        [self._scratch] = allocate([((room_bytes,), torch.uint8)], torch.device("cpu"))
        self._address = self._scratch.data_ptr()
        self._memory = memory_at(self._address, room_bytes)

    def __call__(self, job: Job) -> int:
        if job.can_scatter:  # never more than `STRIDED_BYTES`
            self._reader.readinto(job.source, job.offset, self._memory[: job.nbytes])
            for piece in job.pieces:
                self._compare(piece, 0, piece.nbytes, self._address + piece.offset - job.offset)
            return job.nbytes
        for skip in range(0, job.nbytes, _CHUNK_BYTES):
            nbytes = min(_CHUNK_BYTES, job.nbytes - skip)
            self._reader.readinto(job.source, job.offset + skip, self._memory[:nbytes])
            self._compare(job.pieces[0], skip, nbytes, self._address)
        return job.nbytes

    def _compare(self, piece: Piece, skip: int, nbytes: int, address: int) -> None:
        if not is_same(piece.target.data_ptr() + piece.skip_bytes + skip, address, nbytes):
            self._equal[id(piece.copy)] = False


def same_data(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two entries are the same tensor bit for bit: dtype, shape, and every byte.

    Raises:
        CorruptCheckpointError: A source ended too early, or changed.
        OSError: A device failed.
    """
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.numel == 0 or first.location == second.location:
        return True
    starts = _plain_start(first), _plain_start(second)
    if None in starts or first.boxes[0].extent.big_endian != second.boxes[0].extent.big_endian:
        one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in read_entries([first, second]))
        return torch.equal(one, other)
    buffers = [memoryview(bytearray(min(_CHUNK_BYTES, first.nbytes))) for _ in starts]
    for skip in range(0, first.nbytes, _CHUNK_BYTES):
        chunks = [buffer[: first.nbytes - skip] for buffer in buffers]
        for entry, start, chunk in zip((first, second), starts, chunks, strict=True):
            entry.boxes[0].extent.source.readinto((start or 0) + skip, chunk)
        if chunks[0] != chunks[1]:
            return False
    return True


def _plain_start(entry: TensorEntry) -> int | None:
    """Where an entry begins in its source if its bytes are there in one run, else None."""
    if len(entry.boxes) != 1 or not entry.boxes[0].is_contiguous:
        return None
    return entry.boxes[0].extent.offset + entry.boxes[0].start
