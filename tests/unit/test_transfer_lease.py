"""Casts straight out of the page cache: nobody waits for a load for long, and nobody can take pages away from it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.test_transfer import whole, write
from torchload.core.source import FileSource
from torchload.errors import CastOverflowError, CorruptCheckpointError
from torchload.transfer import lease, run
from torchload.transfer.lease import LeasedFile
from torchload.transfer.pieces import CAST_BYTES

COUNT = 7 * CAST_BYTES // 8
"""Elements of float32 that make several jobs."""


@pytest.fixture
def values() -> torch.Tensor:
    return torch.randn(COUNT)


@pytest.fixture
def source(tmp_path: Path, values: torch.Tensor) -> FileSource:
    """A file that may be leased; file systems that don't lease are told by the first test alone."""
    source = write(tmp_path / "f", torch.zeros(2), values)
    assert source.fd is not None
    if LeasedFile.open(source.fd) is None:
        pytest.skip("no leases to be had here")
    return source


class Borrowings(LeasedFile):
    """Counts what was borrowed."""

    borrowed = 0

    def borrow(self, position: int, nbytes: int) -> torch.Tensor | None:
        data = super().borrow(position, nbytes)
        Borrowings.borrowed += 0 if data is None else nbytes
        return data


@pytest.fixture
def borrowings(monkeypatch: pytest.MonkeyPatch) -> type[Borrowings]:
    monkeypatch.setattr("torchload.transfer.reader.LeasedFile", Borrowings)
    monkeypatch.setattr(Borrowings, "borrowed", 0)
    return Borrowings


def descriptors() -> int:
    gc.collect()  # what other tests left
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_cast_isnt_copied_before(
    source: FileSource, values: torch.Tensor, borrowings: type[Borrowings], dtype: torch.dtype, threads: int
) -> None:
    before = descriptors()
    target = torch.zeros(COUNT, dtype=dtype)
    run([whole(source, target, torch.float32, 8)], threads=threads)
    assert torch.equal(target, values.to(dtype))
    assert borrowings.borrowed == values.nbytes
    assert descriptors() == before


def test_of_many_files_few_are_open_a_second_time(
    source: FileSource, tmp_path: Path, borrowings: type[Borrowings]
) -> None:
    count = 1 << 18
    sources = [write(tmp_path / f"{index}", torch.full((count,), float(index))) for index in range(12)]
    targets = [torch.zeros(count, dtype=torch.float16) for _ in sources]
    before, most = descriptors(), 0

    def look(done: int, total: int) -> None:
        nonlocal most
        most = max(most, descriptors())

    run([whole(file, target, torch.float32) for file, target in zip(sources, targets)], threads=1, progress=look)
    assert borrowings.borrowed == len(sources) * count * 4
    assert most <= before + 2  # the file, and what its mapping keeps
    assert descriptors() == before


@pytest.mark.parametrize("gap", [0, 8])
@pytest.mark.parametrize("leased", [True, False])
def test_matrices_are_cast_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: int, leased: bool) -> None:
    if not leased:
        monkeypatch.setattr(LeasedFile, "open", lambda _: None)
    matrices = [torch.randn(rows, 37) for rows in (3, 5000, 20000, 1, 9000)]
    source = write(tmp_path / "f", *(part for matrix in matrices for part in (torch.zeros(gap // 4), matrix)))
    targets = [torch.zeros_like(matrix, dtype=torch.bfloat16) for matrix in matrices]
    copies, offset = [], 0
    for matrix, target in zip(matrices, targets):
        offset += gap
        copies.append(whole(source, target, torch.float32, offset))
        offset += matrix.nbytes
    run(copies, threads=2)
    for matrix, target in zip(matrices, targets):
        assert torch.equal(target, matrix.bfloat16())


def test_what_lies_at_an_odd_address_arrives_all_the_same(tmp_path: Path, values: torch.Tensor) -> None:
    source = write(tmp_path / "g", torch.zeros(3, dtype=torch.uint8), values)
    target = torch.zeros(COUNT, dtype=torch.float16)
    run([whole(source, target, torch.float32, 3)])
    assert torch.equal(target, values.half())


@pytest.mark.parametrize("way", ["lent", "read", "at an odd address"])
def test_blocks_that_may_overflow_are_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "read":
        monkeypatch.setattr(LeasedFile, "open", lambda _: None)
    gap = 3 if way == "at an odd address" else 8
    large = torch.full((COUNT,), 60000.0)  # the squares add up to more than the limit's
    target = torch.zeros(COUNT, dtype=torch.float16)
    run([whole(write(tmp_path / "f", torch.zeros(gap, dtype=torch.uint8), large), target, torch.float32, gap)])
    assert torch.equal(target, large.half())
    for index in (0, COUNT // 2, COUNT - 1):
        values = torch.ones(COUNT)
        values[index] = -1e6
        source = write(tmp_path / f"{index}", torch.zeros(gap, dtype=torch.uint8), values)
        with pytest.raises(CastOverflowError) as caught:
            run([whole(source, target, torch.float32, gap, "layer.weight")])
        assert (caught.value.tensor, caught.value.largest) == ("layer.weight", 1e6)


def test_whoever_wants_to_write_waits_for_one_job_at_most(
    source: FileSource, values: torch.Tensor, borrowings: type[Borrowings]
) -> None:
    writers: list[int] = []

    def open_to_write(done: int, total: int) -> None:
        writers.append(os.open(source.name, os.O_WRONLY | os.O_NONBLOCK))  # fails where a lease is held

    target = torch.zeros(COUNT, dtype=torch.float16)
    run([whole(source, target, torch.float32, 8)], threads=1, progress=open_to_write)
    assert torch.equal(target, values.half())
    assert borrowings.borrowed == CAST_BYTES  # not any more, once somebody can write
    for writer in writers:
        os.close(writer)


def test_a_lease_is_given_up_and_not_taken_again_while_somebody_waits(source: FileSource) -> None:
    assert source.fd is not None
    file, other = LeasedFile.open(source.fd), LeasedFile.open(source.fd)
    assert file is not None
    assert other is not None
    assert file.borrow(0, 4096) is not None
    with pytest.raises(BlockingIOError):
        os.open(source.name, os.O_WRONLY | os.O_NONBLOCK)
    assert other.borrow(0, 4096) is None
    file.give_back()
    os.close(os.open(source.name, os.O_WRONLY | os.O_NONBLOCK))
    assert other.borrow(0, 4096) is not None
    other.give_back()


def test_pages_that_are_not_there_arent_lent(source: FileSource) -> None:
    assert source.fd is not None
    file = LeasedFile.open(source.fd)
    assert file is not None
    os.truncate(source.name, 4096)
    assert file.borrow(0, 8192) is None
    assert file.borrow(0, 4096) is not None
    file.give_back()
    file.close()
    assert file.borrow(0, 4096) is None


@pytest.mark.parametrize("end", [LeasedFile.give_back, LeasedFile.close])
def test_whatever_was_borrowed_others_may_write_in_the_end(
    source: FileSource, end: Callable[[LeasedFile], None]
) -> None:
    """Also where somebody keeps a tensor of it, and where there is no lease: the kernel takes it after 45 s."""
    assert source.fd is not None
    file = LeasedFile.open(source.fd)
    assert file is not None
    data = file.borrow(0, 4096)
    assert data is not None
    end(file)
    os.close(os.open(source.name, os.O_WRONLY | os.O_NONBLOCK))
    end(file)


def test_interrupted_while_it_is_tried(source: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    assert source.fd is not None
    monkeypatch.setattr(lease, "_end_lease", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        LeasedFile.open(source.fd)
    assert caught.traceback  # its frames hold whatever was open
    os.close(os.open(source.name, os.O_WRONLY | os.O_NONBLOCK))


def test_an_error_that_is_kept_holds_no_pages(
    source: FileSource, values: torch.Tensor, borrowings: type[Borrowings]
) -> None:
    before = descriptors()
    with open(source.name, "r+b") as file:
        file.seek(8 + 4 * COUNT // 2)
        file.write(torch.tensor([1e6]).numpy().tobytes())
    changed = FileSource(source.name)
    with pytest.raises(CastOverflowError) as caught:
        run([whole(changed, torch.zeros(COUNT, dtype=torch.float16), torch.float32, 8)])
    changed.close()
    assert borrowings.borrowed
    assert descriptors() == before, caught.value


def test_a_programs_own_handler_is_left_alone(
    source: FileSource, values: torch.Tensor, borrowings: type[Borrowings]
) -> None:
    before = signal.signal(signal.SIGURG, lambda *_: None)
    try:
        target = torch.zeros(COUNT, dtype=torch.float16)
        run([whole(source, target, torch.float32, 8)])
    finally:
        signal.signal(signal.SIGURG, before)
    assert torch.equal(target, values.half())
    assert borrowings.borrowed == 0


def test_file_systems_of_other_machines(source: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.fd is not None
    monkeypatch.setattr(lease, "file_system_of", lambda _: 0x6969)  # NFS
    assert LeasedFile.open(source.fd) is None


_LOADS = """
import sys, torch
from torchload import errors, read_state_dict
expected = torch.arange(1 << 22).remainder(1000).half()
ended = {"loaded": 0, "refused": 0}
print("ready", flush=True)
for _ in range(20):
    try:
        state = read_state_dict(sys.argv[1], dtype=torch.float16)
        assert torch.equal(state["w"], expected)
        ended["loaded"] += 1
    except (errors.CheckpointFormatError, OSError):
        ended["refused"] += 1
print(sum(ended.values()))
"""


def test_truncated_again_and_again_by_another_process(tmp_path: Path) -> None:
    """Each load ends with the weights or with an error; the process lives."""
    path = tmp_path / "w.pth"
    torch.save({"w": torch.arange(1 << 22).remainder(1000).float()}, path)
    content = path.read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", _LOADS, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as loads:
        assert loads.stdout is not None
        assert loads.stdout.readline() == "ready\n"
        while loads.poll() is None:
            os.truncate(path, len(content) // 3)
            path.write_bytes(content)
        output, error = loads.communicate()
    assert (loads.returncode, output, error) == (0, "20\n", "")


def test_truncated_while_a_thread_reads(source: FileSource) -> None:
    def truncate(done: int, total: int) -> None:
        os.truncate(source.name, 100)

    target = torch.zeros(COUNT, dtype=torch.float16)
    with pytest.raises(CorruptCheckpointError, match=r"became shorter|changed since"):
        run([whole(source, target, torch.float32, 8)], threads=2, progress=truncate)
