"""smart_load(process_group=...): replicas read a share each, and what happens to one happens to all."""

from __future__ import annotations

import importlib
import os
import shutil
import threading
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import distributed, nn

from tests.dcp_folders import whole
from tests.distributed._ranks import on_ranks
from tests.law import assert_equal_bits, randomise, same_bits, snapshot
from torchload import LoadReport, errors, smart_load
from torchload.transfer import cooperative


class Net(nn.Module):
    """Large and small tensors, one of a single row, ties, integers, nothing, and a layout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 301)
        self.layers = nn.Sequential(*(nn.Linear(7, 7) for _ in range(20)))
        self.norm = nn.BatchNorm1d(7)
        self.row = nn.Parameter(torch.randn(1, 90_001))
        self.image = nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)
        self.none = nn.Parameter(torch.zeros(0, 3))
        self.head = nn.Linear(301, 500, bias=False)
        self.head.weight = self.embed.weight


def build(seed: int) -> nn.Module:
    return randomise(Net(), seed)


def loaded_together(folder: Path, ranks: int) -> None:
    want = build(1)
    tensor_bytes = sum(value.nbytes for value in want.state_dict().values()) - want.head.weight.nbytes
    group = distributed.group.WORLD
    for name in ("x.pth", "x.safetensors"):
        for options in ({}, {"atomic": True}, {"dtype": torch.bfloat16}, {"verify": True}):
            model = build(2)
            addresses = [value.data_ptr() for value in model.parameters()]
            report = smart_load(model, folder / name, process_group=group, **options)
            assert_equal_bits(snapshot(model), snapshot(build(1).to(options.get("dtype"))))
            assert model.head.weight is model.embed.weight
            if "verify" in options:
                assert report.read_bytes >= report.nbytes
            else:
                assert report.nbytes == tensor_bytes
                assert sum(_gathered(report.read_bytes)) <= 1.05 * tensor_bytes
                assert report.read_bytes <= tensor_bytes / ranks + (64 << 10)
                assert f"{ranks} ranks read together, each its share" in report.notes
            if not options:
                assert [value.data_ptr() for value in model.parameters()] == addresses
        with torch.device("meta"):
            model = Net()
        smart_load(model, folder / name, process_group=group)
        assert_equal_bits(snapshot(model), snapshot(want))
    seen: list[tuple[int, int]] = []
    smart_load(build(2), folder / "x.pth", process_group=group, progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1]
    assert all(before[0] <= after[0] <= after[1] for before, after in pairwise(seen))
    with torch.inference_mode():
        model = build(2)
        smart_load(model, folder / "x.pth", process_group=group)
        assert_equal_bits(snapshot(model), snapshot(want))


def _gathered(value: object) -> list:
    answers = [None] * distributed.get_world_size()
    distributed.all_gather_object(answers, value)
    return answers


class Own(nn.Module):
    """A module that loads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
        self.weight.data.copy_(state[prefix + "weight"])


class OfNetworkError(OSError):
    """Somebody's own, with something in it that no other process can have."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Remote:
    """A file that is out of reach."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell = file.seek, file.tell

    def read(self, nbytes: int) -> bytes:
        raise OfNetworkError("no network")


def fails_everywhere(
    kind: type[Exception],
    text: str,
    model: nn.Module,
    path: object,
    *,
    unchanged: bool = True,
    same_type: bool = True,
    **options: object,
) -> BaseException:
    """One call that must raise the same on every rank."""
    before = snapshot(model)
    with pytest.raises(kind, match=text) as caught:
        smart_load(model, path, process_group=distributed.group.WORLD, **options)
    if unchanged:
        assert_equal_bits(snapshot(model), before)
    kinds = set(_gathered(type(caught.value).__name__))
    assert len(kinds) == 1 or not same_type
    return caught.value


def failed_together(rank: int, folder: Path) -> None:
    last = distributed.get_world_size() - 1
    is_last = rank == last
    for name in ("x.pth", "x.safetensors"):
        # Before the plan stands: nothing there, no such device, a wrong argument, damage.
        fails_everywhere(errors.CheckpointNotFoundError, "nowhere", build(2), folder / ("nowhere" if is_last else name))
        fails_everywhere(
            errors.DeviceError, "cuda:97", build(2), folder / name, device="cuda:97" if rank == 0 else None
        )
        fails_everywhere(TypeError, "skip", build(2), folder / name, skip="a" if is_last else ())
        error = fails_everywhere(
            errors.CorruptCheckpointError, "half", build(2), folder / (f"half.{name[2:]}" if is_last else name)
        )
        assert is_last or f"on rank {last}" in str(error)
        # The same names and shapes with other values.
        fails_everywhere(
            errors.IncompatibleCheckpointError,
            "the same file",
            build(2),
            folder / (f"y{name[1:]}" if is_last else name),
        )
        # Not the same plan, though the same file.
        other = build(2).half() if is_last else build(2)
        fails_everywhere(errors.IncompatibleCheckpointError, "only replicas can", other, folder / name)
        for options in ({"skip": ["row"]}, {"verify": True}, {"atomic": True}):
            fails_everywhere(
                errors.IncompatibleCheckpointError,
                "only replicas can",
                build(2),
                folder / name,
                **(options if is_last else {}),
            )
    # Another file, of which modules take everything by themselves.
    torch.save({"0.weight": torch.full((3,), float(rank))}, folder / f"own{rank}.pth")
    fails_everywhere(
        errors.IncompatibleCheckpointError, "the same file", nn.Sequential(Own()), folder / f"own{rank}.pth"
    )
    report = smart_load(nn.Sequential(Own()), folder / f"own{rank}.pth")
    assert (report.nbytes, report.read_bytes) == (12, 12)

    # An error that others don't know, and that can't be sent.
    with open(folder / "x.pth", "rb") as file:
        error = fails_everywhere(OSError, "no network", build(2), Remote(file) if is_last else file, same_type=False)
        assert is_last or str(error) == f"OfNetworkError: no network (This happened on rank {last}.)"

    for name, copy in (("x.safetensors", shutil.copy2), ("x.pth", shutil.copy)):  # it keeps the time; it doesn't
        copy(folder / name, folder / f"copy{rank}.{name}")
        model = build(2)
        smart_load(model, folder / f"copy{rank}.{name}", process_group=distributed.group.WORLD)
        assert_equal_bits(snapshot(model), snapshot(build(1)))

    # Only the data shows it, to the rank in whose share it lies.
    error = fails_everywhere(errors.CastOverflowError, "row", build(2), folder / "huge.pth", dtype=torch.float16)
    assert error.written == ()
    fails_everywhere(errors.CastOverflowError, "row", build(2).half(), folder / "huge.pth", atomic=True)
    model = build(2).half()
    before = snapshot(model)
    error = fails_everywhere(errors.CastOverflowError, "row", model, folder / "huge.pth", unchanged=False)
    changed = {name for name, value in snapshot(model).items() if not same_bits(value, before[name])}
    assert changed <= set(error.written)

    # While it is sent, on one rank, which keeps the others company to the end.
    fails_everywhere(
        ZeroDivisionError if is_last else RuntimeError,
        "division",
        build(2),
        folder / "x.pth",
        same_type=False,
        atomic=True,
        progress=(lambda done, total: 1 // (done != total)) if is_last else False,
    )

    # After the swap, on one rank.
    model = build(2)
    if is_last:
        model.register_load_state_dict_post_hook(_refuse)
    fails_everywhere(RuntimeError, "the hook says no", model, folder / "x.pth", atomic=True)
    model = build(2)
    smart_load(model, folder / "x.pth", process_group=distributed.group.WORLD)
    assert_equal_bits(snapshot(model), snapshot(build(1)))


def _refuse(module: nn.Module, keys: object) -> None:
    raise RuntimeError("the hook says no")


def not_there(rank: int, folder: Path) -> None:
    """A rank that doesn't call, and one that dies."""
    group = distributed.new_group(timeout=timedelta(seconds=3))
    distributed.barrier()
    model = build(2)
    before = snapshot(model)
    if rank:
        with pytest.raises(errors.TorchLoadError, match="did not come within the group's timeout"):
            smart_load(model, folder / "x.pth", process_group=group)
        assert_equal_bits(snapshot(model), before)
    else:
        time.sleep(6)
    distributed.barrier()
    torch.save(None, folder / f"outcome{rank}")
    share = sum(value.nbytes for value in before.values()) / distributed.get_world_size()

    def die(done: int, total: int) -> None:
        if done > 1.2 * share:  # in the middle of what is sent
            os._exit(0)

    cooperative._EXCHANGED_BYTES = 1
    with pytest.raises(errors.TorchLoadError, match="has ended") as caught:
        smart_load(model, folder / "x.pth", process_group=distributed.group.WORLD, progress=die if rank == 0 else False)
    now = snapshot(model)
    changed = {name for name in before if not same_bits(now[name], before[name])}
    assert changed
    assert changed <= set(caught.value.written)


def hybrid(rank: int, folder: Path) -> None:
    """HSDP: two replicas of two parts."""
    from torch.distributed.device_mesh import init_device_mesh

    from tests.distributed._parallel import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = nn.Sequential(nn.Linear(301, 2003), nn.Linear(2003, 7))
    fully_shard(model, mesh=mesh)
    with pytest.raises(errors.IncompatibleCheckpointError, match='mesh.get_group\\("replicate"\\)'):
        smart_load(model, folder / "linear.pth", process_group=distributed.group.WORLD)
    report: LoadReport = smart_load(model, folder / "linear.pth", process_group=mesh.get_group("replicate"))
    want = torch.load(folder / "linear.pth", weights_only=True)
    for name, value in model.state_dict().items():
        assert same_bits(value.full_tensor(), want[name])
    assert sum(_gathered(report.read_bytes)) <= 1.2 * sum(value.nbytes for value in want.values())
    group = mesh.get_group("replicate")
    wrong = "nowhere.pth" if rank == 3 else "linear.pth"
    expected = errors.CheckpointNotFoundError if rank % 2 else None  # replicas are 0 and 2, and 1 and 3
    if expected is None:
        smart_load(model, folder / wrong, process_group=group)
    else:
        with pytest.raises(expected, match="on rank 3" if rank == 1 else "nowhere"):
            smart_load(model, folder / wrong, process_group=group)
    with pytest.raises(ValueError, match="not one of process_group="):
        smart_load(model, folder / "linear.pth", process_group=distributed.GroupMember.NON_GROUP_MEMBER)


def chunks_are_cut(folder: Path) -> None:
    """A chunk of a distributed checkpoint is looked up when somebody wants it, also where a share ends in it."""
    model = nn.Sequential(nn.Linear(301, 2003), nn.Linear(2003, 7))
    report = smart_load(model, folder / "linear.dcp", process_group=distributed.group.WORLD)
    want = torch.load(folder / "linear.pth", weights_only=True)
    assert_equal_bits(model.state_dict(), want)
    assert report.read_bytes < 0.6 * sum(value.nbytes for value in want.values())


def _on_two(rank: int, folder: Path) -> None:
    loaded_together(folder, 2)
    chunks_are_cut(folder)
    failed_together(rank, folder)
    not_there(rank, folder)


def _on_four(rank: int, folder: Path) -> None:
    loaded_together(folder, 4)
    failed_together(rank, folder)
    if hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
        hybrid(rank, folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    for seed, name in ((1, "x"), (7, "y")):
        model = build(seed)
        torch.save({"model": model.state_dict()}, tmp_path / f"{name}.pth")
        safetensors.save_model(model, str(tmp_path / f"{name}.safetensors"))
        os.utime(tmp_path / f"{name}.safetensors", (seed, seed))
    for kind in ("pth", "safetensors"):
        content = (tmp_path / f"x.{kind}").read_bytes()
        (tmp_path / f"half.{kind}").write_bytes(content[: len(content) // 2])
    huge = build(1)
    huge.row.data[0, 80_000] = 1e9
    torch.save(huge.state_dict(), tmp_path / "huge.pth")
    linear = nn.Sequential(nn.Linear(301, 2003), nn.Linear(2003, 7)).state_dict()
    torch.save(linear, tmp_path / "linear.pth")
    (tmp_path / "linear.dcp").mkdir()
    whole(linear).write(tmp_path / "linear.dcp")
    return tmp_path


def test_two_ranks(saved: Path) -> None:
    on_ranks(_on_two, saved, 2)


def test_four_ranks(saved: Path) -> None:
    on_ranks(_on_four, saved, 4)


def test_what_is_no_group(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pth")
    with pytest.raises(TypeError, match=r"a torch.distributed.ProcessGroup, such as"):
        smart_load(nn.Linear(2, 2), tmp_path / "x.pth", process_group="world")


def test_one_rank_alone_reads_as_ever(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        torch.save(build(1).state_dict(), tmp_path / "x.pth")
        model = build(2)
        report = smart_load(model, tmp_path / "x.pth", process_group=distributed.group.WORLD)
        assert_equal_bits(snapshot(model), snapshot(build(1)))
        assert report.read_bytes >= report.nbytes
        with pytest.raises(ValueError, match="mmap=True"):
            smart_load(model, tmp_path / "x.pth", process_group=distributed.group.WORLD, mmap=True)
    finally:
        distributed.destroy_process_group()
