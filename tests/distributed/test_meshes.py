"""FSDP2, tensor parallelism and replicas over meshes of two and three dimensions: each rank's part is torch's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from tests.distributed._parallel import DTensor, fully_shard
from tests.distributed._ranks import on_ranks
from tests.law import same_bits
from torchload import smart_load

parallel = pytest.importorskip("torch.distributed.tensor.parallel")

RANKS = 4
MESHES = {  # dimensions, and the group that holds replicas
    "fsdp x tp": ({"data": 2, "tensor": 2}, None),
    "replicas x tp": ({"replicate": 2, "data": 1, "tensor": 2}, "replicate"),
    "replicas x fsdp": ({"replicate": 2, "data": 2}, "replicate"),
}
SIZES = [(5, 7), (13, 2)]  # which two ranks can't halve


def build(sizes: tuple[int, int], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    width, hidden = sizes
    layers = {"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width), "embed": nn.Embedding(hidden, width)}
    return nn.Sequential(nn.ModuleDict(layers), nn.BatchNorm1d(width), nn.Conv2d(hidden, width, 3))


def sharded(model: nn.Module, mesh: object) -> nn.Module:
    """As torch's tutorials do it: tensor parallelism first, FSDP2 over the rest of the mesh."""
    if "tensor" in mesh.mesh_dim_names:
        styles = {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}
        parallel.parallelize_module(model[0], mesh["tensor"], {**styles, "embed": parallel.RowwiseParallel()})
    rest = mesh[tuple(name for name in mesh.mesh_dim_names if name != "tensor")]
    for layer in model[0].values():
        fully_shard(layer, mesh=rest)
    return fully_shard(model, mesh=rest)


def parts(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model.state_dict().items():
        yield name, value.to_local() if isinstance(value, DTensor) else value


def _meshes(rank: int, folder: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh

    for kind, (dimensions, replicas) in MESHES.items():
        mesh = init_device_mesh("cpu", tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))
        groups = [None] if replicas is None else [None, mesh.get_group(replicas)]
        for number, sizes in enumerate(SIZES):
            trained = sharded(build(sizes, 1), mesh)
            want = dict(parts(trained))
            dcp.save({"model": trained.state_dict()}, checkpoint_id=folder / f"{kind} {number}")
            for path in (folder / f"{number}.pth", folder / f"shards{number}", folder / f"{kind} {number}"):
                for group in groups:
                    with torch.device("meta"):
                        empty = build(sizes, 2)
                    for model in (build(sizes, 2), empty):
                        sharded(model, mesh)
                        smart_load(model, path, process_group=group)
                        for name, part in parts(model):
                            assert same_bits(part, want[name]), (kind, sizes, path.name, name)
    distributed.barrier()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_each_rank_holds_what_torch_would_give_it(tmp_path: Path) -> None:
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 came with torch 2.6")
    safetensors = pytest.importorskip("safetensors.torch")
    for number, sizes in enumerate(SIZES):
        state = build(sizes, 1).state_dict()
        torch.save({"state_dict": state}, tmp_path / f"{number}.pth")
        (tmp_path / f"shards{number}").mkdir()
        weight_map = {}
        for shard, names in enumerate((list(state)[:5], list(state)[5:])):
            file = f"model-0000{shard + 1}-of-00002.safetensors"
            safetensors.save_file({name: state[name] for name in names}, tmp_path / f"shards{number}" / file)
            weight_map |= dict.fromkeys(names, file)
        index = json.dumps({"weight_map": weight_map})
        (tmp_path / f"shards{number}" / "model.safetensors.index.json").write_text(index)
    on_ranks(_meshes, tmp_path, RANKS)
