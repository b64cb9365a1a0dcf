"""What the machine itself can do, measured beside the contestants in the same run.

Each function sets everything up, untimed, and returns the work to be timed. None of them loads anything.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.arms import Job
from benchmarks.cases import Case
from benchmarks.machine import CHUNK_BYTES, anonymous_memory, usable_cores
from benchmarks.models import named_tensors

__all__ = ["CEILINGS", "Ceiling", "Work"]

Work = Callable[[], Sequence[torch.Tensor]]
"""What is timed; returns the tensors that it filled, if they have to be there for it to count."""


@dataclass(frozen=True, slots=True)
class Ceiling:
    """One limit.

    Attributes:
        name: As in the tables.
        prepare: Sets up, and returns the work.
        applies: Whether it limits a case on a device (``"cpu"``, ``"cuda"``).
        main: Whether ratios are taken to it; where several are, to the fastest of them.
    """

    name: str
    prepare: Callable[[Job], Work]
    applies: Callable[[Case, str], bool]
    main: bool = False


def _copy_into_model(job: Job, threads: int) -> Work:
    """Memory to the model's own parameters; both are present before the clock starts."""
    tensors = [tensor.detach() for _, tensor in named_tensors(job.model)]
    places = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]
    source = anonymous_memory(sum(nbytes for _, nbytes in places), filled=True)
    copies, position = [], _address(source)
    for place, nbytes in places:
        copies += [(place + at, position + at, min(CHUNK_BYTES, nbytes - at)) for at in range(0, nbytes, CHUNK_BYTES)]
        position += nbytes
    return partial(_run_copies, copies, threads, tensors, keep=source)


def _copy_into_fresh(job: Job, threads: int) -> Work:
    """Memory to fresh huge pages, which are faulted in on the way: what a meta model can hope for."""
    nbytes = os.stat(job.path).st_size
    source = anonymous_memory(nbytes, filled=True)

    def work() -> Sequence[torch.Tensor]:
        arena = anonymous_memory(nbytes, filled=False)
        filled = [torch.frombuffer(arena, dtype=torch.uint8)]
        return _run_copies(_chunks(_address(arena), _address(source), nbytes), threads, filled, keep=source)

    return work


def _copy_same_bytes(job: Job, threads: int) -> Work:
    """As many bytes as the file has, memory to memory: a cast reads as much, and writes something else."""
    nbytes = os.stat(job.path).st_size
    source, target = anonymous_memory(nbytes, filled=True), anonymous_memory(nbytes, filled=True)
    copies = _chunks(_address(target), _address(source), nbytes)
    return partial(_run_copies, copies, threads, [torch.frombuffer(target, dtype=torch.uint8)], keep=source)


def _cast_in_memory(job: Job) -> Work:
    """The cast that torch makes from tensors in memory into the model, on torch's threads."""
    dtype = getattr(torch, job.case.file_dtype)
    pairs = [
        (tensor.detach(), torch.ones(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype))
        for _, tensor in named_tensors(job.model)
    ]

    def work() -> Sequence[torch.Tensor]:
        for target, source in pairs:
            target.copy_(source)
        return [target for target, _ in pairs]

    return work


def _read_direct(job: Job) -> Work:
    """The device past the page cache: O_DIRECT, eight reads of 8 MiB in flight, into memory that is reused."""
    nbytes = os.stat(job.path).st_size
    descriptor = os.open(job.path, os.O_RDONLY | os.O_DIRECT)
    buffers = [anonymous_memory(CHUNK_BYTES, filled=True) for _ in range(8)]  # whole pages, as O_DIRECT wants them

    def read_every_eighth(first: int) -> None:
        for position in range(first * CHUNK_BYTES, nbytes, 8 * CHUNK_BYTES):
            os.preadv(descriptor, [buffers[first]], position)

    return partial(_run_all, [partial(read_every_eighth, first) for first in range(8)])


def _read_buffered(job: Job) -> Work:
    """The file through the page cache, one thread, 8 MiB at a time, into memory that is reused."""
    descriptor = os.open(job.path, os.O_RDONLY)
    buffer = bytearray(CHUNK_BYTES)

    def work() -> Sequence[torch.Tensor]:
        position = 0
        while count := os.preadv(descriptor, [buffer], position):
            position += count
        return ()

    return work


def _copy_to_gpu(job: Job) -> Work:
    """Pinned memory to the GPU, chunk after chunk, as many bytes as the file has."""
    nbytes = os.stat(job.path).st_size
    source = torch.ones(min(nbytes, 256 << 20), dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=job.device)

    def work() -> Sequence[torch.Tensor]:
        for position in range(0, nbytes, len(source)):
            count = min(len(source), nbytes - position)
            target[:count].copy_(source[:count], non_blocking=True)
        torch.cuda.synchronize(job.device)
        return ()

    return work


def _run_copies(
    copies: list[tuple[int, int, int]], threads: int, filled: Sequence[torch.Tensor], keep: object
) -> Sequence[torch.Tensor]:
    """Do (target, source, bytes) copies on so many threads; `filled` and `keep` hold the memory they name."""
    del keep
    copy = ctypes.CDLL(None).memcpy  # through CDLL, which releases the GIL; ctypes.memmove holds it
    copy.argtypes, copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None

    def run(part: list[tuple[int, int, int]]) -> None:
        for target, source, nbytes in part:
            copy(target, source, nbytes)

    _run_all([partial(run, copies[first::threads]) for first in range(threads)])
    return filled


def _run_all(tasks: list[Callable[[], None]]) -> Sequence[torch.Tensor]:
    with ThreadPoolExecutor(len(tasks)) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
    return ()


def _chunks(target: int, source: int, nbytes: int) -> list[tuple[int, int, int]]:
    return [(target + at, source + at, min(CHUNK_BYTES, nbytes - at)) for at in range(0, nbytes, CHUNK_BYTES)]


def _address(region: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(region))


def _is_cast(case: Case) -> bool:
    return case.file_dtype != case.model_dtype


def _table() -> dict[str, Ceiling]:
    def existing(case: Case, device: str) -> bool:
        return device == "cpu" and not case.cold and case.into == "existing" and not _is_cast(case)

    def fresh(case: Case, device: str) -> bool:
        return device == "cpu" and not case.cold and case.into == "meta"

    def cast(case: Case, device: str) -> bool:
        return device == "cpu" and not case.cold and case.into == "existing" and _is_cast(case)

    rows = [
        Ceiling("device, O_DIRECT, 8 × 8 MiB in flight", _read_direct, lambda case, _: case.cold, main=True),
        Ceiling("device, buffered, 1 thread", _read_buffered, lambda case, _: case.cold, main=True),
        Ceiling(
            "pinned copy to the GPU", _copy_to_gpu, lambda case, device: device == "cuda" and not case.cold, main=True
        ),
    ]
    many = min(max(usable_cores(), 2), 8)
    for threads in sorted({1, 2, many}):
        name, main = f"{threads} thread{'s' if threads > 1 else ''}", threads == 2
        rows += [
            Ceiling(f"memcpy, {name}", partial(_copy_into_model, threads=threads), existing, main),
            Ceiling(f"memcpy into huge pages, {name}", partial(_copy_into_fresh, threads=threads), fresh, main),
            Ceiling(f"memcpy of as many bytes, {name}", partial(_copy_same_bytes, threads=threads), cast, main),
        ]
    rows.append(Ceiling("memcpy into present memory, 2 threads", partial(_copy_same_bytes, threads=2), fresh))
    rows.append(Ceiling("cast from memory by torch", _cast_in_memory, cast))
    return {row.name: row for row in rows}


CEILINGS = _table()
