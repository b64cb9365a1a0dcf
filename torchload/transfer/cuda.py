"""Jobs whose bytes go to a CUDA device: from pinned memory, copied and cast by the device, several in flight."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from torchload.transfer.arena import map_memory
from torchload.transfer.host import decode
from torchload.transfer.memory import advise
from torchload.transfer.overflow import largest_of, limit_of, out_of_range
from torchload.transfer.pieces import DEVICE_BYTES, RAW, Job, Piece, needs_swap
from torchload.transfer.ring import ALIGNMENT_BYTES, Lane, Load, Ring, Staging, Suspicion

__all__ = ["LANE_BYTES", "MAX_LANES", "CudaDevice", "cuda_ring", "send_pieces"]

LANE_BYTES = DEVICE_BYTES + 2 * ALIGNMENT_BYTES
"""4 MiB: with half of it, what Python does for each costs more than the copy."""
MAX_LANES = 16
"""Bounds what is pinned on the host, and what is staged on the device, to 64 MiB each."""
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
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_UNAVAILABLE = (2, 801)  # cudaErrorMemoryAllocation; cudaErrorNotSupported, as on small boards
_FORK_ADVICE = (18, 10)  # MADV_WIPEONFORK; MADV_DONTFORK, before Linux 4.14


class CudaDevice:
    """Copies and casts in order on a device's streams."""

    def __init__(self, device: torch.device, nbytes: int, staging: Sequence[torch.Tensor]) -> None:
        """Ready to send. To be made where the targets were, in that thread and on that stream.

        Args:
            device: Where the targets are.
            nbytes: Size of a lane.
            staging: Memory on the device, for each lane.
        """
        self._device = device
        self._nbytes = nbytes
        self._staging = deque(staging)
        self._streams = _streams(device)
        self._turn = itertools.cycle(self._streams if staging[0].numel() else self._streams[:1])
        for stream in self._streams:  # what the caller's stream has been told so far happens first
            stream.wait_stream(torch.cuda.current_stream(device))

    def new_lane(self) -> Lane:
        staging = Staging(self._staging.popleft())
        if self._nbytes == LANE_BYTES:
            with contextlib.suppress(IndexError):
                return Lane(_kept.pop(), staging, is_pinned=True)
        return Lane(_host_memory(self._nbytes), staging, is_pinned=None)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        # The device first: leaving it goes back only to one that this process has set up, which a stream does not heed.
        with torch.cuda.device(self._device), torch.cuda.stream(self._streams[0]):
            yield

    def send(self, loads: Sequence[Load]) -> Callable[[], list[Suspicion]]:
        stream = next(self._turn)
        with torch.cuda.stream(stream) if stream is not self._streams[0] else contextlib.nullcontext():
            try:
                for load in loads:
                    if load.lane.is_pinned is None:
                        load.lane.is_pinned = self._device.type == "cuda" and _pin(load.lane.memory)
                found = send_pieces(loads)
                event = torch.cuda.Event()
                event.record()
            except BaseException:
                stream.synchronize()  # part of it may be under way
                raise

        def wait() -> list[Suspicion]:
            event.synchronize()
            return found

        return wait

    def close(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            if lane.is_pinned and len(_kept) < MAX_LANES and lane.memory.numel() == LANE_BYTES:
                _kept.append(lane.memory)
            elif lane.is_pinned:
                _unpin(lane.memory)


_kept: deque[torch.Tensor] = deque()
"""Pinned memory of earlier loads. To pin 64 MiB takes 6 ms and more, an eighth of what it takes to load 2 GiB."""
_pinned: dict[int, torch.Tensor] = {}
"""All of it, by address, so that an interrupt can't free it: the driver would go on taking the address for pinned, and
read the old pages when something else lies there."""


@lru_cache(maxsize=64)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two, so that some bytes are cast while the next ones are copied.

    They are kept, for torch keeps the memory that was allocated on a stream for that stream.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _host_memory(nbytes: int) -> torch.Tensor:
    """Memory to pin, uint8, on huge pages where there are such.

    A fork would give the process other pages than the device reads, so a child gets pages of its own, empty ones. Were
    there none, what the child maps there would go when it gives up this memory.
    """
    buffer = map_memory(nbytes)
    if buffer is None:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    any(advise(memory.data_ptr(), nbytes, advice) for advice in _FORK_ADVICE)  # the first that the system has
    return memory


def _pin(memory: torch.Tensor) -> bool:
    """Let devices read memory by themselves; False where the system has a limit on that, or can't do it at all.

    It takes a third of the time that `pin_memory` takes, for the memory is on huge pages, which those who read have
    touched before.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))
    if code == 0:
        _pinned[memory.data_ptr()] = memory
        return True
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")  # the error would be reported by the next kernel that is started: this one
    if code not in _UNAVAILABLE:
        torch.cuda.check_error(code)
    return False


def _unpin(memory: torch.Tensor) -> None:
    """Take it back; where the driver doesn't, it must stay."""
    if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())) == 0:
        _pinned.pop(memory.data_ptr(), None)


def cuda_ring(device: torch.device, jobs: Sequence[Job], threads: int) -> Ring:
    """A ring for the jobs of one device, to be made where its targets were, in that thread and on that stream."""
    count = min(max(MAX_LANES, threads + 1), len(jobs))
    nbytes = max(LANE_BYTES, max(job.nbytes for job in jobs) + 2 * ALIGNMENT_BYTES)
    nbytes = -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    stages = any(not _goes_straight(piece) for job in jobs for piece in job.pieces)
    # On the caller's stream: given back to it once everything has arrived, and to be had by whoever comes next.
    staging = torch.empty(count, nbytes if stages else 0, dtype=torch.uint8, device=device)
    return Ring(CudaDevice(device, nbytes, staging.unbind()), count)


def send_pieces(loads: Iterable[Load]) -> list[Suspicion]:
    """Start the copies of the pieces of some jobs on the current stream.

    Returns:
        What may have overflowed.
    """
    together: dict[tuple[torch.dtype, torch.dtype, bool], _Group] = {}
    for job, lane, start in loads:
        shift = start - job.offset
        # In staging memory elements of the first piece are aligned, as those of the others are in nearly all files.
        lead = -(job.pieces[0].offset + shift) % job.pieces[0].copy.dtype.itemsize
        for straight, group in itertools.groupby(job.pieces, _goes_straight):
            pieces = list(group)
            if straight:
                for piece in pieces:
                    first = piece.offset + shift
                    _bytes_of(piece).copy_(lane.memory[first : first + piece.nbytes], non_blocking=True)
                continue
            first, end = pieces[0].offset + shift, max(piece.offset + piece.nbytes for piece in pieces) + shift
            lane.staging.memory[first + lead : end + lead].copy_(lane.memory[first:end], non_blocking=True)
            for piece in pieces:
                target, value = _sides(piece, piece.offset + shift + lead, lane.staging)
                kind = (value.dtype, target.dtype, target.is_neg() or target.is_conj())
                members = together.get(kind)
                if members is None:
                    members = together[kind] = _Group([], [], [])
                members.targets.append(target)
                members.values.append(value)
                if not members.jobs or members.jobs[-1] is not job:
                    members.jobs.append(job)
    return [suspicion for kind, members in together.items() for suspicion in _copy(*kind, members)]


class _Group(NamedTuple):
    """Tensors of one dtype that are copied to ones of one dtype, and where they come from."""

    targets: list[torch.Tensor]
    values: list[torch.Tensor]
    jobs: list[Job]


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


def _copy(source: torch.dtype, result: torch.dtype, is_changed: bool, group: _Group) -> Iterator[Suspicion]:
    """Copy tensors of one pair of dtypes, together unless torch has to negate or conjugate them; tell what may not fit.

    One pair at a time: up to version 2.10 torch takes all targets for the first one's dtype (its issue 173383).
    """
    kinds = _CAST_TOGETHER if source is not result else _COPIED_EXACTLY
    together = not is_changed and source in kinds and result in kinds
    if together:
        torch._foreach_copy_(group.targets, group.values)
    else:
        for target, value in zip(group.targets, group.values):
            target.copy_(value)
    limit = limit_of(source, result)
    if limit is None:
        return
    if together:
        yield Suspicion(group.jobs, largest_of(group.values), limit)
    else:
        flags = torch.stack([out_of_range(value, target) for value, target in zip(group.values, group.targets)])
        yield Suspicion(group.jobs, torch.where(flags.any(), math.inf, 0.0), limit)
