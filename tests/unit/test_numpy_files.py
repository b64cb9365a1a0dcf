"""Numpy archives and pickles of numpy arrays, read without numpy; numpy itself is the judge."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.reading import read_tree, same_bits
from torchload import smart_load
from torchload.core.checkpoint import Record
from torchload.errors import CheckpointFormatError, CorruptCheckpointError
from torchload.formats import open_checkpoint

CODES = ["<f4", ">f4", "<f8", "<f2", ">i2", "<i4", ">i8", "|u1", "|i1", "|b1", "<c8", ">c16", "<u2", "<u4", ">u8"]


def native(array: Any) -> torch.Tensor:
    """The same values as a tensor."""
    array = np.array(array, order="C")  # `ascontiguousarray` would make a scalar a vector
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def npz(compressed: bool = False, **arrays: Any) -> io.BytesIO:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    file.seek(0)
    return file


def handmade(header: bytes, data: bytes = b"", *, version: int = 1, length: int | None = None) -> io.BytesIO:
    """An archive of one array with this header, whatever it says."""
    file = io.BytesIO()
    width = "<H" if version == 1 else "<I"
    prefix = b"\x93NUMPY" + bytes([version, 0]) + struct.pack(width, len(header) if length is None else length)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w.npy", prefix + header + data)
    file.seek(0)
    return file


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_type_of_number_arrives_bit_for_bit(code: str, compressed: bool) -> None:
    array = np.arange(12).reshape(3, 4).astype(code)
    tree = read_tree(npz(compressed, w=array))
    assert same_bits(tree["w"], native(array))


@pytest.mark.parametrize(
    "array",
    [np.float32(2.5), np.zeros((0, 3), "f4"), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(4.0)[::-1]],
    ids=["scalar", "empty", "fortran", "reversed"],
)
def test_every_layout(array: Any) -> None:
    assert same_bits(read_tree(npz(w=array))["w"], native(array))


def test_no_stored_array_is_read() -> None:
    with open_checkpoint(npz(w=np.zeros(1 << 20, "f4"))) as checkpoint:
        assert checkpoint.format == "numpy archive"
        (box,) = checkpoint.root["w"].boxes
        assert box.extent.nbytes == 4 << 20


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_checksums_are_those_of_the_elements(size: int) -> None:
    array = np.random.rand(size).astype("f4")
    with open_checkpoint(npz(w=array)) as checkpoint:
        assert checkpoint.checksums
        assert checkpoint.root["w"].boxes[0].extent.crc32 == zlib.crc32(array.tobytes())


def test_damage_is_found_by_verifying() -> None:
    model = nn.Linear(3, 2)
    data = npz(**{name: value.numpy() for name, value in model.state_dict().items()}).getvalue()
    smart_load(model, io.BytesIO(data), verify=True)
    damaged = data.replace(model.weight.detach().numpy().tobytes(), b"\1" * 24)
    smart_load(nn.Linear(3, 2), io.BytesIO(damaged))
    with pytest.raises(CorruptCheckpointError):
        smart_load(model, io.BytesIO(damaged), verify=True)


def test_names_keep_their_dots_and_other_arrays_are_inert() -> None:
    arrays = {"layer.0.weight": np.ones(2), "names": np.array(["a", "b"]), "pair": np.zeros(2, "i4,f8")}
    with open_checkpoint(npz(**arrays)) as checkpoint:
        root = checkpoint.root
        assert list(root) == list(arrays)
        assert isinstance(root["names"], Record)
        assert isinstance(root["pair"], Record)


def test_pickled_objects_in_an_archive_stay_unread() -> None:
    file = io.BytesIO()
    np.savez(file, w=np.ones(2), objects=np.array([print], dtype=object))
    file.seek(0)
    with open_checkpoint(file) as checkpoint:
        assert isinstance(checkpoint.root["objects"], Record)


def test_a_model_is_loaded_from_an_archive() -> None:
    model, target = nn.Linear(3, 2), nn.Linear(3, 2)
    smart_load(target, npz(**{name: value.numpy() for name, value in model.state_dict().items()}))
    assert all(same_bits(value, target.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_version_of_the_header(version: int) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
    tree = read_tree(handmade(header, struct.pack("<2f", 1, 2), version=version))
    assert tree["w"].tolist() == [1, 2]


HOSTILE = {
    "no magic": b"",
    "another shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n",
    "a huge shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999999, 999999999999999999), }\n",
    "an endless number": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 30000 + b",), }\n",
    "a negative shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }\n",
    "100 dimensions": b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 100 + b"), }\n",
    "no shape": b"{'descr': '<f4', 'fortran_order': False, }\n",
    "an expression": b"{'descr': '<f4', 'fortran_order': False, 'shape': (2**9,), }\n",
    "a call": b"{'descr': '<f4', 'fortran_order': False, 'shape': (exit(),), }\n",
    "nesting": b"(" * 60000,
    "nothing": b"\n",
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_headers_that_are_none_are_refused(header: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(handmade(header, struct.pack("<2f", 1, 2)))


@pytest.mark.parametrize("length", [0, 3, 200, 65535])
def test_a_header_of_another_length_is_refused(length: int) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"
    with pytest.raises(CorruptCheckpointError):
        open_checkpoint(handmade(header, struct.pack("<2f", 1, 2), length=length))


def test_compressed_arrays_are_bounded() -> None:
    assert read_tree(npz(True, w=np.zeros(100, "f4")))["w"].shape == (100,)
    with pytest.raises(CorruptCheckpointError, match="would take more memory"):
        open_checkpoint(npz(True, w=np.zeros(1 << 25, "f4"), v=np.zeros(1 << 25, "f4")))


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=6).filter(lambda name: name not in {"file", "args"}),
        st.tuples(st.lists(st.integers(0, 3), max_size=4), st.sampled_from(CODES)),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
    st.booleans(),
)
def test_law_what_numpy_saves_comes_back(
    shapes: dict[str, tuple[list[int], str]], compressed: bool, fortran: bool
) -> None:
    order: Any = "F" if fortran else "C"
    arrays = {name: np.array(np.random.rand(*shape) * 99, code, order=order) for name, (shape, code) in shapes.items()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(name + ".npy", "w") as member:
                np.lib.format.write_array(member, array)
    file.seek(0)
    tree = read_tree(file)
    assert list(tree) == list(arrays)
    assert all(same_bits(tree[name], native(array)) for name, array in arrays.items())


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays_of_every_protocol(protocol: int) -> None:
    arrays = {"w": np.arange(3000.0).astype("f4").reshape(50, 60), "b": np.arange(3), "f": np.asfortranarray(np.eye(3))}
    data = pickle.dumps({"model": arrays, "__author__": "someone"}, protocol)
    tree = read_tree(io.BytesIO(data))
    assert all(same_bits(tree["model"][name], native(array)) for name, array in arrays.items())
    assert tree["__author__"] == "someone"


def test_long_arrays_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"w": np.zeros(100_000, "f4")}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "pickle of numpy arrays"
        assert checkpoint.root["w"].boxes[0].extent.source is checkpoint.sources[0]


def test_detectron2_weights_are_loaded_by_their_names() -> None:
    model, target = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    arrays = OrderedDict((name, value.numpy()) for name, value in model.state_dict().items())
    data = pickle.dumps({"model": arrays, "__author__": "Caffe2", "matching_heuristics": True})
    smart_load(target, io.BytesIO(data))
    assert same_bits(target[0].weight, model[0].weight)


@pytest.mark.parametrize("value", [{"a": 1}, [1, 2], "text", {"names": np.array(["a"])}, np.float64(3)])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_without_weights_is_named(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(io.BytesIO(data))
    assert caught.value.found == "pickle" or not data.startswith(b"\x80")


def test_a_joblib_file_is_named() -> None:
    # Its arrays stand between the opcodes, which makes no pickle.
    class NumpyArrayWrapper:
        pass

    NumpyArrayWrapper.__module__, NumpyArrayWrapper.__qualname__ = "joblib.numpy_pickle", "NumpyArrayWrapper"
    data = b"\x80\x04\x8c\x13joblib.numpy_pickle\x94\x8c\x11NumpyArrayWrapper\x94\x93)\x81." + b"\xff" * 64
    with pytest.raises(CheckpointFormatError, match=r"joblib\.load") as caught:
        open_checkpoint(io.BytesIO(data))
    assert caught.value.found == "joblib file"


def test_the_only_weights_in_a_folder_are_meant(tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"w": np.ones(3)}))
    (tmp_path / "args.pkl").write_bytes(pickle.dumps({"epochs": 3}))
    (tmp_path / "metrics.json").write_text("{}")
    assert read_tree(tmp_path)["w"].tolist() == [1, 1, 1]


def test_a_pickle_beside_a_checkpoint_is_not_meant(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.pth")
    (tmp_path / "data.pkl").write_bytes(pickle.dumps({"x": np.ones(3)}))
    assert read_tree(tmp_path)["w"].tolist() == [1, 1]
