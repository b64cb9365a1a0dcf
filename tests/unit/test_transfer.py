"""Carrying out copies: each strategy, each failure, and what both leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.threads import python_threads
from torchload.core.checkpoint import Box, Extent, contiguous_strides
from torchload.core.copies import Copy
from torchload.core.source import FileSource, MemorySource, Source
from torchload.core.threads import Helper
from torchload.errors import CastOverflowError, CorruptCheckpointError
from torchload.transfer import crew, run
from torchload.transfer.crew import Crew, can_limit_intra_op
from torchload.transfer.pieces import DIRECT_BYTES, STAGED_BYTES, STRIDED_BYTES, schedule

LARGE = 3 * STAGED_BYTES // 8 + 17
"""Elements of float32 that make several pieces."""


def write(path: Path, *tensors: torch.Tensor) -> FileSource:
    """A file of the tensors' bytes, one after the other."""
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]
    path.write_bytes(b"".join(flat))
    return FileSource(path)


def whole(source: Source, target: torch.Tensor, dtype: torch.dtype, offset: int = 0, name: str = "t") -> Copy:
    """A copy of a contiguous tensor of the target's shape."""
    shape = tuple(target.shape)
    extent = Extent(source, offset, target.numel() * dtype.itemsize)
    return Copy(name, Box(extent, 0, shape, contiguous_strides(shape), (0,) * len(shape)), dtype, target)


class FaultySource(MemorySource):
    """Reads well up to a byte."""

    __slots__ = ("at", "do")

    def __init__(self, nbytes: int, at: int, do: Callable[[], None]) -> None:
        super().__init__(bytes(nbytes))
        self.at, self.do = at, do

    def readinto(self, offset: int, buffer: memoryview) -> None:
        if offset <= self.at < offset + len(buffer):
            self.do()
        super().readinto(offset, buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["as it is", "cast"])
@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("rows", [5, 64])
def test_columns_are_read_over_gaps_only_where_these_are_short(
    tmp_path: Path, dtype: torch.dtype, parts: int, rows: int
) -> None:
    for part_bytes, is_exact in ((1 << 10, False), (64 << 10, True)):
        columns = part_bytes // 4
        values = torch.randn(rows, parts * columns)
        source = write(tmp_path / "f", values)
        box = Box(Extent(source, 0, values.nbytes), part_bytes, (rows, columns), (parts * columns, 1), (0, columns))
        target = torch.zeros(rows, columns, dtype=dtype)
        read = run([Copy("t", box, torch.float32, target)])
        assert torch.equal(target, values[:, columns : 2 * columns].to(dtype))
        needed = rows * part_bytes
        assert read == (needed if is_exact else needed + (rows - 1) * (parts - 1) * part_bytes)


# --- strategies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_large_and_small(tmp_path: Path, dtype: torch.dtype, threads: int | None) -> None:
    values = [torch.randn(LARGE), torch.randn(5), torch.randn(()), torch.randn(0), torch.randn(300, 7)]
    source = write(tmp_path / "f", *values)
    copies, offset = [], 0
    for value in values:
        copies.append(whole(source, torch.zeros(value.shape, dtype=dtype), torch.float32, offset))
        offset += value.nbytes
    assert run(copies, threads=threads) == source.size
    for copy, value in zip(copies, values):
        assert torch.equal(copy.target, value.to(dtype))


def test_larger_than_a_direct_read(tmp_path: Path) -> None:
    values = torch.arange(DIRECT_BYTES // 2 + 3, dtype=torch.int32)
    target = torch.zeros_like(values)
    assert len(schedule([whole(write(tmp_path / "f", values), target, torch.int32)])) == 3
    run([whole(write(tmp_path / "f", values), target, torch.int32)])
    assert torch.equal(target, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transposed_source_in_bounded_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(900, 800)
    source = write(tmp_path / "f", values)
    target = torch.zeros(800, 900, dtype=dtype)
    copy = Copy("t", Box(Extent(source, 0, source.size), 0, (800, 900), (1, 800), (0, 0)), torch.float32, target)
    assert max(job.nbytes for job in schedule([copy])) <= STRIDED_BYTES
    run([copy])
    assert torch.equal(target, values.t().to(dtype))


def test_a_thin_slice_of_much_data_reads_little(tmp_path: Path) -> None:
    values = torch.randn(20, 100_000)
    source = write(tmp_path / "f", values)
    target = torch.zeros(20)
    copy = Copy("t", Box(Extent(source, 0, source.size), 12, (20,), (100_000,), (0,)), torch.float32, target)
    assert run([copy]) == 80
    assert torch.equal(target, values[:, 3])


def test_equal_layouts_go_straight_to_memory(tmp_path: Path) -> None:
    values = torch.randn(3, 5, 4, 4).to(memory_format=torch.channels_last)
    source = write(tmp_path / "f", values.permute(0, 2, 3, 1))
    target = torch.zeros_like(values)
    copy = Copy(
        "t", Box(Extent(source, 0, source.size), 0, (3, 5, 4, 4), values.stride(), (0,) * 4), torch.float32, target
    )
    assert schedule([copy])[0].is_direct
    run([copy])
    assert torch.equal(target, values)


def test_targets_that_are_views(tmp_path: Path) -> None:
    values = torch.randn(4, 6)
    source = write(tmp_path / "f", values)
    memory = torch.zeros(8, 12)
    run([whole(source, memory[::2, ::2], torch.float32)])
    assert torch.equal(memory[::2, ::2], values)
    assert memory.count_nonzero() == values.numel()


def test_conjugate_and_negative_views(tmp_path: Path) -> None:
    values = torch.randn(50, dtype=torch.complex64)
    source = write(tmp_path / "f", values)
    conjugate = torch.zeros(50, dtype=torch.complex64).conj()
    negative = torch.zeros(50, dtype=torch.complex64).conj().imag
    run([whole(source, conjugate, torch.complex64), whole(source, negative, torch.float32)])
    assert torch.equal(conjugate, values)
    assert torch.equal(negative, torch.view_as_real(values).reshape(-1)[:50])


def test_nothing_to_do() -> None:
    assert run([]) == 0
    assert run([whole(MemorySource(b""), torch.zeros(0, 3), torch.float32)]) == 0


def test_casts_what_is_not_aligned(tmp_path: Path) -> None:
    values = torch.randn(LARGE)
    source = write(tmp_path / "f", torch.zeros(3, dtype=torch.uint8), values)
    target = torch.zeros(LARGE, dtype=torch.float16)
    run([whole(source, target, torch.float32, offset=3)])
    assert torch.equal(target, values.half())


# --- modes and settings of the caller -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        lambda: torch.device("meta"),
    ],
    ids=["no_grad", "enable_grad", "inference_mode", "autocast", "default device"],
)
def test_any_mode(tmp_path: Path, mode: Callable[[], torch.no_grad], threads: int, dtype: torch.dtype) -> None:
    values = torch.randn(LARGE)
    source = write(tmp_path / "f", values)
    parameter = torch.nn.Parameter(torch.zeros(LARGE, dtype=dtype))
    small = torch.nn.Parameter(torch.zeros(10, dtype=dtype))
    with torch.inference_mode():
        inference = torch.zeros(LARGE, dtype=dtype)
    with mode():
        run([whole(source, target, torch.float32) for target in (parameter, small, inference)], threads=threads)
    for target in (parameter, small, inference):
        assert torch.equal(target, values[: target.numel()].to(dtype))
    assert parameter.requires_grad
    assert parameter.is_leaf


@pytest.mark.parametrize("size", [10, LARGE])
def test_autograd_notices(tmp_path: Path, size: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(size))
    loss = (parameter**2).sum()
    run([whole(write(tmp_path / "f", torch.randn(size)), parameter, torch.float32)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torch_threads_are_as_before(tmp_path: Path) -> None:
    source = write(tmp_path / "f", torch.randn(LARGE))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run([whole(source, torch.zeros(LARGE).half(), torch.float32)], threads=3)
        in_new_thread: list[int] = []
        thread = threading.Thread(target=lambda: in_new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *in_new_thread] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_progress_is_told_in_the_calling_thread(tmp_path: Path) -> None:
    source = write(tmp_path / "f", torch.randn(4 * LARGE))
    seen: list[tuple[int, int]] = []
    threads = set()

    def progress(done_bytes: int, total_bytes: int) -> None:
        seen.append((done_bytes, total_bytes))
        threads.add(threading.current_thread())

    assert (
        run([whole(source, torch.zeros(4 * LARGE).half(), torch.float32)], threads=2, progress=progress) == source.size
    )
    assert threads == {threading.current_thread()}
    assert seen == sorted(seen)
    assert seen[-1] == (source.size, source.size)


# --- overflow -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [RuntimeError, TypeError])
def test_autograd_is_told_of_writes_where_it_takes_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: type[Exception]
) -> None:
    increment = torch.autograd.graph.increment_version

    def one_at_a_time(tensor: object) -> None:  # as torch 2.4 does
        if not isinstance(tensor, torch.Tensor):
            raise refusal("increment_version expect a Tensor as input")
        increment(tensor)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", one_at_a_time)
    targets = [torch.zeros(3), torch.zeros(3)]
    with torch.inference_mode():
        targets.append(torch.zeros(3))
    source = write(tmp_path / "f", torch.arange(3.0))
    before = [target._version for target in targets[:2]]
    run([whole(source, target, torch.float32) for target in targets])
    assert all(torch.equal(target, torch.arange(3.0)) for target in targets)
    assert [target._version > version for target, version in zip(targets, before)] == [True, True]


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("size", [20, LARGE])
@pytest.mark.parametrize("dtype", FLOATS)
def test_overflow_exactly_where_the_cast_overflows(tmp_path: Path, dtype: torch.dtype, size: int) -> None:
    """Just below the value from which the cast gives no finite number all is well; from it on it is an error."""
    low, high = float(torch.finfo(dtype).max), float(torch.finfo(dtype).max) * 2
    for _ in range(200):
        middle = (low + high) / 2
        finite = bool(torch.tensor(middle, dtype=torch.float64).to(dtype).float().isfinite())
        finite &= dtype != torch.float8_e4m3fn or middle <= 464  # where torch's cast saturates: half a step past 448
        low, high = (middle, high) if finite else (low, middle)
    values = torch.ones(size, dtype=torch.float64)
    values[0], values[1] = float("inf"), float("nan")  # which may stay
    target = torch.zeros(size).to(dtype)
    values[size // 2] = -low
    run([whole(write(tmp_path / "f", values), target, torch.float64)])
    assert torch.equal(target.float().nan_to_num(), values.to(dtype).float().nan_to_num())
    values[size // 2] = -high
    source = write(tmp_path / "g", values)
    with pytest.raises(CastOverflowError, match="layer.weight does not fit") as caught:
        run([whole(source, target, torch.float64, name="layer.weight")])
    assert caught.value.tensor == "layer.weight"
    assert caught.value.largest == high
    assert (caught.value.source_dtype, caught.value.target_dtype) == ("float64", str(dtype).removeprefix("torch."))
    assert caught.value.written == ("layer.weight",)


@pytest.mark.parametrize("layout", ["packed", "strided", "whole"])
def test_overflow_names_the_right_tensor(tmp_path: Path, layout: str) -> None:
    values = torch.ones(9, 100)
    values[4, 50] = 1e6
    source = write(tmp_path / "f", values)
    if layout == "packed":
        copies = [whole(source, torch.zeros(100).half(), torch.float32, row * 400, f"row {row}") for row in range(9)]
    elif layout == "strided":
        copies = [
            whole(source, torch.zeros(200).half()[::2], torch.float32, row * 400, f"row {row}") for row in range(9)
        ]
    else:
        copies = [whole(source, torch.zeros(9, 100).half(), torch.float32, name="row 4")]
    with pytest.raises(CastOverflowError) as caught:
        run(copies)
    assert (caught.value.tensor, caught.value.largest) == ("row 4", 1e6)


@pytest.mark.parametrize(
    ("source_dtype", "target_dtype", "largest"),
    [
        (torch.complex128, torch.complex64, 1e300),
        (torch.int64, torch.float16, 70000.0),
        (torch.int32, torch.float16, 65536.0),
    ],
)
def test_overflow_of_complex_and_integers(
    tmp_path: Path, source_dtype: torch.dtype, target_dtype: torch.dtype, largest: float
) -> None:
    values = torch.ones(100).to(source_dtype)
    target = torch.zeros(100, dtype=target_dtype)
    run([whole(write(tmp_path / "f", values), target, source_dtype)])
    assert torch.equal(target, values.to(target_dtype))
    values[7] = complex(1, largest) if source_dtype.is_complex else int(largest)
    with pytest.raises(CastOverflowError) as caught:
        run([whole(write(tmp_path / "g", values), target, source_dtype)])
    assert caught.value.largest == largest


def test_a_large_sum_is_no_overflow(tmp_path: Path) -> None:
    values = torch.full((LARGE,), 60000.0)
    target = torch.zeros(LARGE).half()
    run([whole(write(tmp_path / "f", values), target, torch.float32)])
    assert torch.equal(target, values.half())


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), CorruptCheckpointError("short"), KeyboardInterrupt()]
)
def test_the_first_error_stops_all(error: BaseException, threads: int) -> None:
    def fail() -> None:
        raise error

    nbytes = 40 * DIRECT_BYTES // 8
    source = FaultySource(nbytes, 5, fail)
    targets = [torch.zeros(DIRECT_BYTES // 8, dtype=torch.uint8) for _ in range(40)]
    copies = [
        whole(source, target, torch.uint8, index * target.numel(), f"t{index}") for index, target in enumerate(targets)
    ]
    running = python_threads()
    with pytest.raises(type(error)) as caught:
        run(copies, threads=threads)
    assert caught.value is error
    assert python_threads() == running
    written: tuple[str, ...] = error.written  # type: ignore[union-attr]
    assert "t0" in written
    assert len(written) < 40
    assert list(written) == [copy.name for copy in copies if copy.name in written]


def test_errors_keep_nothing_alive() -> None:
    def fail() -> None:
        raise OSError

    target = torch.zeros(LARGE)
    kept = weakref.ref(target)
    with contextlib.suppress(OSError):
        run([whole(FaultySource(LARGE * 4, 0, fail), target, torch.float32)], threads=3)
    del target
    gc.collect()
    assert kept() is None


def test_a_failing_progress_callback_stops_the_load() -> None:
    def progress(done_bytes: int, total_bytes: int) -> None:
        raise ZeroDivisionError(done_bytes / total_bytes)

    with pytest.raises(ZeroDivisionError):
        run([whole(MemorySource(bytes(400)), torch.zeros(100), torch.float32)], progress=progress)


def test_a_file_that_was_changed(tmp_path: Path) -> None:
    source = write(tmp_path / "f", torch.ones(100))
    target = torch.zeros(100)
    with open(source.name, "ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptCheckpointError, match="changed since it was opened") as caught:
        run([whole(source, target, torch.float32)])
    assert caught.value.written == ()
    assert target.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_that_is_truncated_meanwhile(tmp_path: Path, dtype: torch.dtype) -> None:
    source = write(tmp_path / "f", torch.ones(8 * LARGE))
    target = torch.zeros(8 * LARGE, dtype=dtype)

    def truncate(done_bytes: int, total_bytes: int) -> None:
        os.truncate(source.name, total_bytes // 2)

    with pytest.raises(CorruptCheckpointError, match=r"became shorter|changed since") as caught:
        run([whole(source, target, torch.float32, name="weight")], threads=2, progress=truncate)
    assert caught.value.written == ("weight",)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX signals")
def test_control_c() -> None:
    """An interrupt while the main thread works or waits ends the load; no thread is left."""
    main = threading.main_thread().ident
    assert main is not None
    nbytes = 64 * (1 << 20)
    source = FaultySource(nbytes, 20 << 20, lambda: signal.pthread_kill(main, signal.SIGINT))
    running = python_threads()
    with pytest.raises(KeyboardInterrupt):
        run([whole(source, torch.zeros(nbytes // 4), torch.float32)], threads=3)
    assert python_threads() == running


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="POSIX signals")
def test_an_interrupt_waits_for_jobs_that_others_are_at() -> None:
    main = threading.main_thread()
    begun = threading.Event()
    ended: list[int] = []

    def work(job: int) -> int:
        if threading.get_ident() == main.ident:
            begun.wait()
            return 0
        begun.set()
        time.sleep(0.2)  # until the main thread waits for this one
        signal.pthread_kill(main.ident or 0, signal.SIGINT)
        time.sleep(0.2)
        ended.append(job)
        return 0

    with pytest.raises(KeyboardInterrupt):
        Crew([0, 1], lambda: contextlib.nullcontext(work), threads=2).run()
    assert len(ended) == 1


def test_an_interrupt_between_the_work_and_the_wait() -> None:
    """It comes as the calling thread's part ends, once no `try` of that part can see it."""
    interrupt = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("PyErr_SetInterrupt", ctypes.pythonapi))
    main = threading.get_ident()
    begun = threading.Event()
    ended: list[int] = []
    watchers: list[object] = []

    class Worker:
        def __call__(self, job: int) -> int:
            if threading.get_ident() == main:
                begun.wait()
                return 0
            begun.set()
            time.sleep(0.2)
            ended.append(job)
            return 0

    def new_worker() -> contextlib.AbstractContextManager[Worker]:
        worker = Worker()
        if threading.get_ident() == main:
            watchers.append(weakref.ref(worker, interrupt))  # no step of Python's own before what follows
        return contextlib.nullcontext(worker)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Crew([0, 1], new_worker, threads=2).run()
        assert len(ended) == 1
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not can_limit_intra_op(), reason="torch's own threads can't be kept out")
def test_an_interrupt_leaves_torch_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads = crew._omp_set_num_threads()
    main = threading.get_ident()

    def interrupted(number: int) -> None:
        set_threads(number)
        if number == 1 and threading.get_ident() == main:
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    monkeypatch.setattr(crew, "_omp_set_num_threads", lambda: interrupted)
    set_threads(3)
    try:
        with pytest.raises(KeyboardInterrupt):
            Crew([0, 1], lambda: contextlib.nullcontext(int), threads=2).run()
        assert torch.get_num_threads() == 3
    finally:
        set_threads(before)


@pytest.mark.skipif(crew._mkl_set_num_threads() is None, reason="torch was built without MKL")
def test_mkl_is_asked_as_well_and_has_its_threads_back(tmp_path: Path) -> None:
    """`torch.set_num_threads` gives MKL a number of its own, which OpenMP's doesn't change."""
    set_threads = crew._mkl_set_num_threads()
    inside: list[int] = []

    def note(job: int) -> int:
        inside.append(set_threads(1))
        return job

    set_threads(3)
    try:
        Crew([0, 1, 2], lambda: contextlib.nullcontext(note), threads=2).run()
        assert inside == [1, 1, 1]
        assert set_threads(3) == 3
    finally:
        set_threads(0)  # what it is to begin with: no number for this thread


def test_an_interrupt_before_a_thread_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(helper: Helper) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Helper, "start", start)
    with pytest.raises(KeyboardInterrupt):
        Crew([0, 1], lambda: contextlib.nullcontext(int), threads=2).run()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_descriptors_and_scratch_are_given_back(tmp_path: Path) -> None:
    source = write(tmp_path / "f", torch.ones(LARGE))
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run([whole(source, torch.zeros(LARGE).half(), torch.float32)], threads=2)
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0
    assert source.name not in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_scratch(tmp_path: Path) -> None:
    """In a fresh process: 64 MiB cast into 32 MiB of parameters take a few MiB more."""
    path = tmp_path / "f"
    path.write_bytes(bytes(64 << 20))
    code = f"""
import re, sys, threading, torch
from torchload.core.source import FileSource
from torchload.transfer import run
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.unit.test_transfer import whole
def anonymous(): return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10
source = FileSource({str(path)!r})
run([whole(source, torch.zeros(1 << 18).half(), torch.float32)], threads=4)
target = torch.ones(4096, 4096).half()
before = peak = anonymous()
def watch(done, total):
    global peak
    peak = max(peak, anonymous())
run([whole(source, target, torch.float32)], threads=4, progress=watch)
print(peak - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 30
