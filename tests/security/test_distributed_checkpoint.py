"""Folders of `torch.distributed.checkpoint` that are made to do harm, or damaged."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from tests.dcp_folders import Folder, stream, whole
from tests.security._hostile import contained
from torchload.core.checkpoint import Region, TensorEntry
from torchload.errors import CorruptCheckpointError, TorchLoadError
from torchload.formats import open_checkpoint
from torchload.transfer.mapped import read_entries

HALVES = [Region((0, 0), (2, 3)), Region((2, 0), (2, 3))]


def grid() -> Folder:
    folder = Folder()
    folder.add_tensor("weight", torch.arange(12.0).reshape(4, 3), HALVES)
    folder.add_value("epoch", 3)
    return folder


def load(folder: Path) -> list[torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return read_entries([entry for entry in checkpoint.root.values() if isinstance(entry, TensorEntry)])


def chunk(folder: Folder, number: int) -> Any:
    return folder.metadata.state_dict_metadata["weight"].chunks[number]


def info(folder: Folder, number: int) -> Any:
    return folder.metadata.storage_data[MetadataIndex("weight", HALVES[number].origin)]


def change(target: Any, **fields: Any) -> None:
    for name, value in fields.items():
        object.__setattr__(target, name, value)


def forget(folder: Folder) -> None:
    del folder.metadata.storage_data[MetadataIndex("weight", (2, 0))]


def swap_items(folder: Folder) -> None:
    folder.metadata.storage_data[MetadataIndex("weight", (0, 0))] = folder.metadata.storage_data[MetadataIndex("epoch")]


def other_tensor(value: Any) -> Callable[[Folder], None]:
    def apply(folder: Folder) -> None:
        folder.metadata.storage_data[MetadataIndex("weight", (0, 0))] = folder.append("__0_0.distcp", stream(value))

    return apply


DAMAGES: dict[str, Callable[[Folder], None]] = {
    "overlap": lambda folder: change(chunk(folder, 1), offsets=torch.Size((0, 0))),
    "hole": lambda folder: folder.metadata.state_dict_metadata["weight"].chunks.pop(),
    "outside": lambda folder: change(chunk(folder, 1), sizes=torch.Size((3, 3))),
    "negative_size": lambda folder: change(chunk(folder, 1), sizes=(-2, 3)),
    "negative_offset": lambda folder: change(chunk(folder, 1), offsets=(-2, 0)),
    "huge": lambda folder: change(folder.metadata.state_dict_metadata["weight"], size=(1 << 62, 1 << 62)),
    "no_integer": lambda folder: change(folder.metadata.state_dict_metadata["weight"], size=(4, 3.0)),
    "other_rank": lambda folder: change(chunk(folder, 0), offsets=(0,), sizes=(2,)),
    "no_place": forget,
    "place_outside_the_file": lambda folder: change(info(folder, 0), offset=1 << 40),
    "negative_place": lambda folder: change(info(folder, 0), offset=-5),
    "place_of_no_bytes": lambda folder: change(info(folder, 0), length=0),
    "place_of_another": lambda folder: change(info(folder, 1), relative_path="__0_0.distcp"),
    "place_in_the_middle": lambda folder: change(info(folder, 0), offset=7),
    "parent_folder": lambda folder: change(info(folder, 0), relative_path="../secret.distcp"),
    "absolute": lambda folder: change(info(folder, 0), relative_path="/etc/passwd"),
    "backslash": lambda folder: change(info(folder, 0), relative_path="..\\secret.distcp"),
    "empty_name": lambda folder: change(info(folder, 0), relative_path=""),
    "nul": lambda folder: change(info(folder, 0), relative_path="a\0b"),
    "folder_itself": lambda folder: change(info(folder, 0), relative_path="."),
    "value_for_tensor": swap_items,
    "other_dtype": other_tensor(torch.ones(2, 3, dtype=torch.float64)),
    "other_shape": other_tensor(torch.ones(3, 2)),
    "expanded": other_tensor(torch.ones(1).expand(2, 4)),
    "dictionary": other_tensor({"weight": torch.ones(2, 3)}),
    "name_is_no_text": lambda folder: folder.metadata.state_dict_metadata.update({7: "x"}),
    "unknown_description": lambda folder: folder.metadata.state_dict_metadata.update({"x": 7}),
    "no_storage": lambda folder: change(folder.metadata, storage_data=None),
    "no_tensors": lambda folder: change(folder.metadata, state_dict_metadata=None),
    "path_to_a_leaf": lambda folder: folder.metadata.planner_data.update(epoch=("weight", "epoch"), weight=("epoch",)),
}
LOADS = {"path_to_a_leaf"}  # odd, but there is only one way to read it


@pytest.mark.parametrize("damage", DAMAGES)
def test_contradictions_are_refused(tmp_path: Path, damage: str) -> None:
    folder = grid()
    DAMAGES[damage](folder)
    inside = tmp_path / "folder"
    inside.mkdir()
    (tmp_path / "secret.distcp").write_bytes(folder.files["__0_0.distcp"])
    folder.write(inside)
    if damage in LOADS:
        assert torch.equal(load(inside)[0], torch.arange(12.0).reshape(4, 3))
    else:
        with pytest.raises(TorchLoadError):
            load(inside)


def test_the_undamaged_folder_loads(tmp_path: Path) -> None:
    assert torch.equal(load(grid().write(tmp_path))[0], torch.arange(12.0).reshape(4, 3))


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    folder = grid()
    change(info(folder, 0), relative_path="sub/__0_0.distcp")
    inside, outside = tmp_path / "folder", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    folder.write(inside)
    (outside / "__0_0.distcp").write_bytes(folder.files["__0_0.distcp"])
    (inside / "sub").symlink_to(outside)
    with pytest.raises(CorruptCheckpointError, match="is a link to another folder"):
        open_checkpoint(inside)


class _Marker:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("where", ["metadata", "description", "path", "place", "item", "tensor item"])
def test_nothing_is_called(tmp_path: Path, where: str) -> None:
    marker = tmp_path / "called"
    folder = grid()
    inside = tmp_path / "folder"
    inside.mkdir()
    if where == "description":
        folder.metadata.state_dict_metadata["x"] = _Marker(marker)
    elif where == "path":
        folder.metadata.planner_data["weight"] = (_Marker(marker),)
    elif where == "place":
        folder.metadata.storage_data["x"] = _Marker(marker)
    elif where == "item":
        folder.add_value("x", _Marker(marker))
    elif where == "tensor item":
        folder.metadata.storage_data[MetadataIndex("weight", (0, 0))] = folder.append(
            "__0_0.distcp", stream(_Marker(marker))
        )
    folder.write(inside)
    if where == "metadata":
        (inside / ".metadata").write_bytes(pickle.dumps(_Marker(marker)))
    with contextlib.suppress(TorchLoadError):
        load(inside)
    assert not marker.exists()


def test_every_truncation_is_found(tmp_path: Path) -> None:
    folder = grid().write(tmp_path)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        data = (folder / name).read_bytes()
        for size in {*range(0, len(data), 97), len(data) - 1}:
            (folder / name).write_bytes(data[:size])
            with pytest.raises(TorchLoadError):
                load(folder)
        (folder / name).write_bytes(data)
    assert len(load(folder)) == 1


def test_flipped_bits_in_the_index_raise_only_ours(tmp_path: Path) -> None:
    folder = grid().write(tmp_path)
    data = bytearray((folder / ".metadata").read_bytes())
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        (folder / ".metadata").write_bytes(data)
        try:
            tensors = load(folder)  # without the tensor, where its name was hit or its dtype is none that torch knows
        except TorchLoadError:
            tensors = []
        for tensor in tensors:
            assert sorted(tensor.flatten().tolist()) == list(range(12))
        data[position] ^= 1 << position % 8


def test_a_list_of_chunks_in_many_places_costs_nothing(tmp_path: Path) -> None:
    folder = whole({"weight": torch.ones(2)})
    first = folder.metadata.state_dict_metadata["weight"]
    first.chunks = [ChunkStorageMetadata(torch.Size((0,)), torch.Size((0,)))] * 20_000
    for number in range(20_000):
        folder.metadata.state_dict_metadata[f"w{number}"] = first
    folder.write(tmp_path)
    assert "more chunks than it has places for" in contained(lambda: load(tmp_path))


def test_deep_paths_cost_nothing(tmp_path: Path) -> None:
    folder = Folder()
    folder.add_value("first", 1)
    for number in range(20_000):
        name = f"n{number}"
        folder.metadata.state_dict_metadata[name] = folder.metadata.state_dict_metadata["first"]
        folder.metadata.storage_data[MetadataIndex(name)] = folder.metadata.storage_data[MetadataIndex("first")]
        folder.metadata.planner_data[name] = (name, *("x",) * 63)
    folder.write(tmp_path)
    assert contained(lambda: load(tmp_path)) == "done"


def test_many_dimensions_cost_nothing(tmp_path: Path) -> None:
    folder = whole(
        {"weight": torch.ones((2,) * 30, dtype=torch.uint8, device="meta").new_empty((1,) * 30, device="cpu")}
    )
    description = folder.metadata.state_dict_metadata["weight"]
    description.size = torch.Size((2,) * 30)
    folder.write(tmp_path)
    assert "30 dimensions" in contained(lambda: load(tmp_path))


def test_thousands_of_chunks_cost_little(tmp_path: Path) -> None:
    folder = Folder()
    count = 1000
    folder.add_tensor("weight", torch.arange(count), [Region((at,), (1,)) for at in range(count)])
    folder.write(tmp_path)
    assert contained(lambda: load(tmp_path)) == "done"
