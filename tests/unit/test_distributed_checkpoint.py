"""Folders of `torch.distributed.checkpoint`, most of them written by it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from tests.dcp_folders import Folder, whole
from tests.versions import save_folder
from torchload import smart_load
from torchload.core.checkpoint import Container, OpaqueTensor, Record, Region, TensorEntry
from torchload.errors import (
    CheckpointFormatError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
)
from torchload.formats import open_checkpoint
from torchload.formats.sets.items import ItemBox, ItemReader
from torchload.transfer.mapped import read_entries

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def dense(tree: Any) -> Any:
    """A tree with tensors in place of their entries."""
    if isinstance(tree, TensorEntry):
        return read_entries([tree])[0]
    if isinstance(tree, dict):
        return {key: dense(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [dense(value) for value in tree]
    return tree


def save(path: Path, state: dict[str, Any], **options: Any) -> Path:
    save_folder(state, storage_writer=FileSystemWriter(path, **options))
    return path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the chunks whose items were looked into."""
    names: list[str] = []
    tensor = ItemReader.tensor

    def counted(self: ItemReader, item: Any, *args: Any) -> Any:
        names.append(item.name)
        return tensor(self, item, *args)

    monkeypatch.setattr(ItemReader, "tensor", counted)
    return names


def test_a_save_is_nested_as_it_was(tmp_path: Path) -> None:
    state = {
        "model": {"a.weight": torch.randn(3, 4), "b": {"c": torch.tensor(2.5)}},
        "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["a.weight"]}], "state": {}},
        "epoch": 7,
        "none": None,
    }
    with open_checkpoint(save(tmp_path, state)) as checkpoint:
        tree = dense(checkpoint.root)
    assert checkpoint.format == "torch.distributed.checkpoint folder (1 file)"
    assert checkpoint.checksums
    assert torch.equal(tree["model"]["a.weight"], state["model"]["a.weight"])
    assert torch.equal(tree["model"]["b"]["c"], state["model"]["b"]["c"])
    assert tree["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert (tree["epoch"], tree["none"]) == (7, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_dtypes_and_shapes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    state = {"scalar": base[0, 0, 1].clone(), "view": base.transpose(0, 2), "empty": base[:0], "part": base[1, 1:]}
    with open_checkpoint(save(tmp_path, state)) as checkpoint:
        tree = dense(checkpoint.root)
    for name, tensor in state.items():
        assert tree[name].dtype is dtype
        assert torch.equal(tree[name], tensor)


@pytest.mark.parametrize("single_file_per_rank", [True, False])
def test_it_loads_into_a_model(tmp_path: Path, single_file_per_rank: bool) -> None:
    source, target = Net(), Net()
    save(tmp_path, {"model": source.state_dict(), "step": 3}, single_file_per_rank=single_file_per_rank)
    report = smart_load(target, tmp_path, "cpu")
    assert report.key == "model"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_flat_names_load_into_a_model(tmp_path: Path) -> None:
    source, target = Net(), Net()
    smart_load(target, save(tmp_path, source.state_dict()), "cpu")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_checksums_of_items_are_verified(tmp_path: Path) -> None:
    source = Net()
    save(tmp_path, source.state_dict())
    smart_load(Net(), tmp_path, "cpu", verify=True)
    with open_checkpoint(tmp_path) as checkpoint:
        extent = checkpoint.root["first.weight"].boxes[0].extent
    (file,) = tmp_path.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[extent.offset + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=file.name):
        smart_load(Net(), tmp_path, "cpu", verify=True)


GRID = [
    Region((row, column), (height, width))
    for row, height in ((0, 2), (2, 3), (5, 1))
    for column, width in ((0, 4), (4, 3))
]


def test_chunks_are_put_together(tmp_path: Path) -> None:
    folder = Folder()
    tensors = {"grid": torch.randn(6, 7), "rows": torch.randn(5), "cube": torch.randn(2, 3, 4)}
    folder.add_tensor("grid", tensors["grid"], GRID)
    folder.add_tensor("rows", tensors["rows"], [Region((3,), (2,)), Region((0,), (3,)), Region((5,), (0,))])
    folder.add_tensor("cube", tensors["cube"], [Region((0, 0, at), (2, 3, 1)) for at in range(4)])
    with open_checkpoint(folder.write(tmp_path)) as checkpoint:
        assert len(checkpoint.root["grid"].boxes) == 6
        tree = dense(checkpoint.root)
        assert checkpoint.format == "torch.distributed.checkpoint folder (2 files)"
    assert all(torch.equal(tree[name], tensor) for name, tensor in tensors.items())


def test_only_what_is_wanted_is_looked_into(tmp_path: Path, looked_up: list[str]) -> None:
    source = Net()
    save(tmp_path, {"model": source.state_dict(), "optimizer": {"state": {"first.weight": torch.ones(6, 4)}}})
    with open_checkpoint(tmp_path) as checkpoint:
        entry = checkpoint.root["model"]["first.weight"]
        assert (entry.shape, entry.dtype, entry.nbytes) == ((6, 4), torch.float32, 96)
        assert isinstance(entry.boxes[0], ItemBox)
        assert entry.location == entry.location
    assert looked_up == []
    smart_load(Net(), tmp_path, "cpu")
    assert sorted(looked_up) == sorted(f"model.{name}" for name in source.state_dict())


def test_equal_values_are_read_once(tmp_path: Path) -> None:
    state = {f"group{number}": {"lr": 0.25, "name": f"n{number}"} for number in range(3)}
    with open_checkpoint(save(tmp_path, state)) as checkpoint:
        assert dense(checkpoint.root) == state


def test_ranks_that_saved_without_each_other_are_joined(tmp_path: Path) -> None:
    tensor, shared = torch.randn(4, 2), torch.randn(3)
    for rank in range(2):
        folder = Folder()
        folder.add_tensor("split", tensor, [Region((2 * rank, 0), (2, 2))])
        folder.add_tensor("shared", shared, [Region((0,), (3,))])
        folder.files = {f"__{rank}_0.distcp": folder.files["__0_0.distcp"]}
        for info in folder.metadata.storage_data.values():
            info.relative_path = f"__{rank}_0.distcp"
        folder.write(tmp_path, f"__{rank}.metadata")
    with open_checkpoint(tmp_path) as checkpoint:
        tree = dense(checkpoint.root)
    assert torch.equal(tree["split"], tensor)
    assert torch.equal(tree["shared"], shared)


@pytest.mark.skipif(not hasattr(dcp.filesystem, "SerializationFormat"), reason="torch has one format of items")
def test_items_in_a_safetensors_file(tmp_path: Path) -> None:
    state = {"model": {"a": torch.randn(3, 4), "b": torch.arange(5)}, "epoch": 4, "name": "x" * 100}
    save(tmp_path, state, serialization_format=dcp.filesystem.SerializationFormat.SAFETENSORS)
    with open_checkpoint(tmp_path) as checkpoint:
        tree = dense(checkpoint.root)
    assert torch.equal(tree["model"]["a"], state["model"]["a"])
    assert torch.equal(tree["model"]["b"], state["model"]["b"])
    assert (tree["epoch"], tree["name"]) == (4, "x" * 100)


def test_tensors_written_through_a_transform_are_opaque(tmp_path: Path) -> None:
    folder = whole({"weight": torch.ones(3), "bias": torch.ones(3)})
    folder.add_value("epoch", 3)
    for index, info in folder.metadata.storage_data.items():
        if index.fqn != "bias":
            info.transform_descriptors = ["stream.zstd"]
    folder.write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert isinstance(checkpoint.root["weight"], OpaqueTensor)
        assert isinstance(checkpoint.root["epoch"], Record)
        assert torch.equal(dense(checkpoint.root["bias"]), torch.ones(3))
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(3))
    layer.bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(IncompatibleCheckpointError, match=r"stream\.zstd"):
        smart_load(layer, tmp_path, "cpu")
    assert not layer.bias.any()


def test_names_without_paths_stay_flat(tmp_path: Path) -> None:
    folder = whole({"model.a": torch.ones(2), "model.b": torch.zeros(2)})
    folder.metadata.planner_data = None
    with open_checkpoint(folder.write(tmp_path)) as checkpoint:
        assert list(checkpoint.root) == ["model.a", "model.b"]


def test_lists_with_gaps_keep_their_numbers(tmp_path: Path) -> None:
    folder = Folder()
    folder.add_value("x.0", "a", ("x", 0))
    folder.add_value("x.2", "c", ("x", 2))
    folder.add_value("y.0.0", "d", ("y", 0, 0))
    with open_checkpoint(folder.write(tmp_path)) as checkpoint:
        assert checkpoint.root == {"x": {0: "a", 2: "c"}, "y": [["d"]]}
        assert type(checkpoint.root["x"]) is Container


def test_the_layout_of_torch_2_0(tmp_path: Path) -> None:
    # Properties came from another module, and neither a version nor a description of the storage was there.
    folder = whole({"weight": torch.arange(6.0).reshape(2, 3)})
    folder.write(tmp_path)
    new, old = b"ctorch.distributed.checkpoint.metadata\n", b"ctorch.distributed._shard.checkpoint.metadata\n"
    data = pickle.dumps(folder.metadata, protocol=2).replace(new, old)
    assert old in data
    (tmp_path / ".metadata").write_bytes(data)
    with open_checkpoint(tmp_path) as checkpoint:
        assert torch.equal(dense(checkpoint.root["weight"]), torch.arange(6.0).reshape(2, 3))


def test_one_file_of_the_folder_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder()
    folder.add_tensor("grid", torch.randn(6, 7), GRID)
    folder.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / ".metadata", tmp_path / "__1_0.distcp", Path("__0_0.distcp")):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.root.keys() == {"grid"}
    with pytest.raises(CheckpointNotFoundError, match=r"__7_0\.distcp does not exist"):
        open_checkpoint("__7_0.distcp")
    (tmp_path / ".metadata").unlink()
    for path in (tmp_path, tmp_path / "__0_0.distcp"):
        with pytest.raises(CheckpointNotFoundError, match="the save did not end"):
            open_checkpoint(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = Folder()
    folder.add_tensor("grid", torch.randn(6, 7), GRID)
    folder.write(tmp_path)
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"1 of the 2 files of .* missing: __1_0\.distcp"):
        open_checkpoint(tmp_path)


def test_a_truncated_file_is_told_by_its_length(tmp_path: Path) -> None:
    save(tmp_path, {"weight": torch.ones(100)})
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="incomplete"):
        open_checkpoint(tmp_path)


def test_another_metadata_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"author": "somebody"}))
    with pytest.raises(CheckpointFormatError, match=r"not torch\.distributed\.checkpoint's"):
        open_checkpoint(tmp_path)


def test_accelerates_folder_around_it(tmp_path: Path) -> None:
    source, target = Net(), Net()
    save(tmp_path / "pytorch_model_fsdp_0", {"model": source.state_dict()})
    save(tmp_path / "optimizer_0", {"optimizer": {"lr": 0.1}})
    smart_load(target, tmp_path, "cpu")
    assert torch.equal(target.first.weight, source.first.weight)
