"""Jobs whose bytes go to a CUDA device: read into pinned memory, copied and cast by the device, several in flight.

A `Lane` is a buffer in host memory with what moves data out of it on its own; a `Ring` lends lanes to reader threads in
turn and never lends one whose data hasn't left yet.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from torchload.copies import Copy
from torchload.transfer.host import decode
from torchload.transfer.memory import memory_at
from torchload.transfer.overflow import OverflowFoundError, may_overflow, out_of_range
from torchload.transfer.pieces import DEVICE_BYTES, RAW, Job
from torchload.transfer.reader import Reader

__all__ = ["CudaLane", "Lane", "Ring", "RingWorker"]

_ALIGNMENT_BYTES = 64
LANE_BYTES = DEVICE_BYTES + _ALIGNMENT_BYTES


class Lane(Protocol):
    """A host buffer, and copies from it that go on while the host does something else.

    Attributes:
        memory: The buffer, uint8, `LANE_BYTES` long.
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
            start = job.offset % _ALIGNMENT_BYTES  # so that elements stay aligned
            self._reader.readinto(job.source, job.offset, memory_at(lane.memory.data_ptr() + start, job.nbytes))
            lane.send(job, start)
        return job.nbytes


class CudaLane:
    """Pinned memory and a stream of its own.

    Tensors that are not plain copies go through a buffer on the device, where they are cast.
    """

    def __init__(self, device: torch.device, allocation_stream: torch.cuda.Stream) -> None:
        """Ready to send.

        Args:
            device: Where the targets are.
            allocation_stream: The stream on which they were made: what it has been told so far happens first.
        """
        self.memory = self._host_memory()
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(allocation_stream)
        self._staging: torch.Tensor | None = None
        self._checks: list[tuple[Copy, torch.Tensor]] = []

    def send(self, job: Job, start: int) -> None:
        with torch.cuda.stream(self._stream):
            send_pieces(self, job, self.memory[start : start + job.nbytes])

    def wait(self) -> None:
        self._stream.synchronize()

    def overflowed(self) -> Copy | None:
        if not self._checks:
            return None
        found = torch.stack([flag for _, flag in self._checks]).tolist()
        return next((copy for (copy, _), bad in zip(self._checks, found) if bad), None)

    def staging(self, nbytes: int) -> torch.Tensor:
        """Memory on the device for a job's bytes; free again when this lane's stream is."""
        if self._staging is None:
            self._staging = torch.empty(LANE_BYTES, dtype=torch.uint8, device=self._device)
        return self._staging[:nbytes]

    def check(self, copy: Copy, flag: torch.Tensor) -> None:
        """Remember a flag (bool, 0-dim, on the device) that says that a copy overflowed."""
        self._checks.append((copy, flag))

    @staticmethod
    def _host_memory() -> torch.Tensor:
        try:
            return torch.empty(LANE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # the system's limit on locked memory: slower, not wrong
            return torch.empty(LANE_BYTES, dtype=torch.uint8, device="cpu")


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
    staged = lane.staging(job.nbytes + _ALIGNMENT_BYTES)[data.storage_offset() :][: job.nbytes]
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
