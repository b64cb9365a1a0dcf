"""The ring's protocol over a fake copy engine, which copies late and in a thread of its own, as a GPU does."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from torchload.core.checkpoint import Box, Extent, contiguous_strides
from torchload.core.copies import Copy
from torchload.core.source import FileSource, MemorySource, Source
from torchload.errors import CastOverflowError, CorruptCheckpointError
from torchload.transfer import engine, run
from torchload.transfer.cuda import (
    ALIGNMENT_BYTES,
    LANE_BYTES,
    CudaChannel,
    CudaLane,
    Ring,
    RingWorker,
    cuda_ring,
    send_pieces,
)
from torchload.transfer.pieces import Job, schedule
from torchload.transfer.reader import Reader

CPU = torch.device("cpu")


class FakeEngine:
    """Copies one job after the other, a little later."""

    def __init__(self) -> None:
        self.pending: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        self.lanes: list[FakeLane] = []

    def _work(self) -> None:
        with torch.inference_mode():
            while (work := self.pending.get()) is not None:
                time.sleep(0.002)
                work()

    def new_lane(self) -> FakeLane:
        self.lanes.append(FakeLane(self))
        return self.lanes[-1]

    def close(self) -> None:
        self.pending.put(None)
        self.thread.join()


class FakeLane:
    """A lane whose memory is in use until the engine has copied it."""

    fail_at: int | None = None

    def __init__(self, engine: FakeEngine) -> None:
        self.memory = torch.full((LANE_BYTES,), 0xEE, dtype=torch.uint8)
        self._engine = engine
        self._left = threading.Event()
        self._left.set()
        self._flags: list[tuple[Copy, torch.Tensor]] = []
        self.sent = 0

    def send(self, job: Job, start: int) -> None:
        assert self._left.is_set(), "memory was lent while it was in use"
        self._left.clear()

        def copy() -> None:
            try:
                send_pieces(self, job, self.memory[start : start + job.nbytes])
            finally:
                self.memory.fill_(0xEE)  # what is read from it now is wrong
                self._left.set()

        self._engine.pending.put(copy)
        self.sent += 1
        if self.fail_at == self.sent:
            raise RuntimeError("the device is gone")  # with copies under way

    def wait(self) -> None:
        assert self._left.wait(10)

    @property
    def is_idle(self) -> bool:
        return self._left.is_set()

    def overflowed(self) -> Copy | None:
        return next((copy for copy, flag in self._flags if flag), None)

    def staging(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def check(self, copy: Copy, flag: torch.Tensor) -> None:
        self._flags.append((copy, flag))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Jobs for the CPU go through a ring over a fake engine."""
    fake = FakeEngine()
    monkeypatch.setattr(engine, "_new_rings", lambda jobs, threads: {CPU: Ring(fake.new_lane, 2 * threads)})
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
    monkeypatch: pytest.MonkeyPatch,
    dtypes: list[torch.dtype],
    shift: int,
    threads: int,
) -> None:
    monkeypatch.setattr("torchload.transfer.pieces.DIRECT_BYTES", 1 << 20)
    copies, expected = model(tmp_path, dtypes, shift)
    assert run(copies, threads=threads) == sum(value.numel() * 4 for value in expected)
    for copy, value in zip(copies, expected):
        assert torch.equal(copy.target, value)
    assert all(lane.is_idle for lane in fake.lanes)
    assert len(fake.lanes) <= 2 * threads
    fake.close()


def test_a_lane_is_lent_again_only_when_its_data_has_left(tmp_path: Path) -> None:
    """Two lanes, many jobs: `FakeLane.send` fails if memory is lent too early, and spoils what was."""
    fake = FakeEngine()
    ring = Ring(fake.new_lane, 2)
    worker = RingWorker(Reader(), ring)
    copies, expected = model(tmp_path, [torch.float32])
    for copy in copies:
        for job in schedule([copy]):
            worker(job)
    assert len(fake.lanes) == 2
    assert min(lane.sent for lane in fake.lanes) > 5
    ring.drain()
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    fake.close()


def test_a_short_read_waits_for_what_was_sent(fake: FakeEngine) -> None:
    class ShortSource(MemorySource):
        def readinto(self, offset: int, buffer: memoryview) -> None:
            if offset >= 5_000_000:
                raise CorruptCheckpointError("nothing there", path="f")
            super().readinto(offset, buffer)

    source = ShortSource(bytes(8_000_000))
    copies = [copy_of(source, torch.ones(250_000), index * 1_000_000, f"t{index}") for index in range(8)]
    with pytest.raises(CorruptCheckpointError, match="nothing there") as caught:
        run(copies, threads=2)
    assert all(lane.is_idle for lane in fake.lanes)
    assert set(caught.value.written) >= {"t0", "t1", "t2"}
    assert all(not copy.target.any() for copy in copies[:3])
    fake.close()


def test_a_device_that_fails_half_way(tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLane, "fail_at", 1)
    copies, _ = model(tmp_path, [torch.float32])
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(copies, threads=2)
    assert fake.lanes
    assert all(lane.is_idle for lane in fake.lanes)
    fake.close()


def test_a_lane_that_can_not_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lane() -> FakeLane:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_new_rings", lambda jobs, threads: {CPU: Ring(no_lane, 2 * threads)})
    copies, _ = model(tmp_path, [torch.float32])
    with pytest.raises(RuntimeError, match="out of memory"):
        run(copies, threads=3)


def test_cancelled_by_the_caller(tmp_path: Path, fake: FakeEngine) -> None:
    def interrupt(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt(f"{done_bytes} of {total_bytes}")

    copies, _ = model(tmp_path, [torch.float32])
    with pytest.raises(KeyboardInterrupt):
        run(copies, threads=2, progress=interrupt)
    assert all(lane.is_idle for lane in fake.lanes)
    fake.close()


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
    fake.close()


class FakeStream:
    """Runs work in order, and notes what it was told."""

    def __init__(self, device: torch.device) -> None:
        self.told: list[str] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.told.append("wait")

    def synchronize(self) -> None:
        self.told.append("synchronize")


class FakeEvent:
    """An event that must be recorded after each use of what it guards, and waited for before the next."""

    def __init__(self, blocking: bool) -> None:
        self.stream: FakeStream | None = None
        self.records = self.waits = 0

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        self.records += 1
        stream.told.append("record")

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[CudaLane]:
    """The real lanes over fake streams, with the CPU for a device; a list of the lanes that are made."""
    lanes: list[CudaLane] = []
    real = CudaLane.__init__

    def note(self: CudaLane, channel: CudaChannel, nbytes: int) -> None:
        real(self, channel, nbytes)
        lanes.append(self)

    monkeypatch.setattr(CudaLane, "__init__", note)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(engine, "_new_rings", lambda jobs, threads: {CPU: cuda_ring(CPU, jobs, threads)})
    return lanes


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float16, torch.bfloat16]])
def test_lanes_keep_to_the_protocol(
    tmp_path: Path, fake_cuda: list[CudaLane], dtypes: list[torch.dtype], threads: int
) -> None:
    copies, expected = model(tmp_path, dtypes, shift=8)
    largest = max(job.nbytes for job in schedule(copies))
    run(copies, threads=threads)
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    assert len(fake_cuda) <= 2 * threads
    channels = {id(lane._channel): lane._channel for lane in fake_cuda}
    assert len(channels) == min(2, len(fake_cuda))
    for lane in fake_cuda:
        assert lane.memory.numel() == largest + ALIGNMENT_BYTES, "no more than this load needs"
        event: Any = lane._event
        assert event.waits == event.records, "once before each use but the first, and once at the end"
        assert event.stream is lane._channel.stream
    for channel in channels.values():
        stream: Any = channel.stream
        assert stream.told[0] == "wait", "for what the caller's stream was told before"
        assert set(stream.told[1:]) == {"record"}


def test_what_was_sent_in_part_is_waited_for(
    tmp_path: Path, fake_cuda: list[CudaLane], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    copies, _ = model(tmp_path, [torch.float16])
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(copies, threads=2)
    streams: list[Any] = [lane._channel.stream for lane in fake_cuda]
    assert all(stream.told[-1] == "synchronize" for stream in streams)
    assert not any(lane._channel.lock.locked() for lane in fake_cuda)


def test_an_interrupt_while_waiting_leaves_nothing_under_way() -> None:
    class Interrupted(FakeLane):
        waits = 0

        def wait(self) -> None:
            self.waits += 1
            if self.waits == 1:
                raise KeyboardInterrupt
            super().wait()

    fake = FakeEngine()
    lanes = [Interrupted(fake), Interrupted(fake)]
    made = iter(lanes)
    ring = Ring(lambda: next(made), 2)
    for _ in lanes:
        with ring.lend():
            pass
    with pytest.raises(KeyboardInterrupt):
        ring.drain()
    assert [lane.waits for lane in lanes] == [2, 2]
    fake.close()


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
def test_overflow_on_a_device(tmp_path: Path) -> None:
    source = MemorySource(torch.tensor([1.0, 1e9]).numpy().tobytes())
    with pytest.raises(CastOverflowError) as caught:
        run([copy_of(source, torch.zeros(2, device="cuda").half(), 0, "weight")])
    assert caught.value.largest == 1e9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_on_a_device_is_bounded(tmp_path: Path, dtype: torch.dtype) -> None:
    """Beside the targets, what two jobs are staged and checked in, however large the load."""
    values = torch.randn(64 << 20)
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    target = torch.zeros(64 << 20, dtype=dtype, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run([copy_of(FileSource(tmp_path / "f"), target, 0, "weight")])
    assert torch.cuda.max_memory_allocated() - before <= 6 * LANE_BYTES
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
