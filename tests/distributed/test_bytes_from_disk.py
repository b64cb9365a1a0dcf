"""How many bytes ranks on one machine take from its disk, and how many each of them reads."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from tests.distributed._ranks import on_ranks
from torchload import smart_load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a process reads")

RANKS = 4
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
    assert torch.equal(model.weight, torch.load(folder / "x.pth", mmap=True)["weight"])


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
    assert torch.equal(model.weight, torch.load(folder / "x.pth", mmap=True)["weight"])
    return read


def test_ranks_of_a_process_group_read_a_file_from_disk_once(saved: Path) -> None:
    assert_read_once(on_ranks(_load, saved, RANKS), saved / "x.pth")
