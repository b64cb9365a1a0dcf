"""What two processes save, read by one; and what is in one folder, read by two."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from tests.distributed._ranks import on_ranks
from torchload import smart_load
from torchload.core.checkpoint import OpaqueTensor
from torchload.errors import CorruptCheckpointError, IncompatibleCheckpointError
from torchload.formats import open_checkpoint
from torchload.formats.sets.items import ItemReader

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORLD = 2


def build() -> nn.Module:
    """The same module in every process; the first dimension of the last weight does not divide."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.BatchNorm1d(5))


def work(rank: int, folder: Path) -> None:
    """One process: saves in every way, and loads again."""
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed.device_mesh import init_device_mesh

    from tests.distributed._parallel import DTensor, Partial, Replicate, Shard, distribute_tensor

    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (WORLD,))
    state = build().state_dict()

    def sharded(dimension: int) -> dict[str, torch.Tensor]:
        return {
            name: distribute_tensor(value, mesh, [Shard(dimension) if value.dim() > dimension else Replicate()])
            for name, value in state.items()
        }

    dcp.save({"model": sharded(0)}, checkpoint_id=folder / "rows")
    dcp.save(sharded(1), checkpoint_id=folder / "columns")

    for name, parts in (("dtensor_rows", sharded(0)), ("dtensor_columns", sharded(1))):
        (folder / name).mkdir(exist_ok=True)
        torch.save({"model": parts, "rank": rank}, folder / name / f"model_world_size_{WORLD}_rank_{rank}.pt")

    grid = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("a", "b"))
    (folder / "dtensor_grid").mkdir(exist_ok=True)
    placements = {0: [Replicate(), Replicate()], 1: [Replicate(), Shard(0)], 2: [Shard(1), Shard(0)]}
    placed = {name: distribute_tensor(value, grid, placements[value.dim()]) for name, value in state.items()}
    torch.save(placed, folder / "dtensor_grid" / f"rank{rank}.pt")

    (folder / "partial").mkdir(exist_ok=True)
    torch.save({"w": DTensor.from_local(torch.ones(3), mesh, [Partial()])}, folder / "partial" / f"rank{rank}.pt")

    (folder / "sharded_tensor").mkdir(exist_ok=True)
    parts = {}
    for name, value in state.items():
        if not value.dim():
            parts[name] = value
            continue
        rows = -(-value.shape[0] // WORLD)
        part = value[rank * rows : (rank + 1) * rows].clone()
        origin = [rank * rows] + [0] * (value.dim() - 1)
        shard = LocalShard.from_tensor_and_offsets(part, origin, rank)
        parts[name] = init_from_local_shards([shard], *value.shape)
    torch.save({"model": parts}, folder / "sharded_tensor" / f"rank{rank}.pt")
    dist.barrier()

    looked_up: list[str] = []
    tensor = ItemReader.tensor

    def counted(self, item, *args):  # type: ignore[no-untyped-def]
        looked_up.append(f"{Path(item.file.name).name}:{item.name}")
        return tensor(self, item, *args)

    ItemReader.tensor = counted  # type: ignore[method-assign]
    model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            placed_here = distribute_tensor(torch.zeros_like(parameter), mesh, [Shard(0)])
            setattr(module, name, nn.Parameter(placed_here))
    smart_load(model, folder / "rows")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), state[name]), name
    # Of the parameters only its own chunks; the buffers, which are replicated here, it needs whole.
    foreign = [item.rpartition(":model.")[2] for item in looked_up if item.startswith(f"__{1 - rank}_")]
    assert looked_up
    assert not set(foreign) & dict(model.named_parameters()).keys()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    on_ranks(work, folder, WORLD)
    return folder


@pytest.mark.parametrize(
    "name", ["rows", "columns", "dtensor_rows", "dtensor_columns", "dtensor_grid", "sharded_tensor"]
)
def test_one_process_reads_what_two_saved(saved: Path, name: str) -> None:
    model, expected = build(), build().state_dict()
    for tensor in model.state_dict().values():
        tensor.zero_()
    report = smart_load(model, saved / name, "cpu")
    assert report.tensors == len(expected)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_one_ranks_file_alone_is_refused(saved: Path) -> None:
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for file in (saved / "dtensor_rows" / "model_world_size_2_rank_0.pt", saved / "sharded_tensor" / "rank1.pt"):
        with pytest.raises(IncompatibleCheckpointError, match="one rank's part of a"):
            smart_load(model, file, "cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_partial_sums_stay_opaque(saved: Path) -> None:
    with open_checkpoint(saved / "partial" / "rank0.pt") as checkpoint:
        assert isinstance(checkpoint.root["w"], OpaqueTensor)
        assert checkpoint.root["w"].parts == ()


def test_a_missing_rank_leaves_a_hole(saved: Path, tmp_path: Path) -> None:
    source = saved / "sharded_tensor" / "rank0.pt"
    for rank in range(2):
        (tmp_path / f"rank{rank}.pt").write_bytes(source.read_bytes())
    with pytest.raises(CorruptCheckpointError, match="leave a hole; are all ranks here"):
        open_checkpoint(tmp_path)
