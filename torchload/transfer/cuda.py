"""Jobs whose bytes go to a CUDA device: from pinned memory, copied and cast by the device, several in flight."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, cast

import torch

from torchload.transfer.arena import map_memory
from torchload.transfer.host import decode
from torchload.transfer.memory import advise
from torchload.transfer.overflow import limit_of, out_of_range
from torchload.transfer.pieces import DEVICE_BYTES, RAW, Job, Piece, needs_swap
from torchload.transfer.ring import ALIGNMENT_BYTES, Lane, Load, Ring, Staging

__all__ = ["LANE_BYTES", "MAX_LANES", "CudaDevice", "cuda_ring", "send_pieces"]

LANE_BYTES = DEVICE_BYTES + 2 * ALIGNMENT_BYTES
"""4 MiB: with half of it, what Python does for each costs more than the copy."""
MAX_LANES = 16
"""Bounds what is pinned on the host, and what casts are staged in on the device, to 64 MiB each, unless more threads
are asked for than there are by default, or something that can't be cut is longer than a lane."""

_COPIED_EXACTLY = frozenset(
    {torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)
"""Dtypes of which torch's kernel for many tensors moves every bit. Others have none, or go through float32 there,
which changes the payload of a NaN."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CAST_TOGETHER = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Dtypes that the same kernel casts into one another, in all versions of torch."""
_TO_DEVICE = 1  # cudaMemcpyHostToDevice
_MOST_APART = 1000  # each takes 512 bytes of the device, as the smallest tensor there does
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device
_UNAVAILABLE = (2, 801)  # cudaErrorMemoryAllocation; cudaErrorNotSupported, as on small boards
_FORK_ADVICE = (18, 10)  # MADV_WIPEONFORK; MADV_DONTFORK, before Linux 4.14


class CudaDevice:
    """Copies and casts on the stream of whoever wants them, after what that was told before."""

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
        self._stream = torch.cuda.current_stream(device)
        self._handle = self._stream.cuda_stream if device.type == "cuda" else 0
        self._verdicts = Verdicts()

    def new_lane(self) -> Lane:
        staging = Staging(self._staging.popleft())
        if self._nbytes == LANE_BYTES:
            with contextlib.suppress(IndexError):
                return Lane(_kept.pop(), staging, is_pinned=True)
        return Lane(_host_memory(self._nbytes), staging, is_pinned=None)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        # The device first: leaving it goes back only to one that this process has set up, which a stream does not heed.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def send(self, loads: Sequence[Load]) -> torch.cuda.Event:
        try:
            for load in loads:
                if load.lane.is_pinned is None:
                    load.lane.is_pinned = self._device.type == "cuda" and _pin(load.lane.memory)
            send_pieces(loads, self._verdicts, self._handle)
            event = torch.cuda.Event()
            event.record()
        except BaseException:
            self._stream.synchronize()  # part of it may be under way
            raise
        return event

    def suspicious(self) -> list[Job]:
        return self._verdicts.suspicious()

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
    stages = any(piece.kind != RAW for job in jobs for piece in job.pieces)
    # On the caller's stream: given back to it once everything has arrived, and to be had by whoever comes next.
    staging = torch.empty(count, nbytes if stages else 0, dtype=torch.uint8, device=device)
    return Ring(CudaDevice(device, nbytes, staging.unbind()), count)


class Verdicts:
    """Whether casts were harmless: numbers on the device that tell, which nobody waits for until the end."""

    def __init__(self) -> None:
        self._by_kind: dict[tuple[torch.dtype, float], _Numbers] = {}

    def add(self, jobs: Sequence[Job], numbers: Sequence[torch.Tensor], limit: float) -> None:
        """Note numbers (0-dim), each of which tells that a cast in its job was harmless if it is at most `limit`."""
        kind = (numbers[0].dtype, limit)
        members = self._by_kind.get(kind)
        if members is None:
            members = self._by_kind[kind] = _Numbers([], [], [])
        members.jobs.extend(jobs)
        members.apart.extend(numbers)
        if len(members.apart) >= _MOST_APART:
            members.gather()

    def suspicious(self) -> list[Job]:
        """The jobs in which a finite value may not have fitted."""
        found: dict[int, Job] = {}
        for (_, limit), members in self._by_kind.items():
            members.gather()
            # As numbers of Python: a limit that is rounded to the tensors' dtype is another one.
            values = itertools.chain.from_iterable(numbers.tolist() for numbers in members.gathered)
            for job, value in zip(members.jobs, values, strict=True):
                if not value <= limit:  # nor is NaN
                    found[id(job)] = job
        return list(found.values())


class _Numbers(NamedTuple):
    """Numbers of one dtype on a device, and the jobs that they tell of."""

    jobs: list[Job]
    apart: list[torch.Tensor]
    gathered: list[torch.Tensor]

    def gather(self) -> None:
        """Put those that lie apart, each in memory of its own, side by side.

        The kernel that casts does it: to load one that stacks them, and one that finds the largest, takes 38 ms.
        """
        if self.apart:
            numbers = torch.empty(len(self.apart), dtype=self.apart[0].dtype, device=self.apart[0].device)
            torch._foreach_copy_(list(numbers.unbind()), self.apart)
            self.gathered.append(numbers)
            self.apart.clear()


def send_pieces(loads: Iterable[Load], verdicts: Verdicts, stream: int = 0) -> None:
    """Start the copies of the pieces of some jobs on the current stream, whose handle is `stream`."""
    groups: dict[tuple[torch.dtype, torch.dtype, bool], _Group] = {}
    for job, lane, start in loads:
        shift = start - job.offset
        # In staging memory elements of the first piece are aligned, as those of the others are in nearly all files.
        staged = next((piece for piece in job.pieces if piece.kind != RAW), None)
        lead = -(staged.offset + shift) % staged.copy.dtype.itemsize if staged is not None else 0
        for kind, group in itertools.groupby(job.pieces, _kind):
            if kind == RAW:
                for piece in group:
                    _send(lane, piece.offset + shift, piece.nbytes, piece.target, piece.skip_bytes, stream)
                continue
            pieces = list(group)
            first, end = pieces[0].offset + shift, max(piece.offset + piece.nbytes for piece in pieces) + shift
            _send(lane, first, end - first, lane.staging.memory, first + lead, stream)
            for piece in pieces:
                target, value = _sides(piece, piece.offset + shift + lead, lane.staging)
                pair = (value.dtype, target.dtype, target.is_neg() or target.is_conj())
                members = groups.get(pair)
                if members is None:
                    members = groups[pair] = _Group([], [], [])
                members.targets.append(target)
                members.values.append(value)
                members.jobs.append(job)
    for (source, result, is_changed), members in groups.items():
        numbers, limit = _copy(source, result, is_changed, members)
        if numbers:
            verdicts.add(members.jobs, numbers, limit)


class _Group(NamedTuple):
    """Tensors of one dtype that are copied to ones of one dtype, and the jobs that they belong to."""

    targets: list[torch.Tensor]
    values: list[torch.Tensor]
    jobs: list[Job]


_kind = operator.attrgetter("kind")


def _send(lane: Lane, start: int, nbytes: int, target: torch.Tensor, skip_bytes: int, stream: int) -> None:
    """Start to copy bytes of a lane to a tensor's memory, both from some byte on."""
    copy = _memcpy() if lane.is_pinned else None
    if copy is not None:
        code = copy(target.data_ptr() + skip_bytes, lane.memory.data_ptr() + start, nbytes, _TO_DEVICE, stream)
        if code:
            torch.cuda.check_error(code)
        return
    memory = target.as_strided((target.numel(),), (1,)).view(torch.uint8)
    memory.narrow(0, skip_bytes, nbytes).copy_(lane.memory.narrow(0, start, nbytes), non_blocking=True)


@lru_cache(maxsize=1)
def _memcpy() -> Callable[[int, int, int, int, int], int] | None:
    """``cudaMemcpyAsync`` of the runtime that this process has loaded, or None where there is none to be found.

    Torch takes four operators for a copy of bytes. Each lets go of the interpreter, as this does, and gets it back from
    eight threads that read only after a while: the device would wait for the one that sends.
    """
    if torch.version.cuda is None:
        return None
    with contextlib.suppress(OSError, AttributeError, TypeError):
        function = ctypes.CDLL(None)["cudaMemcpyAsync"]  # an object of its own, whoever else has such
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
        function.restype = ctypes.c_int
        return cast("Callable[[int, int, int, int, int], int]", function)
    return None


def _sides(piece: Piece, at: int, staging: Staging) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a piece goes, and the same elements in staging memory, from byte `at` on."""
    dtype, target = piece.copy.dtype, piece.target
    if at % dtype.itemsize or needs_swap(piece.copy.box.extent, dtype):
        return target, decode(piece, staging.memory[at : at + piece.nbytes])
    if dtype is target.dtype and dtype not in _COPIED_EXACTLY and not (target.is_neg() or target.is_conj()):
        dtype = _INTEGERS[dtype.itemsize]
        target = target.view(dtype)
    return target, staging.view(dtype, at, piece.shape, piece.strides)


def _copy(
    source: torch.dtype, result: torch.dtype, is_changed: bool, group: _Group
) -> tuple[Sequence[torch.Tensor], float]:
    """Copy tensors of one pair of dtypes, together unless torch has to negate or conjugate them.

    One pair at a time: up to version 2.10 torch takes all targets for the first one's dtype (its issue 173383).

    Returns:
        Numbers (0-dim) that tell whether the casts were harmless, if that is in doubt, and what they mustn't exceed.
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
        return [], 0.0
    if together:
        return torch._foreach_norm(group.values, math.inf), limit  # the largest magnitude in each; NaN if there is one
    return [out_of_range(value, target) for value, target in zip(group.values, group.targets)], 0.0
