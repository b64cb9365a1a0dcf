"""smart_load under DDP: every rank loads the same file, onto its own device, before or after wrapping."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tests.distributed._ranks import on_two_ranks
from tests.law import assert_equal_bits, randomise, snapshot
from torchload import errors, smart_load, smart_resume


def build(seed: int) -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 2)), seed)


def _ddp(rank: int, folder: Path) -> dict[str, object]:
    want = snapshot(build(1))
    for name in ("plain", "wrapped", "compiled"):
        model = DistributedDataParallel(build(2 + rank))
        smart_load(model, folder / f"{name}.pth")
        assert_equal_bits(snapshot(model.module), want)
        before = build(2 + rank)
        smart_load(before, folder / f"{name}.pth", device="cpu")
        assert_equal_bits(snapshot(before), want)
        inner = build(2 + rank)
        model = torch.compile(DistributedDataParallel(inner), backend="eager")
        smart_load(model, folder / f"{name}.pth")
        assert_equal_bits(snapshot(inner), want)

    # One step, resumed by both ranks: gradients are averaged, so both end with the same weights.
    model = DistributedDataParallel(build(2 + rank))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    smart_resume(model, folder / "wrapped.pth", optimizer)
    model(torch.randn(4, 64, generator=torch.Generator().manual_seed(rank))).sum().backward()
    optimizer.step()
    parts = [torch.empty(2, 64) for _ in range(2)]
    distributed.all_gather(parts, model.module[2].weight.detach())
    assert torch.equal(*parts)

    # A rank that can't load raises, and the other is none the worse for it.
    if rank == 1:
        with pytest.raises(errors.CheckpointNotFoundError):
            smart_load(build(2), folder / "nowhere.pth")
        with pytest.raises(errors.DeviceError, match="cuda:97"):
            smart_load(build(2), folder / "plain.pth", "cuda:97")

    mapped = build(2)
    smart_load(mapped, folder / "plain.pth", mmap=True)
    assert_equal_bits(snapshot(mapped), want)
    return {"cuda": torch.cuda.is_initialized(), "shared": _mapped_from(folder / "plain.pth", mapped[0].weight)}


def _mapped_from(file: Path, tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is a mapping of a file, as the kernel tells."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.endswith(str(file))
    return False


def test_ranks_load_the_same_file(tmp_path):
    trained = build(1)
    torch.save(trained.state_dict(), tmp_path / "plain.pth")
    optimizer = torch.optim.AdamW(trained.parameters(), 0.1)
    trained(torch.randn(4, 64)).sum().backward()
    wrapped = nn.DataParallel(build(1))
    optimizer.step()
    torch.save(
        {"epoch": 1, "state_dict": wrapped.state_dict(), "optimizer": optimizer.state_dict()},
        tmp_path / "wrapped.pth",
    )
    torch.save({f"_orig_mod.module.{k}": v for k, v in build(1).state_dict().items()}, tmp_path / "compiled.pth")
    outcomes = on_two_ranks(_ddp, tmp_path)
    assert [outcome["cuda"] for outcome in outcomes] == [False, False]  # no rank woke a GPU
    if os.path.exists("/proc/self/maps"):
        assert [outcome["shared"] for outcome in outcomes] == [True, True]


def test_one_process(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    os.environ.setdefault("USE_LIBUV", "0")
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        torch.save({"model": build(1).state_dict()}, tmp_path / "x.pth")
        model = DistributedDataParallel(build(2))
        smart_load(model, tmp_path / "x.pth")
        assert_equal_bits(snapshot(model.module), snapshot(build(1)))
    finally:
        distributed.destroy_process_group()
