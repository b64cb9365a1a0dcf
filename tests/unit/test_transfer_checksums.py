"""Checksums that are compared as data arrives."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.test_transfer import whole
from torchload import smart_load
from torchload.core.checkpoint import Extent
from torchload.core.source import MemorySource
from torchload.core.word_sums import WordSums
from torchload.errors import CorruptCheckpointError
from torchload.formats import open_checkpoint
from torchload.match.globs import Globs
from torchload.model.placement import Placement
from torchload.model.target import describe_model
from torchload.plan.options import Options
from torchload.plan.plan import LoadPlan
from torchload.plan.planner import make_plan
from torchload.plan.steps import select_for
from torchload.transfer import checks, run
from torchload.transfer.checks import verify_extents
from torchload.transfer.pieces import DIRECT_BYTES, STAGED_BYTES

ROWS = 3 * DIRECT_BYTES // 4 // 64 + 5
TARGETS = {
    "in several reads": torch.empty(ROWS, 64),
    "in one read": torch.empty(500, 64),
    "cast": torch.empty(3 * STAGED_BYTES // 4 // 64, 64, dtype=torch.float16),
    "cast with its neighbours": torch.empty(50, 64, dtype=torch.bfloat16),
    "scattered": torch.empty(7, 64),
    "rearranged": torch.empty(64, 9000).t(),
    "permuted alike": torch.empty(2, 3, 40, 50).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_damage_is_found_on_arrival(what: str, threads: int) -> None:
    """Any flipped bit, at either end and in the middle, wherever the data goes and however it gets there."""
    target = torch.zeros_like(TARGETS[what])
    values = torch.randn(target.shape)
    data = bytearray(values.numpy().tobytes())
    recorded = zlib.crc32(data)
    run([recording(data, target, recorded)], check=True, threads=threads)
    assert torch.equal(target, values.to(target.dtype))
    for position in (0, len(data) // 2, len(data) - 4):
        data[position] ^= 1
        with pytest.raises(CorruptCheckpointError, match=r"weight: CRC-32 .*, recorded") as caught:
            run([recording(data, target, recorded)], check=True, threads=threads)
        assert caught.value.written == ("weight",)
        data[position] ^= 1


@pytest.mark.parametrize("what", TARGETS)
@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_found_sound_is_compared_with_that(what: str, threads: int) -> None:
    """Sums of words tell of any flipped bit as the checksum does, wherever the data goes."""
    target = torch.zeros_like(TARGETS[what])
    data = bytearray(torch.randn(target.shape).numpy().tobytes())
    copy = recording(data, target, zlib.crc32(data))
    verify_extents([copy.box.extent])
    assert (copy.box.extent.word_sums is not None) == (len(data) >= 64 << 10)
    sound = WordSums(len(data))
    sound.add(memoryview(data), 0)
    run([copy], check=True, threads=threads)
    for position in (0, len(data) // 2, len(data) - 4):
        data[position] ^= 1
        changed = recording(data, target, zlib.crc32(b"no longer asked for"))
        changed.box.extent.word_sums = sound
        with pytest.raises(CorruptCheckpointError, match="weight: it isn't what it was when its CRC-32 was right"):
            run([changed], check=True, threads=threads)
        data[position] ^= 1


def recording(data: bytearray, target: torch.Tensor, crc32: int):
    copy = whole(MemorySource(bytes(data), "x.pth"), target, torch.float32, name="weight")
    copy.box.extent.crc32 = crc32
    return copy


@pytest.mark.parametrize("size", [100, 300])
def test_what_was_damaged_after_the_first_look_is_found_as_it_lands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A bit flips between the check and the load, in memory: the file's time and size stay what they were."""
    model = nn.Linear(size, size, bias=False)
    torch.save({"weight": torch.ones(size, size)}, tmp_path / "x.pth")

    path = tmp_path / "x.pth"
    data, times = bytearray(path.read_bytes()), os.stat(path)
    data[data.index(torch.ones(64).numpy().tobytes()) + 40] ^= 4

    def flip(extents: list[Extent]) -> None:
        verify_extents(extents)
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    monkeypatch.setattr(checks, "verify_extents", flip)
    with pytest.raises(CorruptCheckpointError, match="weight") as caught:
        smart_load(model, path, verify=True)
    assert caught.value.written == ("weight",)


class Shared(nn.Module):
    """One parameter whose data has a record of its own, and two that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(30, 20))
        both = torch.randn(40, 20)
        self.upper, self.lower = nn.Parameter(both[:20]), nn.Parameter(both[20:])


def plan_for(model: nn.Module, path: Path, **options: object) -> tuple[LoadPlan, list[int]]:
    """The plan, and the sizes of what has to be checked before it is carried out."""
    with open_checkpoint(path) as checkpoint:
        target = describe_model(model)
        selection = select_for(target, checkpoint, Globs(), True, key=None, prefix=None, rename=None)
        atomic, mmap = bool(options.get("atomic")), bool(options.get("mmap"))
        settings = Options(Placement(None), options.get("dtype"), (), True, atomic, mmap, verify=True)
        plan = make_plan(target, checkpoint, selection, settings)
        return plan, sorted(extent.nbytes for extent in plan.extents_to_check_first)


def test_only_what_cannot_be_taken_back_is_checked_first(tmp_path: Path) -> None:
    torch.save(Shared().state_dict(), tmp_path / "x.pth")
    with torch.device("meta"):
        empty = Shared()
    own, both = 30 * 20 * 4, 40 * 20 * 4
    assert plan_for(Shared(), tmp_path / "x.pth")[1] == [own, both]
    for model, options in ((empty, {}), (Shared(), {"atomic": True}), (Shared(), {"dtype": torch.float16})):
        assert plan_for(model, tmp_path / "x.pth", **options)[1] == [both]
    assert plan_for(empty, tmp_path / "x.pth", mmap=True)[1] == [own, both]


@pytest.mark.parametrize("options", [{"atomic": True}, {"dtype": torch.float16}, {"mmap": True}, {}], ids=str)
def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path: Path, options: dict[str, object]) -> None:
    model = Shared()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "x.pth"
    torch.save({name: torch.ones_like(tensor) for name, tensor in before.items()}, path)
    smart_load(Shared(), path, verify=True, **options)
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(100).numpy().tobytes()) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="fails its checksum"):
        smart_load(model, path, verify=True, **options)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype is before[name].dtype
