"""Lanes on the way to a device: several threads read into them, one sends what has been read.

The sender, of which each device has one, gives a `Lane` back when its bytes have left. It is the only one that talks to
the device: several threads that do take turns at its driver and at the interpreter's lock (28 GiB/s of 51 on an H200,
where one that sends for eight makes 47), and a thread that never does can't set up a device that nobody asked for.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

import torch

from torchload.core.threads import Helper
from torchload.transfer.memory import memory_at
from torchload.transfer.pieces import Job
from torchload.transfer.reader import Reader

__all__ = ["ALIGNMENT_BYTES", "Arrival", "Device", "Lane", "Load", "Ring", "RingWorker", "Staging"]

ALIGNMENT_BYTES = 4096
"""Bytes lie in a lane as they lie in the file's blocks: elements stay aligned, and blocks can be read directly."""


class Staging:
    """Memory on the device where a job's bytes lie nearly as they do in its lane, seen in any dtype."""

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


class Lane:
    """A buffer on the host, and as much memory on the device to cast and rearrange in.

    Attributes:
        memory: On the host, uint8; long enough for the longest job and `ALIGNMENT_BYTES`.
        staging: On the device; empty where nothing is staged.
        is_pinned: Whether the device reads `memory` by itself; None as long as nobody has tried.
    """

    __slots__ = ("is_pinned", "memory", "staging")

    def __init__(self, memory: torch.Tensor, staging: Staging, *, is_pinned: bool | None) -> None:
        self.memory = memory
        self.staging = staging
        self.is_pinned = is_pinned


class Load(NamedTuple):
    """A job whose bytes have been read into a lane, from byte `start` on."""

    job: Job
    lane: Lane
    start: int


class Arrival(Protocol):
    """What a device has been told to do; `torch.cuda.Event` is one."""

    def synchronize(self) -> None:
        """Wait until it is done."""


class Device(Protocol):
    """What a ring needs of a device."""

    def new_lane(self) -> Lane:
        """Make a lane. Called by the threads that read, which don't talk to the device."""

    def attached(self) -> contextlib.AbstractContextManager[object]:
        """What the thread that sends has to be in."""

    def send(self, loads: Sequence[Load]) -> Arrival:
        """Start copies out of lanes; if that fails, none of them is under way."""

    def suspicious(self) -> list[Job]:
        """The jobs in which a finite value may not have fitted. Asked once all have arrived."""

    def close(self, lanes: Sequence[Lane]) -> None:
        """Take back the lanes that were made, after an error as well: nothing is under way from them any more."""


class Ring:
    """Lends lanes to the threads that read, and sends what they have read in a thread of its own.

    Memory on either side is free once it has finished, after an error as well. It is no context: those are entered and
    left by steps of Python's own, in which an interrupt would leave a thread that sends.

    Attributes:
        suspicious: Jobs in which a finite value may not have fitted, once it has finished; each to be looked at.
        lacks_pinned_memory: Whether the system gave less of it than was asked for.
    """

    def __init__(self, device: Device, count: int) -> None:
        """Ready to start.

        Args:
            device: Where the data goes.
            count: How many lanes there may be; they are made when they are needed.
        """
        self.suspicious: list[Job] = []
        self.lacks_pinned_memory = False
        self._device = device
        self._count = count
        self._lanes: list[Lane] = []
        self._free: SimpleQueue[Lane | None] = SimpleQueue()
        for _ in range(count):
            self._free.put(None)
        self._loads: SimpleQueue[Load | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._sender = Helper(self._work)

    def borrow(self) -> Lane:
        """A lane whose memory may be overwritten; to be handed to `send` or `give_back`.

        Raises:
            BaseException: Why earlier lanes could not be sent.
        """
        lane = self._free.get()
        try:
            if self._failure is not None:
                raise self._failure
            if lane is None:
                lane = self._device.new_lane()
                self._lanes.append(lane)
        except BaseException:
            self._free.put(lane)
            raise
        return lane

    def give_back(self, lane: Lane) -> None:
        """Lend a lane again."""
        self._free.put(lane)

    def send(self, load: Load) -> None:
        """Have a lane's bytes sent; it is lent again when they have left."""
        self._loads.put(load)

    def start(self) -> None:
        """Begin to send. Whatever comes of it, `finish` has to be called."""
        self._sender.start()

    def finish(self, error: BaseException | None) -> None:
        """Wait until everything has arrived; if this is interrupted, to be called again.

        Args:
            error: What is to be raised anyway.

        Raises:
            BaseException: Why something could not be sent; once, and only if nothing else is raised.
        """
        self._loads.put(None)
        self._sender.join()
        failure, self._failure = self._failure, None
        try:
            if failure is not None and error is None:
                raise failure
        finally:
            del failure  # its traceback holds this frame

    def _work(self) -> None:
        under_way: deque[tuple[Arrival | None, list[Load]]] = deque()
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            with self._failing():
                stack.enter_context(self._device.attached())
            while loads := self._next_loads():
                arrival = None
                with self._failing():
                    if self._failure is None:
                        arrival = self._device.send(loads)
                under_way.append((arrival, loads))
                # Those who read need most of the lanes; of the others the longest under way are waited for.
                while sum(len(loads) for _, loads in under_way) > self._count // 3:
                    self._finish(*under_way.popleft())
            while under_way:
                self._finish(*under_way.popleft())
            self.lacks_pinned_memory = any(lane.is_pinned is False for lane in self._lanes)
            with self._failing():
                if self._failure is None:
                    self.suspicious = self._device.suspicious()
            with self._failing():
                self._device.close(self._lanes)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Keep an error for those who read: the sender goes on until they have stopped."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - raised by `borrow` and at the end
            self._failure = self._failure or error

    def _next_loads(self) -> list[Load]:
        """All that has been read meanwhile, at least one; none at the end."""
        load = self._loads.get()
        loads: list[Load] = []
        while load is not None:
            loads.append(load)
            try:
                load = self._loads.get_nowait()
            except Empty:
                break
        else:
            if loads:
                self._loads.put(None)  # the end, to be seen once more
        return loads

    def _finish(self, arrival: Arrival | None, loads: Sequence[Load]) -> None:
        with self._failing():
            if arrival is not None:
                arrival.synchronize()
        for load in loads:
            self._free.put(load.lane)


class RingWorker:
    """Reads jobs into lanes; one for each thread."""

    def __init__(self, reader: Reader, ring: Ring) -> None:
        self._reader = reader
        self._ring = ring

    def __call__(self, job: Job) -> int:
        lane = self._ring.borrow()
        try:
            start = (job.source.base + job.offset) % ALIGNMENT_BYTES
            self._reader.readinto(job.source, job.offset, memory_at(lane.memory.data_ptr() + start, job.nbytes))
        except BaseException:
            self._ring.give_back(lane)
            raise
        self._ring.send(Load(job, lane, start))
        return job.nbytes
