"""The ring's protocol over a fake copy engine, which copies late and in a thread of its own, as a GPU does."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.threads import python_threads
from torchload.core.checkpoint import Box, Extent, contiguous_strides
from torchload.core.copies import Copy
from torchload.core.source import FileSource, MemorySource, Source
from torchload.core.threads import Helper
from torchload.errors import CastOverflowError, CorruptCheckpointError
from torchload.transfer import engine, pieces, run
from torchload.transfer.crew import Crew
from torchload.transfer.cuda import (
    LANE_BYTES,
    MAX_LANES,
    CudaDevice,
    Verdicts,
    _kept,
    _memcpy,
    _Numbers,
    _pin,
    cuda_ring,
    send_pieces,
)
from torchload.transfer.memory import memory_at
from torchload.transfer.pieces import Job, _fill_lanes, schedule
from torchload.transfer.reader import Reader
from torchload.transfer.ring import Arrival, Lane, Load, Ring, RingWorker, Staging

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch for CUDA has a copy that doesn't know the CPU's addresses."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr("torchload.transfer.cuda._memcpy", lambda: None)


class FakeArrival(threading.Event):
    def synchronize(self) -> None:
        assert self.wait(10)


class FakeEngine:
    """A device that copies one job after the other, a little later."""

    pause = 0.002
    fail_at: int | None = None

    def __init__(self) -> None:
        self.pending: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        self.verdicts = Verdicts()
        self.lanes: list[Lane] = []
        self.in_use: set[int] = set()
        self.sent: list[int] = []
        self.senders: set[int] = set()
        self.closed: list[Lane] = []

    def _work(self) -> None:
        with torch.inference_mode():
            while (work := self.pending.get()) is not None:
                time.sleep(self.pause)
                work()

    def new_lane(self) -> Lane:
        memory = torch.full((LANE_BYTES,), 0xEE, dtype=torch.uint8)
        self.lanes.append(Lane(memory, Staging(torch.zeros(LANE_BYTES, dtype=torch.uint8)), is_pinned=True))
        return self.lanes[-1]

    def attached(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def send(self, loads: Sequence[Load]) -> Arrival:
        self.senders.add(threading.get_ident())
        arrival = FakeArrival()
        for load in loads:
            assert id(load.lane) not in self.in_use, "memory was lent while it was in use"
            self.in_use.add(id(load.lane))
            self.sent.append(id(load.lane))
            if self.fail_at is not None and len(self.sent) >= self.fail_at:
                self.in_use.clear()
                raise RuntimeError("the device is gone")

        def copy() -> None:
            try:
                send_pieces(loads, self.verdicts)
            finally:
                for load in loads:
                    load.lane.memory.fill_(0xEE)  # what is read from it now is wrong
                    self.in_use.discard(id(load.lane))
                arrival.set()

        self.pending.put(copy)
        return arrival

    def suspicious(self) -> list[Job]:
        assert self.is_idle
        return self.verdicts.suspicious()

    def close(self, lanes: Sequence[Lane]) -> None:
        assert self.is_idle
        self.closed += lanes

    @property
    def is_idle(self) -> bool:
        return not self.in_use

    def stop(self) -> None:
        self.pending.put(None)
        self.thread.join()


@pytest.fixture
def lanes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the CPU is cut and put together as if it went to a device."""
    monkeypatch.setattr(pieces, "STAGED_BYTES", 1 << 20)
    monkeypatch.setattr(pieces, "_batch", lambda device, source, members, cold: _fill_lanes(device, source, members))


def memcpy(target: int, source: int, nbytes: int, kind: int, stream: int) -> int:
    assert (kind, stream) == (1, 0)
    ctypes.memmove(target, source, nbytes)
    return 0


@pytest.fixture(params=[True, False], ids=["memcpy", "operators"])
def fake(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, no_runtime: None, lanes_for_all: None
) -> FakeEngine:
    """Jobs for the CPU go through a ring over a fake engine, with CUDA's own copy and without it."""
    monkeypatch.setattr("torchload.transfer.cuda._memcpy", lambda: memcpy if request.param else None)
    fake = FakeEngine()
    monkeypatch.setattr(engine, "_new_rings", lambda jobs, threads: {CPU: Ring(fake, 2 * threads)})
    return fake


def copy_of(source: Source, target: torch.Tensor, offset: int, name: str, dtype: torch.dtype = torch.float32) -> Copy:
    shape = tuple(target.shape)
    extent = Extent(source, offset, target.numel() * dtype.itemsize)
    return Copy(name, Box(extent, 0, shape, contiguous_strides(shape), (0,) * len(shape)), dtype, target)


def model(tmp_path: Path, dtypes: list[torch.dtype], shift: int = 0) -> tuple[list[Copy], list[torch.Tensor]]:
    """Copies of large, small and tiny tensors in turn, and what must arrive."""
    values = [torch.randn(size) for size in (400_000, 3, 1, 70_000, 5000, 20) * 3]
    (tmp_path / "f").write_bytes(bytes(shift) + b"".join(value.numpy().tobytes() for value in values))
    source = FileSource(tmp_path / "f")
    copies, expected, offset = [], [], shift
    for index, value in enumerate(values):
        dtype = dtypes[index % len(dtypes)]
        copies.append(copy_of(source, torch.zeros(value.shape, dtype=dtype), offset, f"t{index}"))
        expected.append(value.to(dtype))
        offset += value.nbytes
    return copies, expected


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shift", [0, 8, 3])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float16], [torch.float32, torch.bfloat16, torch.float64]])
def test_everything_arrives(
    tmp_path: Path,
    fake: FakeEngine,
    dtypes: list[torch.dtype],
    shift: int,
    threads: int,
) -> None:
    copies, expected = model(tmp_path, dtypes, shift)
    assert run(copies, threads=threads) == sum(value.numel() * 4 for value in expected)
    for copy, value in zip(copies, expected):
        assert torch.equal(copy.target, value)
    assert fake.is_idle
    assert len(fake.lanes) <= 2 * threads
    assert fake.closed == fake.lanes
    assert len(fake.senders) == 1
    assert threading.get_ident() not in fake.senders
    fake.stop()


def test_a_lane_is_lent_again_only_when_its_data_has_left(tmp_path: Path) -> None:
    """Two lanes, many jobs: `FakeEngine.send` fails if memory is lent too early, and spoils what was."""
    fake = FakeEngine()
    copies, expected = model(tmp_path, [torch.float32])
    ring = Ring(fake, 2)
    ring.start()
    worker = RingWorker(Reader(), ring)
    for copy in copies:
        for job in schedule([copy]):
            worker(job)
    ring.finish(None)
    assert len(fake.lanes) == 2
    assert min(Counter(fake.sent).values()) > 5
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    fake.stop()


def test_a_short_read_waits_for_what_was_sent(fake: FakeEngine) -> None:
    class ShortSource(MemorySource):
        def readinto(self, offset: int, buffer: memoryview) -> None:
            if offset + len(buffer) > 5_000_000:
                raise CorruptCheckpointError("nothing there", path="f")
            super().readinto(offset, buffer)

    source = ShortSource(bytes(8_000_000))
    copies = [copy_of(source, torch.ones(250_000), index * 1_000_000, f"t{index}") for index in range(8)]
    with pytest.raises(CorruptCheckpointError, match="nothing there") as caught:
        run(copies, threads=2)
    assert fake.is_idle
    assert set(caught.value.written) >= {"t0", "t1", "t2"}
    assert all(not copy.target.any() for copy in copies[:3])
    fake.stop()


def test_a_device_that_fails_half_way(tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, _ = model(tmp_path, [torch.float32])
    monkeypatch.setattr(FakeEngine, "fail_at", 2)
    asked: list[FakeEngine] = []
    monkeypatch.setattr(FakeEngine, "suspicious", lambda self: asked.append(self))
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(copies, threads=2)
    assert not asked
    assert fake.lanes
    assert fake.closed == fake.lanes, "else memory goes back to the system that the driver takes for pinned"
    assert fake.is_idle
    fake.stop()


@pytest.mark.parametrize("what", ["new_lane", "attached", "close"])
def test_what_can_not_be_had(tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fake, what, refuse)
    copies, _ = model(tmp_path, [torch.float32])
    running = python_threads()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(copies, threads=3)
    assert python_threads() == running
    fake.stop()


def test_cancelled_by_the_caller(tmp_path: Path, fake: FakeEngine) -> None:
    def interrupt(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt(f"{done_bytes} of {total_bytes}")

    copies, _ = model(tmp_path, [torch.float32])
    with pytest.raises(KeyboardInterrupt):
        run(copies, threads=2, progress=interrupt)
    assert fake.is_idle
    fake.stop()


def test_overflow_is_noticed_by_the_device(tmp_path: Path, fake: FakeEngine) -> None:
    values = torch.ones(100)
    values[50] = -1e9
    values[51] = float("inf")
    source = MemorySource(values.numpy().tobytes())
    copies = [copy_of(source, torch.zeros(10).half(), 40 * index, f"t{index}") for index in range(10)]
    with pytest.raises(CastOverflowError) as caught:
        run(copies)
    assert (caught.value.tensor, caught.value.largest) == ("t5", 1e9)
    assert caught.value.written == tuple(f"t{index}" for index in range(10))
    fake.stop()


@pytest.mark.parametrize("value", [65536.0, -65536.0])
def test_a_limit_that_the_dtype_of_the_file_would_round(fake: FakeEngine, value: float) -> None:
    """To bfloat16 the largest float16, 65504, is 65536."""
    values = torch.full((3000,), 1.0, dtype=torch.bfloat16)
    copies = [
        copy_of(MemorySource(bytes(values.view(torch.uint8).tolist())), torch.zeros(3000).half(), 0, "a", values.dtype)
    ]
    run(copies)
    assert copies[0].target.eq(1).all()
    values[1234] = value
    source = MemorySource(bytes(values.view(torch.uint8).tolist()))
    with pytest.raises(CastOverflowError):
        run([copy_of(source, copies[0].target, 0, "a", values.dtype)])
    fake.stop()


def test_one_of_very_many_overflows(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device says of each is put together now and then, and belongs to the right job."""
    monkeypatch.setattr("torchload.transfer.cuda._MOST_APART", 100)
    apart: list[int] = []
    gather = _Numbers.gather
    monkeypatch.setattr(_Numbers, "gather", lambda self: (apart.append(len(self.apart)), gather(self)))
    looked: list[Job] = []
    real = engine._look_closer
    monkeypatch.setattr(engine, "_look_closer", lambda job: (looked.append(job), real(job)))
    values = torch.ones(2400, 2)
    values[1700, 1] = -7e4
    values[300, 0] = float("inf")  # legal, but looked at
    source = MemorySource(values.numpy().tobytes())
    copies = [copy_of(source, torch.zeros(2).half(), 8 * index, f"t{index}") for index in range(2400)]
    with pytest.raises(CastOverflowError) as caught:
        run(copies)
    assert caught.value.tensor == "t1700"
    assert [sum(piece.copy.name in ("t300", "t1700") for piece in job.pieces) for job in looked] == [1, 1]
    assert len(apart) >= 2, "once at least before the end"
    assert max(apart) <= 100 + 16 * pieces.MAX_SHARING, "each takes 512 bytes of the device"
    fake.stop()


def test_a_copy_that_the_driver_refuses(tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> None:
        raise RuntimeError(f"error {code}")

    monkeypatch.setattr("torchload.transfer.cuda._memcpy", lambda: lambda *_: 700)
    monkeypatch.setattr(torch.cuda, "check_error", fail)
    copies, _ = model(tmp_path, [torch.float32])
    with pytest.raises(RuntimeError, match="error 700"):
        send_pieces([Load(schedule(copies)[0], fake.new_lane(), 0)], fake.verdicts)
    assert not any(copy.target.any() for copy in copies)
    fake.stop()


class FakeStream:
    """Notes what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def synchronize(self) -> None:
        self.told.append("synchronize")


class FakeCuda:
    """What CUDA was asked for, thread by thread."""

    def __init__(self) -> None:
        self.stream = FakeStream()
        """The caller's, and the only one."""
        self.places: dict[int, list[object]] = {}
        """Thread → the devices and streams that it is on, the last one innermost."""
        self.left: list[object] = []
        self.events: list[FakeEvent] = []

    def new_event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    @contextlib.contextmanager
    def on(self, place: object) -> Iterator[None]:
        mine = self.places.setdefault(threading.get_ident(), [])
        mine.append(place)
        yield
        assert mine.pop() is place
        self.left.append(place)


class FakeEvent:
    def __init__(self) -> None:
        self.records = self.waits = 0

    def record(self) -> None:
        self.records += 1

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch, lanes_for_all: None) -> FakeCuda:
    """The real thing over fake streams, with the CPU for a device."""
    cuda = FakeCuda()
    real = CudaDevice.send

    def send(self: CudaDevice, loads: Sequence[Load]) -> torch.cuda.Event:
        assert [type(place) for place in cuda.places[threading.get_ident()]] == [torch.device, FakeStream]
        return real(self, loads)

    monkeypatch.setattr(CudaDevice, "send", send)
    monkeypatch.setattr(torch.cuda, "Event", cuda.new_event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.stream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.on)
    monkeypatch.setattr(torch.cuda, "device", cuda.on)
    monkeypatch.setattr(engine, "_new_rings", lambda jobs, threads: {CPU: cuda_ring(CPU, jobs, threads)})
    return cuda


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float16, torch.bfloat16]])
def test_one_thread_talks_to_the_device(
    tmp_path: Path, fake_cuda: FakeCuda, dtypes: list[torch.dtype], threads: int
) -> None:
    copies, expected = model(tmp_path, dtypes, shift=8)
    for number in range(2):
        for copy in copies:
            copy.target.zero_()
        run(copies, threads=threads)
        assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
        assert len(fake_cuda.places) <= number + 1, "readers never do, nor does the caller's thread"
    assert threading.get_ident() not in fake_cuda.places
    assert fake_cuda.events
    assert all(event.records == event.waits == 1 for event in fake_cuda.events)
    assert not fake_cuda.stream.told, "its order is that of what the caller told it"
    assert not any(fake_cuda.places.values()), "the device has been left again"
    assert isinstance(fake_cuda.left[-1], torch.device), "after its stream"


def test_what_was_sent_in_part_is_waited_for(
    tmp_path: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    copies, _ = model(tmp_path, [torch.float16])
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(copies, threads=2)
    assert fake_cuda.stream.told


def test_pinned_memory_outlives_a_load_that_fails(
    tmp_path: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed while it is registered, its address would stand for the old pages: the next to get it loads from those."""

    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    unregistered: list[int] = []

    def unregister(address: int) -> int:
        unregistered.append(address)
        return len(unregistered) - 1

    pinned = [torch.zeros(LANE_BYTES, dtype=torch.uint8) for _ in range(MAX_LANES + 2)]
    kept = deque(pinned)
    addresses = {memory.data_ptr() for memory in pinned}
    monkeypatch.setattr("torchload.transfer.cuda._kept", kept)
    monkeypatch.setattr("torchload.transfer.cuda._pinned", held := dict.fromkeys(addresses))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostUnregister=unregister))
    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    copies, _ = model(tmp_path, [torch.float16])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(copies, threads=2)
    assert {memory.data_ptr() for memory in kept}.union(unregistered) == addresses
    assert len(kept) >= MAX_LANES
    assert set(held) == addresses.difference(unregistered[:1]), "but for the one that the driver let go of"


def test_too_little_memory_for_staging(
    fake_cuda: FakeCuda, lanes_for_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine, "_new_rings", fail)
    source = MemorySource(bytes(40))
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        run([copy_of(source, torch.zeros(10), 0, "weight")])
    assert caught.value.written == (), "nothing was begun"


def test_a_system_without_anonymous_memory(
    tmp_path: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_ANON"):
        monkeypatch.delattr(mmap, name)
    copies, expected = model(tmp_path, [torch.float32])
    run(copies, threads=2)
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_child_process_can_give_up_the_memory(fake_cuda: FakeCuda) -> None:
    """It has pages of its own there, else what it maps next would lie there, and go when the memory goes."""
    lane = cuda_ring(CPU, schedule([copy_of(MemorySource(bytes(40)), torch.zeros(10), 0, "weight")]), 1).borrow()
    lane.memory.fill_(7)
    start, size = lane.memory.data_ptr(), lane.memory.numel()
    child = os.fork()
    if child == 0:  # no Python beyond what is needed, and no way back into the tests
        os._exit(int(bytes(memory_at(start, size)) != bytes(size)))
    assert os.waitpid(child, 0)[1] == 0
    assert lane.memory.eq(7).all()


def test_bytes_that_stay_as_they_are_need_no_memory_there_and_no_kernel(
    tmp_path: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To load the first kernel takes 18 ms, as long as a small model takes in all."""
    monkeypatch.setattr(torch, "_foreach_copy_", None)
    copies, expected = model(tmp_path, [torch.float32], shift=5)
    run(copies, threads=2)
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    device: Any = cuda_ring(CPU, schedule(copies), 2)._device
    assert not any(staging.numel() for staging in device._staging)


@pytest.mark.parametrize("threads", [1, 8, 12])
def test_what_is_held_is_bounded(fake_cuda: FakeCuda, threads: int) -> None:
    """64 MiB on either side, however much there is to load, and no more than there is."""
    source = MemorySource(b"")
    weight = copy_of(source, torch.empty(1 << 20, device="meta"), 0, "weight", torch.float64)
    job = schedule([weight])[0]
    for count, lanes in ((100, MAX_LANES), (3, 3)):
        ring = cuda_ring(CPU, [job] * count, threads)
        device: Any = ring._device
        assert ring._count == len(device._staging) == lanes
        assert lanes * device._nbytes <= 64 << 20
        assert sum(staging.numel() for staging in device._staging) <= 64 << 20


def test_an_interrupt_while_waiting_leaves_nothing_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine()
    fake.pause = 0.2
    values = torch.randn(1 << 18)
    copies = [copy_of(MemorySource(values.numpy().tobytes()), torch.zeros(1 << 18), 0, "weight")]
    real, interrupts = Helper.join, [KeyboardInterrupt("first"), KeyboardInterrupt("second")]

    def join(helper: Helper) -> None:
        if interrupts:
            raise interrupts.pop(0)
        real(helper)

    monkeypatch.setattr(Helper, "join", join)
    ring = Ring(fake, 1)
    crew = Crew(schedule(copies), lambda: contextlib.nullcontext(RingWorker(Reader(), ring)), threads=1)
    with pytest.raises(KeyboardInterrupt, match="first"):
        engine._run(crew, [ring])
    assert not interrupts
    assert fake.is_idle
    assert torch.equal(copies[0].target, values)
    fake.stop()


def test_an_interrupt_between_the_work_and_the_wait() -> None:
    """It comes as those who read are done, once no `try` of theirs can see it, and nothing has arrived yet."""
    interrupt = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("PyErr_SetInterrupt", ctypes.pythonapi))
    watchers: list[object] = []

    class Last:
        """Gone as the function ends that holds it."""

    class Interrupted(Crew[Job]):
        def run(self) -> None:
            last = Last()
            watchers.append(weakref.ref(last, interrupt))
            super().run()

    fake = FakeEngine()
    fake.pause = 0.2
    values = torch.randn(1 << 18)
    copies = [copy_of(MemorySource(values.numpy().tobytes()), torch.zeros(1 << 18), 0, "weight")]
    ring = Ring(fake, 1)
    crew = Interrupted(schedule(copies), lambda: contextlib.nullcontext(RingWorker(Reader(), ring)), threads=1)
    running = python_threads()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine._run(crew, [ring])
        assert python_threads() == running
    finally:
        signal.signal(signal.SIGINT, before)
    assert fake.is_idle
    assert torch.equal(copies[0].target, values)
    fake.stop()


def test_a_sender_that_can_not_start(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    copies, _ = model(tmp_path, [torch.float32])
    monkeypatch.setattr("_thread.start_new_thread", refuse)
    with pytest.raises(RuntimeError, match="can't start") as caught:
        run(copies, threads=1)
    assert caught.value.written == ()
    monkeypatch.undo()
    fake.stop()


def test_every_device_is_waited_for_before_an_overflow_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, the slower of which isn't done when the other's overflow is found."""
    slow, quick = FakeEngine(), FakeEngine()
    meta = torch.device("meta")  # another key; the data goes to the CPU all the same
    real = engine.schedule
    monkeypatch.setattr(engine, "schedule", lambda *a: [j._replace(device=meta if j.offset else CPU) for j in real(*a)])
    monkeypatch.setattr(engine, "_new_rings", lambda jobs, threads: {CPU: Ring(quick, 2), meta: Ring(slow, 2)})
    slow.pause = 0.3
    source = MemorySource(torch.full((2 << 18,), 1e9).numpy().tobytes())
    targets = [torch.zeros(1 << 18, dtype=torch.float16), torch.zeros(1 << 18)]
    copies = [copy_of(source, target, index << 20, f"t{index}") for index, target in enumerate(targets)]
    with pytest.raises(CastOverflowError):
        run(copies, threads=1)
    assert slow.is_idle
    assert quick.is_idle
    assert slow.sent
    assert targets[1].eq(1e9).all()
    slow.stop()
    quick.stop()


def test_an_interrupt_is_not_taken_for_an_overflow(fake: FakeEngine) -> None:
    def interrupt(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    source = MemorySource(torch.full((4 << 18,), 1e9).numpy().tobytes())
    copies = [copy_of(source, torch.zeros(1 << 18).half(), index << 20, f"t{index}") for index in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run(copies, threads=1, progress=interrupt)
    fake.stop()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_one_pair_of_dtypes_at_a_time(fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2.10 torch's kernel takes all targets for the first one's dtype; others it has no kernel for at all."""
    calls: list[tuple[set[torch.dtype], set[torch.dtype]]] = []
    real = torch._foreach_copy_

    def watch(targets: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        calls.append(({value.dtype for value in values}, {target.dtype for target in targets}))
        real(targets, values)

    monkeypatch.setattr(torch, "_foreach_copy_", watch)
    names = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex32 complex64 complex128"
    names += " int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool"
    same = [getattr(torch, name) for name in names.split()]
    casts = [(torch.float32, torch.float16), (torch.float32, torch.float64), (torch.float32, torch.float8_e5m2)]
    data, copies, expected = bytearray(), [], []
    for index, (dtype, result) in enumerate([*zip(same, same), *casts]):
        raw = torch.randint(0, 2, (24 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        copies.append(copy_of(MemorySource(b""), torch.zeros(24, dtype=result), len(data), f"t{index}", dtype))
        expected.append(raw.to(result))
        data += bytes(raw.view(torch.uint8).tolist())
    source = MemorySource(bytes(data))
    copies = [copy_of(source, c.target, c.box.extent.offset, c.name, c.dtype) for c in copies]
    run(copies, threads=1)
    for copy, value in zip(copies, expected):
        assert torch.equal(copy.target.view(torch.uint8), value.view(torch.uint8)), copy
    kernels = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128}
    kernels |= {torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool}
    assert calls
    for sources, targets in calls:
        assert len(sources) == len(targets) == 1
        assert sources | targets <= kernels
        assert sources != targets or sources <= kernels - {torch.float16, torch.bfloat16}, "they go through float32"
    fake.stop()


def test_targets_that_show_another_sign(fake: FakeEngine) -> None:
    """Of views that are negated or conjugated lazily torch can't write several at once."""
    values = torch.randn(20, dtype=torch.complex128)
    source = MemorySource(values.numpy().tobytes())
    memory: list[torch.Tensor] = [torch.zeros(20, dtype=dtype) for dtype in (torch.complex128, torch.complex64)]
    conjugates = [copy_of(source, one.conj(), 0, "conjugate", torch.complex128) for one in memory]
    run([*conjugates, copy_of(source, torch._neg_view(negative := torch.zeros(40)), 0, "negative", torch.float64)])
    assert torch.equal(memory[0], values.conj().resolve_conj())
    assert torch.equal(memory[1], values.conj().resolve_conj().to(torch.complex64))
    assert torch.equal(negative, -torch.view_as_real(values).reshape(-1).float())
    # Of the same dtype, for which torch has no kernel that copies several: not as integers either.
    halves = values.real.bfloat16()
    source = MemorySource(bytes(halves.view(torch.uint8).tolist()))
    run([copy_of(source, torch._neg_view(negative := torch.zeros(20).bfloat16()), 0, "half", torch.bfloat16)])
    assert torch.equal(negative, -halves)
    fake.stop()


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bytes_arrive_as_they_are(tmp_path: Path, fake: FakeEngine, offset: int, dtype: torch.dtype) -> None:
    """Every payload of a NaN, wherever the file puts it, in tensors of every size."""
    sizes = [1, 7, 1000, 300_000, 2_500_000]
    raws = [torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8) for size in sizes]
    (tmp_path / "f").write_bytes(bytes(offset) + b"".join(raw.numpy().tobytes() for raw in raws))
    source, copies, at = FileSource(tmp_path / "f"), [], offset
    for size, raw in zip(sizes, raws):
        copies.append(copy_of(source, torch.zeros(size, dtype=dtype), at, str(size), dtype))
        at += raw.numel()
    run(copies, threads=3)
    for copy, raw in zip(copies, raws):
        assert torch.equal(copy.target.view(torch.uint8), raw)
    fake.stop()


def test_what_only_looks_like_an_overflow(fake: FakeEngine) -> None:
    """Infinities and NaNs in the file are legal, and so is what rounds down to the largest value."""
    values = torch.tensor([65519.0, float("inf"), float("nan"), -float("inf"), 65504.0])
    target = torch.zeros(5, dtype=torch.float16)
    run([copy_of(MemorySource(values.numpy().tobytes()), target, 0, "mask")])
    assert torch.equal(target.nan_to_num(nan=1.0), values.half().nan_to_num(nan=1.0))
    fake.stop()


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_an_odd_header_costs_no_memory_on_the_device(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    """As in many safetensors files: all tensors lie the same number of bytes off, and need not be copied once more."""
    monkeypatch.setattr("torchload.transfer.cuda.decode", None)
    copies, expected = model(tmp_path, [torch.float16, torch.float32], shift)
    run(copies, threads=2)
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    fake.stop()


def check_real_numbers_for_a_complex_target() -> None:
    values = torch.tensor([1.0, float("inf"), 3.0, -4.0, 5.0], dtype=torch.float64)
    target = torch.zeros(5, dtype=torch.complex64)
    run([copy_of(MemorySource(values.numpy().tobytes()), target, 0, "weight", torch.float64)])
    assert torch.equal(target, values.to(torch.complex64))
    values[3] = 1e300
    with pytest.raises(CastOverflowError):
        run([copy_of(MemorySource(values.numpy().tobytes()), target, 0, "weight", torch.float64)])


def test_real_numbers_for_a_complex_target_on_a_device(fake: FakeEngine) -> None:
    check_real_numbers_for_a_complex_target()
    fake.stop()


def test_real_numbers_for_a_complex_target() -> None:
    check_real_numbers_for_a_complex_target()


def test_what_overlaps_with_a_tensor_that_is_cut(fake: FakeEngine) -> None:
    """Views of one storage, the widest of which takes several lanes."""
    values = torch.randn(3 << 20)
    source = MemorySource(values.numpy().tobytes())
    places = [(0, 3 << 20), (0, 10), (4, 2 << 20), (1 << 20, 1 << 21), (8 << 20, 7)]
    copies = [copy_of(source, torch.zeros(count), offset, f"{offset} {count}") for offset, count in places]
    run(copies, threads=2)
    for copy, (offset, count) in zip(copies, places):
        assert torch.equal(copy.target, values[offset // 4 :][:count])
    fake.stop()


def test_a_cast_that_lies_inside_another(fake: FakeEngine) -> None:
    """What is staged together reaches to the end of the widest, whichever begins last."""
    values = torch.randn(5000)
    source = MemorySource(values.numpy().tobytes())
    places = [(0, 5000), (400, 10), (404, 7)]
    copies = [copy_of(source, torch.zeros(count).half(), offset, f"{offset}") for offset, count in places]
    run(copies, threads=1)
    for copy, (offset, count) in zip(copies, places):
        assert torch.equal(copy.target, values[offset // 4 :][:count].half())
    fake.stop()


def test_casts_behind_bytes_that_lie_otherwise_need_no_copy_of_their_own(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchload.transfer.cuda.decode", None)
    values = torch.randn(400)
    source = MemorySource(bytes(3) + bytes(16) + values.numpy().tobytes())
    flags = copy_of(source, torch.ones(16, dtype=torch.uint8), 3, "flags", torch.uint8)
    copies = [copy_of(source, torch.zeros(100).half(), 19 + 400 * index, f"{index}") for index in range(4)]
    run([flags, *copies], threads=1)
    assert not flags.target.any()
    assert torch.equal(torch.cat([copy.target for copy in copies]), values.half())
    fake.stop()


@pytest.mark.parametrize("result", [torch.float32, torch.float16])
def test_a_job_fits_into_a_lane(result: torch.dtype) -> None:
    """As they are cut for a device, which the fake ones are not."""
    target = torch.empty(9 << 20, dtype=result, device="meta")
    jobs = schedule([copy_of(MemorySource(b""), target, 132, "weight"), copy_of(MemorySource(b""), target, 4, "w")])
    assert sum(piece.nbytes for job in jobs for piece in job.pieces) == 2 * 36 << 20
    turned = torch.empty(3000, 3000, dtype=result, device="meta").t()
    small = copy_of(MemorySource(b""), torch.empty(100, dtype=result, device="meta"), 0, "small")
    jobs += schedule([small, copy_of(small.box.extent.source, turned, 400, "turned")])
    assert all(0 < job.nbytes <= pieces.DEVICE_BYTES for job in jobs)


def test_copies_go_to_the_stream_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Stream(FakeStream):
        cuda_stream = 77

    monkeypatch.setattr("torchload.transfer.cuda._memcpy", lambda: lambda *call: told.append(call[-1]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    lane = Lane(torch.zeros(LANE_BYTES, dtype=torch.uint8), Staging(torch.empty(0, dtype=torch.uint8)), is_pinned=True)
    job = schedule([copy_of(MemorySource(bytes(40)), torch.zeros(10), 0, "weight")])[0]
    CudaDevice(torch.device("cuda"), LANE_BYTES, []).send([Load(job, lane, 0)])
    assert told == [77]


def test_an_error_that_is_kept_holds_no_memory_of_the_device(tmp_path: Path, fake_cuda: FakeCuda) -> None:
    """An `except CastOverflowError:` that loads again, in a wider dtype, needs it."""
    made: list[weakref.ref[Ring]] = []
    real = engine._new_rings

    def new_rings(jobs: Sequence[Job], threads: int) -> dict[torch.device, Ring]:
        rings = real(jobs, threads)
        made.extend(weakref.ref(ring) for ring in rings.values())
        return rings

    copies = [copy_of(MemorySource(torch.full((10,), 1e9).numpy().tobytes()), torch.zeros(10).half(), 0, "weight")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_new_rings", new_rings)
        with pytest.raises(CastOverflowError) as caught:
            run(copies)
    assert caught.value.__traceback__ is not None
    assert [ring() for ring in made] == [None]


def test_memory_that_can_not_be_pinned(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the lack of it is put up with, and the report says so."""
    copies, expected = model(tmp_path, [torch.float32])
    notes: list[str] = []
    run(copies, threads=1, notes=notes)
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    assert len(notes) == 1
    assert "pinned" in notes[0]

    class Runtime:
        code = 0

        def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
            assert (address, nbytes, flags) == (memory.data_ptr(), memory.numel(), 1)
            return self.code

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = torch.empty(4096, dtype=torch.uint8)
    monkeypatch.setattr("torchload.transfer.cuda._pinned", pinned := {})
    assert _pin(memory)
    assert pinned[memory.data_ptr()] is memory, "whatever happens to its lane"
    monkeypatch.setattr(torch, "ones", lambda *_, device: None)  # takes the error away
    for runtime.code in (2, 801):  # there is too little of it, or none at all
        assert not _pin(memory)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: (_ for _ in ()).throw(RuntimeError(f"error {code}")))
    runtime.code = 700
    with pytest.raises(RuntimeError, match="error 700"):
        _pin(memory)


@pytest.mark.gpu
def test_memory_is_pinned_once_and_kept(tmp_path: Path) -> None:
    values = torch.randn(6 << 20)
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    for _ in range(3):
        notes: list[str] = []
        target = torch.zeros(6 << 20, device="cuda")
        run([copy_of(FileSource(tmp_path / "f"), target, 0, "weight")], notes=notes)
        assert torch.equal(target.cpu(), values)
        assert not notes
        assert 0 < len(_kept) <= MAX_LANES
        assert all(memory.is_pinned() for memory in _kept)
    with pytest.raises(RuntimeError):
        _pin(_kept[0])  # twice
    assert torch.ones(3, device="cuda").sum() == 3, "the error is gone"


@pytest.mark.gpu
@pytest.mark.parametrize("threads", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_on_a_device(tmp_path: Path, dtype: torch.dtype, threads: int | None) -> None:
    copies, expected = model(tmp_path, [dtype], shift=8)
    copies = [Copy(copy.name, copy.box, copy.dtype, copy.target.cuda()) for copy in copies]
    run(copies, threads=threads)
    for copy, value in zip(copies, expected):
        assert torch.equal(copy.target.cpu(), value)


@pytest.mark.gpu
@pytest.mark.skipif(torch.version.cuda is None, reason="not CUDA")
def test_the_copy_of_cuda_is_found() -> None:
    torch.ones(1, device="cuda")
    assert _memcpy() is not None


@pytest.mark.gpu
def test_overflow_on_a_device(tmp_path: Path) -> None:
    source = MemorySource(torch.tensor([1.0, 1e9]).numpy().tobytes())
    with pytest.raises(CastOverflowError) as caught:
        run([copy_of(source, torch.zeros(2, device="cuda").half(), 0, "weight")])
    assert caught.value.largest == 1e9


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0), (torch.float16, 66 << 20)])
def test_memory_on_a_device_is_bounded(tmp_path: Path, dtype: torch.dtype, bound: int) -> None:
    """Beside the targets, what jobs are staged in to be cast, however large the load."""
    values = torch.randn(64 << 20)
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    target = torch.zeros(64 << 20, dtype=dtype, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run([copy_of(FileSource(tmp_path / "f"), target, 0, "weight")])
    assert torch.cuda.max_memory_allocated() - before <= bound
    assert torch.equal(target.cpu(), values.to(dtype))


@pytest.mark.gpu
def test_it_has_arrived_before_any_stream_looks(tmp_path: Path) -> None:
    values = torch.randn(8 << 20)
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    target = torch.zeros(8 << 20, device="cuda")
    torch.cuda._sleep(50_000_000)
    target.fill_(7)  # told to the caller's stream before the load, so it happens before it
    run([copy_of(FileSource(tmp_path / "f"), target, 0, "weight")])
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(target.cpu(), values)
