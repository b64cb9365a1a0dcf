"""How many bytes ranks on one machine take from its disk, and how many each of them reads."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from tests.distributed._ranks import on_ranks
from torchload import smart_load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a process reads")

RANKS = 4
MIB = 1 << 20
SIDE = 3584  # 49 MiB: files of this size are read past the page cache, if one process reads them


def bytes_read() -> dict[str, int]:
    """What this process has had read so far: ``read_bytes`` from the device, ``rchar`` in all."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def drop_from_cache(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cold file, and processes that no launcher has told anything."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "TORCHLOAD_DIRECT_IO"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    torch.save(nn.Linear(SIDE, SIDE, bias=False).state_dict(), tmp_path / "x.pth")
    drop_from_cache(tmp_path / "x.pth")
    return tmp_path


def assert_read_once(from_device: list[int], file: Path) -> None:
    if not any(from_device):
        pytest.skip("the file system keeps this file in memory, or doesn't count")
    assert sum(from_device) <= 1.1 * file.stat().st_size


def _load_at_the_same_time(rank: int, folder: Path, barrier: object) -> None:
    model = nn.Linear(SIDE, SIDE, bias=False)
    barrier.wait()
    before = bytes_read()
    smart_load(model, folder / "x.pth")
    (folder / f"read{rank}").write_text(str(bytes_read()["read_bytes"] - before["read_bytes"]))
    assert torch.equal(model.weight, torch.load(folder / "x.pth", mmap=True, weights_only=True)["weight"])


def test_processes_of_spawn_read_a_file_from_disk_once(saved: Path) -> None:
    barrier = multiprocessing.get_context("spawn").Barrier(RANKS)
    multiprocessing.spawn(_load_at_the_same_time, (saved, barrier), nprocs=RANKS)
    assert_read_once([int((saved / f"read{rank}").read_text()) for rank in range(RANKS)], saved / "x.pth")


def _load(rank: int, folder: Path) -> int:
    model = nn.Linear(SIDE, SIDE, bias=False)
    distributed.barrier()
    before = bytes_read()
    smart_load(model, folder / "x.pth")
    read = bytes_read()["read_bytes"] - before["read_bytes"]
    assert torch.equal(model.weight, torch.load(folder / "x.pth", mmap=True, weights_only=True)["weight"])
    return read


def test_ranks_of_a_process_group_read_a_file_from_disk_once(saved: Path) -> None:
    assert_read_once(on_ranks(_load, saved, RANKS), saved / "x.pth")


class Block(nn.Module):
    """A linear layer that is cut by rows, and one that is cut by columns, into parts of so many bytes a row."""

    def __init__(self, part_bytes: int) -> None:
        super().__init__()
        columns = part_bytes * RANKS // 4
        self.up = nn.Linear(16, columns, bias=False)
        self.down = nn.Linear(columns, (8 << 20) // (columns * 4), bias=False)


def _load_in_parts(rank: int, folder: Path) -> dict[str, tuple[int, int, int]]:
    """For each model: bytes that this rank held, that the report says it read, and that the kernel counted."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from tests.distributed._parallel import fully_shard

    # Where a program handles the signal of leases itself, pages aren't read where they lie, which nothing counts.
    signal.signal(signal.SIGURG, lambda *_: None)
    mesh = init_device_mesh("cpu", (RANKS,))
    found = {}
    for kind in ("fsdp", *PARTS):
        want = torch.load(folder / f"{kind}.pth", weights_only=True)
        model = Block(PARTS.get(kind, 64 << 10))
        if kind == "fsdp":
            fully_shard(model, mesh=mesh)
        else:
            parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        before = bytes_read()["rchar"]
        report = smart_load(model, folder / f"{kind}.pth")
        counted = bytes_read()["rchar"] - before
        for name, value in model.state_dict().items():
            assert torch.equal(value.full_tensor(), want[name]), name
        found[kind] = (report.nbytes, report.read_bytes, counted)
        assert ("over the gaps" in str(report)) == (kind == "8 KiB")
    return found


PARTS = {"8 KiB": 8 << 10, "64 KiB": 64 << 10, "256 KiB": 256 << 10}


def test_ranks_read_their_own_parts(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.tensor.parallel")
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("FSDP2 came with torch 2.6")
    for kind in ("fsdp", *PARTS):
        torch.save(Block(PARTS.get(kind, 64 << 10)).state_dict(), tmp_path / f"{kind}.pth")
    outcomes = on_ranks(_load_in_parts, tmp_path, RANKS)
    for kind in ("fsdp", *PARTS):
        held, read, counted = (sum(outcome[kind][index] for outcome in outcomes) for index in range(3))
        file_bytes = (tmp_path / f"{kind}.pth").stat().st_size
        tensor_bytes = sum(value.nbytes for value in torch.load(tmp_path / f"{kind}.pth", weights_only=True).values())
        assert held == tensor_bytes
        assert read <= counted <= read + RANKS * MIB  # the rest is the file's tables, and modules
        if kind == "8 KiB":  # rows so short are read whole, which is quicker; each rank reads what all of them hold
            assert 2 * file_bytes < read <= RANKS * file_bytes
        else:
            assert read <= 1.1 * file_bytes
