"""Jobs whose bytes go to a CUDA device: read into pinned memory, copied and cast by the device, several in flight.

A `Lane` is a buffer in host memory with what moves data out of it on its own; a `Ring` lends lanes to reader threads in
turn and never lends one whose data hasn't left yet. Each thread keeps to one device and one of that device's streams
while it works, and a lane has memory of its own on either side, so that no thread waits for another.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from torchload.transfer.host import decode
from torchload.transfer.memory import memory_at
from torchload.transfer.overflow import largest_of, limit_of, out_of_range
from torchload.transfer.pieces import DEVICE_BYTES, RAW, Job, Piece, needs_swap
from torchload.transfer.reader import Reader

__all__ = ["Lane", "Ring", "RingWorker", "Suspicion", "cuda_ring", "drain_all"]

ALIGNMENT_BYTES = 4096
"""Bytes lie in a lane as they lie in the file's blocks: elements stay aligned, and blocks can be read directly."""
LANE_BYTES = DEVICE_BYTES + ALIGNMENT_BYTES
"""A lane holds so much at most; just short of a power of two, to which torch rounds pinned memory up."""
MAX_LANES = 16
"""Bounds what is pinned, which takes 0.4 s/GiB, and what is staged on the device, to 64 MiB."""
STRAIGHT_BYTES = 1 << 20
"""From this size on a copy of its own costs less than another pass over the device's memory."""

_COPIED_EXACTLY = frozenset(
    {torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)
"""Dtypes of which torch's kernel for many tensors moves every bit. Others have none, or go through float32 there,
which changes the payload of a NaN."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CAST_TOGETHER = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Dtypes that the same kernel casts into one another, in all versions of torch."""


class Suspicion(NamedTuple):
    """A job of which a cast may have gone wrong, unless `largest` turns out to be no more than `limit`.

    Attributes:
        job: Which.
        largest: A 0-dim tensor on the device.
        limit: What a cast in the job surely holds.
    """

    job: Job
    largest: torch.Tensor
    limit: float


class Lane(Protocol):
    """A host buffer, and copies from it that go on while the host does something else.

    Attributes:
        memory: The buffer, uint8, as long as the longest job and `ALIGNMENT_BYTES`.
        is_pinned: Whether copies from it need no copy on the host before.
        suspicions: Of what was sent, what may have overflowed; to be looked at after `wait`.
    """

    memory: torch.Tensor
    is_pinned: bool
    suspicions: list[Suspicion]

    def send(self, job: Job, start: int) -> None:
        """Start the copies of a job whose bytes lie in `memory` from byte `start`."""

    def wait(self) -> None:
        """Return when nothing that was started needs `memory` any more, even if `send` failed half-way."""


class Ring:
    """Lanes, lent in turn.

    With more lanes than threads there is always one that isn't lent, so lending waits for copies only, never for
    another thread.
    """

    def __init__(
        self,
        new_lane: Callable[[], Lane],
        count: int,
        on_device: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """Lanes are made when they are first lent.

        Args:
            new_lane: Makes a lane.
            count: How many; more than there are threads.
            on_device: What a thread has to be in while it lends lanes.
        """
        self.on_device = on_device
        self._new_lane = new_lane
        self._lanes: deque[Lane | None] = deque([None] * count)

    @contextlib.contextmanager
    def lend(self) -> Iterator[Lane]:
        """A lane whose memory may be overwritten: the one that was used longest ago."""
        lane = self._lanes.popleft()
        try:
            if lane is None:
                lane = self._new_lane()
            else:
                lane.wait()
            yield lane
        finally:
            self._lanes.append(lane)

    @property
    def lanes(self) -> list[Lane]:
        """Those that were made."""
        return [lane for lane in self._lanes if lane is not None]

    def suspicious(self) -> list[Job]:
        """Jobs in which a finite value may not have fitted, each to be looked at; to be asked after `drain_all`."""
        by_dtype: dict[torch.dtype, list[Suspicion]] = {}
        for lane in self.lanes:
            for suspicion in lane.suspicions:
                by_dtype.setdefault(suspicion.largest.dtype, []).append(suspicion)
        found: list[Job] = []
        for members in by_dtype.values():
            largest = torch.stack([suspicion.largest for suspicion in members]).tolist()
            found += [one.job for one, value in zip(members, largest) if not value <= one.limit]  # NaN too
        return found


def drain_all(rings: Iterable[Ring]) -> None:
    """Wait until every copy has arrived. Required before memory on either side is freed, even after an error.

    Raises:
        BaseException: What the first wait raised that failed, or an interrupt, once the others have been waited for.
    """
    failures: list[BaseException] = []
    lanes = [lane for ring in rings for lane in ring.lanes]
    for lane in lanes:
        try:
            lane.wait()
        except BaseException as error:  # noqa: BLE001 - the other lanes must be waited for
            failures.append(error)
    if failures:
        for lane in lanes:
            with contextlib.suppress(BaseException):  # an interrupt may have come before the wait
                lane.wait()
        raise failures[0]


class RingWorker:
    """Reads jobs into lanes and sends them off; one for each thread."""

    def __init__(self, reader: Reader, ring: Ring) -> None:
        self._reader = reader
        self._ring = ring

    def __call__(self, job: Job) -> int:
        with self._ring.lend() as lane:
            start = (job.source.base + job.offset) % ALIGNMENT_BYTES
            self._reader.readinto(job.source, job.offset, memory_at(lane.memory.data_ptr() + start, job.nbytes))
            lane.send(job, start)
        return job.nbytes


class CudaLane:
    """Pinned memory, memory on the device to cast and rearrange in, and an event that tells when both are free."""

    def __init__(self, nbytes: int, staging: torch.Tensor) -> None:
        """Ready to send.

        Args:
            nbytes: Size of its memory.
            staging: Memory on the device, uint8, as long; or empty where nothing is staged.
        """
        self.memory, self.is_pinned = _host_memory(nbytes, pin=staging.is_cuda)
        self.suspicions: list[Suspicion] = []
        self._staging = Staging(staging)
        self._event = torch.cuda.Event(blocking=True)  # waiting takes no processor time from those who read

    def send(self, job: Job, start: int) -> None:
        try:
            self.suspicions += send_pieces(job, self.memory, start, self._staging)
        finally:
            self._event.record()  # if it failed, part of it may be under way

    def wait(self) -> None:
        self._event.synchronize()


def cuda_ring(device: torch.device, jobs: Sequence[Job], threads: int) -> Ring:
    """A ring for the jobs of one device, to be made where its targets were, in that thread and on that stream."""
    count = min(max(threads + 1, min(threads + threads // 3, MAX_LANES)), len(jobs) + 1)
    nbytes = -(-max(job.nbytes for job in jobs) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + ALIGNMENT_BYTES
    stages = any(not _goes_straight(piece) for job in jobs for piece in job.pieces)
    # On the caller's stream: given back to it once everything has arrived, and to be had by whoever comes next.
    staging = torch.empty(count, nbytes if stages else 0, dtype=torch.uint8, device=device)
    free = deque(staging.unbind())
    streams = _streams(device)
    for stream in streams:  # what the caller's stream has been told so far happens first
        stream.wait_stream(torch.cuda.current_stream(device))
    turn = itertools.cycle(streams)

    @contextlib.contextmanager
    def on_device() -> Iterator[None]:
        # The device first: leaving it goes back only to one that this process has set up, which a stream does not heed.
        with torch.cuda.device(device), torch.cuda.stream(next(turn)):
            yield

    return Ring(lambda: CudaLane(nbytes, free.pop()), count, on_device)


@lru_cache(maxsize=64)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two, so that one job is cast while the next one is copied.

    They are kept, for torch keeps the memory that was allocated on a stream for that stream.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _host_memory(nbytes: int, *, pin: bool) -> tuple[torch.Tensor, bool]:
    """Memory that the device reads by itself, if there is any to be had; and whether it is such memory."""
    if pin:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True), True
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu"), False


class Staging:
    """Memory on the device where a job's bytes lie as they do in its lane, seen in any dtype."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self._start = memory.storage_offset()
        self._views: dict[torch.dtype, torch.Tensor] = {}

    def view(self, dtype: torch.dtype, at: int, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
        """The elements from byte `at` on, which must be a multiple of their size."""
        memory = self._views.get(dtype)
        if memory is None:
            memory = self._views[dtype] = self.memory.view(dtype)
        return memory.as_strided(shape, strides, (self._start + at) // dtype.itemsize)


def send_pieces(job: Job, memory: torch.Tensor, start: int, staging: Staging) -> list[Suspicion]:
    """Start the copies of a job's pieces on the current stream.

    Args:
        job: What to send.
        memory: Its bytes lie here, on the host, ...
        start: ... from this one on.
        staging: Where to put what is small, cast or rearranged.

    Returns:
        What may have overflowed.
    """
    shift = start - job.offset
    together: dict[tuple[torch.dtype, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for straight, group in itertools.groupby(job.pieces, _goes_straight):
        pieces = list(group)
        if straight:
            for piece in pieces:
                first = piece.offset + shift
                _bytes_of(piece).copy_(memory[first : first + piece.nbytes], non_blocking=True)
            continue
        first, end = pieces[0].offset + shift, max(piece.offset + piece.nbytes for piece in pieces) + shift
        staging.memory[first:end].copy_(memory[first:end], non_blocking=True)
        for piece in pieces:
            target, value = _sides(piece, piece.offset + shift, staging)
            targets, values = together.setdefault((value.dtype, target.dtype), ([], []))
            targets.append(target)
            values.append(value)
    found: list[Suspicion] = []
    for dtypes, (targets, values) in together.items():
        found += _copy(job, dtypes, targets, values)
    return found


def _goes_straight(piece: Piece) -> bool:
    """Whether a piece's bytes are copied from the host to where they end up."""
    return piece.kind == RAW and (piece.nbytes >= STRAIGHT_BYTES or piece.nbytes != piece.target.nbytes)


def _bytes_of(piece: Piece) -> torch.Tensor:
    """The memory that a `RAW` piece fills, uint8: bytes need no alignment."""
    target = piece.target
    memory = target.as_strided((target.numel(),), (1,)).view(torch.uint8)
    return memory[piece.skip_bytes : piece.skip_bytes + piece.nbytes]


def _sides(piece: Piece, at: int, staging: Staging) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a piece goes, and the same elements in staging memory, from byte `at` on."""
    dtype, target = piece.copy.dtype, piece.target
    if at % dtype.itemsize or needs_swap(piece.copy.box.extent, dtype):
        data = staging.memory[at : at + piece.nbytes]
        return (_bytes_of(piece), data) if piece.kind == RAW else (target, decode(piece, data))
    if dtype is target.dtype and dtype not in _COPIED_EXACTLY and not (target.is_neg() or target.is_conj()):
        dtype = _INTEGERS[dtype.itemsize]
        target = target.view(dtype)
    return target, staging.view(dtype, at, piece.shape, piece.strides)


def _copy(
    job: Job, dtypes: tuple[torch.dtype, torch.dtype], targets: list[torch.Tensor], values: list[torch.Tensor]
) -> list[Suspicion]:
    """Copy tensors of one pair of dtypes, together if possible, and see what may not fit.

    One pair at a time: up to version 2.10 torch takes all targets for the first one's dtype (its issue 173383).
    """
    is_cast = dtypes[0] is not dtypes[1]
    together = _CAST_TOGETHER.issuperset(dtypes) if is_cast else dtypes[0] in _COPIED_EXACTLY
    if together:
        torch._foreach_copy_(targets, values)
    else:
        for target, value in zip(targets, values):
            target.copy_(value)
    limit = limit_of(*dtypes)
    if limit is None:
        return []
    if together:
        return [Suspicion(job, largest_of(values), limit)]
    flags = torch.stack([out_of_range(value, target) for value, target in zip(values, targets)])
    return [Suspicion(job, torch.where(flags.any(), math.inf, 0.0), limit)]
