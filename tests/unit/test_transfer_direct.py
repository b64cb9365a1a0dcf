"""Reading past the page cache: when it is chosen, that it reads what the page cache would, and how it gives way."""

from __future__ import annotations

import errno
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchload.core.checkpoint import Box, Extent
from torchload.core.copies import Copy
from torchload.core.source import FileSource, MemorySource
from torchload.errors import CorruptCheckpointError
from torchload.transfer import direct, engine, reader, run
from torchload.transfer.direct import DirectFile
from torchload.transfer.memory import memory_at
from torchload.transfer.pieces import COLD_BYTES, COLD_SMALL_BYTES, DIRECT_BYTES, schedule
from torchload.transfer.reader import Reader
from torchload.transfer.settings import direct_io, thread_count

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT and mincore are Linux's")

SIZE_BYTES = 70_001


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read that can goes past the page cache."""
    monkeypatch.setenv("TORCHLOAD_DIRECT_IO", "1")
    monkeypatch.setattr(reader, "DIRECT_IO_BYTES", 1)


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    generator = torch.Generator().manual_seed(0)
    content = torch.randint(256, (SIZE_BYTES,), dtype=torch.uint8, generator=generator)
    (tmp_path / "f").write_bytes(content.numpy().tobytes())
    return FileSource(tmp_path / "f")


def opened(source: FileSource) -> DirectFile:
    assert source.fd is not None
    file = DirectFile.open(source.fd)
    if file is None:
        pytest.skip("this file system has no direct I/O")
    return file


def drop_from_cache(path: str) -> None:
    """Let the file be cold, if the kernel obeys."""
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def floats(source: FileSource, offset: int, target: torch.Tensor, name: str = "t") -> Copy:
    count = target.numel()
    return Copy(name, Box(Extent(source, offset, 4 * count), 0, (count,), (1,), (0,)), torch.float32, target)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_reads_what_is_in_the_file(forced: None, source: FileSource, data: st.DataObject) -> None:
    """From any position, to any address: in step with the file's blocks (one copy less) or not."""
    file = opened(source)
    position = data.draw(st.integers(0, SIZE_BYTES - 1))
    nbytes = data.draw(st.integers(1, SIZE_BYTES - position))
    memory = torch.full((SIZE_BYTES + 3 * 4096,), 0xEE, dtype=torch.uint8)
    in_step = (position - memory.data_ptr()) % 4096
    start = data.draw(st.sampled_from([in_step, 0, 64]))
    assert file.read(position, memory_at(memory.data_ptr() + start, nbytes))
    expected = torch.frombuffer(bytearray(source.read(position, nbytes)), dtype=torch.uint8)
    assert torch.equal(memory[start : start + nbytes], expected)
    assert (memory[:start] == 0xEE).all()
    assert (memory[start + nbytes :] == 0xEE).all()
    file.close()
    file.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_load_past_the_page_cache(forced: None, tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(3 * DIRECT_BYTES // 4 + 5)
    (tmp_path / "f").write_bytes(b"abcd" + values.numpy().tobytes())
    source = FileSource(tmp_path / "f")
    cuts = [0, 7, 500, 70_000, 70_001, values.numel()]
    copies = [
        floats(source, 4 + 4 * first, torch.zeros(last - first, dtype=dtype))
        for first, last in itertools.pairwise(cuts)
    ]
    before = set(os.listdir("/proc/self/fd"))
    run(copies)
    assert torch.equal(torch.cat([copy.target for copy in copies]), values.to(dtype))
    assert set(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_reads_of_slices_begin_at_the_slice(forced: None, source: FileSource) -> None:
    part = source.slice(4099, 9000)
    buffer = bytearray(8000)
    with Reader() as both:
        both.look_at(part)
        both.readinto(part, 1000, memoryview(buffer))
    assert buffer == source.read(5099, 8000)


def test_a_cold_file_is_noticed_and_so_is_a_warm_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: FileSource
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHLOAD_DIRECT_IO", raising=False)
    with Reader() as small:
        drop_from_cache(source.name)
        assert not small.look_at(source), "readahead is quick enough for a small file"
    monkeypatch.setattr(direct, "_MINIMUM_FILE_BYTES", 1)
    source.read(0, SIZE_BYTES)
    with Reader() as warm:
        assert not warm.look_at(source)
        assert not warm.is_cold
    drop_from_cache(source.name)
    file = opened(source)
    buffer = bytearray(SIZE_BYTES)
    assert file.read(0, memoryview(buffer)), "absent"
    source.read(0, SIZE_BYTES)
    assert not file.read(0, memoryview(buffer)), "somebody has read it meanwhile"
    file.close()
    drop_from_cache(source.name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert source.fd is not None
    assert DirectFile.open(source.fd) is None, "eight processes share what one of them reads"


def test_what_has_no_direct_io_is_read_as_usual(forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader() as both:
        assert not both.look_at(MemorySource(bytes(10)))
        assert both.look_at(MemorySource(bytes(10))) is both.is_cold is False
    monkeypatch.setenv("TORCHLOAD_DIRECT_IO", "0")
    with open(__file__, "rb") as file:
        assert DirectFile.open(file.fileno()) is None


def test_a_file_system_that_refuses_late(forced: None, source: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some open a file with O_DIRECT and refuse to read it; then the page cache is used after all."""
    file = opened(source)
    file.close()
    real = os.preadv

    def refuse(descriptor: int, *arguments: object) -> int:
        if descriptor != source.fd:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", refuse)
    target = torch.zeros(SIZE_BYTES // 4)
    run([floats(source, 0, target)])
    monkeypatch.undo()
    assert target.numpy().tobytes() == source.read(0, target.nbytes)


def test_errors_of_the_device_are_not_hidden(forced: None, source: FileSource, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(source).close()

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output error") as caught:
        run([floats(source, 0, torch.zeros(SIZE_BYTES // 4), "weight")])
    assert caught.value.written == ("weight",)  # type: ignore[attr-defined]


def test_a_file_that_ends_early(forced: None, source: FileSource) -> None:
    file = opened(source)
    os.truncate(source.name, 5000)
    assert not file.read(4000, memoryview(bytearray(2000)))
    file.close()
    with pytest.raises(CorruptCheckpointError, match="changed since"):
        run([floats(source, 0, torch.zeros(2000))])


@given(st.lists(st.integers(1, 3_000_000), min_size=1, max_size=60))
def test_requests_to_a_cold_file_are_large(sizes: list[int]) -> None:
    """Neighbours share a request up to its size; nothing is left out, and what is large goes alone."""
    source = MemorySource(b"")
    copies, offset = [], 0
    for size in sizes:
        target = torch.empty(size, device="cpu")
        copies.append(floats(source, offset, target))  # type: ignore[arg-type]
        offset += 4 * size
    jobs = schedule(copies, lambda _: True)
    assert sum(piece.nbytes for job in jobs for piece in job.pieces) == offset
    for job, following in itertools.pairwise(jobs):
        assert max(job.nbytes, following.nbytes) <= max(COLD_BYTES, DIRECT_BYTES)
        if all(piece.nbytes < COLD_SMALL_BYTES for piece in (*job.pieces, *following.pieces)):
            full = job.nbytes + following.pieces[0].nbytes > COLD_BYTES
            assert full or job.offset + job.nbytes < following.offset, "what lies between them goes alone"


def test_the_environment_may_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, wish in {"": None, "auto": None, "1": True, "0": False}.items():
        monkeypatch.setenv("TORCHLOAD_DIRECT_IO", text)
        assert direct_io() is wish
    for text, count in {"": None, "1": 1, "12": 12}.items():
        monkeypatch.setenv("TORCHLOAD_THREADS", text)
        assert thread_count() == count
        assert engine.default_threads(1, computes=True) == (count or 1)
    assert engine.default_threads(1 << 40, computes=False, cold=True) == 12
    assert engine.default_threads(1 << 40, computes=False, least=100) == 12


@pytest.mark.parametrize("text", ["0", "-1", "many", "²"])
def test_a_wish_that_makes_no_sense_is_passed_over(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TORCHLOAD_THREADS", text)
    with pytest.warns(UserWarning, match="TORCHLOAD_THREADS is .* it is ignored"):
        assert thread_count() is None
    monkeypatch.setenv("TORCHLOAD_DIRECT_IO", text + "!")
    with pytest.warns(UserWarning, match="TORCHLOAD_DIRECT_IO"):
        assert direct_io() is None
