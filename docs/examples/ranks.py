"""Load on several ranks: ``torchrun --nproc-per-node 2 ranks.py``, on GPUs or on the CPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchload import LoadReport, best_device, smart_load


class Net(nn.Module):
    """A layer, and a table that no checkpoint holds: it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.compute_tables()

    def compute_tables(self) -> None:
        self.register_buffer("inv_freq", 1 / 10000 ** (torch.arange(8) / 8), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(inputs * self.inv_freq).relu())


def load_replicas(path: str) -> tuple[nn.Module, LoadReport]:
    """Every rank reads the file, onto its own device."""
    model = Net()
    report = smart_load(model, path, device="auto")
    return DistributedDataParallel(model), report


def load_replicas_together(path: str) -> tuple[nn.Module, LoadReport]:
    """Every rank reads its share of the file, and has the rest from the others."""
    model = Net()
    report = smart_load(model, path, device="auto", process_group=dist.group.WORLD)
    return DistributedDataParallel(model), report


def load_sharded(path: str) -> tuple[nn.Module, LoadReport]:
    """Every rank reads its own part of each tensor; nothing of the model exists twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(best_device().type, (dist.get_world_size(),))
    with torch.device("meta"):
        model = Net()
    model.compute_tables()  # real from here on
    fully_shard(model, mesh=mesh)
    report = smart_load(model, path)
    return model, report


def main() -> None:
    device = best_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    path = str(Path(tempfile.gettempdir(), f"ranks-{os.environ['MASTER_PORT']}.pth"))
    if dist.get_rank() == 0:
        torch.save(Net().state_dict(), path)
    dist.barrier()
    for load in (load_replicas, load_replicas_together, load_sharded):
        model, report = load(path)
        model(torch.zeros(2, 8, device=device))
        if dist.get_rank() == 0:
            print(report)
    dist.barrier()
    if dist.get_rank() == 0:
        Path(path).unlink()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
