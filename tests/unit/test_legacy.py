"""Files of torch.save before torch 1.6: what torch.load reads from them, torchload indexes without reading."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.reading import read_tree, same_bits
from torchload import smart_load
from torchload.core.checkpoint import Container, OpaqueTensor
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats import open_checkpoint

DATA = Path(__file__).parents[1] / "data"
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def legacy_bytes(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class without source text
        torch.save(value, file, _use_new_zipfile_serialization=False, **options)
    return file.getvalue()


def handmade(
    root: bytes, keys: list[str], storages: bytes, *, version: int = 1001, little_endian: bool = True
) -> bytes:
    """A legacy file with this object pickle, whatever it says."""
    parts = [0x1950A86A20F9469CFC6C, version, {"protocol_version": version, "little_endian": little_endian}]
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    return head + root + pickle.dumps(keys, 2) + storages


class _Pickler(pickle.Pickler):
    """Writes `Reference`s as persistent ids."""

    def persistent_id(self, value: Any) -> Any:
        return value.pid if isinstance(value, Reference) else None


class Reference:
    def __init__(self, *pid: Any) -> None:
        self.pid = pid


class Rebuilt:
    """Pickles as a tensor over a storage."""

    def __init__(self, storage: Reference, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.args = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.args


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 2).dump(value)
    return file.getvalue()


def storage(key: str, numel: int, view: Any = None) -> Reference:
    return Reference("storage", torch.FloatStorage, key, "cpu", numel, view)


def floats(*values: float) -> bytes:
    return struct.pack(f"<q{len(values)}f", len(values), *values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    value = torch.arange(24).reshape(4, 6).to(dtype)
    assert same_bits(read_tree(io.BytesIO(legacy_bytes({"w": value})))["w"], value)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_pickle_protocol_is_recognized_and_read(protocol: int) -> None:
    data = legacy_bytes({"w": torch.ones(3), "epoch": 7}, pickle_protocol=protocol)
    with open_checkpoint(io.BytesIO(data)) as checkpoint:
        assert checkpoint.format == "legacy checkpoint (torch < 1.6)"
        assert checkpoint.root["epoch"] == 7
    assert read_tree(io.BytesIO(data))["w"].tolist() == [1, 1, 1]


def test_views_strides_and_empty_tensors_are_kept() -> None:
    base = torch.arange(60.0).reshape(3, 4, 5)
    state = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "part": base[1:, ::2, 1:4],
        "expanded": base[0, 0, :1].expand(7),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    tree = read_tree(io.BytesIO(legacy_bytes(state)))
    assert all(same_bits(tree[name], value) for name, value in state.items())


def test_tied_tensors_have_one_location() -> None:
    weight = nn.Parameter(torch.ones(3))
    with open_checkpoint(io.BytesIO(legacy_bytes({"a": weight, "b": weight, "c": weight.data[1:]}))) as checkpoint:
        root = checkpoint.root
        assert root["a"].location == root["b"].location != root["c"].location
        assert root["a"].boxes[0].extent is root["c"].boxes[0].extent
        assert root["a"].is_parameter


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.pth"
    torch.save({"w": torch.zeros(4 << 20), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with open_checkpoint(path) as checkpoint:
        extents = [checkpoint.root[name].boxes[0].extent for name in ("w", "b")]
        assert sorted(extent.nbytes for extent in extents) == [8, 16 << 20]
        assert all(extent.source is checkpoint.sources[0] for extent in extents)


def test_a_whole_module_is_its_state_dict() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
            self.register_buffer("scratch", torch.ones(2), persistent=False)

    globals()["Unknown"] = Unknown  # pickle wants to find the class by its name
    Unknown.__qualname__ = "Unknown"
    model = nn.DataParallel(Unknown())
    try:
        data = legacy_bytes(model)
    finally:
        del globals()["Unknown"]
    with open_checkpoint(io.BytesIO(data)) as checkpoint:
        root = checkpoint.root
        assert isinstance(root, Container)
        assert list(root) == list(model.state_dict())
    target = Unknown()
    smart_load(target, io.BytesIO(data))
    assert all(same_bits(value, target.state_dict()[name]) for name, value in model.module.state_dict().items())


def test_what_is_no_dense_tensor_is_opaque() -> None:
    tree = read_tree(io.BytesIO(legacy_bytes({"sparse": torch.eye(3).to_sparse(), "w": torch.ones(1)})))
    assert isinstance(tree["sparse"], OpaqueTensor)
    assert "sparse COO" in tree["sparse"].reason


def test_storages_in_the_tree_are_tensors() -> None:
    tensor, other = torch.arange(4.0), torch.arange(3)
    tree = read_tree(io.BytesIO(legacy_bytes([tensor.untyped_storage(), other.storage(), other])))
    assert same_bits(tree[0], tensor.view(torch.uint8))
    assert same_bits(tree[1], other)
    assert same_bits(tree[2], other)


def test_a_view_of_a_storage_lies_inside_it() -> None:
    # Until torch 0.4 a storage could be a part of another one: (key of the view, offset, length), in elements.
    view = Rebuilt(storage("root", 5, ("view", 2, 3)), 1, (2,), (1,))
    whole = Rebuilt(storage("root", 5), 0, (5,), (1,))
    data = handmade(pickled({"view": view, "whole": whole}), ["root"], floats(0, 1, 2, 3, 4))
    tree = read_tree(io.BytesIO(data))
    assert tree["view"].tolist() == [3, 4]
    assert tree["whole"].tolist() == [0, 1, 2, 3, 4]
    beyond = Rebuilt(storage("root", 5, ("view", 2, 3)), 2, (2,), (1,))
    with pytest.raises(CorruptCheckpointError, match="does not lie inside its storage"):
        open_checkpoint(io.BytesIO(handmade(pickled({"view": beyond}), ["root"], floats(0, 1, 2, 3, 4))))


def test_data_is_little_endian_whatever_the_writer_was() -> None:
    # torch swaps while it writes; torch.load does not look at the flag either.
    root = pickled({"w": Rebuilt(storage("0", 2), 0, (2,), (1,))})
    data = handmade(root, ["0"], floats(1.5, -2), little_endian=False)
    assert read_tree(io.BytesIO(data))["w"].tolist() == [1.5, -2]
    assert torch.load(io.BytesIO(data), weights_only=True)["w"].tolist() == [1.5, -2]


def test_several_objects_in_one_file_are_noted() -> None:
    data = legacy_bytes({"w": torch.ones(2)})
    with open_checkpoint(io.BytesIO(data + data)) as checkpoint:
        assert checkpoint.notes == (f"{len(data)} bytes follow the checkpoint in its file; they were not looked at.",)


def test_a_pickle_longer_than_the_first_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.pth"
    value = {"text": "x" * (6 << 20), "w": torch.arange(5.0)}
    torch.save(value, path, _use_new_zipfile_serialization=False)
    tree = read_tree(path)
    assert tree["text"] == value["text"]
    assert same_bits(tree["w"], value["w"])


def test_a_pickle_longer_than_any_window_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchload.formats.pickles import pickle_file

    monkeypatch.setattr(pickle_file, "_WINDOWS_BYTES", (64, 256))
    path = tmp_path / "long.pth"
    torch.save({"note": b"y" * 9000, "w": torch.arange(5.0)}, path, _use_new_zipfile_serialization=False)
    assert read_tree(path)["w"].tolist() == [0, 1, 2, 3, 4]
    assert read_tree(io.BytesIO(path.read_bytes()))["note"] == b"y" * 9000


def test_another_version_is_named() -> None:
    with pytest.raises(CheckpointFormatError, match="protocol version 1002"):
        open_checkpoint(io.BytesIO(handmade(pickled({}), [], b"", version=1002)))


def test_a_truncated_file_says_how_much_is_missing() -> None:
    data = legacy_bytes({"w": torch.ones(1000)})
    with pytest.raises(CorruptCheckpointError, match=f"need {len(data)} bytes, but the file has {len(data) - 1}"):
        open_checkpoint(io.BytesIO(data[:-1]))


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=12),
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(DTYPES)),
        max_size=8,
    )
)
def test_law_what_torch_saves_comes_back(shapes: dict[str, tuple[list[int], torch.dtype]]) -> None:
    state = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    tree = read_tree(io.BytesIO(legacy_bytes(state)))
    assert list(tree) == list(state)
    assert all(same_bits(tree[name], value) for name, value in state.items())
