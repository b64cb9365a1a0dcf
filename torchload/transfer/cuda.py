"""Jobs whose bytes go to a CUDA device: read into pinned memory, copied and cast by the device, several in flight.

A `Lane` is a buffer in host memory with what moves data out of it on its own; a `Ring` lends lanes to reader threads in
turn and never lends one whose data hasn't left yet.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from torchload.core.copies import Copy
from torchload.transfer.host import decode
from torchload.transfer.memory import memory_at
from torchload.transfer.overflow import OverflowFoundError, may_overflow, out_of_range
from torchload.transfer.pieces import DEVICE_BYTES, RAW, Job
from torchload.transfer.reader import Reader

__all__ = ["Lane", "Ring", "RingWorker", "cuda_ring"]

ALIGNMENT_BYTES = 4096
"""Bytes lie in a lane as they lie in the file's blocks: elements stay aligned, and blocks can be read directly."""
LANE_BYTES = DEVICE_BYTES + ALIGNMENT_BYTES
"""A lane holds so much at most; just short of a power of two, to which torch rounds pinned memory up."""
_CHANNELS = 2
"""So that one job is cast while the next one is copied."""


class Lane(Protocol):
    """A host buffer, and copies from it that go on while the host does something else.

    Attributes:
        memory: The buffer, uint8, as long as the longest job and `ALIGNMENT_BYTES`.
    """

    memory: torch.Tensor

    def send(self, job: Job, start: int) -> None:
        """Start the copies of a job whose bytes lie in `memory` from byte `start`."""

    def wait(self) -> None:
        """Return when nothing that was started needs `memory` any more, even if `send` failed half-way."""

    def overflowed(self) -> Copy | None:
        """A copy of those sent in which a finite value didn't fit; to be asked after `wait`."""


class Ring:
    """Lanes, lent in turn.

    With more lanes than threads there is always one that isn't lent, so lending waits for copies only, never for
    another thread.
    """

    def __init__(self, new_lane: Callable[[], Lane], count: int) -> None:
        """Lanes are made when they are first lent.

        Args:
            new_lane: Makes a lane.
            count: How many; more than there are threads.
        """
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

    def drain(self) -> None:
        """Wait until every copy has arrived. Required before memory on either side is freed, even after an error.

        Raises:
            OverflowFoundError: A finite value didn't fit.
        """
        made = [lane for lane in self._lanes if lane is not None]
        failures: list[BaseException] = []
        for lane in made:
            try:
                lane.wait()
            except BaseException as error:  # noqa: BLE001 - the other lanes must be waited for
                failures.append(error)
        if failures:
            for lane in made:
                with contextlib.suppress(BaseException):  # an interrupt may have come before the wait
                    lane.wait()
            raise failures[0]
        for lane in made:
            copy = lane.overflowed()
            if copy is not None:
                raise OverflowFoundError(copy)


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


class CudaChannel:
    """A stream on a device, and memory there in which what isn't a plain copy is cast and rearranged.

    What is sent through a channel happens in order, so one piece of memory serves all of it.
    """

    def __init__(self, device: torch.device, allocation_stream: torch.cuda.Stream) -> None:
        """Ready to send.

        Args:
            device: Where the targets are.
            allocation_stream: The stream on which they were made: what it has been told so far happens first.
        """
        self.device = device
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(allocation_stream)
        self._staging: torch.Tensor | None = None

    def staging(self, nbytes: int) -> torch.Tensor:
        """Memory for a job's bytes, for whoever holds the lock; its contents last until the next job's arrive."""
        if self._staging is None or self._staging.numel() < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._staging[:nbytes]


class CudaLane:
    """Pinned memory, and an event that tells when it may be written to."""

    def __init__(self, channel: CudaChannel, nbytes: int) -> None:
        """Ready to send.

        Args:
            channel: What it sends through, together with other lanes.
            nbytes: Size of its memory.
        """
        self._channel = channel
        with torch.cuda.device(channel.device):  # or else pinning might set up another device for this process
            self.memory = _host_memory(nbytes)
            self._event = torch.cuda.Event(blocking=True)  # waiting takes no processor time from those who read
        self._checks: list[tuple[Copy, torch.Tensor]] = []

    def send(self, job: Job, start: int) -> None:
        channel = self._channel
        with channel.lock, torch.cuda.stream(channel.stream):
            try:
                send_pieces(self, job, self.memory[start : start + job.nbytes])
                self._event.record(channel.stream)
            except BaseException:
                channel.stream.synchronize()  # part of it may be under way
                raise

    def wait(self) -> None:
        self._event.synchronize()

    def overflowed(self) -> Copy | None:
        if not self._checks:
            return None
        found = torch.stack([flag for _, flag in self._checks]).tolist()
        return next((copy for (copy, _), bad in zip(self._checks, found) if bad), None)

    def staging(self, nbytes: int) -> torch.Tensor:
        """Memory on the device for a job's bytes."""
        return self._channel.staging(nbytes)

    def check(self, copy: Copy, flag: torch.Tensor) -> None:
        """Remember a flag (bool, 0-dim, on the device) that says that a copy overflowed."""
        self._checks.append((copy, flag))


def cuda_ring(device: torch.device, jobs: Iterable[Job], threads: int) -> Ring:
    """A ring for the jobs of one device, to be made where its targets were, in that thread and on that stream."""
    stream = torch.cuda.current_stream(device)
    channels = itertools.cycle([CudaChannel(device, stream) for _ in range(_CHANNELS)])
    nbytes = max(job.nbytes for job in jobs) + ALIGNMENT_BYTES
    return Ring(lambda: CudaLane(next(channels), nbytes), 2 * threads)


def _host_memory(nbytes: int) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:  # the system's limit on locked memory: slower, not wrong
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class Staging(Protocol):
    """What `send_pieces` needs of a lane."""

    def staging(self, nbytes: int) -> torch.Tensor: ...

    def check(self, copy: Copy, flag: torch.Tensor) -> None: ...


def send_pieces(lane: Staging, job: Job, data: torch.Tensor) -> None:
    """Start the copies of a job's pieces on the current stream.

    Args:
        lane: Where to stage what is cast or rearranged, and what to tell of it.
        job: What to send.
        data: Its bytes, on the host.
    """
    first = job.pieces[0]
    if len(job.pieces) == 1 and first.kind == RAW:
        # Unaligned bytes are cloned on the host, and then there is nothing to wait for.
        _flat(first.target, first.skip_bytes, first.nbytes).copy_(decode(first, data), non_blocking=True)
        return
    staged = lane.staging(job.nbytes + ALIGNMENT_BYTES)[data.storage_offset() :][: job.nbytes]
    staged.copy_(data, non_blocking=True)
    targets: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for piece in job.pieces:
        value = decode(piece, staged[piece.offset - job.offset :][: piece.nbytes])
        target = _flat(piece.target, piece.skip_bytes, piece.nbytes) if piece.kind == RAW else piece.target
        targets.append(target)
        values.append(value)
    torch._foreach_copy_(targets, values)
    for piece, target, value in zip(job.pieces, targets, values):
        if may_overflow(value.dtype, target.dtype):
            lane.check(piece.copy, out_of_range(value, target))


def _flat(target: torch.Tensor, skip_bytes: int, nbytes: int) -> torch.Tensor:
    """A run of a dense tensor's memory as one dimension."""
    first, count = (size // target.element_size() for size in (skip_bytes, nbytes))
    return target.as_strided((target.numel(),), (1,))[first : first + count]
