"""smart_save under a process group: two gloo ranks on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed._ranks import RANKS, on_two_ranks
from torchload import errors, read_state_dict, smart_save, verify_weights


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def _save_ddp(rank, folder):
    model = DistributedDataParallel(build())
    report = smart_save(model, f"{folder}/model.pth", dtype=torch.float16)
    exists_at_once = os.path.exists(f"{folder}/model.pth")
    return report.tensors, report.path == f"{folder}/model.pth", exists_at_once


def test_one_rank_writes_and_the_others_wait(tmp_path):
    assert on_two_ranks(_save_ddp, tmp_path) == [(9, True, True)] * 2
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["model.pth"]
    assert verify_weights(build().half(), tmp_path / "model.pth")


def _fail_on_the_writer(rank, folder):
    model = build()
    if rank == 0:
        model[0].weight.data[0, 0] = 1e9
    try:
        smart_save(model, f"{folder}/model.safetensors", dtype=torch.float16)
    except errors.CastOverflowError as error:
        return error.tensor
    return "no error"


def test_an_error_of_the_writer_is_everybodys(tmp_path):
    assert on_two_ranks(_fail_on_the_writer, tmp_path) == ["0.weight"] * 2
    assert list(tmp_path.glob("*.safetensors")) == []


def _fail_on_another(rank, folder):
    model = build()
    if rank == 1:
        model[0] = nn.Linear(4, 6, device="meta")
    try:
        smart_save(model, f"{folder}/model.pth")
    except ValueError as error:
        return "meta device" in str(error)
    return "no error"


def test_an_error_of_another_rank_is_everybodys(tmp_path):
    assert on_two_ranks(_fail_on_another, tmp_path) == [True] * 2
    assert list(tmp_path.glob("*.pth")) == []


def _different_models(rank, folder):
    try:
        smart_save(nn.Linear(2, 2 + rank), f"{folder}/model.pth")
    except RuntimeError as error:
        return "distributed=False" in str(error)
    return "no error"


def test_ranks_with_different_models_are_refused(tmp_path):
    assert on_two_ranks(_different_models, tmp_path) == [True] * 2
    assert list(tmp_path.glob("*.pth")) == []


def _each_alone(rank, folder):
    if rank == 0:
        smart_save(build(), f"{folder}/first.pth", distributed=False)
    smart_save(nn.Linear(2, 2 + rank), f"{folder}/rank{rank}.pth", distributed=False)
    return "done"


def test_a_rank_may_save_on_its_own(tmp_path):
    assert on_two_ranks(_each_alone, tmp_path) == ["done"] * 2
    assert {path.name for path in tmp_path.glob("*.pth")} == {"first.pth", "rank0.pth", "rank1.pth"}


def _sharded(overflow=False):
    from torch.distributed.device_mesh import init_device_mesh

    from tests.distributed._parallel import Replicate, Shard, distribute_tensor

    model = build()
    if overflow:
        model[0].weight.data[0, 0] = 1e9
    mesh = init_device_mesh("cpu", (RANKS,))
    for module, placement in ((model[0], Shard(0)), (model[2], Shard(1)), (model[1], Replicate())):
        bias = Replicate() if module is model[2] else placement
        module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [placement]))
        module.bias = nn.Parameter(distribute_tensor(module.bias.data, mesh, [bias]))
    return model


def _save_sharded(rank, folder):
    model = _sharded()
    smart_save(model, f"{folder}/model.safetensors")
    smart_save(model, f"{folder}/model.pth", dtype=torch.bfloat16)
    alone = "saved"
    try:
        smart_save(model, f"{folder}/alone{rank}.pth", distributed=False)
    except ValueError as error:
        alone = "must save together" in str(error)
    try:
        smart_save(_sharded(overflow=True), f"{folder}/overflow.pth", dtype=torch.float16)
    except errors.CastOverflowError as error:
        return alone, error.tensor
    return alone, "no error"


def test_sharded_tensors_are_put_together(tmp_path):
    assert on_two_ranks(_save_sharded, tmp_path) == [(True, "0.weight")] * 2
    assert verify_weights(build(), tmp_path / "model.safetensors")
    assert verify_weights(build().bfloat16(), tmp_path / "model.pth")
    assert not list(tmp_path.glob("alone*"))
    assert not list(tmp_path.glob("overflow*"))


def _save_fsdp2(rank, folder):
    from tests.distributed._parallel import fully_shard

    model = build()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return smart_save(model, f"{folder}/model.pth").tensors


def test_fsdp2(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="no FSDP")
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 came with torch 2.6")
    assert on_two_ranks(_save_fsdp2, tmp_path) == [9] * 2
    assert verify_weights(build(), tmp_path / "model.pth")


def _save_fsdp1(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = build()
    model[0] = FullyShardedDataParallel(model[0], device_id=torch.device("cpu"))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    smart_save(wrapped, f"{folder}/model.pth")
    return "done"


@pytest.mark.filterwarnings("ignore")
def test_fsdp1(tmp_path):
    assert on_two_ranks(_save_fsdp1, tmp_path) == ["done"] * 2
    assert list(read_state_dict(tmp_path / "model.pth")) == list(build().state_dict())
    assert verify_weights(build(), tmp_path / "model.pth")
