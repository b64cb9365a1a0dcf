"""Tar archives: the first format of torch.save, and checkpoints that others packed."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.generate import Net, packed, tar_bytes, weights
from tests.reading import read_tree, same_bits
from torchload import smart_load
from torchload.core.source import MemorySource
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats import open_checkpoint
from torchload.formats.files.tar import read_members

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of storages that have a dtype


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8], ids=str)
def test_torch_reads_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(24).reshape(4, 6).to(dtype)
    state = OrderedDict(base=base, part=base[1:3, ::2], expanded=base[0, :1].expand(3), tie=base, scalar=base[1, 1])
    path = tmp_path / "old.pth"
    path.write_bytes(tar_bytes(state))
    expected = torch.load(path, weights_only=False)
    tree = read_tree(path)
    assert tree.keys() == expected.keys()
    assert all(same_bits(tree[name], value) for name, value in expected.items())
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "tar checkpoint (torch 0.1)"
        assert checkpoint.root["base"].location == checkpoint.root["tie"].location


def test_a_whole_module_is_its_state_dict() -> None:
    model = Net()
    tree = read_tree(io.BytesIO(tar_bytes({"model": model, "epoch": 3})))
    assert tree["epoch"] == 3
    assert list(tree["model"]) == list(model.state_dict())
    target = Net()
    smart_load(target, io.BytesIO(tar_bytes({"model": model, "epoch": 3})))
    assert all(same_bits(value, target.state_dict()[name]) for name, value in model.state_dict().items())


def torch_tar(storages: bytes, tensors: bytes, root: bytes) -> io.BytesIO:
    return io.BytesIO(packed({"storages": storages, "tensors": tensors, "pickle": root}))


def dumped(*values: Any) -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in values)


STORAGE = dumped(1, (11, "cuda:1", torch.FloatStorage)) + struct.pack("<q3f", 3, 1, 2, 3)
TENSOR = dumped(1, (7, 11, torch.FloatTensor)) + struct.pack("<ii3q", 1, 0, 2, 1, 1)
ROOT = b"\x80\x02}(U\x01wU\x017Qu."


def test_parts_of_storages_and_tensors_without_any() -> None:
    storages = STORAGE + dumped([(12, 11, 1, 2)])
    tensors = dumped(2, (7, 12, torch.FloatTensor)) + struct.pack("<ii3q", 1, 0, 1, 1, 1)
    tensors += dumped((8, None, torch.FloatTensor)) + struct.pack("<iiq", 0, 0, 0)
    root = b"\x80\x02}(U\x01wU\x017QU\x01eU\x018QU\x01sU\x0212Qu."
    tree = read_tree(torch_tar(storages, tensors, root))
    assert tree["w"].tolist() == [3]
    assert tree["e"].shape == (0,)
    assert tree["s"].tolist() == [2, 3]


VIEWS = dumped([])
HOSTILE = {
    "no storages": (b"", TENSOR, ROOT),
    "a count beyond the file": (dumped(1 << 40), TENSOR, ROOT),
    "a negative count": (dumped(-1) + VIEWS, TENSOR, ROOT),
    "a count that is text": (dumped("1"), TENSOR, ROOT),
    "a storage of no kind": (dumped(1, (11, "cpu", dict)) + struct.pack("<q", 0) + VIEWS, TENSOR, ROOT),
    "a negative storage": (dumped(1, (11, "cpu", torch.FloatStorage)) + struct.pack("<q", -1) + VIEWS, TENSOR, ROOT),
    "a huge storage": (dumped(1, (11, "cpu", torch.FloatStorage)) + struct.pack("<q", 1 << 61) + VIEWS, TENSOR, ROOT),
    "a part beyond its storage": (STORAGE + dumped([(12, 11, 2, 2)]), TENSOR, ROOT),
    "a part of nothing": (STORAGE + dumped([(12, 99, 0, 1)]), TENSOR, ROOT),
    "parts that are none": (STORAGE + dumped([(1, 2)]), TENSOR, ROOT),
    "no tensors": (STORAGE + VIEWS, b"", ROOT),
    "a tensor beyond its storage": (STORAGE + VIEWS, TENSOR[:-8] + struct.pack("<q", 2), ROOT),
    "a negative offset": (STORAGE + VIEWS, TENSOR[:-8] + struct.pack("<q", -1), ROOT),
    "a million dimensions": (STORAGE + VIEWS, TENSOR[:-32] + struct.pack("<iiq", 10**6, 0, 0), ROOT),
    "negative dimensions": (STORAGE + VIEWS, TENSOR[:-32] + struct.pack("<iiq", -1, 0, 0), ROOT),
    "an overflowing shape": (
        STORAGE + VIEWS,
        dumped(1, (7, 11, torch.FloatTensor)) + struct.pack("<ii5q", 2, 0, 1 << 40, 1 << 40, 0, 0, 0),
        ROOT,
    ),
    "a tensor in no storage": (STORAGE + VIEWS, dumped(1, (7, 99, 0)) + struct.pack("<ii3q", 1, 0, 2, 1, 1), ROOT),
    "a reference to nothing": (STORAGE + VIEWS, TENSOR, ROOT.replace(b"U\x017", b"U\x019")),
    "another reference": (STORAGE + VIEWS, TENSOR, b"\x80\x02K\x05K\x06\x86Q."),
}


@pytest.mark.parametrize("members", HOSTILE.values(), ids=HOSTILE)
def test_what_contradicts_itself_is_refused(members: tuple[bytes, bytes, bytes]) -> None:
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(torch_tar(*members))


def test_checkpoints_in_a_tar_archive_are_opened() -> None:
    state = weights()
    data = packed({"./model_config.yaml": b"name: net", "./model_weights.ckpt": saved(state)})
    tree = read_tree(io.BytesIO(data))
    assert list(tree) == ["model_weights"]
    assert all(same_bits(tree["model_weights"][name], value) for name, value in state.items())
    target = Net()
    smart_load(target, io.BytesIO(data))
    assert all(same_bits(value, target.state_dict()[name]) for name, value in state.items())


def test_another_tar_archive_is_named() -> None:
    with pytest.raises(CheckpointFormatError, match="tar archive") as caught:
        open_checkpoint(io.BytesIO(packed({"notes.txt": b"nothing"})))
    assert caught.value.found == "tar archive"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int) -> None:
    file = io.BytesIO()
    names = {"a": b"1", "folder/b": b"22" * 400, "deep/" * 12 + "c": b"", "empty": b""}
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        archive.addfile(tarfile.TarInfo("folder"))
    members = read_members(MemorySource(file.getvalue()), "a.tar")
    assert {name: source.read(0, source.size) for name, source in members.items()} == {**names, "folder": b""}


def test_names_and_sizes_in_pax_headers() -> None:
    file = io.BytesIO()
    long = "name/" * 60
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(long + "x")
        info.size = 3
        info.pax_headers = {"size": "3", "comment": "ä"}
        archive.addfile(info, io.BytesIO(b"abc"))
    (name, source), *_ = read_members(MemorySource(file.getvalue()), "a.tar").items()
    assert (name, source.read(0, 3)) == (long + "x", b"abc")


def test_the_same_name_twice_is_refused() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("pickle"))
    file.seek(0)
    with pytest.raises(CorruptCheckpointError, match="twice"):
        open_checkpoint(file)


def test_truncation_anywhere_is_found() -> None:
    data = tar_bytes(OrderedDict(w=torch.ones(3)))
    end = len(data.rstrip(b"\0"))
    for size in range(512, end + 512 - end % 512, 101):
        with pytest.raises((CorruptCheckpointError, CheckpointFormatError)):
            open_checkpoint(io.BytesIO(data[:size]))


def test_a_flipped_bit_in_a_header_is_found() -> None:
    data = tar_bytes(OrderedDict(w=torch.ones(3)))
    header = data.index(b"storages\0")
    for position in (header, header + 124 + 8, header + 156):
        damaged = bytearray(data)
        damaged[position] ^= 1
        with pytest.raises(CorruptCheckpointError, match="checksum"):
            open_checkpoint(io.BytesIO(damaged))
