"""The ring's protocol over a fake copy engine, which copies late and in a thread of its own, as a GPU does."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchload.copies import Copy
from torchload.errors import CastOverflowError, CorruptCheckpointError
from torchload.index import Box, Extent, contiguous_strides
from torchload.source import FileSource, MemorySource, Source
from torchload.transfer import engine, pieces, run
from torchload.transfer.cuda import (
    ALIGNMENT_BYTES,
    LANE_BYTES,
    MAX_LANES,
    CudaLane,
    Ring,
    RingWorker,
    Staging,
    Suspicion,
    _host_memory,
    _streams,
    cuda_ring,
    drain_all,
    send_pieces,
)
from torchload.transfer.pieces import Job, _fill_lanes, schedule
from torchload.transfer.reader import Reader

CPU = torch.device("cpu")


class FakeEngine:
    """Copies one job after the other, a little later."""

    pause = 0.002

    def __init__(self) -> None:
        self.pending: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        self.lanes: list[FakeLane] = []

    def _work(self) -> None:
        with torch.inference_mode():
            while (work := self.pending.get()) is not None:
                time.sleep(self.pause)
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
        self.is_pinned = True
        self.suspicions: list[Suspicion] = []
        self.sent = 0

    def send(self, job: Job, start: int) -> None:
        assert self._left.is_set(), "memory was lent while it was in use"
        self._left.clear()

        def copy() -> None:
            try:
                staging = Staging(torch.zeros(LANE_BYTES, dtype=torch.uint8))
                self.suspicions += send_pieces(job, self.memory, start, staging)
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


@pytest.fixture
def lanes_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the CPU is cut and put together as if it went to a device."""
    monkeypatch.setattr(pieces, "STAGED_BYTES", 1 << 20)
    monkeypatch.setattr(pieces, "_batch", lambda device, source, members, cold: _fill_lanes(device, source, members))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, lanes_for_all: None) -> FakeEngine:
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
    dtypes: list[torch.dtype],
    shift: int,
    threads: int,
) -> None:
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
    drain_all([ring])
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    fake.close()


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
    """Notes what it was told."""

    def __init__(self, device: torch.device) -> None:
        self.told: list[str] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.told.append("wait")


class FakeEvent:
    """An event that must be recorded after each use of what it guards, and waited for before the next."""

    def __init__(self, blocking: bool) -> None:
        self.records = self.waits = 0

    def record(self) -> None:
        self.records += 1

    def synchronize(self) -> None:
        self.waits += 1


class FakeCuda:
    """What CUDA was asked for, thread by thread."""

    def __init__(self) -> None:
        self.lanes: list[CudaLane] = []
        self.streams: list[FakeStream] = []
        self.places: dict[int, list[object]] = {}
        """Thread → the devices and streams that it is on, the last one innermost."""
        self.left: list[object] = []

    def new_stream(self, device: torch.device) -> FakeStream:
        self.streams.append(FakeStream(device))
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, place: object) -> Iterator[None]:
        mine = self.places.setdefault(threading.get_ident(), [])
        mine.append(place)
        yield
        assert mine.pop() is place
        self.left.append(place)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch, lanes_for_all: None) -> Iterator[FakeCuda]:
    """The real lanes over fake streams, with the CPU for a device."""
    cuda = FakeCuda()
    real_lane, real_send = CudaLane.__init__, CudaLane.send

    def note(self: CudaLane, nbytes: int, staging: torch.Tensor) -> None:
        assert [type(place) for place in cuda.places[threading.get_ident()]] == [torch.device, FakeStream], (
            "memory is pinned, and copies begin, where the thread is on the load's device"
        )
        real_lane(self, nbytes, staging)
        cuda.lanes.append(self)

    def send(self: CudaLane, job: Job, start: int) -> None:
        assert [type(place) for place in cuda.places[threading.get_ident()]] == [torch.device, FakeStream]
        real_send(self, job, start)

    monkeypatch.setattr(CudaLane, "__init__", note)
    monkeypatch.setattr(CudaLane, "send", send)
    monkeypatch.setattr(torch.cuda, "Stream", cuda.new_stream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", cuda.on)
    monkeypatch.setattr(torch.cuda, "device", cuda.on)
    monkeypatch.setattr(engine, "_new_rings", lambda jobs, threads: {CPU: cuda_ring(CPU, jobs, threads)})
    _streams.cache_clear()
    yield cuda
    _streams.cache_clear()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.float16, torch.bfloat16]])
def test_lanes_keep_to_the_protocol(
    tmp_path: Path, fake_cuda: FakeCuda, dtypes: list[torch.dtype], threads: int
) -> None:
    copies, expected = model(tmp_path, dtypes, shift=8)
    for _ in range(2):
        for copy in copies:
            copy.target.zero_()
        run(copies, threads=threads)
        assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    assert len(fake_cuda.lanes) <= 2 * (threads + 1)
    for lane in fake_cuda.lanes:
        event: Any = lane._event
        assert event.waits == event.records, "once before each use but the first, and once at the end"
    assert len(fake_cuda.streams) == 2, "streams are kept: the memory that torch keeps for each of them is"
    assert all(stream.told == ["wait", "wait"] for stream in fake_cuda.streams), "for what the caller's stream was told"
    assert not any(fake_cuda.places.values()), "every thread has left the device again"
    assert all(isinstance(*pair) for pair in zip(fake_cuda.left, [FakeStream, torch.device] * 99)), "in that order"


def test_what_was_sent_in_part_is_waited_for(
    tmp_path: Path, fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(torch, "_foreach_copy_", fail)
    copies, _ = model(tmp_path, [torch.float16])
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(copies, threads=2)
    events: list[Any] = [lane._event for lane in fake_cuda.lanes]
    assert events
    assert all(event.records == event.waits == 1 for event in events)


@pytest.mark.parametrize("threads", [1, 2, 8, 12, 40])
def test_what_is_held_is_bounded(tmp_path: Path, threads: int) -> None:
    jobs = [Job(CPU, MemorySource(b""), 0, LANE_BYTES - ALIGNMENT_BYTES, [])] * 100
    made: list[int] = []

    class OneLane(FakeLane):
        def __init__(self) -> None:
            made.append(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", FakeStream)
        patch.setattr(torch.cuda, "current_stream", FakeStream)
        _streams.cache_clear()
        ring = cuda_ring(CPU, jobs, threads)
        _streams.cache_clear()
    count = len(ring._lanes)
    assert count > threads
    assert count <= max(MAX_LANES, threads + 1)
    assert MAX_LANES * LANE_BYTES <= 64 << 20


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
    rings = [Ring(lambda: next(made), 1), Ring(lambda: next(made), 1)]
    for ring in rings:
        with ring.lend():
            pass
    with pytest.raises(KeyboardInterrupt):
        drain_all(rings)
    assert [lane.waits for lane in lanes] == [2, 2]
    fake.close()


def test_every_device_is_waited_for_before_an_overflow_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, the slower of which isn't done when the other's overflow is found."""
    slow, quick = FakeEngine(), FakeEngine()
    meta = torch.device("meta")  # another key; the data goes to the CPU all the same
    real = engine.schedule
    monkeypatch.setattr(
        engine, "schedule", lambda *a: [j._replace(device=meta if j.offset else CPU) for j in real(*a)]
    )
    monkeypatch.setattr(
        engine, "_new_rings", lambda jobs, threads: {CPU: Ring(quick.new_lane, 2), meta: Ring(slow.new_lane, 2)}
    )
    slow.pause = 0.3
    source = MemorySource(torch.full((2 << 18,), 1e9).numpy().tobytes())
    targets = [torch.zeros(1 << 18, dtype=torch.float16), torch.zeros(1 << 18)]
    copies = [copy_of(source, target, index << 20, f"t{index}") for index, target in enumerate(targets)]
    with pytest.raises(CastOverflowError):
        run(copies, threads=1)
    assert all(lane.is_idle for lane in slow.lanes + quick.lanes)
    assert targets[1].eq(1e9).all()
    slow.close()
    quick.close()


def test_an_interrupt_is_not_taken_for_an_overflow(fake: FakeEngine) -> None:
    def interrupt(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    source = MemorySource(torch.full((4 << 18,), 1e9).numpy().tobytes())
    copies = [copy_of(source, torch.zeros(1 << 18).half(), index << 20, f"t{index}") for index in range(4)]
    with pytest.raises(KeyboardInterrupt):
        run(copies, threads=1, progress=interrupt)
    fake.close()


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
    fake.close()


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
    fake.close()


def test_what_only_looks_like_an_overflow(fake: FakeEngine) -> None:
    """Infinities and NaNs in the file are legal, and so is what rounds down to the largest value."""
    values = torch.tensor([65519.0, float("inf"), float("nan"), -float("inf"), 65504.0])
    target = torch.zeros(5, dtype=torch.float16)
    run([copy_of(MemorySource(values.numpy().tobytes()), target, 0, "mask")])
    assert torch.equal(target.nan_to_num(nan=1.0), values.half().nan_to_num(nan=1.0))
    fake.close()


def test_memory_that_can_not_be_pinned(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the lack of it is put up with, and the report says so."""
    copies, expected = model(tmp_path, [torch.float32])
    notes: list[str] = []
    run(copies, threads=1, notes=notes)
    assert all(torch.equal(copy.target, value) for copy, value in zip(copies, expected))
    assert len(notes) == 1
    assert "pinned" in notes[0]

    real = torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError(message)
        return real(*args, **keywords)

    monkeypatch.setattr(torch, "empty", refuse)
    message = "CUDA error: out of memory"
    memory, is_pinned = _host_memory(100, pin=True)
    assert memory.numel() == 100
    assert not is_pinned
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        _host_memory(100, pin=True)


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
    """Beside the targets, what jobs are staged in, however large the load."""
    values = torch.randn(64 << 20)
    (tmp_path / "f").write_bytes(values.numpy().tobytes())
    target = torch.zeros(64 << 20, dtype=dtype, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run([copy_of(FileSource(tmp_path / "f"), target, 0, "weight")])
    assert torch.cuda.max_memory_allocated() - before <= 66 << 20
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
