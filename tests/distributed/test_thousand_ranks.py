"""Planning for 1,024 ranks and 70 billion parameters: metadata alone, one process, no memory."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

from torchload.core.copies import Copy
from torchload.formats import open_checkpoint
from torchload.match.globs import Globs
from torchload.model import shards
from torchload.model.placement import Placement
from torchload.model.target import describe_model
from torchload.plan.options import Options
from torchload.plan.pairing import copies_of
from torchload.plan.planner import make_plan
from torchload.plan.steps import select_for
from torchload.transfer import cooperative

fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
parallel = pytest.importorskip("torch.distributed.tensor.parallel")
pytestmark = pytest.mark.skipif(
    not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard") or not hasattr(os, "posix_fallocate"),
    reason="FSDP2 came with torch 2.6; not every system has files with holes",
)

WIDTH, HIDDEN, HEADS, WORDS, LAYERS = 8192, 28672, 1024, 128_256, 80
DATA, TENSOR = 128, 8
BY_ROWS, BY_COLUMNS = ("q", "k", "v", "gate", "up"), ("o", "down")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"q": (WIDTH, WIDTH), "k": (WIDTH, HEADS), "v": (WIDTH, HEADS), "o": (WIDTH, WIDTH)}
        sizes |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))
        self.before, self.after = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)


def build() -> nn.Module:
    with torch.device("meta"):
        return Network().to(torch.bfloat16)


def sharded(mesh: object) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = build()
    styles = {
        **dict.fromkeys(BY_ROWS, parallel.ColwiseParallel),
        **dict.fromkeys(BY_COLUMNS, parallel.RowwiseParallel),
    }
    for layer in model.layers:
        parallel.parallelize_module(layer, mesh["tensor"], {name: style() for name, style in styles.items()})
        fully_shard(layer, mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file of 141 GB that takes a few KiB of disk."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in build().state_dict().items():
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + end)
        except OSError:
            pytest.skip("this file system has no room for files with holes")
    return path


def planned(model: nn.Module, path: Path) -> list[Copy]:
    with open_checkpoint(path) as checkpoint:
        target = describe_model(model)
        selection = select_for(target, checkpoint, Globs(), True, key=None, prefix=None, rename=None)
        options = Options(Placement("cpu"), None, (), True, False)
        plan = make_plan(target, checkpoint, selection, options)
        return [copy for item in plan.assignments for copy in copies_of(item.name, item.entry, item.slot.tensor)]


def nbytes(copy: Copy) -> int:
    return math.prod(copy.box.shape) * copy.dtype.itemsize


@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_a_rank_plans_just_its_own_bytes(saved: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import _utils

    distributed.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=DATA * TENSOR)
    try:
        model = sharded(init_device_mesh("cpu", (DATA, TENSOR), mesh_dim_names=("data", "tensor")))
        layouts: list[object] = []
        ask = _utils.compute_local_shape_and_global_offset
        monkeypatch.setattr(
            _utils, "compute_local_shape_and_global_offset", lambda *of: (layouts.append(of), ask(*of))[1]
        )
        shards._regions.clear()
        copies = planned(model, saved)
    finally:
        distributed.destroy_process_group()
    names = [name for name, _ in model.named_parameters()]
    assert [copy.name for copy in copies] == names  # one read for each tensor, whatever the number of ranks
    cut_twice = tuple(f".{name}.weight" for name in (*BY_ROWS, *BY_COLUMNS))
    for copy, parameter in zip(copies, model.parameters(), strict=True):
        ranks = DATA * TENSOR if copy.name.endswith(cut_twice) else DATA  # every size divides
        assert nbytes(copy) == parameter.numel() * 2 // ranks
    assert len(layouts) <= 12  # they take milliseconds each, and layers are alike


def test_shares_of_a_thousand_replicas(saved: Path) -> None:
    state = build().state_dict()
    with open_checkpoint(saved) as checkpoint:
        copies = [copy for name, entry in checkpoint.root.items() for copy in copies_of(name, entry, state[name])]
        parts = cooperative.shares(copies, 1024)
    whole = sum(map(nbytes, copies))
    sizes = [sum(map(nbytes, part)) for part in parts]
    assert len(parts) == 1024
    assert sum(sizes) == whole
    assert max(sizes) <= whole / 1024 + (64 << 10)
    assert sum(map(len, parts)) <= 4 * (len(copies) + 1024)  # what is cut is cut a few times
    ranges = [(copy.box.extent.offset + copy.box.start, nbytes(copy)) for part in parts for copy in part]
    assert all(start + size == following for (start, size), (following, _) in pairwise(ranges))
