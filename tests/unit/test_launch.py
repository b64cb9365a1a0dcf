"""What is known of the processes that a launcher started beside this one."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from torch import distributed

from torchload.core.launch import has_siblings, local_rank
from torchload.model import placement
from torchload.model.placement import best_device, resolve_device

BY_LAUNCHER = {
    "torchrun": {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"},
    "Open MPI": {"OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
    "Intel MPI": {"MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4", "PMI_SIZE": "4"},
    "MVAPICH": {"MV2_COMM_WORLD_LOCAL_RANK": "2", "MV2_COMM_WORLD_LOCAL_SIZE": "4"},
    "PALS": {"PALS_LOCAL_RANKID": "2", "PALS_LOCAL_SIZE": "4"},
    "srun": {
        "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2),4(x3),1", "SLURM_NODEID": "3", "SLURM_LOCALID": "2",
    },
}  # fmt: skip
ALONE = {
    "no launcher": {},
    "torchrun with one process": {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "8"},
    "srun with one task on each node": {
        "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_NODEID": "3", "SLURM_LOCALID": "0",
        "PMI_SIZE": "8",
    },
    "a batch script of Slurm, outside srun": {"SLURM_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"},
    "torchrun with one process, started by srun": {
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0",
    },
    "nonsense": {"LOCAL_WORLD_SIZE": "four", "SLURM_NODEID": "9", "SLURM_STEP_TASKS_PER_NODE": "4"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("LOCAL_", "OMPI_", "MPI_", "MV2_", "PALS_", "PMI_", "SLURM_")) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)


@pytest.mark.parametrize("launcher", BY_LAUNCHER)
def test_a_launcher_tells_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    for name, value in BY_LAUNCHER[launcher].items():
        monkeypatch.setenv(name, value)
    assert (local_rank(), has_siblings()) == (2, True)


@pytest.mark.parametrize("case", ALONE)
def test_one_process_on_its_machine_is_alone(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    for name, value in ALONE[case].items():
        monkeypatch.setenv(name, value)
    assert not has_siblings()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE"])
def test_ranks_somewhere_may_be_here(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "8")
    assert has_siblings()


def _tell(queue: multiprocessing.Queue[object]) -> None:
    queue.put((local_rank(), has_siblings()))


def test_a_process_that_python_started_may_have_siblings() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_tell, args=(queue,))
    process.start()
    assert queue.get() == (None, True)
    process.join()


ONE_EACH = {
    "torchrun": {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "WORLD_SIZE": "1"},
    "mpirun": {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    "srun": {
        "SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "0",
    },
}  # fmt: skip


def _join_and_tell(rank: int, folder: Path) -> None:
    before = local_rank(), has_siblings()
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    (folder / f"told{rank}").write_text(repr((before, (local_rank(), has_siblings()))))
    distributed.barrier()
    os._exit(0)


@pytest.mark.parametrize("launcher", ONE_EACH)
def test_a_launcher_of_one_tells_nothing_of_processes_that_its_own_spawns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """One task on each node, which spawns a process for each GPU: all of these inherit its number."""
    for name, value in {**ONE_EACH[launcher], "USE_LIBUV": "0"}.items():
        monkeypatch.setenv(name, value)
    assert (local_rank(), has_siblings()) == (0, False)
    torch.multiprocessing.spawn(_join_and_tell, (tmp_path,), nprocs=2)
    told = [(tmp_path / f"told{rank}").read_text() for rank in range(2)]
    assert told == [repr(((None, True), (rank, True))) for rank in range(2)]


@pytest.fixture
def group_of_four() -> object:
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    distributed.init_process_group("fake", store=fake.FakeStore(), rank=3, world_size=4)
    yield
    distributed.destroy_process_group()


def test_a_process_group_tells(group_of_four: object) -> None:
    assert (local_rank(), has_siblings()) == (3, True)


class TestAuto:
    @pytest.fixture(autouse=True)
    def two_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        free = {0: 10, 1: 20}
        monkeypatch.setattr(placement, "_count", lambda kind: 2 * (kind == "cuda"))
        monkeypatch.setattr(placement, "free_bytes", lambda device: free[device.index])

    def test_one_process_takes_the_device_with_most_memory(self) -> None:
        assert best_device() == torch.device("cuda", 1)

    @pytest.mark.parametrize("rank", range(4))
    def test_each_local_rank_has_its_own(self, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert resolve_device("auto") == torch.device("cuda", rank % 2)

    def test_a_single_local_rank_is_free_to_choose(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert best_device() == torch.device("cuda", 1)

    def test_without_a_launcher_the_process_group_tells(self, group_of_four: object) -> None:
        assert best_device() == torch.device("cuda", 1)  # rank 3 of 4, on two devices
