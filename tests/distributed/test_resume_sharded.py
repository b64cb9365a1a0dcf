"""Resuming runs under FSDP2 and tensor parallelism from every layout that the page on resuming names, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.distributed._parallel import DTensor, Replicate, fully_shard
from tests.distributed._ranks import on_ranks
from tests.unit import test_resume_deepspeed as deepspeed
from tests.unit.test_resume import LAYOUTS, STEPS, STOP, Run, folder_state, new_model
from torchload import smart_load, smart_resume, smart_save, verify_weights

Shard = Callable[[nn.Module], nn.Module]


def fsdp2(model: nn.Module) -> nn.Module:
    """Every layer, and the whole. With four ranks the last layer's three rows leave one of them empty."""
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return model


def tensor_parallel(model: nn.Module) -> nn.Module:
    """The first layer by columns, the last by rows; `Run` and DeepSpeed's net have other names for them."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    first, last = ("0", "3") if isinstance(model, nn.Sequential) else (None, "head")
    plan: dict[str, Any] = {last: RowwiseParallel(input_layouts=Replicate())}
    if first is not None:
        plan[first] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def two_dimensional(model: nn.Module) -> nn.Module:
    """FSDP2 over pairs of ranks that each hold the same part of what tensor parallelism cuts."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    styles = {"0": ColwiseParallel(output_layouts=Replicate()), "3": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, mesh["tensor"], styles)
    for name in styles:
        fully_shard(model.get_submodule(name), mesh=mesh["data"])
    return fully_shard(model, mesh=mesh["data"])


def skip_without_fsdp2() -> None:
    """Before torch 2.6 it runs on CUDA devices only."""
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 came with torch 2.6")


SHARDS: dict[str, Shard] = {"fsdp2": fsdp2, "tensor parallel": tensor_parallel, "both": two_dimensional}


class ShardedRun(Run):
    """`Run` with a model that is sharded before its optimizer is made."""

    def __init__(self, shard: Shard, seed: int = 0) -> None:
        self.model = shard(new_model(seed))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01, foreach=False)  # takes both kinds of tensors
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.ema = self

    def update_parameters(self, model: nn.Module) -> None:
        """No average: FSDP's modules can't be copied."""


def gathered(run: Run, folder: Path) -> Run:
    """The run on one process, as smart_save puts it together."""
    smart_save(run.model, folder / "gathered.pth", optimizer=run.optimizer, scheduler=run.scheduler)
    whole = Run()
    saved = torch.load(folder / "gathered.pth", weights_only=True)  # by torch itself
    whole.model.load_state_dict(saved["state_dict"])
    whole.optimizer.load_state_dict(saved["optimizer_state_dict"])
    whole.scheduler.load_state_dict(saved["scheduler_state_dict"])
    return whole


def write_layouts(run: Run, whole: Run, folder: Path) -> dict[str, tuple[Path, bool]]:
    """Every layout → where it is, and whether it holds a scheduler."""
    import torch.distributed.checkpoint as dcp

    written = {name: (folder / f"{name}.ckpt", has_scheduler) for name, (_, has_scheduler, *_) in LAYOUTS.items()}
    if distributed.get_rank() == 0:
        for name, (build, *_) in LAYOUTS.items():
            torch.save(build(whole), folder / f"{name}.ckpt")
        for name, suffix in (("accelerate", "bin"), ("trainer", "pt")):
            path = folder / name
            path.mkdir()
            smart_save(whole.model, path / "model.safetensors", distributed=False)
            torch.save(whole.optimizer.state_dict(), path / f"optimizer.{suffix}")
            torch.save(whole.scheduler.state_dict(), path / f"scheduler.{suffix}")
            (path / "trainer_state.json").write_text(json.dumps({"epoch": 1.5, "global_step": STOP}))
        average_only = {"epoch": 2, "model": None, "ema": whole.model, "optimizer": whole.optimizer.state_dict()}
        torch.save(average_only, folder / "ultralytics.pt")
        (folder / "accelerate sharded").mkdir()
        torch.save(whole.scheduler.state_dict(), folder / "accelerate sharded" / "scheduler.bin")
    distributed.barrier()
    for name, flat in (("nested folder", False), ("torchtitan", True)):
        dcp.save(folder_state(run, flat=flat), checkpoint_id=folder / name)
    state = folder_state(run, flat=False)
    dcp.save({"model": state["model"]}, checkpoint_id=folder / "accelerate sharded" / "pytorch_model_fsdp_0")
    dcp.save({"optimizer": state["optimizer"]}, checkpoint_id=folder / "accelerate sharded" / "optimizer_0")
    for name in ("smart_save.pth", "smart_save"):
        report = smart_save(run.model, folder / name, optimizer=run.optimizer, scheduler=run.scheduler)
        assert report.tensors == len(whole.model.state_dict())
    names = [
        "accelerate",
        "trainer",
        "accelerate sharded",
        "nested folder",
        "torchtitan",
        "smart_save.pth",
        "smart_save",
    ]
    written |= {name: (folder / name, True) for name in names}
    return written | {"gathered": (folder / "gathered.pth", True), "ultralytics": (folder / "ultralytics.pt", False)}


def _every_layout(kind: str, rank: int, folder: Path) -> None:
    run = ShardedRun(SHARDS[kind])
    run.train(0, STOP)
    whole = gathered(run, folder)
    layouts = write_layouts(run, whole, folder)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    want = run.train(STOP, STEPS)
    for name, (path, has_scheduler) in layouts.items():
        again = ShardedRun(SHARDS[kind], seed=1)
        smart_resume(again.model, path, again.optimizer, again.scheduler if has_scheduler else None, rng=False)
        if not has_scheduler:
            again.scheduler.last_epoch = STOP
        assert [group["lr"] for group in again.optimizer.param_groups] == rates, name
        assert again.train(STOP, STEPS) == want, name
        moment = again.optimizer.state[again.model[0].weight]["exp_avg"]
        assert isinstance(moment, DTensor), name


def _deepspeed(kind: str, rank: int, folder: Path) -> None:
    straight = deepspeed.Run()
    straight.train(0, 3)
    for name, save in deepspeed.SAVED.items():
        if rank == 0:
            save(folder / name, straight, 2)
    distributed.barrier()

    for name in deepspeed.SAVED:
        losses = []
        for path in (folder / name, folder / "again.pth"):
            torch.manual_seed(1)
            model = deepspeed.Net()
            shard_net(kind, model)
            named = dict(model.named_parameters())
            optimizer = torch.optim.AdamW(
                [
                    {"params": [named[each] for each in deepspeed.DECAYED], "weight_decay": 0.1},
                    {"params": [named[each] for each in deepspeed.OTHERS], "lr": 0.02},
                ],
                0.01,
                amsgrad=True,
                foreach=False,
            )
            smart_resume(model, path, optimizer)
            if path.suffix == "":
                smart_save(model, folder / "again.pth", optimizer=optimizer)
            again = deepspeed.Run()
            again.model, again.optimizer = model, optimizer
            losses.append(again.train(3, 6))
        assert losses[0] == losses[1], name
        assert losses[0] == pytest.approx(copy_of(straight).train(3, 6), rel=1e-5), name


def shard_net(kind: str, model: nn.Module) -> None:
    """FSDP2 takes no parameters without dimensions, so its root, which has one, stays whole."""
    if kind == "fsdp2":
        for layer in model.children():
            fully_shard(layer)
    else:
        tensor_parallel(model)


def copy_of(run: deepspeed.Run) -> deepspeed.Run:
    again = deepspeed.Run()
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    return again


CASES = [
    ("fsdp2", 2),
    ("tensor parallel", 2),
    *(pytest.param(kind, 4, marks=pytest.mark.slow) for kind in SHARDS),
]


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_training_goes_on_bit_for_bit_from_every_layout(tmp_path, kind, ranks):
    if kind != "tensor parallel":
        skip_without_fsdp2()
    on_ranks(partial(_every_layout, kind), tmp_path, ranks)


@pytest.mark.parametrize("kind", ["fsdp2", "tensor parallel"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_training_goes_on_from_deepspeeds_folders(tmp_path, kind, ranks):
    if kind == "fsdp2":
        skip_without_fsdp2()
    on_ranks(partial(_deepspeed, kind), tmp_path, ranks)


# --- saving ---


def _folder_on_other_ranks(rank: int, folder: Path) -> None:
    run = ShardedRun(fsdp2)
    run.train(0, STOP)
    smart_save(run.model, folder / "last", optimizer=run.optimizer, scheduler=run.scheduler, extra={"epoch": 3})
    smart_save(run.model, folder / "last", optimizer=run.optimizer, scheduler=run.scheduler, extra={"epoch": 4})
    smart_save(run.model, folder / "half", dtype=torch.bfloat16)
    whole = gathered(run, folder)
    assert verify_weights(whole.model, folder / "last")
    again = Run(seed=1)
    assert smart_resume(again.model, folder / "last", again.optimizer, again.scheduler).epoch == 4
    assert again.train(STOP, STEPS) == whole.train(STOP, STEPS)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        smart_save(run.model, folder / "nowhere" / "last")


def test_a_folder_written_by_two_ranks_is_read_by_one(tmp_path):
    skip_without_fsdp2()
    on_ranks(_folder_on_other_ranks, tmp_path)
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("outcome")}
    assert names == {"last", "half", "gathered.pth", "store"}
    assert {path.name for path in (tmp_path / "last").iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    again = Run(seed=1)
    smart_resume(again.model, tmp_path / "last", again.optimizer, again.scheduler)
    assert "bfloat16" in str(smart_load(again.model, tmp_path / "half").casts)


def _steps(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(STOP):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return optimizer


def _small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _fsdp1(rank: int, folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(_small(0), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = _steps(model)
    for name in ("last.pth", "last"):
        smart_save(model, folder / name, optimizer=optimizer)


@pytest.mark.filterwarnings("ignore")
def test_a_run_under_the_first_fsdp_is_gathered(tmp_path):
    on_ranks(_fsdp1, tmp_path)
    straight = _small(0)
    want = _steps(straight)
    for name in ("last.pth", "last"):
        model = _small(1)
        optimizer = torch.optim.Adam(model.parameters())
        smart_resume(model, tmp_path / name, optimizer)
        for (key, mine), theirs in zip(model.named_parameters(), straight.parameters()):
            torch.testing.assert_close(mine, theirs, msg=key)
            torch.testing.assert_close(optimizer.state[mine], want.state[theirs], msg=key)
