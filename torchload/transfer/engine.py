"""Carry out copies: every byte is read once, and goes straight to where it ends up or through a bounded scratch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from torchload.core.copies import Copy
from torchload.core.source import Source
from torchload.errors import CastOverflowError, CorruptCheckpointError
from torchload.transfer.crew import Crew, available_cores, can_limit_intra_op, intra_op_alone
from torchload.transfer.direct import REQUESTS_IN_FLIGHT
from torchload.transfer.host import HostWorker, decode
from torchload.transfer.memory import memory_at
from torchload.transfer.overflow import OverflowFoundError, largest_finite, limit_of, overflow_error, overflows
from torchload.transfer.pieces import Job, Piece, schedule
from torchload.transfer.reader import Reader
from torchload.transfer.settings import thread_count

if TYPE_CHECKING:
    from torchload.transfer.checksums import Arrivals
    from torchload.transfer.ring import Ring

__all__ = ["Progress", "check_unchanged", "default_threads", "note_writes", "run"]

MAX_THREADS = 8
"""More don't help: a few cores saturate memory. Scratch memory grows with them."""
BYTES_PER_THREAD = 8 << 20
"""A thread is worth starting for this much work."""
_MOST_LOOKED_AT = 4 << 30
"""Bytes that are read again to say all that overflows: a few seconds, where a load has failed anyway."""

_UNPINNED = "the system gave too little pinned memory: copies to the GPU were slower than they could be"

Progress = Callable[[int, int], None]


def run(
    copies: Sequence[Copy],
    *,
    check: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    notes: list[str] | None = None,
) -> int:
    """Carry out checked copies.

    Whatever mode the caller is in (`inference_mode`, `no_grad`, `autocast`, a default device or dtype), targets are
    written in place; autograd sees that they changed.

    Args:
        copies: What goes where. Sources, shapes and offsets are taken to be valid.
        check: Whether to compare checksums on the way; see `Arrivals` for which.
        threads: How many threads may work, the calling one included; by default as many as are worth it.
        progress: Receives (bytes done, bytes in all) now and then, in the calling thread.
        notes: Receives a sentence about what made this slower than it might be.

    Returns:
        Number of bytes read.

    Raises:
        CastOverflowError: A finite value became infinite in a target's dtype.
        CorruptCheckpointError: A source ended too early, or changed while it was read, or data failed its checksum.
        OSError: A device failed.

        Any error, a KeyboardInterrupt included, has an attribute ``written``: the names of the copies whose targets
        may hold new data in whole or in part, in the order of `copies`.
    """
    if not copies:
        return 0
    with Reader() as reader:
        with torch.inference_mode():
            jobs = schedule(copies, reader.look_at)
        return _do(copies, jobs, reader, _arrivals(copies) if check else None, threads, progress, notes)


def _arrivals(copies: Sequence[Copy]) -> Arrivals:
    from torchload.transfer.checksums import Arrivals  # for `verify=True` only

    return Arrivals(copies)


def _do(
    copies: Sequence[Copy],
    jobs: Sequence[Job],
    reader: Reader,
    arrivals: Arrivals | None,
    threads: int | None,
    progress: Progress | None,
    notes: list[str] | None,
) -> int:
    """Work through the jobs, and account for what they did to the targets."""
    total_bytes = sum(job.nbytes for job in jobs)
    sources = {id(job.source): job.source for job in jobs}.values()

    def report(done_bytes: int) -> None:
        if progress is not None:
            progress(done_bytes, total_bytes)

    if threads is None:
        threads = default_threads(
            sum(job.nbytes for job in jobs if not job.can_scatter or reader.is_cold or arrivals is not None),
            computes=not all(job.is_direct or job.can_scatter or job.device.type == "cuda" for job in jobs),
            cold=reader.is_cold,
        )
    rings: dict[torch.device, Ring] = {}
    crew = Crew(jobs, lambda: _Worker(reader, rings, arrivals), threads, report if progress is not None else None)
    try:
        check_unchanged(sources)
        rings.update(_new_rings(jobs, threads))
        _run(crew, rings.values())
        check_unchanged(sources)
        if arrivals is not None:
            arrivals.check()
    except BaseException as error:
        touched = {id(piece.copy) for job in crew.started for piece in job.pieces}
        written = [copy for copy in copies if id(copy) in touched]
        note_writes(written)
        if isinstance(error, OverflowFoundError):
            error.__traceback__ = None  # its frames hold the file's pages, for as long as somebody keeps the error
            raise _explain(error.copy, copies, written) from None
        error.written = tuple(copy.name for copy in written)  # type: ignore[attr-defined]
        raise
    else:
        note_writes(copies)
        if notes is not None and _UNPINNED not in notes and any(ring.lacks_pinned_memory for ring in rings.values()):
            notes.append(_UNPINNED)
    finally:
        rings.clear()  # memory on devices, which an error's traceback would hold
    return crew.done_bytes


def _run(crew: Crew[Job], rings: Collection[Ring]) -> None:
    """Do the jobs, wait until all of them have arrived, and look closer at those that may have overflowed.

    Raises:
        BaseException: What a worker raised, or else what waiting did; overflow is reported only where nothing failed.
    """
    error: BaseException | None = None
    is_over = False
    try:
        for ring in rings:
            ring.start()
        crew.run()
    except BaseException as failure:  # noqa: BLE001 - raised once all has arrived
        error = failure
    # From here on nothing is called outside of a `try`: an interrupt there would leave threads that send.
    while not is_over:
        try:
            for ring in rings:
                ring.finish(error)
            is_over = True
        except BaseException as failure:  # noqa: BLE001 - the same; the others have yet to finish
            if error is None:
                error = failure
    try:
        if error is not None:
            raise error
    finally:
        del error  # its traceback holds this frame
    if suspicious := [job for ring in rings for job in ring.suspicious]:
        with torch.inference_mode(), intra_op_alone():
            for job in suspicious:
                _look_closer(job)


def _look_closer(job: Job) -> None:
    """Raise OverflowFoundError if a cast in the job lost a finite value, by doing it again on the host."""
    for piece in job.pieces:
        if limit_of(piece.copy.dtype, piece.target.dtype) is not None:
            values = _read(piece)
            if overflows(values, values.to(piece.target.dtype)):
                raise OverflowFoundError(piece.copy)


def _read(piece: Piece) -> torch.Tensor:
    """A piece's values, on the host, in the file's dtype."""
    data = torch.empty(piece.nbytes, dtype=torch.uint8, device="cpu")
    piece.copy.box.extent.source.readinto(piece.offset, memory_at(data.data_ptr(), piece.nbytes))
    return decode(piece, data)


class _Worker:
    """Does any job, each in the way of its device; one for each thread."""

    def __init__(self, reader: Reader, rings: Mapping[torch.device, Ring], arrivals: Arrivals | None) -> None:
        self._host = HostWorker(reader, arrivals)
        self._by_device: dict[torch.device, Callable[[Job], int]] = {}
        if rings:
            from torchload.transfer.ring import RingWorker

            self._by_device.update((device, RingWorker(reader, ring)) for device, ring in rings.items())

    def __call__(self, job: Job) -> int:
        worker = self._by_device.get(job.device)
        return self._host(job) if worker is None else worker(job)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._host.close()


def _new_rings(jobs: Iterable[Job], threads: int) -> dict[torch.device, Ring]:
    """A ring for each device that copies on its own."""
    by_device: dict[torch.device, list[Job]] = {}
    for job in jobs:
        if job.device.type == "cuda":
            by_device.setdefault(job.device, []).append(job)
    if not by_device:
        return {}
    from torchload.transfer.cuda import cuda_ring  # most loads have no use for it

    return {device: cuda_ring(device, members, threads) for device, members in by_device.items()}


def default_threads(total_bytes: int, *, computes: bool, cold: bool = False, least: int = 1) -> int:
    """How many threads are worth starting for so much data; `least` where some wait for others, however few cores."""
    if (wish := thread_count()) is not None:
        return wish
    worth = 1 + total_bytes // BYTES_PER_THREAD
    if cold:
        return min(REQUESTS_IN_FLIGHT, worth)
    threads = min(max(available_cores(), least), MAX_THREADS, worth)
    if threads > 1 and computes and not can_limit_intra_op():
        return 1  # torch's own threads share the work of each operator
    return threads


def check_unchanged(sources: Iterable[Source]) -> None:
    """Raise if a file isn't what it was when its checkpoint was opened."""
    for source in sources:
        identity = getattr(source, "identity", None)
        if identity is None or source.fd is None:
            continue
        status = os.fstat(source.fd)
        if (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns) != identity:
            raise CorruptCheckpointError(
                f"{source.name} was changed since it was opened ({identity[2]} bytes then, {status.st_size} now). "
                "Nobody may write to a checkpoint that is being loaded; load it again.",
                path=source.name,
            )


def note_writes(copies: Iterable[Copy]) -> None:
    """Tell autograd about writes to memory that it hasn't seen."""
    targets = [copy.target for copy in copies]
    try:
        torch.autograd.graph.increment_version(targets)
    except (RuntimeError, TypeError):  # torch 2.4 takes one at a time
        for target in targets:
            if not target.is_inference():
                torch.autograd.graph.increment_version(target)


def _explain(copy: Copy, copies: Iterable[Copy], written: Iterable[Copy]) -> CastOverflowError:
    """The error for a copy that overflowed, with the largest value of its tensor, and the others that would."""
    with torch.inference_mode(), intra_op_alone():
        overflowing = {copy.name: max(largest_finite(_read(piece)) for job in schedule([copy]) for piece in job.pieces)}
        budget = _MOST_LOOKED_AT
        for job in schedule([item for item in copies if limit_of(item.dtype, item.target.dtype) is not None]):
            budget -= job.nbytes
            if budget < 0:
                break
            for piece in job.pieces:
                values = _read(piece)
                if overflows(values, values.to(piece.target.dtype)):
                    name = piece.copy.name
                    overflowing[name] = max(overflowing.get(name, 0.0), largest_finite(values))
    error = overflow_error(copy.name, copy.dtype, copy.target.dtype, overflowing)
    error.written = tuple(item.name for item in written)
    return error
